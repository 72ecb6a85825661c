"""What a full screen shows of one run, kept up to date by a thread that reads its files.

A disk that hangs, or a scheduler that does not answer, leaves the picture as it was; the screen
goes on, and can be left.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcresume.errors import HpcResumeError
from hpcresume.history import last_lines
from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.picture import CheckpointShown, Picture, RunView
from hpcresume.observe.progress import ProgressTail
from hpcresume.run_dir import RunDir
from hpcresume.status import RunStatus
from hpcresume.training.progress import Progress

#: The pauses between two looks: at what is published, and at the journals, metrics and jobs.
_LOOK_S, _READ_S = 0.5, 2.0
#: How old Slurm's answer may be.
_JOBS_S = 10.0
_LOG_LINES = 200


@dataclass(frozen=True)
class Series:
    """What was logged under one name, over all steps."""

    values: Sequence[float]
    """Means of stretches of equal length."""
    last: float
    """The newest value; nan where that is no finite number."""
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at a moment."""

    name: str
    status: RunStatus | None = None
    """None before the first look has come to its end."""
    progress: Progress | None = None
    series: Mapping[str, Series] = field(default_factory=dict)
    """What was logged, by name, in the order that it came in."""
    checkpoints: tuple[CheckpointShown, ...] = ()
    """Those that are there, the newest first."""
    over: bool = False
    """Whether no further link is to be waited for."""
    log: tuple[str, ...] = ()
    trouble: str = ""
    """Why the picture may be old."""


class Viewer:
    """Looks at one run in a thread of its own; `view` is the newest picture."""

    def __init__(self, run: RunDir, look: Callable[[], Progress] | None = None) -> None:
        """`look` tells the progress where the training is in this very process."""
        self.view = View(name=run.name)
        self.look_here = look
        self._run = run
        self._jobs = LivingJobs(os.environ, max_age_s=_JOBS_S)
        self._tail = ProgressTail(run)
        self._runs_view: RunView | None = None
        self._picture: Picture | None = None
        self._read_at = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="viewer", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._left.set()

    def _keep_looking(self) -> None:
        while not self._left.is_set():
            self.look()
            self._left.wait(_LOOK_S)

    def look(self) -> View:
        """Take the newest picture."""
        trouble = ""
        try:
            if time.monotonic() - self._read_at >= _READ_S:
                self._read()
                self._read_at = time.monotonic()
        except (HpcResumeError, OSError) as error:
            trouble = str(error)
        published = self._tail.look()
        picture = self._picture
        story = None if self._runs_view is None else self._runs_view.story
        self.view = View(
            name=self._run.name,
            status=None if picture is None else picture.status,
            progress=published if self.look_here is None else self.look_here(),
            series={} if picture is None else _series(picture.curves),
            checkpoints=() if picture is None else tuple(reversed(picture.checkpoints)),
            over=story is not None and story.over,
            log=tuple(last_lines(self._run.train_log, _LOG_LINES)),
            trouble=trouble,
        )
        return self.view

    def _read(self) -> None:
        if self._runs_view is None:
            self._runs_view = RunView(self._run)
        self._picture = self._runs_view.look(*self._jobs.of(self._run))


def _series(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, Series]:
    found = {}
    for name, curve in curves.items():
        means = [value for value in curve["mean"] if value is not None]
        if not means:
            continue
        step, last = curve["latest"]
        low = [value for value in curve.get("low", means) if value is not None]
        high = [value for value in curve.get("high", means) if value is not None]
        is_bad = bool(curve["bad"]) and curve["bad"][-1] > step
        found[name] = Series(means, math.nan if is_bad else last, min(low), max(high))
    return found
