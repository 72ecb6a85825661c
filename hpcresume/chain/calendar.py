"""When a chain will be complete: the work that is left, at the pace of the links so far.

Pure: journal records in, a value out; nothing is measured, nothing is said. Used by `status`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpcresume.journal import LinkRecords, Record

#: A link counts half as much as the one after it: what was measured last is most like what comes.
_OLDER = 0.5
#: No step, no duration and no Unix time of a run is as large.
_LARGEST = 1e11
#: What would last longer than ten years is no estimate.
LONGEST_S = 10 * 365 * 86400.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What the links of a chain have shown so far."""

    steps_per_s: float
    """Committed steps in a second of training, saves included."""
    startup_s: float
    """From a link's claim to its first step."""
    waits_s: tuple[float, ...] = ()
    """How long each link waited in the queue once nothing but the queue held it, oldest first."""
    lasted_s: tuple[float, ...] = ()
    """How long the links lasted whose time was over, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a further job may take, as it was recorded when the newest one was queued."""

    time_s: float | None = None
    """Its time limit; None: none is known."""
    time_min_s: float | None = None
    """The least that Slurm may lower it to; None: it stands."""
    lead_s: float = 15.0
    """How long before its end a link leaves; a first guess where no link has told."""
    deadline: float | None = None
    """Unix seconds: when the last job must be over."""

    def expired(self, now: float) -> bool:
        """Whether no job that begins now (Unix seconds) could end before the deadline."""
        least_s = self.time_min_s or self.time_s or 0.0
        return self.deadline is not None and now + least_s > self.deadline


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the chain stands."""

    steps_left: int
    now: float
    """Unix seconds."""
    alive: bool = False
    """Whether a link runs."""
    started: bool = False
    """Whether that link trains."""
    left_s: float | None = None
    """Until its job's end; None: it has no end."""
    waited_s: float = 0.0
    """How long the next job has waited for nothing but the queue; 0 while a link runs."""


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """When training will be complete, in Unix seconds, and in how many links."""

    expected: float
    """If each link waits in the queue as long as those before did on average."""
    best: float
    """If each waits as short as the one that waited least, and is given all its time."""
    links_left: int
    """With the running one."""


def measure(links: Sequence[LinkRecords], submissions: Sequence[Record]) -> Pace | None:
    """The pace of a chain; None as long as no link has committed a step that it trained."""
    rate = _weighted(list(_trained(links)))
    startups = [(s["t"] - c["t"], 1.0) for c, s in map(_beginning, links) if c and s]
    if rate is None:
        return None
    return Pace(
        steps_per_s=rate,
        startup_s=max(0.0, _weighted(startups) or 0.0),
        waits_s=tuple(_waits(links, submissions)),
        lasted_s=tuple(_lasted(links)),
    )


def promised(links: Sequence[LinkRecords], submissions: Sequence[Record]) -> Promise:
    """What the newest job of a chain was queued with."""
    queued = [r for r in submissions if r["kind"] == "queued" and "time_s" in r]
    for link in reversed(links):
        # What the links before it have queued is older.
        by_link = [record for record in link.all("queued") if "time_s" in record]
        queued += by_link
        if by_link:
            break
    newest = max(queued, key=lambda record: float(record["t"]), default={})
    leads = [lead for record in queued if (lead := _number(record.get("lead_s"))) is not None]
    return Promise(
        time_s=_number(newest.get("time_s")),
        time_min_s=_number(newest.get("time_min_s")),
        lead_s=leads[-1] if leads else Promise.lead_s,
        deadline=_number(newest.get("deadline")),
    )


def calendar(pace: Pace, promise: Promise, place: Place) -> Calendar | None:
    """When a chain at that pace will be complete; None where that cannot be told.

    That is so where further links are needed and nobody knows how long they last, where they are
    over before their first step, and beyond ten years. Every link to come waits in full: a job
    that depends on another gains no age in the queue.
    """
    full = None if promise.time_s is None else promise.time_s - promise.lead_s
    usual = full
    if full is not None and promise.time_min_s is not None and pace.lasted_s:
        usual = min(full, sum(pace.lasted_s) / len(pace.lasted_s))
    waits = pace.waits_s or (0.0,)
    expected = _end(pace, place, promise.lead_s, usual, sum(waits) / len(waits))
    best = _end(pace, place, promise.lead_s, full, min(waits))
    if expected is None or best is None or expected[0] > place.now + LONGEST_S:
        return None
    return Calendar(expected=expected[0], best=min(best[0], expected[0]), links_left=expected[1])


def _end(
    pace: Pace, place: Place, lead_s: float, lasts_s: float | None, wait_s: float
) -> tuple[float, int] | None:
    """When it is complete, and in how many links, if each of them lasts and waits so long."""
    train_s = place.steps_left / pace.steps_per_s
    links, passed_s = 0, 0.0
    if place.alive:
        startup_s = 0.0 if place.started else pace.startup_s
        if place.left_s is None:
            return place.now + startup_s + train_s, 1
        own_s = max(0.0, place.left_s - lead_s - startup_s)
        if train_s <= own_s:
            return place.now + startup_s + train_s, 1
        train_s -= own_s
        links, passed_s = 1, max(0.0, place.left_s - lead_s)
    if lasts_s is None or lasts_s <= pace.startup_s:
        return None
    further = max(1, math.ceil(train_s / (lasts_s - pace.startup_s)))
    queued_s = further * wait_s - min(wait_s, place.waited_s)
    passed_s += queued_s + further * pace.startup_s + train_s
    return place.now + passed_s, links + further


# ---- what the records tell -------------------------------------------------------------------


def _beginning(link: LinkRecords) -> tuple[Record | None, Record | None]:
    return link.last("claimed"), link.last("started")


def _trained(links: Sequence[LinkRecords]) -> Iterator[tuple[float, float]]:
    """Committed steps and the seconds that they took, of each link that has committed any."""
    for link in links:
        started, saved = link.last("started"), link.last("saved")
        if started is None or saved is None:
            continue
        first, last = _number(started.get("step")), _number(saved.get("step"))
        seconds = saved["t"] - started["t"]
        # The host's clock may have been set back in between.
        if first is not None and last is not None and last > first and seconds > 0:
            yield last - first, seconds


def _weighted(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The ratio of the sums of pairs, the newest (the last) counting most; None without any."""
    weights = [_OLDER ** (len(pairs) - 1 - at) for at in range(len(pairs))]
    below = sum(w * pair[1] for w, pair in zip(weights, pairs, strict=True))
    return (
        sum(w * pair[0] for w, pair in zip(weights, pairs, strict=True)) / below if below else None
    )


def _waits(links: Sequence[LinkRecords], submissions: Sequence[Record]) -> Iterator[float]:
    lasted = _found_to_have_lasted(links)
    for before, link in zip([None, *links], links, strict=False):
        claimed, since = link.last("claimed"), _free_since(before, lasted, submissions)
        if claimed is not None and since is not None:
            yield max(0.0, claimed["t"] - since)


def ran_and_waited(
    links: Sequence[LinkRecords], submissions: Sequence[Record], *, alive: bool, now: float
) -> tuple[float, float]:
    """Seconds that the links of a chain have lasted, and that they waited in the queue before.

    `alive` is whether the newest one goes on; `now` is Unix seconds.
    """
    lasted = _found_to_have_lasted(links)
    ran = 0.0
    for link in links:
        if link.records:
            seconds = max(0.0, link.records[-1]["t"] - _begun(link))
            ran += max(seconds, lasted.get(link.number, 0.0))
    if alive and links and links[-1].records:
        ran += max(0.0, now - links[-1].records[-1]["t"])
    return ran, sum(_waits(links, submissions))


def free_since(links: Sequence[LinkRecords], submissions: Sequence[Record]) -> float | None:
    """Since when the next job waits for nothing but the queue, in Unix seconds; None: not known.

    That is the end of the newest link, or the submission that came later.
    """
    newest = links[-1] if links else None
    return _free_since(newest, _found_to_have_lasted(links), submissions)


def _free_since(
    before: LinkRecords | None, lasted: Mapping[int, float], submissions: Sequence[Record]
) -> float | None:
    number = 0 if before is None else before.number
    own = [r for r in submissions if r["kind"] == "submitted" and r.get("after_link") == number]
    times = [float(record["t"]) for record in own]
    if before is not None and before.records:
        times.append(float(before.records[-1]["t"]))
        times.append(_begun(before) + lasted.get(number, 0.0))
    return max(times, default=None)


def _begun(link: LinkRecords) -> float:
    return float(link.records[0]["t"])


def _found_to_have_lasted(links: Sequence[LinkRecords]) -> dict[int, float]:
    """Seconds, as later links learned from the scheduler of those that could say nothing more."""
    ends = [record for link in links for record in link.all("ended") if "of" in record]
    return {record["of"]: _number(record.get("seconds")) or 0.0 for record in ends}


def _lasted(links: Sequence[LinkRecords]) -> Iterator[float]:
    for link in links:
        end = link.last("ended")
        if end is not None and end.get("cause") == "deadline" and "of" not in end:
            yield max(0.0, end["t"] - _begun(link))


def _number(value: object) -> float | None:
    """A number of steps or seconds; None for what disk or hand have made of it."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < _LARGEST else None
