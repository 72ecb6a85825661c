"""What a full screen shows of one run, kept up to date by a thread that reads its files.

A disk that hangs, or a scheduler that does not answer, leaves the picture as it was; the screen
goes on, and can be left.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hpcresume import files
from hpcresume.display.sparkline import Series
from hpcresume.errors import HpcResumeError
from hpcresume.history import last_lines
from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.metrics import MetricTail
from hpcresume.observe.progress import ProgressTail
from hpcresume.run_dir import RunDir
from hpcresume.status import RunStatus, read_status
from hpcresume.story import Story, read_story
from hpcresume.training.progress import Progress, number

#: The pauses between two looks: at what is published, and at the journals, metrics and jobs.
_LOOK_S, _READ_S = 0.5, 2.0
#: How old Slurm's answer may be.
_JOBS_S = 10.0
_LOG_LINES = 200


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that is there, as the journal tells of it."""

    step: int
    time: float
    """Unix seconds."""
    num_bytes: int
    seconds: float
    best: bool


@dataclass(frozen=True, kw_only=True)
class View:
    """A run at a moment."""

    name: str
    status: RunStatus | None = None
    """None before the first look has come to its end."""
    progress: Progress | None = None
    series: Mapping[str, Series] = field(default_factory=dict)
    """What was logged, by name, in the order that it came in."""
    checkpoints: tuple[Saved, ...] = ()
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
        self._metrics = MetricTail(run)
        self._series: dict[str, Series] = {}
        self._story: Story | None = None
        self._status: RunStatus | None = None
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
        progress = published if self.look_here is None else self.look_here()
        self.view = View(
            name=self._run.name,
            status=self._status,
            progress=progress,
            series=dict(self._series),
            checkpoints=self._checkpoints(),
            over=self._story is not None and self._story.over,
            log=tuple(last_lines(self._run.train_log, _LOG_LINES)),
            trouble=trouble,
        )
        return self.view

    def _read(self) -> None:
        jobs, note = self._jobs.of(self._run)
        self._story = read_story(self._run)
        self._status = read_status(self._run, jobs, note, story=self._story)
        for record in self._metrics.look():
            for name, value in record.items():
                if name not in ("step", "epoch") and number(value) is not None:
                    self._series.setdefault(name, Series()).add(value)

    def _checkpoints(self) -> tuple[Saved, ...]:
        if self._story is None:
            return ()
        state = files.read_json_or_none(self._run.trainer_state)
        best = state.get("best_model_checkpoint") if isinstance(state, dict) else None
        there = set(self._run.checkpoint_steps())
        found: dict[int, Saved] = {}
        for link in self._story.links:
            for record in link.all("saved"):
                step = int(record["step"])
                if step in there:
                    found[step] = Saved(
                        step=step,
                        time=float(record["t"]),
                        num_bytes=int(number(record.get("bytes")) or 0),
                        seconds=float(number(record.get("seconds")) or 0.0),
                        best=self._run.checkpoint(step).name == best,
                    )
        return tuple(found[step] for step in sorted(found, reverse=True))
