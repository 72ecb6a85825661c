"""When a job ends, by the clock of the host that it runs on, however wrong that is or becomes.

Used by the supervisor. The scheduler tells times by its own clock, and those who are to leave in
time count down by theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hpcresume.scheduler.job import JobInfo

log = logging.getLogger(__name__)

#: Clocks of one cluster that differ by no more than this do not count as wrong, in seconds.
_TOLERANCE_S = 60.0


class JobEnd:
    """The end of one job; made when the job has just begun."""

    def __init__(
        self, end: float | None, *, now: Callable[[], float], monotonic: Callable[[], float]
    ) -> None:
        """`end` is what is known of it at first, in Unix seconds of the scheduler's clock."""
        self._end = end
        self._now = now
        self._monotonic = monotonic
        self._began = monotonic()
        #: Taken for the scheduler's clock, until that tells otherwise.
        self._clock_at_begin = now()

    def compare(self, job: JobInfo) -> None:
        """Find out whether this host's clock was wrong from the beginning.

        It stood between the start and the end of the running job, if it was right.
        """
        if job.start_time is None or job.end_time is None:
            return
        earliest, latest = job.start_time - _TOLERANCE_S, job.end_time + _TOLERANCE_S
        if not earliest <= self._clock_at_begin <= latest:
            log.warning(
                "this host's clock is wrong by %+.0f s; the job's end is told by the scheduler's",
                self._clock_at_begin - job.start_time,
            )
            self._clock_at_begin = job.start_time

    def move(self, end: float | None) -> None:
        """The scheduler tells another end; None: it tells nothing, and what is known stands."""
        self._end = self._end if end is None else end

    def on_this_clock(self) -> float | None:
        """The end in Unix seconds of this host's clock as it runs now; None while unknown."""
        return None if self._end is None else self._end + self._now() - self.scheduler_now()

    def scheduler_now(self) -> float:
        """Unix seconds now by the scheduler's clock, as far as that is known."""
        return self._clock_at_begin + self._monotonic() - self._began
