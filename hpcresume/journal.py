"""The journals of a run: what happened, in records that only their own link appends.

A link has two journals because a journal has one writer: the supervisor's and rank 0's. Readers
merge them along the chain; of a link that a newer one has followed, only as much is read as the
newer claim adopted (of its metrics as well). What a fenced link writes later is therefore never
read.

A record is `{v, t, kind, link, job, …}`; `t` is Unix seconds, durations are seconds from a
monotonic clock. Kinds: submitted claimed queued restored started stepped saved save_failed
quarantined stop_asked ended decided changed completed cancelled; of a command also retried (failed,
started again in its job) and fell_back (its steps begin where they had begun before).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from hpcresume import files
from hpcresume.run_dir import LinkDir, RunDir

VERSION = 1
_LARGEST = 1e18
#: What readers take for numbers.
_NUMBERS = ("t", "step", "after_link", "of", "seconds", "step_s", "save_s")
#: What they take for texts, and the records that say nothing without a step.
_TEXTS = ("cause", "decision", "digest", "reason", "rule")
_WITH_STEP = frozenset({"fell_back", "restored", "save_failed", "saved"})
#: A million lines; what is larger is damaged, and memory is finite.
_LARGEST_JOURNAL = 256 << 20
Record = dict[str, Any]


class Journal:
    """Appends the records of one writer."""

    def __init__(self, path: Path, *, link: int, job: str | None) -> None:
        self._lines = files.LineWriter(path)
        self._common = {"link": link, "job": job}

    def write(self, kind: str, **fields: Any) -> Record:
        """Append a record; it survives a power loss on return."""
        record = {"v": VERSION, "t": round(time.time(), 3), "kind": kind, **self._common, **fields}
        self._lines.append(record, sync=True)
        return record

    def close(self) -> None:
        """Give the file back."""
        self._lines.close()


def record_id(record: Mapping[str, Any]) -> str:
    """A short name for a record, made of its content: eight hexadecimal digits."""
    import hashlib

    return hashlib.blake2b(files.to_json(record), digest_size=4).hexdigest()


def asking_about(run: RunDir, record: Mapping[str, Any] | None) -> str:
    """What a log line ends with: ` (more: hpcresume why toy --record 1f3a9c02)`."""
    if record is None:
        return ""
    return f" (more: hpcresume why {run.name} --record {record_id(record)})"


@dataclass(frozen=True)
class LinkRecords:
    """One link as its readers see it."""

    number: int
    claim: Mapping[str, Any]
    records: list[Record] = field(default_factory=list)

    def last(self, kind: str) -> Record | None:
        """The newest record of a kind."""
        found = self._by_kind.get(kind)
        return found[-1] if found else None

    def all(self, *kinds: str) -> list[Record]:
        """The records of some kinds, in order."""
        if len(kinds) == 1:
            return list(self._by_kind.get(kinds[0], ()))
        return [r for r in self.records if r.get("kind") in kinds]

    @functools.cached_property
    def _by_kind(self) -> dict[str, list[Record]]:
        # Views ask for one kind after the other, of journals with 100,000 lines.
        found: dict[str, list[Record]] = {}
        for record in self.records:
            found.setdefault(record["kind"], []).append(record)
        return found


def read_submissions(run: RunDir) -> list[Record]:
    """What `submit`, `resume` and `cancel` recorded."""
    lines = files.read_lines(run.submissions, _LARGEST_JOURNAL)
    return [record for record in lines if is_record(record)]


def read_link(run: RunDir, number: int) -> LinkRecords:
    """One link's records, as far as the chain has adopted them."""
    link = run.link(number)
    return _read(link, read_claim(link), read_claim(run.link(number + 1)))


def read_chain(run: RunDir) -> list[LinkRecords]:
    """All links, in order."""
    claims = {number: read_claim(run.link(number)) for number in run.link_numbers()}
    return [_read(run.link(n), claim, claims.get(n + 1, {})) for n, claim in claims.items()]


def read_claim(link: LinkDir) -> Mapping[str, Any]:
    """Who claimed a link; nothing where that is not known."""
    claim = files.read_json_or_none(link.claim)
    return claim if isinstance(claim, dict) else {}


def _read(
    link: LinkDir,
    claim: Mapping[str, Any],
    successor: Mapping[str, Any],
    chosen: Callable[[files.Lines], files.Lines] | None = None,
) -> LinkRecords:
    writers = (
        filter(is_record, files.read_lines(path, _most_bytes(successor, path), chosen))
        for path in (link.journal, link.training)
    )
    return LinkRecords(link.number, claim, in_order(writers))


class ChainGlance(Sequence[LinkRecords]):
    """The links of a run, in order, each read when it is asked for.

    Nearly all lines of a long journal are saves, of which each link has its newest ones alone
    here: a hundred thousand lines are read in a tenth of the time that it takes to decode them.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._numbers = run.link_numbers()
        self._links: dict[int, LinkRecords] = {}
        self._claims: dict[int, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, at: int) -> LinkRecords: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[LinkRecords]: ...
    def __getitem__(self, at: int | slice) -> LinkRecords | Sequence[LinkRecords]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        number = self._numbers[at]
        if number not in self._links:
            claim, successor = self._claim(number), self._claim(number + 1)
            link = self._run.link(number)
            self._links[number] = _read(link, claim, successor, _without_old_saves)
        return self._links[number]

    def _claim(self, number: int) -> Mapping[str, Any]:
        if number not in self._claims:
            known = self._numbers and number <= self._numbers[-1]
            self._claims[number] = read_claim(self._run.link(number)) if known else {}
        return self._claims[number]


#: How a save's line is known without decoding it, and how many of a link are kept.
_SAVED, _NEWEST_SAVES = b'"kind":"saved"', 32


def _without_old_saves(lines: files.Lines) -> files.Lines:
    if len(lines) <= _NEWEST_SAVES:
        return lines
    saves = [at for at, line in enumerate(lines) if _SAVED in line]
    old = set(saves[:-_NEWEST_SAVES])
    return [line for at, line in enumerate(lines) if at not in old]


def in_order(writers: Iterable[Iterable[Record]]) -> list[Record]:
    """What the writers of a link have recorded, merged by time."""
    timed: list[tuple[float, Record]] = []
    for records in writers:
        now = -math.inf
        for record in records:
            # Both writers share a host and so a clock, which may jump back: the order within
            # a file stands, whatever its times say.
            now = max(now, record["t"])
            timed.append((now, record))
    timed.sort(key=lambda item: item[0])
    return [record for _, record in timed]


def adopted_bytes(successor: Mapping[str, Any], path: Path) -> int | None:
    """How much of a link's file the claim after it adopted; None for all, where there is none."""
    adopted = successor.get("adopted")
    limit = adopted.get(path.stem) if isinstance(adopted, dict) else None
    return limit if isinstance(limit, int) and limit >= 0 else None


def _most_bytes(successor: Mapping[str, Any], path: Path) -> int:
    limit = adopted_bytes(successor, path)
    return _LARGEST_JOURNAL if limit is None else min(limit, _LARGEST_JOURNAL)


def is_record(value: Any) -> bool:
    """Whether a line is a record of ours; what disk or hand made of it otherwise is passed over."""
    if type(value) is not dict or type(value.get("kind")) is not str or "t" not in value:
        return False
    for name in _NUMBERS:
        if name in value:
            number = value[name]
            if type(number) not in (int, float) or not abs(number) < _LARGEST:
                return False
    if value["kind"] in _WITH_STEP and "step" not in value:
        return False
    for name in _TEXTS:
        if not isinstance(value.get(name, ""), (str, type(None))):
            return False
    segments = value.get("segments", [])
    return isinstance(segments, list) and all(map(_is_segment, segments))


def _is_segment(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(n) is int for n in value)


@dataclass(frozen=True)
class Segment:
    """A stretch of the training that stands: link `link` up to and including step `upto_step`."""

    link: int
    upto_step: int
    metrics_bytes: int
    """How much of that link's metric log belongs to it."""


@dataclass(frozen=True)
class Lineage:
    """Which work of which links the newest link has built upon.

    Every checkpoint carries its lineage; a link that restores one adopts it. A commit of an
    earlier link beyond its segment (a fenced link that woke up) is on no lineage.
    """

    segments: tuple[Segment, ...] = ()
    link: int = 0
    """The link that adopted the segments."""

    def holds(self, link: int, step: int) -> bool:
        """Whether a checkpoint of that link and step is part of the run."""
        if link >= self.link:
            return True
        return any(s.link == link and step <= s.upto_step for s in self.segments)

    def extended(self, link: int, step: int, metrics_bytes: int) -> tuple[Segment, ...]:
        """The segments with this link's own stretch at the end, up to `step`."""
        return (*self.segments, Segment(link, step, metrics_bytes))


def segments_to_json(segments: tuple[Segment, ...]) -> list[list[int]]:
    """As they stand in checkpoints and records: [link, upto_step, metrics_bytes]."""
    return [[s.link, s.upto_step, s.metrics_bytes] for s in segments]


def segments_from_json(value: Any) -> tuple[Segment, ...]:
    """The reverse of `segments_to_json`. Raises ValueError or TypeError on anything else."""
    return tuple(Segment(int(a), int(b), int(c)) for a, b, c in value)


def lineage(run: RunDir, chain: Sequence[LinkRecords] | None = None) -> Lineage:
    """What the newest link that has restored (or begun afresh) builds upon."""
    links = chain if chain is not None else read_chain(run)
    for link in reversed(links):
        record = link.last("restored")
        if record is not None:
            return Lineage(segments_from_json(record.get("segments", [])), link.number)
    return Lineage()


def known_step(links: Sequence[LinkRecords], *, own: bool = False) -> int:
    """The step that the newest link which trained stood at, or had committed last.

    Of a link that has restored more than once (a command was seen at one step, and its framework
    then went on from another), what came after the last time counts. With `own`, only what the run
    itself has committed counts, not what it began with.
    """
    for link in reversed(links):
        records = link.all("restored", "saved")
        begun = [at for at, record in enumerate(records) if record["kind"] == "restored"]
        records = records[begun[-1] :] if begun else records
        steps = [int(r["step"]) for r in records if not (own and "from" in r)]
        if steps:
            return max(steps)
    return 0


def read_metrics(run: RunDir, over: Lineage | None = None) -> Iterator[Record]:
    """The metric log of the run, each step once, in order."""
    over = lineage(run) if over is None else over
    for segment in over.segments:
        yield from files.read_lines(run.link(segment.link).metrics, segment.metrics_bytes)
    if over.link:
        path = run.link(over.link).metrics
        successor = read_claim(run.link(over.link + 1))
        yield from files.read_lines(path, adopted_bytes(successor, path))
