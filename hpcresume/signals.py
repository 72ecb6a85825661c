"""Signals as flags: a handler notes what came and returns; the loops look when they are ready.

Used by the supervisor, by ranks and by the local driver. Nothing is saved, logged or decided
inside a handler: a checkpoint taken in one hangs or tears (the state is in mid-step, locks are
held).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from types import FrameType

#: Always mean: save and leave.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Mean: the scheduler thinks that the end is near; look at the clock.
HINT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class SignalFlags:
    """What has arrived since `listen` began."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.any = False
        """Whether anything came at all."""

    def note(self, number: int) -> None:
        """Remember one arrival."""
        self._counts[number] = self._counts.get(number, 0) + 1
        self.any = True

    def count(self, number: int) -> int:
        """How often a signal has arrived."""
        return self._counts.get(number, 0)

    def stop_asked(self) -> str | None:
        """The name of a signal that means "save and leave", if one came."""
        for number in STOP_SIGNALS:
            if self._counts.get(number):
                return number.name
        return None

    def take_hint(self) -> bool:
        """Whether a pre-timeout signal came since the last call."""
        taken = [self._counts.pop(number, 0) for number in HINT_SIGNALS]
        return any(taken)


@contextlib.contextmanager
def listen(*, second_interrupt_kills: bool = False) -> Iterator[SignalFlags]:
    """Turn TERM, INT, USR1, USR2 and CONT into flags until the block ends.

    With `second_interrupt_kills`, the second Ctrl-C acts at once, as people expect. Only the main
    thread can install handlers; elsewhere the flags stay empty, and the clock alone must do.
    """
    flags = SignalFlags()

    def handler(number: int, _frame: FrameType | None) -> None:
        flags.note(number)
        if second_interrupt_kills and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    previous: dict[signal.Signals, object] = {}
    # SIGCONT precedes Slurm's other signals; taken here so that no foreign handler acts on it.
    for number in (*STOP_SIGNALS, *HINT_SIGNALS, signal.SIGCONT):
        try:
            previous[number] = signal.signal(number, handler)
        except ValueError:
            break
    try:
        yield flags
    finally:
        _restore(previous)


@contextlib.contextmanager
def hints_ignored() -> Iterator[None]:
    """What is started in this block ignores pre-timeout signals until it listens.

    Their default would end it while it still starts. Only the main thread can say so.
    """
    previous: dict[signal.Signals, object] = {}
    for number in HINT_SIGNALS:
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        _restore(previous)


def _restore(previous: Mapping[signal.Signals, object]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
