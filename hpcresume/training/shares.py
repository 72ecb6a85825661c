"""How the ranks' shares of one checkpoint come together: by messages, without collectives.

A rank that is slow keeps nobody from training, and none of this can be mixed up with the user's
own collectives. Rank 0 names the directory; each rank writes there and tells what; rank 0 commits.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

from hpcresume.checkpoint.manifest import FileEntry
from hpcresume.training.distributed import TIMEOUT, Ranks

_LOOK_S = 0.02


class Shares:
    """One rank's view of the saves that several ranks write together, in their order.

    Made on all ranks at the same place. `next` begins a save on each of them; the other methods are
    for the threads that write.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._rank = ranks.rank
        # As the ranks themselves found each other.
        host = ranks.broadcast(os.environ.get("MASTER_ADDR") or socket.gethostname())
        first = ranks.rank == 0
        store = TCPStore(host, 0, None, True, TIMEOUT, False) if first else None
        port = ranks.broadcast(None if store is None else store.port)
        self._store = store or TCPStore(host, port, None, False, TIMEOUT, False)
        self._number = 0
        self._said: dict[int, list[str]] = {}
        self._over = threading.Event()

    def next(self) -> int:
        """The number of the save that begins now."""
        self._number += 1
        return self._number

    def give_up(self) -> None:
        """Let no thread of this rank wait any longer."""
        self._over.set()

    # ---- rank 0 -------------------------------------------------------------------------

    def write(
        self, number: int, own: Callable[[Path], Sequence[FileEntry]], ranks: Sequence[int]
    ) -> Callable[[Path], Sequence[FileEntry]]:
        """How to write what rank 0 itself and some other ranks have of a save.

        Raises OSError where one of them could not, or says nothing for too long.
        """

        def write(directory: Path) -> list[FileEntry]:
            self._said[number] = [f"{number}", *(f"{number}/{rank}" for rank in ranks)]
            self._store.set(f"{number}", str(directory))
            entries = list(own(directory))
            for rank in ranks:
                told = self._wait_for([f"{number}/{rank}"])
                if told is None:
                    raise OSError(errno.ETIMEDOUT, f"rank {rank} did not deliver its share")
                content = json.loads(told)
                if isinstance(content, str):
                    raise OSError(errno.EIO, f"rank {rank} could not write its share: {content}")
                entries += [FileEntry(**{**e, "chunks": tuple(e["chunks"])}) for e in content]
            return entries

        return write

    def close(self, number: int) -> None:
        """The save is committed or given up: nobody need wait for its directory."""
        self._store.set(f"{number}/closed", "")
        # Nobody looks any more at what was said of the one before the last.
        for key in self._said.pop(number - 2, ()):
            self._store.delete_key(key)

    # ---- the other ranks ------------------------------------------------------------------

    def deliver(self, number: int, own: Callable[[Path], Sequence[FileEntry]]) -> None:
        """Write this rank's share of a save where rank 0 says, and tell it."""
        place = self._wait_for([f"{number}", f"{number}/closed"])
        if not place:
            return
        told: object = "it failed"
        try:
            told = [{**asdict(entry), "rank": self._rank} for entry in own(Path(place.decode()))]
        except OSError as error:
            told = f"{error.strerror or error} ({error.filename or place.decode()})"
        finally:
            # Whatever happened: rank 0 waits for a word.
            self._store.set(f"{number}/{self._rank}", json.dumps(told))

    def _wait_for(self, keys: Sequence[str]) -> bytes | None:
        """The value of the first of the keys that is there; None where none comes."""
        began = time.monotonic()
        while time.monotonic() - began < TIMEOUT.total_seconds():
            for key in keys:
                if self._store.check([key]):
                    return bytes(self._store.get(key))
            if self._over.wait(_LOOK_S):
                break
        return None
