"""The plan of a run: which checkpoints are to be expected when, as far as its links have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcresume import files
from hpcresume.chain.calendar import LONGEST_S, measure, promised
from hpcresume.chain.plan import PlannedSave, Rhythm, plan, usual_interval
from hpcresume.config import CheckpointConfig, read_frozen
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobInfo
from hpcresume.status import RunStatus, is_alive, place_of, utc
from hpcresume.story import Story, glance
from hpcresume.training.progress import from_json


@dataclass(frozen=True)
class RunPlan:
    """The checkpoints to come, or why there is no plan."""

    saves: Sequence[PlannedSave]
    total_steps: int | None
    missing: str = ""
    """One sentence; empty where there is a plan."""

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        saves = [{**asdict(save), "at": utc(save.at)} for save in self.saves]
        return {"saves": saves, "total_steps": self.total_steps, "missing": self.missing}


def plan_of(run: RunDir, status: RunStatus, jobs: Sequence[JobInfo] | None) -> RunPlan:
    """What is to be expected of a run from now on; of one that rests, if it went on now.

    Raises ConfigError where the run's configuration cannot be read.
    """
    total = status.total_steps
    if status.state == "complete":
        return RunPlan([], total, "Training is complete: no checkpoint is to come.")
    if not total:
        return RunPlan([], total, "It has no number of steps at which it ends, so it has no plan.")
    story = glance(run)
    pace = measure(story.links, story.submissions)
    if pace is None:
        return RunPlan([], total, "The plan comes with the first checkpoint: no pace is known yet.")
    left = max(0, total - status.step)
    if left / pace.steps_per_s > LONGEST_S:
        return RunPlan([], total, "At the pace of its links so far it lasts more than ten years.")
    settings = read_frozen(run.config).checkpoint
    saves = plan(
        step=status.step,
        # A job that has begun and has no link yet is the next one.
        link=status.link + (status.state == "running" and not is_alive(story, status)),
        pace=pace,
        promise=promised(story.links, story.submissions),
        place=place_of(story, status.state, left, jobs),
        rhythm=_rhythm(run, story, settings),
    )
    if not saves:
        return RunPlan([], total, "Its jobs are too short: they are over before their first step.")
    return RunPlan(saves, total)


def _rhythm(run: RunDir, story: Story, settings: CheckpointConfig) -> Rhythm:
    """What was asked for; of `minutes: auto`, what came of it so far."""
    minutes = settings.minutes
    seconds = usual_interval(story.links) if minutes == "auto" else None
    if isinstance(minutes, (int, float)):
        seconds = 60.0 * minutes
    live = files.read_json_or_none(run.trainer_state)
    progress = from_json(live.get("progress")) if isinstance(live, dict) else None
    epoch_steps = progress.steps_per_epoch if progress is not None else None
    return Rhythm(
        steps=settings.steps,
        seconds=seconds,
        epoch_steps=(epoch_steps or None) if settings.each_epoch else None,
    )
