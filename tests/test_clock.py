"""The time that a rank has left, and how much of it the last save needs."""

from __future__ import annotations

import pytest

from hpcresume.training.clock import MARGIN_S, Clock, lead_time

BEGAN = 1_800_000_000.0


class Elapsed:
    """A clock of each kind, moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.jump = 0.0

    def monotonic(self) -> float:
        return 5000.0 + self.seconds

    def now(self) -> float:
        return BEGAN + self.seconds + self.jump

    def clock(self, *, saves: tuple[float, ...] = (), end_s: float | None = 600.0) -> Clock:
        return Clock(
            end_time=None if end_s is None else BEGAN + end_s,
            file=None,
            lead_s=None,
            guess_s=0.0,
            saves=saves,
            monotonic=self.monotonic,
            now=self.now,
        )


def test_the_last_save_begins_when_its_usual_time_and_a_step_and_five_seconds_are_left() -> None:
    elapsed = Elapsed()
    clock = elapsed.clock(saves=(8.0, 10.0, 9.0))
    clock.step_took(2.0)
    elapsed.seconds = 600 - 17.1
    assert not clock.due()
    elapsed.seconds = 600 - 17.0
    assert clock.due()


def test_a_quick_save_does_not_make_a_link_forget_the_slow_ones_before_it() -> None:
    clock = Elapsed().clock(saves=(10.0, 14.0, 11.0))
    clock.saves.append(6.0)
    assert clock.lead_s() == 14.0 + MARGIN_S


def test_a_save_that_was_slow_once_is_forgotten_after_as_many_as_are_kept() -> None:
    clock = Elapsed().clock(saves=(90.0, *[10.0] * 31))
    assert clock.lead_s() == 10.0 + MARGIN_S


@pytest.mark.parametrize(("save_s", "lead_s"), [(1, 6), (20, 25), (60, 75), (600, 750)])
def test_a_long_save_gets_a_quarter_of_its_time_besides(save_s: float, lead_s: float) -> None:
    assert lead_time([save_s], [], guess_s=0.0) == lead_s


def test_a_guess_is_generous_already() -> None:
    assert lead_time([], [2.0], guess_s=600.0) == 607.0


def test_a_guess_leaves_half_of_the_job_to_train() -> None:
    elapsed = Elapsed()
    clock = elapsed.clock()
    elapsed.seconds = 20.0
    clock.guess(3600.0)
    assert clock.lead_s() == 290.0 + MARGIN_S
    assert not clock.due()


@pytest.mark.parametrize("end_s", [600.0, None])
def test_a_guess_that_fits_is_taken_as_it_is(end_s: float | None) -> None:
    clock = Elapsed().clock(end_s=end_s)
    clock.guess(100.0)
    assert clock.lead_s() == 105.0


def test_what_was_measured_needs_no_guess() -> None:
    clock = Elapsed().clock(saves=(3.0,))
    clock.guess(100.0)
    clock.saves.clear()
    assert clock.lead_s() == MARGIN_S


def test_a_jump_of_the_wall_clock_changes_nothing() -> None:
    elapsed = Elapsed()
    clock = elapsed.clock()
    elapsed.seconds, elapsed.jump = 100.0, 86400.0
    assert clock.remaining_s() == 500.0
