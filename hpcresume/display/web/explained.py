"""A run's picture with the sentence that explains it, as the page and the report take it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpcresume.config import read_frozen, to_mapping
from hpcresume.errors import HpcResumeError
from hpcresume.journal import LinkRecords
from hpcresume.observe.picture import Picture, RunView
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobInfo
from hpcresume.story import Story
from hpcresume.why import explain

#: While nothing but the step changes, explaining takes at most one part of so many of the time.
_PART = 20


class ExplainedView:
    """Looks at one run, and says why it stands as it does. Not for several threads at a time."""

    def __init__(self, run: RunDir) -> None:
        """Raises NotFound where it is no run."""
        self._view = RunView(run)
        self._newest: LinkRecords | None = None
        self._seen: object = None
        self._until = 0.0
        self._why: dict[str, Any] = {}

    @property
    def run_id(self) -> str:
        """Of the run that the last look saw; empty before that."""
        return "" if self._view.story is None else self._view.story.run_id

    def look(self, jobs: Sequence[JobInfo] | None, note: str = "") -> dict[str, Any]:
        """How it stands, why, and what to do next. Raises NotFound, OSError."""
        picture = self._view.look(jobs, note)
        assert self._view.story is not None
        return {**picture.to_json(), "why": self._explanation(self._view.story, picture)}

    def _explanation(self, story: Story, picture: Picture) -> dict[str, Any]:
        status = picture.status
        changing = (len(story.submissions), story.cancelled, status.state, status.why)
        seen = (*changing, status.job, status.queued, status.checkpoint_step)
        began = time.monotonic()
        if self._newest is story.newest and self._seen == seen and began < self._until:
            return self._why
        told = explain(
            story,
            status,
            {},
            _settings(story.run),
            now=time.time(),
            called=picture.name,
        )
        advice = [{"why": why, "command": command} for why, command in told.next]
        self._why = {"sentence": told.sentence, "next": advice}
        self._newest, self._seen = story.newest, seen
        took = time.monotonic() - began
        self._until = began + _PART * took
        return self._why


def _settings(run: RunDir) -> Mapping[str, Any]:
    with contextlib.suppress(HpcResumeError, OSError):
        return to_mapping(read_frozen(run.config))
    return {}
