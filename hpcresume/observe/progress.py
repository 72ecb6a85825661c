"""How far a run is, from what its rank 0 publishes; for everybody outside of that process."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from hpcresume import files
from hpcresume.run_dir import RunDir
from hpcresume.training.heartbeat import END, STEP
from hpcresume.training.progress import Progress, from_json

#: What is published is at most so old while a rank lives: durations go on for so long.
_FRESH_S = 10.0


class ProgressTail:
    """Looks at the same files again and again."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._content: Any = None
        self._since = time.monotonic()
        self._busy = ("", time.monotonic())

    def look(self) -> Progress | None:
        """How far the run is; None before its first step."""
        content = files.read_json_or_none(self._run.trainer_state)
        now = time.monotonic()
        if content != self._content:
            self._content, self._since = content, now
        if not isinstance(content, dict):
            return None
        progress = from_json(content.get("progress"))
        if progress is None:
            return None
        if content.get("completed") is True:
            return replace(progress, busy="", left_s=0.0)
        return self._alive(progress, now)

    @property
    def link(self) -> int:
        """The link that published last; 0 where none has."""
        number = self._content.get("link") if isinstance(self._content, dict) else None
        return number if type(number) is int else 0

    def _alive(self, progress: Progress, now: float) -> Progress:
        """With what has gone on since it was published."""
        passed = min(now - self._since, _FRESH_S)
        newest = self._run.newest_link()
        if newest > self.link:
            told = replace(progress, busy_usual_s=0.0, steps_per_s=0.0)
            return self._at(told, f"link {newest} starts", now)
        kind, step = self._sign(newest)
        told = replace(
            progress,
            epoch_s=progress.epoch_s + passed,
            train_s=progress.train_s + passed,
            left_s=None if progress.left_s is None else max(0.0, progress.left_s - passed),
        )
        return self._at(_advanced(told, step), kind, now)

    def _at(self, progress: Progress, kind: str, now: float) -> Progress:
        """At something besides steps, since it was first seen to be."""
        if kind != self._busy[0]:
            self._busy = (kind, now)
        return replace(progress, busy=kind, busy_s=now - self._busy[1] if kind else 0.0)

    def _sign(self, number: int) -> tuple[str, int]:
        """What rank 0 is at besides steps, and its last step, by its newest sign of life."""
        sign = files.read_json_or_none(self._run.link(number).beat(0))
        if not isinstance(sign, dict):
            return "", 0
        kind, step = sign.get("kind"), sign.get("step")
        between = isinstance(kind, str) and kind not in (STEP, END, "leaving")
        return str(kind) if between else "", step if type(step) is int else 0


def _advanced(progress: Progress, step: int) -> Progress:
    """With the steps since it was published, of which signs of life tell no more."""
    moved = step - progress.step
    if moved <= 0:
        return progress
    epoch, done = progress.epoch, progress.step_in_epoch + moved
    if progress.steps_per_epoch:
        epoch, done = epoch + done // progress.steps_per_epoch, done % progress.steps_per_epoch
    if progress.epochs is not None and epoch > progress.epochs:
        epoch, done = progress.epochs, progress.steps_per_epoch or 0
    return replace(progress, step=step, epoch=epoch, step_in_epoch=done)
