"""A program in a real pseudo-terminal, and the screen that a terminal makes of what it writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pexpect
import pyte
from oracle import ENVIRON

#: Codes that move the cursor or clear: everything that is no letter, new line or colour.
CONTROL = re.compile(rb"\x1b(?!\[[0-9;]*m)|\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1a]")
COLOUR = re.compile(rb"\x1b\[[0-9;]*[3-4][0-7][0-9;]*m")

#: What of our own environment says how a terminal is written to.
_OF_TERMINALS = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "LC_ALL")
_INHERITED = {name: value for name, value in ENVIRON.items() if name not in _OF_TERMINALS}


def in_terminal(*argv: str, cwd: Path, width: int = 80, **environ: str) -> str:
    """All that a command of hpcresume writes to a terminal of that width; it must succeed."""
    own, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with (
        os.fdopen(own, "rb", buffering=0) as terminal,
        subprocess.Popen(
            [sys.executable, "-m", "hpcresume", *argv],
            cwd=cwd,
            env={**_INHERITED, "TERM": "xterm", **environ},
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its,
        ) as process,
    ):
        os.close(its)
        written = b""
        # The end of what is written to a terminal is an error for who reads it.
        with contextlib.suppress(OSError):
            while piece := terminal.read(1 << 16):
                written += piece
    assert process.returncode == 0, written
    return written.decode().replace("\r\n", "\n")


class Terminal:
    """Runs a program of ours; `screen` is what somebody would see."""

    def __init__(
        self, argv: Sequence[str], cwd: Path, *, width: int = 100, height: int = 30, **environ: str
    ) -> None:
        self._screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self._child = pexpect.spawn(
            sys.executable,
            list(argv),
            cwd=str(cwd),
            env={**_INHERITED, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environ},
            dimensions=(height, width),
            timeout=None,
        )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._child.close(force=True)

    @property
    def screen(self) -> str:
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def cursor_is_shown(self) -> bool:
        return not self._screen.cursor.hidden

    def _read(self) -> bool:
        """Take in what was written; False once the program has ended."""
        try:
            data = self._child.read_nonblocking(1 << 16, 0.05)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def wait_for(self, *patterns: str, cursor: bool = False, timeout: float = 90) -> str:
        """The screen as soon as it shows all of these, and the cursor if that is asked for."""
        deadline = time.monotonic() + timeout
        alive = True
        while True:
            screen = self.screen
            missing = [pattern for pattern in patterns if not re.search(pattern, screen)]
            if cursor and not self.cursor_is_shown:
                missing.append("the cursor")
            if not missing:
                return screen
            assert alive and time.monotonic() < deadline, f"{missing} not in:\n{screen}"
            alive = self._read()

    def type(self, keys: str) -> None:
        self._child.send(keys)

    def interrupt(self) -> None:
        self._child.sendintr()

    def resize(self, width: int, height: int) -> None:
        self._screen.resize(height, width)
        self._child.setwinsize(height, width)

    def end(self, timeout: float = 90) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + timeout
        while self._read():
            assert time.monotonic() < deadline, f"it does not end:\n{self.screen}"
        self._child.wait()
        if self._child.exitstatus is None:
            return 128 + (self._child.signalstatus or signal.SIGKILL)
        return self._child.exitstatus
