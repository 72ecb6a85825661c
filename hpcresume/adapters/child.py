"""The processes of a command: started, signalled, and ended to the last one.

A command may start others in groups and sessions of their own, as torchrun does with its workers:
they are found by a line of their environment, which they inherit.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcresume.errors import ConfigError
from hpcresume.scheduler import process
from hpcresume.scheduler.process_table import ProcessId, family, send

_KEY = "HPCRESUME_COMMAND_KEY"
_CHUNK_BYTES = 1 << 16
_SOON_S = 0.02
#: One that waits for a dead disk cannot even be killed; the end of the job sees to it.
_KILLED_S = 30.0


class Child:
    """A running command. Raises ConfigError where it cannot be started."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], cwd: Path) -> None:
        self._mark = f"{_KEY}={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        self._out, end = os.pipe()
        os.set_blocking(self._out, False)
        try:
            self._process = process.spawn(
                argv,
                environ={**environ, name: value},
                output=end,
                cwd=cwd,
                new_session=True,
                # What is left of it where this process is killed would write besides the next one.
                dies_with_us=True,
            )
        except OSError as error:
            os.close(self._out)
            raise ConfigError(f"command: {argv[0]} cannot be started: {error.strerror}.") from None
        finally:
            os.close(end)
        self._leader = ProcessId.of(self._process.pid)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._open = True

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while its first process lives."""
        return self._process.poll()

    def read(self, timeout_s: float) -> bytes:
        """What it has printed, as soon as there is something; empty after `timeout_s` seconds."""
        if not self._open:
            time.sleep(timeout_s)
            return b""
        if not self._poll.poll(timeout_s * 1000):
            return b""
        try:
            data = os.read(self._out, _CHUNK_BYTES)
        except BlockingIOError:
            return b""
        self._open = bool(data)
        return data

    def rest(self) -> bytes:
        """What is still in the pipe, without waiting for more."""
        data = b""
        while more := self.read(0):
            data += more
        return data

    def tell(self, number: signal.Signals, *, everyone: bool) -> None:
        """Signal its first process, or all that are left of it."""
        if everyone:
            send(self.processes(), number)
        elif self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def processes(self) -> list[ProcessId]:
        """All its living processes; to find them, all of this machine are looked through."""
        return family(self._leader, self._mark)

    def kill(self) -> None:
        """End all that is left of it, now."""
        until = time.monotonic() + _KILLED_S
        while (left := self.processes()) and time.monotonic() < until:
            send(left, signal.SIGKILL)
            time.sleep(_SOON_S)
            self._process.poll()

    def close(self) -> None:
        """End what is left, and give the pipe back."""
        self.kill()
        self._process.poll()
        os.close(self._out)
