"""The metrics of a run as they grow, merged over its links.

Used by `hpcresume logs --metrics` and by every view that draws curves.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.journal import Lineage, lineage, read_metrics
from hpcresume.run_dir import RunDir


class MetricTail:
    """The metrics of a run as they grow, merged over its links: each step once, in order."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._step = 0
        self._link = 0
        self._position: int | None = 0
        """How far the newest link's log is read; None: to its end."""

    def look(self) -> list[dict[str, Any]]:
        """What has come since the last look."""
        over = lineage(self._run)
        new: list[Any] = []
        if over.link != self._link:
            # Another link trains: what stands of those before, its lineage tells.
            self._link, self._position = over.link, 0
            missed = tuple(part for part in over.segments if part.upto_step > self._step)
            new += read_metrics(self._run, Lineage(missed))
        if self._link != self._run.newest_link() and self._position is not None:
            # The next link is there: it has said how much of this one counts.
            self._position = None
            new += read_metrics(self._run, Lineage((), self._link))
        elif self._position is not None and self._link:
            new += self._grown(self._run.link(self._link).metrics, self._position)
        return list(self._later(new))

    def _grown(self, path: Path, position: int) -> list[Any]:
        """The values of the whole lines behind a position."""
        try:
            data = files.read_bytes(path, begin=position)
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position = position + len(whole)
        values = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line))
        return values

    def _later(self, records: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The records of later steps than before; what is no record of ours is passed over."""
        for record in records:
            step = record.get("step") if isinstance(record, dict) else None
            if isinstance(step, int) and step > self._step:
                self._step = step
                yield record
