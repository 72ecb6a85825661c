"""Whether this rank must end its link: signals, the deadline, requests in files."""

from __future__ import annotations

import time

from hpcresume.training.berth import Berth
from hpcresume.training.requests import requested

#: Between two looks at the clock and at files, in seconds.
_LOOK_S = 0.5


class StopWatch:
    """Asked at each step boundary, so that it looks at files and the clock only now and then."""

    def __init__(self, berth: Berth) -> None:
        self._berth = berth
        self._next_look = 0.0
        self._reason: str | None = None

    def ask(self, reason: str) -> None:
        """Stop at the next boundary, for a reason that this rank has found itself."""
        self._reason = self._reason or reason

    def why(self, now: float) -> str | None:
        """The reason to stop, or None. `now` is the monotonic clock's time in seconds.

        A reason that was found stays: several ranks take some steps to agree on the stop.
        """
        if self._reason is None:
            self._reason = self._look_sometimes(now)
        return self._reason

    def wait(self, seconds: float) -> str | None:
        """Wait, but no longer than until there is a reason to stop, which is returned."""
        until = time.monotonic() + seconds
        while self._reason is None:
            self._reason = self.look()
            left = until - time.monotonic()
            if left <= 0 or self._reason is not None:
                break
            time.sleep(min(left, _LOOK_S))
        return self._reason

    def _look_sometimes(self, now: float) -> str | None:
        if self._berth.flags.any:
            signal = self._berth.flags.stop_asked()
            if signal is not None:
                return signal
        if now < self._next_look:
            return None
        self._next_look = now + _LOOK_S
        return self.look()

    def look(self) -> str | None:
        """The reason to stop, or None, without sparing."""
        berth = self._berth
        signal = berth.flags.stop_asked()
        if signal is not None:
            return signal
        if berth.clock.due():
            return f"deadline: {berth.clock.remaining_s() or 0:.0f} s left"
        if berth.orphaned():
            return "the supervisor is gone"
        return requested(berth.run, berth.link)
