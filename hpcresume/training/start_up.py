"""How long a link takes from the start of its job to its first step, and what with.

Measured by the clock that counts from the machine's boot, which two processes of a host share: the
supervisor hands over what it has measured in a variable, and rank 0 goes on from there. Where the
two are on different hosts the time in between is not known, and left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from hpcresume.scheduler.process_table import ProcessId

#: Carries what was measured from the supervisor to the ranks.
VARIABLE = "HPCRESUME_START_UP"
#: A start that takes longer is worth a line in the log, in seconds.
LONG_S = 60.0


def _since_boot() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _process_began() -> tuple[str, float]:
    """The boot, and the seconds from it to this process's start; now, where /proc is missing."""
    own = ProcessId.of(os.getpid())
    if own is None:
        return "", _since_boot()
    boot, _, ticks = own.born.rpartition(":")
    return boot, int(ticks) / os.sysconf("SC_CLK_TCK")


class StartUp:
    """The parts of one start, in order; each begins where the one before it ends."""

    def __init__(
        self,
        text: str | None = None,
        *,
        now: Callable[[], float] = _since_boot,
        began: tuple[str, float] | None = None,
    ) -> None:
        """`text` is what another process of the link has `told`; `began` is this one's start."""
        self._now = now
        self._boot, self._at = began or _process_began()
        self.parts: dict[str, float] = {}
        self.over = False
        if text:
            self._take_over(text)

    def _take_over(self, text: str) -> None:
        told = json.loads(text)
        self.parts = dict(told["parts"])
        if self._boot and told["boot"] == self._boot:
            self.parts["launch"] = max(0.0, self._at - told["at"])

    def waited(self, part: str, seconds: float) -> None:
        """Note what came before this process."""
        self.parts[part] = max(0.0, seconds)

    def reached(self, part: str) -> None:
        """The end of a part; of one that is noted already, nothing."""
        if part not in self.parts and not self.over:
            now = self._now()
            self.parts[part] = now - self._at
            self._at = now

    def done(self) -> None:
        """The first step is over: nothing more is noted."""
        self.reached("step")
        self.over = True

    def told(self) -> str:
        """For the process that goes on."""
        return json.dumps({"boot": self._boot, "at": self._now(), "parts": self.parts})

    def age_s(self) -> float:
        """Seconds since this process began, or since the last part."""
        return self._now() - self._at

    @property
    def seconds(self) -> float:
        """The parts together."""
        return sum(self.parts.values())

    def to_json(self) -> dict[str, float]:
        """For a record."""
        return {part: round(seconds, 3) for part, seconds in self.parts.items()}

    def words(self) -> str:
        """For the log: the longest parts first."""
        longest = sorted(self.parts.items(), key=lambda item: -item[1])[:4]
        parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in longest)
        return f"the first step was done {self.seconds:.0f} s after the start ({parts})"
