"""How all runs of a folder stand, again and again: those at rest are not read twice.

`hpcresume status` looks once, or every few seconds; the page in the browser while somebody sees it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume.errors import HpcResumeError, unavailable
from hpcresume.observe.chain import StoryTail
from hpcresume.observe.jobs import LivingJobs
from hpcresume.run_dir import RunDir, all_runs
from hpcresume.status import RunStatus, read_status
from hpcresume.story import glance

#: States that only a new link or a new submission ends.
_AT_REST = frozenset({"complete", "stopped", "failed"})


@dataclass(frozen=True)
class Overview:
    """The runs of a folder, those with the newest sign of life first."""

    runs: dict[str, RunStatus]
    """By their ids."""
    paths: dict[str, RunDir]
    errors: list[HpcResumeError]
    """Why runs could not be looked at: each is a sentence with its path."""

    @property
    def damaged(self) -> list[str]:
        """The sentences of `errors`."""
        return [str(error) for error in self.errors]


class OverviewTail:
    """Looks at a folder. Not for several threads at a time."""

    def __init__(
        self, root: Path, jobs: LivingJobs, *, all_complete: bool = True, add_up: bool = False
    ) -> None:
        """Without `all_complete`, of the runs that are complete only the newest is looked at;
        `add_up` as for `status.read_status`."""
        self._root = root
        self._jobs = jobs
        self._all_complete = all_complete
        self._add_up = add_up
        self._known: dict[Path, _Known] = {}

    def look(self, runs: Sequence[RunDir] | None = None) -> Overview:
        """How the runs stand now; who has just listed them (`all_runs`), hands them in."""
        found, seen_complete = Overview({}, {}, []), False
        runs = all_runs(self._root) if runs is None else runs
        self._known = {run.path: self._known[run.path] for run in runs if run.path in self._known}
        for run in runs:
            try:
                known = self._known.get(run.path)
                if known is None or known.stamp != _stamp(run):
                    known = self._known[run.path] = _Known(run)
                if seen_complete and known.is_complete():
                    continue
                status = known.look(self._jobs, self._add_up)
            except (HpcResumeError, OSError) as error:
                self._known.pop(run.path, None)
                told = unavailable(error) if isinstance(error, OSError) else error
                found.errors.append(told)
                continue
            seen_complete |= status.state == "complete" and not self._all_complete
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
        self._story: StoryTail | None = None
        self._status: RunStatus | None = None
        self._complete = False
        self.run_id = str(run.identify()["id"])

    def is_complete(self) -> bool:
        """Whether training is complete, which takes less reading than how it stands."""
        if self._status is not None:
            return self._status.state == "complete"
        self._complete = self._complete or glance(self._run).completed
        return self._complete

    def look(self, jobs: LivingJobs, add_up: bool) -> RunStatus:
        if self._status is None or self._status.state not in _AT_REST:
            # Before the files: a job that ends in between has written by then how it did.
            living, note = jobs.of(self._run)
            story = None
            if self._status is not None:
                # Most runs are at rest, of which the first look reads no more than it needs.
                self._story = self._story or StoryTail(self._run)
                story = self._story.look()
            self._status = read_status(self._run, living, note, story=story, add_up=add_up)
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
