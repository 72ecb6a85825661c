"""What the time from a job's start to the first step is spent with, told across processes."""

from __future__ import annotations

import json

from hpcresume.training.start_up import StartUp


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_each_part_begins_where_the_one_before_it_ends() -> None:
    clock = Clock(100.0)
    start = StartUp(now=clock, began=("boot", 98.0))
    start.waited("job", 7.0)
    start.reached("imports")
    clock.now = 101.5
    start.reached("checkpoint")
    clock.now = 103.0
    start.done()
    assert start.parts == {"job": 7.0, "imports": 2.0, "checkpoint": 1.5, "step": 1.5}
    assert start.seconds == 12.0


def test_a_part_is_noted_once_and_none_after_the_first_step() -> None:
    clock = Clock(1.0)
    start = StartUp(now=clock, began=("boot", 0.0))
    start.reached("batch")
    clock.now = 2.0
    start.reached("batch")
    start.done()
    clock.now = 9.0
    start.reached("batch")
    start.reached("more")
    start.done()
    assert start.parts == {"batch": 1.0, "step": 1.0}


def test_a_rank_goes_on_from_what_the_supervisor_has_told() -> None:
    supervisor = StartUp(now=Clock(52.0), began=("boot", 50.0))
    supervisor.reached("supervisor")
    rank = StartUp(supervisor.told(), now=Clock(56.0), began=("boot", 53.5))
    rank.reached("imports")
    assert rank.parts == {"supervisor": 2.0, "launch": 1.5, "imports": 2.5}


def test_what_lies_between_two_hosts_is_left_out() -> None:
    supervisor = StartUp(now=Clock(52.0), began=("boot", 50.0))
    supervisor.reached("supervisor")
    rank = StartUp(supervisor.told(), now=Clock(9.0), began=("another boot", 8.0))
    rank.reached("imports")
    assert rank.parts == {"supervisor": 2.0, "imports": 1.0}


def test_a_scheduler_whose_clock_is_ahead_takes_nothing_off() -> None:
    start = StartUp(now=Clock(1.0), began=("boot", 1.0))
    start.waited("job", -3.0)
    assert start.seconds == 0.0


def test_the_line_for_the_log_names_the_longest_parts_first() -> None:
    told = json.dumps({"boot": "", "at": 0, "parts": {"job": 1, "imports": 8, "a": 2, "b": 3}})
    clock = Clock(0.0)
    start = StartUp(told, now=clock, began=("boot", 0.0))
    clock.now = 61.0
    start.done()
    assert start.words() == (
        "the first step was done 75 s after the start (step 61 s, imports 8 s, b 3 s, a 2 s)"
    )
