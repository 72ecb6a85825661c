"""When a checkpoint is due: a pure policy.

A session asks at each step boundary; `submit` asks how many checkpoints a link will get. The best
metric and the stop of a link save too, which is the session's matter.

The interval of `minutes: auto` weighs what a save costs against what a failure loses:

- J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of
  the ACM 17 (9), 1974, pages 530-531: √(2δM).
- J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future
  Generation Computer Systems 22 (3), 2006, pages 303-312, equation 37:
  √(2δM)·[1 + ⅓√(δ/2M) + (δ/2M)/9] − δ for δ < 2M, else M.

δ is what one save costs the training and M the mean time between failures, both in seconds. The
share of the time that is lost at an interval τ is about δ/τ + τ/2M.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    # By name alone: see retention.
    from hpcresume.config import CheckpointConfig

#: Mean time between failures of one node before anything is known, in seconds: pessimistic, since
#: a save too many costs less than an hour lost.
PRIOR_MTBF_S = 24 * 3600.0
#: Bounds of the automatic interval, in seconds. More often than the first wears out a shared file
#: system for nothing; the second bounds what is lost where failures are rarer than we think.
SHORTEST_S = 30.0
LONGEST_S = 3600.0
#: The interval of `minutes: auto` until a save was measured.
UNMEASURED_S = 30 * 60.0
#: How much longer than a write the interval must be, so that saves never queue up.
_WRITES = 1.2
#: Weight of the newest value in an average.
_NEWEST = 0.3


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Save every so many steps, every so many minutes, at each epoch's end; whichever come."""

    steps: int | None = None
    minutes: float | Literal["auto"] | None = 30.0
    each_epoch: bool = True

    def by_count(self, global_step: int, *, epoch_ended: bool) -> str | None:
        """The reason to save at this step boundary that all ranks see alike, or None."""
        if self.each_epoch and epoch_ended:
            return "epoch"
        if self.steps is not None and global_step % self.steps == 0:
            return "steps"
        return None

    def by_clock(self, seconds_since_save: float, auto_s: float = UNMEASURED_S) -> str | None:
        """The reason to save that depends on one rank's clock, or None.

        `auto_s` is what `auto_interval` says now; only `minutes: auto` looks at it.
        """
        if self.minutes == "auto":
            return "auto" if seconds_since_save >= auto_s else None
        if self.minutes is not None and seconds_since_save >= self.minutes * 60:
            return "minutes"
        return None


def cadence_of(settings: CheckpointConfig) -> Cadence:
    """The cadence that a run's configuration asks for."""
    return Cadence(steps=settings.steps, minutes=settings.minutes, each_epoch=settings.each_epoch)


# ---- minutes: auto -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What saving costs in this run: averages (see `average`), in seconds."""

    stall_s: float
    """How long a save keeps training from going on: copying the state, and by how much steps are
    slower while it is written."""
    persist_s: float
    """From the copy to the commit."""
    step_s: float = 0.0
    """A step; nothing is saved within one."""


def auto_interval(
    measured: Measured,
    *,
    mtbf_s: float,
    overhead: float = 0.01,
    until_deadline_s: float | None = None,
) -> float:
    """Seconds from the last save to the next.

    Daly's interval, but never so short that stalls exceed the share `overhead` of the time, that a
    save begins before the one before it is written, or that it falls within one step. These bounds
    win over LONGEST_S.

    `until_deadline_s` is the time from the last save to the deadline, when the link saves in any
    case: the interval then divides it, so that the last periodic save is that one.
    """
    floor_s = max(
        SHORTEST_S, _WRITES * measured.persist_s, measured.stall_s / overhead, measured.step_s
    )
    best_s = max(floor_s, min(daly(measured.stall_s, mtbf_s), LONGEST_S))
    if until_deadline_s is None:
        return best_s
    return until_deadline_s / _pieces(until_deadline_s, best_s, floor_s)


def _pieces(total_s: float, best_s: float, floor_s: float) -> int:
    """In how many equal pieces, none shorter than the floor, to cut a stretch of time.

    n saves and the work at risk between them cost n·δ + total²/2nM, which is the same for n and
    n + 1 pieces where (total/best)² = n(n + 1).
    """
    exact = total_s / best_s
    number = math.floor(exact)
    if exact * exact > number * (number + 1):
        number += 1
    return max(1, min(number, math.floor(total_s / floor_s)))


def young(cost_s: float, mtbf_s: float) -> float:
    """Young's interval in seconds, a first approximation; see the module."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly(cost_s: float, mtbf_s: float) -> float:
    """Daly's interval in seconds: the time between the end of a save and the next; see the module.

    0 where a save costs nothing.
    """
    ratio = cost_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return young(cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def mean_time_between_failures(*, num_nodes: int, failures: int, observed_s: float) -> float:
    """What to expect of a run on so many nodes, in seconds.

    The prior counts as one failure in PRIOR_MTBF_S of a node's time; what was seen is added:
    `failures` ends that came without a save before them, in `observed_s` seconds of all links.
    (The mean of the posterior rate, for a Gamma(1, prior) and failures that come independently.)
    """
    return (PRIOR_MTBF_S / max(num_nodes, 1) + observed_s) / (1 + failures)


def average(values: Iterable[float]) -> float | None:
    """The exponentially weighted average of durations, the newest last; None where there is none.

    It forgets a slow hour of the file system after some ten saves.
    """
    found: float | None = None
    for value in values:
        found = value if found is None else found + _NEWEST * (value - found)
    return found


# ---- what a link gets --------------------------------------------------------------------


def saves_in_link(cadence: Cadence, *, link_s: float, step_s: float | None = None) -> int | None:
    """How many checkpoints a link of so many seconds commits at least, the deadline's included.

    None where it cannot be told: `minutes: auto` adapts itself, and `steps` needs a step's
    duration. Epochs are not counted: how long one lasts nobody knows before.
    """
    if cadence.minutes == "auto" or (cadence.steps is not None and step_s is None):
        return None
    periods_s = []
    if cadence.minutes is not None:
        periods_s.append(cadence.minutes * 60)
    if cadence.steps is not None and step_s is not None:
        periods_s.append(cadence.steps * step_s)
    # The last period of a link ends with its deadline, whole or not.
    return max([1, *(math.ceil(link_s / period_s) for period_s in periods_s)])


def few_saves(cadence: Cadence, *, link_s: float, step_s: float | None = None) -> str | None:
    """What to say where a link gets fewer than two checkpoints; None where it gets enough."""
    number = saves_in_link(cadence, link_s=link_s, step_s=step_s)
    if number is None or number >= 2:
        return None
    unless = ", unless an epoch ends before" if cadence.each_epoch else ""
    minutes = link_s / 60 / 4
    shown = f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.2g}"
    return (
        f"A job of {_words(link_s)} saves only once, at its end{unless}: one that dies has trained "
        f"for nothing. Set checkpoint.minutes to {shown} or less, or to auto."
    )


def _words(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h".replace(".0 h", " h")
