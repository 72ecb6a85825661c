"""The keyboard, one key at a time, for screens that are left by a key."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def listening() -> Iterator[Callable[[float], frozenset[str]]]:
    """What waits for keys so many seconds and returns them; without a keyboard it only waits."""
    try:
        fd = sys.stdin.fileno()
        before = termios.tcgetattr(fd)
    except (AttributeError, OSError, ValueError, termios.error):

        def wait(seconds: float) -> frozenset[str]:
            time.sleep(seconds)
            return frozenset()

        yield wait
        return

    def pressed(seconds: float) -> frozenset[str]:
        if not select.select([fd], [], [], seconds)[0]:
            return frozenset()
        typed = os.read(fd, 64)
        if not typed:
            # The keyboard is gone: what waits for it would return at once from now on.
            time.sleep(seconds)
        return frozenset(typed.decode(errors="replace"))

    tty.setcbreak(fd)
    try:
        yield pressed
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
