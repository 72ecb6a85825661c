"""What can be watched: the list of runs, and each run by its id."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcresume.display.web.explained import ExplainedView
from hpcresume.display.web.watching import Watched
from hpcresume.errors import NotFound
from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.overview import Overview, OverviewTail
from hpcresume.run_dir import RunDir

#: One squeue for all runs in so many seconds, however many watch.
_JOBS_S = 10.0
#: Runs that are remembered although nobody watches them at the moment.
_REMEMBERED = 16


class Rooms:
    """All that can be watched of a folder of runs. For one event loop."""

    def __init__(self, root: Path, environ: Mapping[str, str]) -> None:
        self._jobs = LivingJobs(environ, max_age_s=_JOBS_S)
        self._tail = OverviewTail(root, self._jobs)
        self._root = root
        self._paths: dict[str, RunDir] = {}
        self._runs: dict[str, Watched] = {}
        self.list = Watched(self._look_at_all)

    async def run(self, run_id: str) -> Watched | None:
        """A run by its id, among those that lie in the folder; None for any other word."""
        if run_id not in self._paths:
            await asyncio.to_thread(self.list.look)
        directory = self._paths.get(run_id)
        if directory is None:
            return None
        if run_id not in self._runs:
            for key, room in list(self._runs.items()):
                if len(self._runs) >= _REMEMBERED and not room.viewers:
                    del self._runs[key]
            self._runs[run_id] = Watched(_Looker(directory, self._jobs))
        return self._runs[run_id]

    def end(self) -> None:
        """Send everybody home: the server ends."""
        for room in (self.list, *self._runs.values()):
            room.end()

    def _look_at_all(self) -> dict[str, Any]:
        overview: Overview = self._tail.look()
        self._paths = overview.paths
        runs = {}
        for key, status in overview.runs.items():
            shown = status.to_json()
            age, left = shown.pop("checkpoint_age_s"), shown.pop("time_left_s")
            del shown["worked_s"], shown["train_left_s"]
            # Moments instead of ages: a page that nothing happens to is sent nothing.
            shown["checkpoint_created"] = None if age is None else _moment(-age)
            shown["job_ends"] = None if left is None else _moment(left)
            runs[key] = shown
        order = list(runs)
        return {"root": str(self._root), "order": order, "runs": runs, "damaged": overview.damaged}


def _moment(seconds: float) -> int:
    """So many seconds from now, to a few seconds: it stays the same from look to look."""
    return round((time.time() + seconds) / 5) * 5


class _Looker:
    """Looks at one run; begins anew where another run has taken its place."""

    def __init__(self, run: RunDir, jobs: LivingJobs) -> None:
        self._run = run
        self._jobs = jobs
        self._view: ExplainedView | None = None

    def __call__(self) -> dict[str, Any]:
        run_id = self._run.identify()["id"]
        if self._view is None or self._view.run_id != run_id:
            self._view = ExplainedView(self._run)
        try:
            return self._view.look(*self._jobs.of(self._run))
        except NotFound:
            self._view = None
            raise
