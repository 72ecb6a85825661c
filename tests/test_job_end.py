"""The end of a job is told by the clock of its host, whatever that shows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from hpcresume.scheduler.job import JobInfo, JobState
from hpcresume.scheduler.job_end import JobEnd

TEN_YEARS_S = 10 * 365 * 86400.0
BEGIN = 1_800_000_000.0


@dataclass
class Host:
    """A clock that may be wrong, and one that counts seconds since the host has booted."""

    wall: float = BEGIN + 5
    up: float = 700.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.up += seconds

    def job_end(self, end: float | None = BEGIN + 3600) -> JobEnd:
        return JobEnd(end, now=lambda: self.wall, monotonic=lambda: self.up)

    def left(self, end: JobEnd) -> float:
        found = end.on_this_clock()
        assert found is not None
        return found - self.wall


def running(end: float | None = BEGIN + 3600) -> JobInfo:
    return JobInfo(id="7", state=JobState.RUNNING, start_time=BEGIN, end_time=end)


def test_a_right_clock_is_left_alone() -> None:
    host = Host()
    end = host.job_end()
    end.compare(running())
    host.passes(595)
    assert end.on_this_clock() == BEGIN + 3600
    assert host.left(end) == 3000


@pytest.mark.parametrize("jump_s", [TEN_YEARS_S, -TEN_YEARS_S])
def test_a_clock_that_jumps_moves_the_end_along(jump_s: float) -> None:
    host = Host()
    end = host.job_end()
    end.compare(running())
    host.wall += jump_s
    host.passes(595)
    assert host.left(end) == 3000


@pytest.mark.parametrize("wrong_s", [TEN_YEARS_S, -TEN_YEARS_S, 3700.0, -70.0])
def test_a_clock_that_was_wrong_from_the_beginning_is_noticed_by_the_jobs_own_times(
    wrong_s: float,
) -> None:
    host = Host(wall=BEGIN + wrong_s)
    end = host.job_end()
    end.compare(running())
    host.passes(600)
    assert host.left(end) == pytest.approx(3000)


def test_a_link_that_begins_late_in_its_job_has_no_wrong_clock() -> None:
    host = Host(wall=BEGIN + 900)
    end = host.job_end()
    end.compare(running())
    assert host.left(end) == 2700


def test_a_job_without_a_limit_tells_nothing_about_the_clock() -> None:
    host = Host(wall=BEGIN + TEN_YEARS_S)
    end = host.job_end(None)
    end.compare(running(None))
    assert end.on_this_clock() is None


def test_an_end_that_moves_counts_and_silence_leaves_it_where_it_was() -> None:
    host = Host()
    end = host.job_end(None)
    end.move(BEGIN + 60)
    end.move(None)
    assert end.on_this_clock() == BEGIN + 60
