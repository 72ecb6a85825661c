"""How all runs of a folder stand, again and again: those at rest are not read twice."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hpcresume.errors import NotFound
from hpcresume.observe.chain import StoryTail
from hpcresume.observe.jobs import LivingJobs
from hpcresume.run_dir import RunDir, all_runs
from hpcresume.status import RunStatus, read_status

#: States that only a new link or a new submission ends.
_AT_REST = frozenset({"complete", "stopped", "failed"})


@dataclass(frozen=True)
class Overview:
    """The runs of a folder, those with the newest sign of life first."""

    runs: dict[str, RunStatus]
    """By their ids."""
    paths: dict[str, RunDir]
    damaged: list[str]
    """A sentence for each directory that looks like a run and is none."""


class OverviewTail:
    """Looks at a folder. Not for several threads at a time."""

    def __init__(self, root: Path, jobs: LivingJobs) -> None:
        self._root = root
        self._jobs = jobs
        self._known: dict[Path, _Known] = {}

    def look(self) -> Overview:
        """How the runs stand now."""
        found = Overview({}, {}, [])
        runs = all_runs(self._root)
        self._known = {run.path: self._known[run.path] for run in runs if run.path in self._known}
        for run in runs:
            try:
                known = self._known.get(run.path)
                if known is None or known.stamp != _stamp(run):
                    known = self._known[run.path] = _Known(run)
                status = known.look(self._jobs)
            except (NotFound, OSError) as error:
                self._known.pop(run.path, None)
                found.damaged.append(str(error))
                continue
            key = known.run_id
            while key in found.runs:
                # A copy of a run has its id as well.
                key += "+"
            found.runs[key], found.paths[key] = status, run
        return found


class _Known:
    """A run that was looked at before."""

    def __init__(self, run: RunDir) -> None:
        self.stamp = _stamp(run)
        self._run = run
        self._story = StoryTail(run)
        self._status: RunStatus | None = None
        self.run_id = str(run.identify()["id"])

    def look(self, jobs: LivingJobs) -> RunStatus:
        if self._status is None or self._status.state not in _AT_REST:
            living, note = jobs.of(self._run)
            self._status = read_status(self._run, living, note, story=self._story.look())
        return self._status


def _stamp(run: RunDir) -> tuple[object, ...]:
    """What changes when a run that rests goes on: claims, submissions, or another run's files."""
    found: list[object] = []
    for path in (run.links, run.submissions, run.identity):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            found.append(None)
        else:
            found += [status.st_mtime_ns, status.st_ino]
    return tuple(found)
