"""The checkpoints that a chain will commit, when, and in which link, at the pace of its links.

Pure: what was measured and what was asked for in, rows out. Used by `status --plan`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpcresume.chain.calendar import Pace, Place, Promise
from hpcresume.journal import LinkRecords

#: Beyond it, nobody reads on, and nothing is as was planned.
_MOST = 10_000
#: So many of the newest saves tell how long it is from one to the next.
_NEWEST = 20


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When a link saves besides at its end; None: not by that."""

    steps: int | None = None
    """Every so many steps."""
    seconds: float | None = None
    epoch_steps: int | None = None
    """The steps of an epoch, after each of which it saves."""


@dataclass(frozen=True, kw_only=True)
class PlannedSave:
    """One checkpoint to come."""

    step: int
    seconds: float
    """Of running since the checkpoint before it, or since now: the start of a link is in it."""
    cumulative_s: float
    """Of running since now, without the waits in the queue."""
    at: float
    """Unix seconds: when it is committed if links wait as long as those before did on average."""
    link: int
    reason: str
    """`steps`, `minutes`, `epoch`, `deadline` (the last one of its link), or `complete`."""


def usual_interval(links: Sequence[LinkRecords]) -> float | None:
    """Seconds from one save of a link to the next, on the median of the newest; None: no two."""
    gaps: list[float] = []
    for link in reversed(links):
        times = [float(record["t"]) for record in link.all("saved")]
        gaps = [b - a for a, b in pairwise(times) if b > a] + gaps
        if len(gaps) >= _NEWEST:
            break
    return statistics.median(gaps[-_NEWEST:]) if gaps else None


def plan(
    *, step: int, link: int, pace: Pace, promise: Promise, place: Place, rhythm: Rhythm
) -> list[PlannedSave]:
    """The checkpoints from `step` to the end, of which `link` is the newest link so far.

    Empty where nothing is left to do, or where links are over before their first step. A chain
    that lives is in its link; another one waits for its next.
    """
    return list(_saves(step, link, pace, promise, place, rhythm))


def _saves(
    step: int, link: int, pace: Pace, promise: Promise, place: Place, rhythm: Rhythm
) -> Iterator[PlannedSave]:
    total, rate = step + place.steps_left, pace.steps_per_s
    waits_s = sum(pace.waits_s) / max(1, len(pace.waits_s))
    now_s, queued_s, before_s, number = 0.0, 0.0, 0.0, 0
    alive, waited_s = place.alive, place.waited_s
    while step < total:
        if alive:
            startup_s, lasts_s = 0.0 if place.started else pace.startup_s, place.left_s
        else:
            startup_s, lasts_s = pace.startup_s, promise.time_s
            link, queued_s, waited_s = link + 1, queued_s + max(0.0, waits_s - waited_s), 0.0
        now_s += startup_s
        room_s = math.inf if lasts_s is None else lasts_s - promise.lead_s - startup_s
        begin, begin_s = step, now_s
        end = total if room_s * rate >= total - step else step + math.floor(room_s * rate)
        if end <= begin and not alive:
            return
        alive = False
        while step < end:
            step, reason = _next_save(step, end, total, rhythm, rate)
            now_s = begin_s + (step - begin) / rate
            yield PlannedSave(
                step=step,
                seconds=round(now_s - before_s, 3),
                cumulative_s=round(now_s, 3),
                at=place.now + now_s + queued_s,
                link=link,
                reason=reason,
            )
            before_s, number = now_s, number + 1
            if number == _MOST:
                return


def _next_save(step: int, end: int, total: int, rhythm: Rhythm, rate: float) -> tuple[int, str]:
    """The step of the next save of a link that ends at step `end`, and why it comes."""
    candidates = [(end, "complete" if end == total else "deadline")]
    for every, reason in ((rhythm.epoch_steps, "epoch"), (rhythm.steps, "steps")):
        if every is not None:
            candidates.append(((step // every + 1) * every, reason))
    if rhythm.seconds is not None:
        candidates.append((step + max(1, round(rhythm.seconds * rate)), "minutes"))
    return min(candidates, key=lambda candidate: candidate[0])
