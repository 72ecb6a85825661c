"""When a checkpoint is due: the rules, the automatic interval, what a link will get."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcresume.checkpoint import cadence
from hpcresume.checkpoint.cadence import (
    Cadence,
    Measured,
    auto_interval,
    average,
    cadence_of,
    daly,
    few_saves,
    mean_time_between_failures,
    saves_in_link,
    young,
)
from hpcresume.config import CheckpointConfig, RunConfig, from_mapping
from hpcresume.errors import ConfigError

HOUR = 3600.0
DAY = 24 * HOUR
never = Cadence(minutes=None, each_epoch=False)


# ---- the rules -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "each_epoch", "step", "ended", "due"),
    [
        (500, False, 500, False, "steps"),
        (500, False, 501, False, None),
        (None, True, 7, True, "epoch"),
        (None, True, 7, False, None),
        (None, False, 7, True, None),
        (7, True, 7, True, "epoch"),
        (1, False, 1, False, "steps"),
    ],
)
def test_the_count_of_steps_and_epochs_says_when_to_save(
    steps: int | None, each_epoch: bool, step: int, ended: bool, due: str | None
) -> None:
    rules = Cadence(steps=steps, each_epoch=each_epoch)
    assert rules.by_count(step, epoch_ended=ended) == due


@pytest.mark.parametrize(
    ("minutes", "seconds", "due"),
    [(30, 1799.9, None), (30, 1800, "minutes"), (0.5, 30, "minutes"), (None, 1e9, None)],
)
def test_the_clock_says_when_to_save(
    minutes: float | None, seconds: float, due: str | None
) -> None:
    assert Cadence(minutes=minutes).by_clock(seconds, auto_s=1.0) == due


def test_the_automatic_interval_takes_the_place_of_the_minutes() -> None:
    rules = Cadence(minutes="auto")
    assert (rules.by_clock(92.9, 93.0), rules.by_clock(93.0, 93.0)) == (None, "auto")


def test_half_an_hour_goes_by_until_a_save_was_measured() -> None:
    rules = Cadence(minutes="auto")
    assert (rules.by_clock(1799.9), rules.by_clock(1800)) == (None, "auto")


def test_the_default_is_half_an_hour_and_each_end_of_an_epoch() -> None:
    assert cadence_of(RunConfig().checkpoint) == Cadence(steps=None, minutes=30, each_epoch=True)


def test_a_configuration_gives_its_cadence() -> None:
    settings = CheckpointConfig(steps=5, minutes="auto", each_epoch=False)
    assert cadence_of(settings) == Cadence(steps=5, minutes="auto", each_epoch=False)


@pytest.mark.parametrize("minutes", ["auto", 0.5, 30, None])
def test_minutes_are_a_number_or_auto_or_null(minutes: object) -> None:
    config = from_mapping({"checkpoint": {"minutes": minutes}}, "test")
    assert config.checkpoint.minutes == minutes


@pytest.mark.parametrize("minutes", ["often", "Auto", 0, -1, True, "30"])
def test_other_minutes_are_an_error_that_says_what_is_expected(minutes: object) -> None:
    with pytest.raises(ConfigError, match=r"a number above 0, or one of auto, or null"):
        from_mapping({"checkpoint": {"minutes": minutes}}, "test")


@pytest.mark.parametrize("overhead", [0, -0.1, 1.5])
def test_an_overhead_is_a_share(overhead: float) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.overhead"):
        from_mapping({"checkpoint": {"overhead": overhead}}, "test")


# ---- Young and Daly ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost_s", "mtbf_s", "seconds"),
    [
        # √(2·0.05·86,400) = √8,640
        (0.05, DAY, 92.952),
        # √(2·0.8·10,800) = √17,280
        (0.8, 3 * HOUR, 131.453),
        # √(2·2·86,400) = √345,600
        (2, DAY, 587.878),
        # √(2·30·86,400) = √5,184,000
        (30, DAY, 2276.840),
        (0, DAY, 0),
    ],
)
def test_young_is_the_root_of_twice_the_cost_and_the_time_between_failures(
    cost_s: float, mtbf_s: float, seconds: float
) -> None:
    assert young(cost_s, mtbf_s) == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize(
    ("cost_s", "mtbf_s", "seconds"),
    [
        # 92.952·(1 + √(0.05/172,800)/3 + …) − 0.05
        (0.05, DAY, 92.92),
        # 131.453·(1 + 0.0060858/3 + 0.000037037/9) − 0.8
        (0.8, 3 * HOUR, 130.92),
        # 587.878·(1 + 0.0034021/3 + 0.000011574/9) − 2
        (2, DAY, 586.55),
        # 2,276.840·(1 + 0.0131762/3 + 0.00017361/9) − 30
        (30, DAY, 2256.88),
        # 12,000·(1 + √0.25/3 + 0.25/9) − 6,000, where a save takes half of the time that is left
        (6000, 12000, 12000 * (1 + 0.5 / 3 + 0.25 / 9) - 6000),
        (0, DAY, 0),
    ],
)
def test_daly_corrects_young_by_higher_orders(cost_s: float, mtbf_s: float, seconds: float) -> None:
    assert daly(cost_s, mtbf_s) == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("cost_s", [200.0, 201.0, 1e9])
def test_daly_is_the_time_between_failures_where_a_save_takes_twice_as_long(
    cost_s: float,
) -> None:
    assert daly(cost_s, 100.0) == 100.0


# ---- failures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_nodes", "failures", "observed_s", "hours"),
    [
        (1, 0, 0, 24),
        (8, 0, 0, 3),
        # A day on one node without a failure, then one.
        (1, 0, DAY, 48),
        (1, 1, DAY, 24),
        # Two days with nine failures: every five hours or so.
        (1, 9, 2 * DAY, 7.2),
        (0, 0, 0, 24),
    ],
)
def test_what_is_known_of_failures_begins_with_a_day_of_one_node(
    num_nodes: int, failures: int, observed_s: float, hours: float
) -> None:
    found = mean_time_between_failures(
        num_nodes=num_nodes, failures=failures, observed_s=observed_s
    )
    assert found == pytest.approx(hours * HOUR)


@pytest.mark.parametrize("true_s", [0.5 * HOUR, 3 * HOUR, 12 * HOUR, 10 * DAY])
def test_what_was_seen_wins_over_the_prior_in_the_long_run(true_s: float) -> None:
    found = mean_time_between_failures(num_nodes=4, failures=400, observed_s=400 * true_s)
    assert found == pytest.approx(true_s, rel=0.05)


# ---- auto ----------------------------------------------------------------------------------


def cost(stall_s: float, persist_s: float = 1.0, step_s: float = 0.1) -> Measured:
    return Measured(stall_s=stall_s, persist_s=persist_s, step_s=step_s)


@pytest.mark.parametrize(
    ("stall_s", "mtbf_s", "overhead", "seconds"),
    [
        # Daly's, which is longer than each bound.
        (0.05, DAY, 0.01, 92.92),
        (0.8, 3 * HOUR, 0.01, 130.92),
        (2, DAY, 0.01, 586.55),
        # The budget: 30 s are 1 % of 3,000 s; Daly would take 2,257.
        (30, DAY, 0.01, 3000),
        (30, DAY, 0.05, 2256.88),
        # Failures so often that Daly would spend 10 % on saving.
        (2, 200, 0.01, 200),
        (0, DAY, 0.01, cadence.SHORTEST_S),
        # Failures so rare that a day would pass.
        (5, 1000 * DAY, 0.01, cadence.LONGEST_S),
        # The budget wins over the longest interval.
        (60, DAY, 0.01, 6000),
    ],
)
def test_the_automatic_interval_is_dalys_within_its_bounds(
    stall_s: float, mtbf_s: float, overhead: float, seconds: float
) -> None:
    found = auto_interval(cost(stall_s), mtbf_s=mtbf_s, overhead=overhead)
    assert found == pytest.approx(seconds, abs=0.01)


def test_a_save_is_written_before_the_next_one_begins() -> None:
    assert auto_interval(cost(0.05, persist_s=300), mtbf_s=DAY) == pytest.approx(360)


def test_an_interval_is_no_shorter_than_a_step() -> None:
    assert auto_interval(cost(0.05, step_s=400), mtbf_s=DAY) == pytest.approx(400)


@pytest.mark.parametrize(
    ("deadline_s", "pieces"),
    [
        # Daly's interval is 586.55 s.
        (7000, 12),
        (586.55, 1),
        (700, 1),
        # (800/586.55)² = 1.86 < 1·2: one save costs less than two.
        (800, 1),
        (850, 2),
        (900, 2),
        # (1,400/586.55)² = 5.70 < 2·3
        (1400, 2),
        (1500, 3),
        (100, 1),
    ],
)
def test_the_last_periodic_save_coincides_with_the_deadlines(
    deadline_s: float, pieces: int
) -> None:
    found = auto_interval(cost(2), mtbf_s=DAY, until_deadline_s=deadline_s)
    assert found * pieces == pytest.approx(deadline_s)


def test_alignment_never_makes_an_interval_shorter_than_its_bounds() -> None:
    # 1,999 s would be cut in two by cost alone, but 1 % of 15 s are 1,500 s.
    found = auto_interval(cost(15), mtbf_s=HOUR, until_deadline_s=1999 * 1.2)
    assert found == pytest.approx(1999 * 1.2)


durations = st.floats(0, 1e4, allow_nan=False)


@settings(deadline=None, max_examples=500)
@given(
    durations, durations, durations, st.floats(60, 1e8), st.floats(0.001, 1), st.floats(0.001, 1e6)
)
def test_an_aligned_interval_divides_what_is_left_and_keeps_the_budget(
    stall_s: float,
    persist_s: float,
    step_s: float,
    mtbf_s: float,
    overhead: float,
    deadline_s: float,
) -> None:
    measured = Measured(stall_s=stall_s, persist_s=persist_s, step_s=step_s)
    free = auto_interval(measured, mtbf_s=mtbf_s, overhead=overhead)
    bounds = (cadence.SHORTEST_S, 1.2 * persist_s, stall_s / overhead, step_s)
    assert free >= max(bounds)
    found = auto_interval(measured, mtbf_s=mtbf_s, overhead=overhead, until_deadline_s=deadline_s)
    pieces = deadline_s / found
    assert pieces == pytest.approx(round(pieces))
    assert round(pieces) >= 1
    # One piece is what is left, however little that is.
    assert round(pieces) == 1 or found >= max(bounds) * (1 - 1e-9)
    if max(bounds) <= free / 2:
        assert found <= free * math.sqrt(2) * (1 + 1e-9)


def lost_share(interval_s: float, stall_s: float, mtbf_s: float, seed: int) -> float:
    """What a simulated run loses to saves and failures, of all its time."""
    draw = random.Random(seed)
    left_s = 3000 * interval_s
    useful_s = total_s = 0.0
    fails_in_s = draw.expovariate(1 / mtbf_s)
    while useful_s < left_s:
        if fails_in_s < interval_s + stall_s:
            total_s += fails_in_s
            fails_in_s = draw.expovariate(1 / mtbf_s)
        else:
            fails_in_s -= interval_s + stall_s
            total_s += interval_s + stall_s
            useful_s += interval_s
    return 1 - useful_s / total_s


@pytest.mark.parametrize(("stall_s", "mtbf_s"), [(0.5, 3 * HOUR), (2, 3 * HOUR), (5, 12 * HOUR)])
def test_the_automatic_interval_loses_less_than_half_or_twice_as_long_a_one(
    stall_s: float, mtbf_s: float
) -> None:
    own_s = auto_interval(cost(stall_s), mtbf_s=mtbf_s, overhead=0.5)
    loss = {
        factor: sum(lost_share(own_s * factor, stall_s, mtbf_s, seed) for seed in range(30)) / 30
        for factor in (0.4, 1.0, 2.5)
    }
    assert loss[1.0] < min(loss[0.4], loss[2.5])


@pytest.mark.parametrize(
    ("values", "found"),
    [([], None), ([2.0], 2.0), ([2.0, 2.0, 2.0], 2.0), ([0.0, 1.0], 0.3), ([1.0] + [0.0] * 20, 0)],
)
def test_an_average_weighs_the_newest_most(values: list[float], found: float | None) -> None:
    assert average(values) == (None if found is None else pytest.approx(found, abs=1e-3))


# ---- what a link gets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "link_s", "step_s", "number"),
    [
        (Cadence(), 2 * HOUR, None, 4),
        (Cadence(), 2.2 * HOUR, None, 5),
        (Cadence(), HOUR, None, 2),
        (Cadence(), 1800, None, 1),
        (Cadence(), 1200, None, 1),
        (never, HOUR, None, 1),
        (Cadence(minutes=None, steps=500), HOUR, 1.0, 8),
        (Cadence(minutes=10, steps=5000), HOUR, 1.0, 6),
        # Not to be told.
        (Cadence(steps=500), 600, None, None),
        (Cadence(minutes="auto"), 600, 1.0, None),
    ],
)
def test_a_link_gets_a_checkpoint_for_each_period_and_one_at_its_end(
    rules: Cadence, link_s: float, step_s: float | None, number: int | None
) -> None:
    assert saves_in_link(rules, link_s=link_s, step_s=step_s) == number


def test_a_link_that_saves_once_is_warned_of_with_what_to_set() -> None:
    assert few_saves(Cadence(), link_s=1200) == (
        "A job of 20 min saves only once, at its end, unless an epoch ends before: one that dies "
        "has trained for nothing. Set checkpoint.minutes to 5 or less, or to auto."
    )


def test_what_is_advised_is_enough() -> None:
    for link_s in (5, 30, 600, 3601, 86400, 1e6):
        words = few_saves(never, link_s=link_s)
        assert words is not None
        assert "e+" not in words
        minutes = float(words.partition("checkpoint.minutes to ")[2].partition(" ")[0])
        advised = saves_in_link(Cadence(minutes=minutes), link_s=link_s)
        assert advised is not None and advised >= 2, words


@pytest.mark.parametrize(
    ("rules", "link_s"),
    [
        (Cadence(), 2 * HOUR),
        (Cadence(minutes="auto"), 60),
        (Cadence(steps=500), 60),
        (Cadence(minutes=1), 61),
    ],
)
def test_nothing_is_said_where_a_link_gets_two_or_nobody_can_tell(
    rules: Cadence, link_s: float
) -> None:
    assert few_saves(rules, link_s=link_s) is None
