"""A text that is shown again every few seconds: in its place on a terminal, else as blocks.

What makes the text may take its time (a disk that hangs, a scheduler that does not answer): it
runs in a thread, and the screen goes on and can be left.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hpcresume.display.keys import listening
from hpcresume.display.terminal import styled
from hpcresume.signals import SignalFlags

#: Seconds from one look to the next: on a terminal, and where lines stay.
LOOK_S, BLOCK_S = 3.0, 30.0
_KEYS_S = 0.2
_LEAVE_KEYS = frozenset("qQ")
#: To the screen that is beside the one with the history, and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True)
class Look:
    """What was seen."""

    text: str
    over: bool = False
    """Whether nothing of it will change any more."""


def blocks(look: Callable[[], Look], flags: SignalFlags, say: Callable[[str], None]) -> None:
    """Say the text with the time above it, again and again, until it is over or a signal comes."""
    while True:
        seen = look()
        say(f"{time.strftime('%m-%d %H:%M:%S')} [status]\n{seen.text}\n")
        until = time.monotonic() + BLOCK_S
        while time.monotonic() < until:
            if seen.over or flags.stop_asked() is not None:
                return
            time.sleep(_KEYS_S)


def screen(look: Callable[[], Look], flags: SignalFlags) -> None:
    """Show the text in its place until q or a signal; the last one stays on the terminal."""
    keeper = _Keeper(look)
    keeper.start()
    try:
        with listening() as pressed:
            sys.stdout.write(_ENTER)
            while flags.stop_asked() is None and not pressed(_KEYS_S) & _LEAVE_KEYS:
                _draw(keeper.text)
    finally:
        keeper.stop()
        sys.stdout.write(_LEAVE + keeper.text + "\n")
        sys.stdout.flush()


class _Keeper:
    """Looks in a thread of its own; `text` is the newest that was seen."""

    def __init__(self, look: Callable[[], Look]) -> None:
        self.text = "reading…"
        self._look = look
        self._left = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._keep_looking, name="status", daemon=True).start()

    def stop(self) -> None:
        self._left.set()

    def _keep_looking(self) -> None:
        while not self._left.is_set():
            self.text = self._look().text
            self._left.wait(LOOK_S)


def _draw(text: str) -> None:
    """Lines beyond the screen are counted, not drawn: what is above must not scroll away."""
    # A serial console knows no size.
    height = os.get_terminal_size(sys.stdout.fileno()).lines or 24
    lines = text.split("\n")
    if len(lines) > height - 1:
        more = len(lines) - (height - 2)
        lines = [*lines[: max(0, height - 2)], styled(f"… {more} more lines", "dim")]
    lines.append(styled("q leaves", "dim"))
    body = "\n".join(line + _TO_LINE_END for line in lines)
    sys.stdout.write(_HOME + body + _TO_SCREEN_END)
    sys.stdout.flush()
