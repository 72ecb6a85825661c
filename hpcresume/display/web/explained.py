"""A run's picture with the sentence that explains it, as the page takes it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hpcresume.config import read_frozen, to_mapping
from hpcresume.errors import HpcResumeError
from hpcresume.observe.picture import RunView
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobInfo
from hpcresume.why import explain


def explained(view: RunView, jobs: Sequence[JobInfo] | None, note: str = "") -> dict[str, Any]:
    """How a run stands, why, and what to do next. Raises NotFound, OSError."""
    picture = view.look(jobs, note)
    assert view.story is not None
    told = explain(
        view.story,
        picture.status,
        {},
        _settings(view.run),
        now=time.time(),
        called=picture.name,
    )
    next_steps = [{"why": why, "command": command} for why, command in told.next]
    why = {"sentence": told.sentence, "next": next_steps}
    return {**picture.to_json(), "why": why}


def _settings(run: RunDir) -> Mapping[str, Any]:
    with contextlib.suppress(HpcResumeError, OSError):
        return to_mapping(read_frozen(run.config))
    return {}
