"""The files of a checkpoint in memory, each byte as it was written. Needs no torch.

Several threads read, each into its own place, and check every chunk against the manifest while it
is in the processor's cache: a verified read takes little longer than a read.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpcresume.checkpoint.manifest import CHUNK_BYTES, Committed, FileEntry, damage_of, digest_of
from hpcresume.errors import CheckpointError

#: More do not make a disk faster; fewer leave one processor to wait for it.
_MOST_THREADS = 4


class Images:
    """The files of one checkpoint, by name. What is taken out is its taker's alone."""

    def __init__(self, committed: Committed, content: dict[str, memoryview]) -> None:
        self.committed = committed
        self._content = content

    def names(self) -> Collection[str]:
        """The files that the checkpoint holds."""
        return [entry.name for entry in self.committed.manifest.files]

    def take(self, name: str) -> memoryview:
        """A file's bytes, which may be written to. Raises CheckpointError where it is not there."""
        if name not in self._content:
            # The same words as for a checkpoint that never held it.
            self.committed.manifest.entry(name)
            raise CheckpointError(f"{name} of step {self.committed.step} was read already.")
        return self._content.pop(name)

    def json(self, name: str) -> Any:
        """The value in a JSON file. Raises CheckpointError where it is not there, or no JSON."""
        if name not in self._content:
            self.committed.manifest.entry(name)
        try:
            return json.loads(bytes(self._content[name]))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is no JSON ({error}).") from None


def read(committed: Committed) -> Images:
    """All files of a checkpoint, verified. Raises what `verify` does."""
    content = {entry.name: memory(entry.bytes) for entry in committed.manifest.files}
    _check(committed, content)
    return Images(committed, content)


def verify(committed: Committed) -> None:
    """Check every byte.

    Raises CheckpointError that names the file and the place of the damage; OSError where the file
    system cannot tell at present.
    """
    _check(committed, {})


def memory(size: int) -> memoryview:
    """Fresh memory of so many bytes, in large pages where the system has them."""
    if not size:
        return memoryview(bytearray())
    pages = mmap.mmap(-1, size)
    with contextlib.suppress(AttributeError, OSError):
        # Many times faster to make than small ones.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


def _check(committed: Committed, content: Mapping[str, memoryview]) -> None:
    with contextlib.ExitStack() as opened:
        work = _Work()
        for entry in committed.manifest.files:
            fd = _open(committed.path / entry.name, entry)
            opened.callback(os.close, fd)
            work.add(entry, fd, content.get(entry.name))
        threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(work))
        if threads <= 1:
            work.do()
            return
        with ThreadPoolExecutor(threads, "reader") as pool:
            for done in [pool.submit(work.do) for _ in range(threads)]:
                done.result()


def _open(path: Path, entry: FileEntry) -> int:
    try:
        # Without waiting: a pipe in the place of a file has nobody at its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(fd)
    except OSError as error:
        raise damage_of(error, entry.name) from None
    size = status.st_size
    if stat.S_ISREG(status.st_mode) and size == entry.bytes == _covered(entry):
        return fd
    os.close(fd)
    raise CheckpointError(f"{entry.name} has {size} bytes, not {entry.bytes}")


def _covered(entry: FileEntry) -> int:
    """The size that the number of digests allows for."""
    most = len(entry.chunks) * CHUNK_BYTES
    return entry.bytes if most - CHUNK_BYTES < entry.bytes <= most or not entry.bytes else -1


class _Work:
    """The chunks that are still to be read; several threads take them in turn."""

    def __init__(self) -> None:
        self._chunks: list[tuple[FileEntry, int, memoryview | None, int]] = []
        self._turn: Iterator[tuple[FileEntry, int, memoryview | None, int]] = iter(self._chunks)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, entry: FileEntry, fd: int, target: memoryview | None) -> None:
        """Have a file read, into a place of its own or only to be checked."""
        self._chunks += [(entry, fd, target, index) for index in range(len(entry.chunks))]

    def do(self) -> None:
        """Read and check until nothing is left. Raises what `verify` does."""
        spare: memoryview | None = None
        try:
            while (chunk := self._next()) is not None:
                entry, fd, target, index = chunk
                start = index * CHUNK_BYTES
                size = min(CHUNK_BYTES, entry.bytes - start)
                if target is None:
                    spare = spare or memoryview(bytearray(min(CHUNK_BYTES, entry.bytes)))
                    if len(spare) < size:
                        spare = memoryview(bytearray(CHUNK_BYTES))
                    piece = spare[:size]
                else:
                    piece = target[start : start + size]
                _fill(piece, fd, start, entry.name)
                if digest_of(piece) != entry.chunks[index]:
                    raise CheckpointError(
                        f"{entry.name} has changed between byte {start:,} and {start + size:,}"
                    )
        except BaseException:
            # The others need not go on.
            self._turn = iter(())
            raise

    def _next(self) -> tuple[FileEntry, int, memoryview | None, int] | None:
        with self._lock:
            return next(self._turn, None)


def _fill(piece: memoryview, fd: int, start: int, name: str) -> None:
    """Read a whole piece: a read may be short."""
    filled = 0
    while filled < len(piece):
        try:
            count = os.preadv(fd, [piece[filled:]], start + filled)
        except OSError as error:
            raise damage_of(error, name) from None
        if not count:
            raise CheckpointError(f"{name} ends after {start + filled} bytes")
        filled += count
