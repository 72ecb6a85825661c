"""The metrics of a run as curves that can be drawn, however long the run is.

A curve is at most `MOST_BUCKETS` stretches of equal length, a power of two steps; each knows the
mean, the lowest and the highest value in it. So no spike is lost, a curve that has grown by a
point is the same but for its end, and nothing depends on when it was looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.journal import Lineage, Segment, adopted_bytes, read_claim
from hpcresume.observe.growing import GrowingLines
from hpcresume.run_dir import RunDir

MOST_BUCKETS = 1024
#: A training that logs more names than people look at.
MOST_CURVES = 64
_MOST_BAD = 32
_LARGEST_STEP = 2**53
#: What is no metric.
_OWN = frozenset({"step", "epoch", "t"})


@dataclass
class _Bucket:
    """The points of a curve in one stretch of steps."""

    __slots__ = ("count", "first", "high", "last", "low", "number", "total")

    number: int
    first: int
    last: int
    count: int
    total: float
    low: float
    high: float

    def add(self, step: int, value: float) -> None:
        """Take a later point in."""
        self.last = step
        self.count += 1
        self.total += value
        if value < self.low:
            self.low = value
        elif value > self.high:
            self.high = value

    def join(self, later: _Bucket) -> None:
        """Take the next bucket's points in."""
        self.last = later.last
        self.count += later.count
        self.total += later.total
        self.low = min(self.low, later.low)
        self.high = max(self.high, later.high)

    def copy(self) -> _Bucket:
        """One that grows on its own."""
        return _Bucket(
            self.number, self.first, self.last, self.count, self.total, self.low, self.high
        )


class Curve:
    """One metric over the steps of a run; points come in the order of their steps."""

    def __init__(self) -> None:
        self.width = 1
        """Steps in a bucket."""
        self.latest: tuple[int, float] | None = None
        """The newest finite point."""
        self.bad: list[int] = []
        """The first steps in which it was not finite."""
        self._buckets: list[_Bucket] = []
        self._drawn: list[tuple[float, ...]] = []
        """The buckets that never change as long as the width does not, ready to be drawn."""

    def add(self, step: int, value: float) -> None:
        """Take the value of a step in, which is later than those before."""
        if not math.isfinite(value):
            if len(self.bad) < _MOST_BAD:
                self.bad.append(step)
            return
        self.latest = (step, value)
        number = step // self.width
        if self._buckets and self._buckets[-1].number == number:
            self._buckets[-1].add(step, value)
            return
        self._buckets.append(_Bucket(number, step, step, 1, value, value, value))
        while len(self._buckets) > MOST_BUCKETS:
            self._widen()

    def _widen(self) -> None:
        """Buckets of twice the width."""
        self.width *= 2
        self._drawn = []
        wider: list[_Bucket] = []
        for bucket in self._buckets:
            bucket.number //= 2
            if wider and wider[-1].number == bucket.number:
                wider[-1].join(bucket)
            else:
                wider.append(bucket)
        self._buckets = wider

    def copy(self) -> Curve:
        """A curve that grows on its own."""
        other = Curve()
        other.width, other.latest, other.bad = self.width, self.latest, list(self.bad)
        other._buckets = [bucket.copy() for bucket in self._buckets]
        other._drawn = list(self._drawn)
        return other

    def to_json(self) -> dict[str, Any]:
        """Columns: the middle step of each bucket, its mean; `low` and `high` where they differ."""
        settled = max(0, len(self._buckets) - 1)
        self._drawn += [_drawn(bucket) for bucket in self._buckets[len(self._drawn) : settled]]
        rows = [*self._drawn, *(_drawn(bucket) for bucket in self._buckets[settled:])]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]
        names = ("steps", "mean", "low", "high")[: 4 if self.width > 1 else 2]
        latest = None if self.latest is None else [self.latest[0], _short(self.latest[1])]
        drawn = dict(zip(names, columns, strict=False))
        return {**drawn, "width": self.width, "latest": latest, "bad": list(self.bad)}


def _drawn(bucket: _Bucket) -> tuple[Any, ...]:
    middle = (bucket.first + bucket.last) // 2
    mean = bucket.total / bucket.count
    return middle, _short(mean), _short(bucket.low), _short(bucket.high)


def _short(value: float) -> float | None:
    """Six digits are more than a picture shows; a sum may have left the numbers."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


class Curves:
    """All metrics of a run by their names, as far as they are numbers."""

    def __init__(self, known: Mapping[str, Curve] | None = None, step: int = 0) -> None:
        self._step = step
        self.by_name = dict(known or {})
        self.left_out: set[str] = set()
        """Names beyond the number that is drawn."""

    @property
    def step(self) -> int:
        """The newest step that something was logged in."""
        return self._step

    def add(self, records: Iterable[Any], upto_step: int = _LARGEST_STEP) -> None:
        """Take the lines of a metric log in; what is no record of ours is passed over."""
        for record in records:
            step = record.get("step") if isinstance(record, dict) else None
            if type(step) is not int or not self._step < step <= upto_step:
                continue
            self._step = step
            for name, value in record.items():
                if name not in _OWN and type(value) in (int, float):
                    self._add(name, step, value)

    def _add(self, name: str, step: int, value: float) -> None:
        curve = self.by_name.get(name)
        if curve is None:
            if len(self.by_name) >= MOST_CURVES:
                self.left_out.add(name)
                return
            curve = self.by_name[name] = Curve()
        try:
            curve.add(step, float(value))
        except OverflowError:
            curve.add(step, math.inf)

    def copy(self) -> Curves:
        """Curves that grow on their own."""
        curves = {name: curve.copy() for name, curve in self.by_name.items()}
        other = Curves(curves, self._step)
        other.left_out = set(self.left_out)
        return other


class CurvesTail:
    """The curves of a run as it grows.

    Where a link goes on from an older step than the one before it had reached, what that one
    logged beyond is taken back.
    """

    def __init__(self, run: RunDir, *, monitor: bool = False) -> None:
        """What the training logged, or with `monitor` how its machine did."""
        self._run = run
        self._monitor = monitor
        self._over = Lineage()
        self._settled = Curves()
        """Of the links before the newest."""
        self._live = Curves()
        self._lines: GrowingLines | None = None

    def look(self, over: Lineage) -> Curves:
        """The curves along a lineage, as they are now."""
        path = self._path(over.link)
        limit = adopted_bytes(read_claim(self._run.link(over.link + 1)), path)
        if over != self._over:
            self._settle(over.segments)
            self._over = over
            self._lines = None
        if self._lines is None or (limit is not None and self._lines.position > limit):
            self._live = self._settled.copy()
            self._lines = GrowingLines(path)
        self._live.add(self._lines.look(limit))
        return self._live

    def _path(self, link: int) -> Path:
        own = self._run.link(link)
        return own.monitor if self._monitor else own.metrics

    def _settle(self, segments: tuple[Segment, ...]) -> None:
        known = self._over.segments
        if segments[: len(known)] != known:
            known, self._settled = (), Curves()
        for segment in segments[len(known) :]:
            # Nobody says how much of a monitor's lines counts; their steps do.
            limit = None if self._monitor else segment.metrics_bytes
            self._settled.add(files.read_lines(self._path(segment.link), limit), segment.upto_step)
