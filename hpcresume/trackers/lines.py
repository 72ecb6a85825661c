"""What a link's training has to tell a tracker: what was logged, and how its machine does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hpcresume import files
from hpcresume.journal import Lineage
from hpcresume.observe.growing import GrowingLines
from hpcresume.run_dir import RunDir
from hpcresume.trackers.tracker import Line

#: What is no number of the training's.
_OWN = frozenset({"step", "epoch", "t"})
_MONITOR = "monitor/"


class Lines:
    """The steps behind `since` that stand, each once and in order, as far as they are written.

    First what an earlier link has logged and could not tell, along the lineage that this link
    has adopted; then what this one logs. Names of the monitor begin with "monitor/".
    """

    def __init__(self, run: RunDir, over: Lineage, since: int) -> None:
        self._run = run
        self._earlier = over.segments
        self._since = since
        own = run.link(over.link)
        self._monitor, self._metrics = GrowingLines(own.monitor), GrowingLines(own.metrics)

    def look(self) -> list[Line]:
        """What has come since the last look."""
        found = [line for part in self._missed() for line in part]
        # Its monitor speaks of a step after the step's metrics are written: in this order of
        # reading no line comes before one of an earlier step.
        monitor = self._monitor.look()
        metrics = self._metrics.look()
        return found + self._merged(metrics, monitor)

    def _missed(self) -> Iterator[list[Line]]:
        segments, self._earlier = self._earlier, ()
        for segment in segments:
            if segment.upto_step > self._since:
                link = self._run.link(segment.link)
                metrics = files.read_lines(link.metrics, segment.metrics_bytes)
                monitor = files.read_lines(link.monitor)
                yield self._merged(metrics, monitor, segment.upto_step)

    def _merged(
        self, metrics: Iterable[Any], monitor: Iterable[Any], upto: float = float("inf")
    ) -> list[Line]:
        """One line for each step, in order; what is no record of ours is passed over."""
        now = time.time()
        by_step: dict[int, tuple[dict[str, float], float]] = {}
        for prefix, records in (("", metrics), (_MONITOR, monitor)):
            for record in records:
                step = record.get("step") if isinstance(record, dict) else None
                if type(step) is int and self._since < step <= upto:
                    known = by_step.get(step, ({}, now))
                    t = record.get("t")
                    by_step[step] = (
                        {**known[0], **_numbers(record, prefix)},
                        t if isinstance(t, float) else known[1],
                    )
        return [Line(step, *by_step[step]) for step in sorted(by_step) if by_step[step][0]]


def _numbers(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    found = {}
    for name, value in record.items():
        if name not in _OWN and type(value) in (int, float):
            # An integer may be larger than any float.
            with contextlib.suppress(OverflowError):
                found[prefix + name] = float(value)
    return found
