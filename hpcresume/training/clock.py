"""A rank's view of the time that is left.

The supervisor (or, in the foreground, the scheduler's environment) says when the job ends; this
clock counts down to it on the monotonic clock, so that a jump of the wall clock changes nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hpcresume import files

_REREAD_S = 1.0
#: Slack of the lead time, in seconds: start of the save, end of the processes.
MARGIN_S = 5.0
#: How much longer than the p95 of those measured a save may take, as a share: that p95 is of a few
#: saves, and of those that take minutes one in some exceeds it by more than five seconds.
SPREAD = 0.25


def lead_time(saves_s: Sequence[float], steps_s: Sequence[float], *, guess_s: float) -> float:
    """How long before a job's end the last save must begin, in seconds.

    p95 of the measured saves, plus the longest of the steps (the stop is seen at a boundary),
    plus a margin: MARGIN_S, or the share SPREAD of a long save. `guess_s`, which is generous,
    stands for the saves until one has been measured.
    """
    if not saves_s:
        return guess_s + _p95(steps_s) + MARGIN_S
    save = _p95(saves_s)
    return save + _p95(steps_s) + max(MARGIN_S, SPREAD * save)


def _p95(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0.0


class Clock:
    """Durations of steps and saves, and whether it is time to stop.

    `saves` are the durations of saves that links before have measured, the newest last.
    `monotonic` and `now` tell the time; a simulation hands in its own.
    """

    def __init__(
        self,
        *,
        end_time: float | None,
        file: Path | None,
        lead_s: float | None,
        guess_s: float,
        saves: Iterable[float] = (),
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic = monotonic
        self._now = now
        self._file = file
        self._fixed_lead_s = lead_s
        self._guess_s = guess_s
        self._end = None if end_time is None else self._on_monotonic(end_time)
        self._read_at = 0.0
        self._steps: deque[float] = deque(maxlen=256)
        self._busy: dict[str, float] = {}
        self.saves: deque[float] = deque(saves, maxlen=32)

    def guess(self, save_s: float) -> None:
        """A first guess of a save's duration, where history had none to tell.

        At most half of what is left of the job: a link that stops before its first step measures
        nothing, and then no link ever would.
        """
        if not self.saves and not self._guess_s:
            remaining = self.remaining_s()
            self._guess_s = save_s if remaining is None else min(save_s, max(0.0, remaining / 2))

    def step_took(self, seconds: float) -> None:
        """Note the duration of a step."""
        self._steps.append(seconds)

    def steps_s(self) -> list[float]:
        """The durations of the last steps."""
        return list(self._steps)

    def longest_s(self, kind: str) -> float:
        """The longest that something has taken so far; 0 where it has not been."""
        return self._busy.get(kind, 0.0)

    def busy_took(self, kind: str, seconds: float) -> None:
        """Note the duration of something longer than a step; the longest of its kind counts."""
        self._busy[kind] = max(seconds, self._busy.get(kind, 0.0))

    def lead_s(self) -> float:
        """How long before the job's end the last save must begin."""
        if self._fixed_lead_s is not None:
            return self._fixed_lead_s
        steps = _p95(self._steps)
        longest = max([steps, *self._busy.values()])
        return lead_time(list(self.saves), [longest], guess_s=self._guess_s)

    def remaining_s(self) -> float | None:
        """Seconds to the job's end; None without a limit."""
        now = self._monotonic()
        if self._file is not None and now - self._read_at >= _REREAD_S:
            self._read_at = now
            content = files.read_json_or_none(self._file)
            if isinstance(content, dict) and "end" in content:
                end = content["end"]
                self._end = None if end is None else self._on_monotonic(float(end))
        return None if self._end is None else self._end - now

    def has_time_for_a_save(self) -> bool:
        """Whether a save that begins now is over before the last one must begin."""
        remaining = self.remaining_s()
        return remaining is None or remaining - self.lead_s() > max(self.saves, default=0.0)

    def due(self) -> bool:
        """Whether the deadline is reached."""
        remaining = self.remaining_s()
        return remaining is not None and remaining <= self.lead_s()

    def _on_monotonic(self, unix: float) -> float:
        return self._monotonic() + unix - self._now()
