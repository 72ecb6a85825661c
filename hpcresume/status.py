"""How a run stands, for people: its story, its checkpoints and the scheduler's word together.

Reads only; never imports torch.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.chain.calendar import (
    Calendar,
    Place,
    calendar,
    free_since,
    measure,
    promised,
    ran_and_waited,
)
from hpcresume.checkpoint.manifest import Committed, newest_of_run
from hpcresume.journal import Record, known_step, lineage
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobInfo, JobState
from hpcresume.scheduler.waiting import waiting_words
from hpcresume.story import Story, alive_elsewhere, glance, has_no_driver, resized, waits_in_vain


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One row of `hpcresume status`."""

    name: str
    path: Path
    state: str
    """complete, running, waiting, stopped, failed or stalled."""
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    link: int = 0
    job: str = ""
    node: str = ""
    time_left_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    checkpoint_verified: bool = False
    """Whether its bytes were checked; `committed` checkpoints are verified when they are used."""
    seen: str = ""
    """Of a command, how its progress is seen: steps, or time alone; empty where ranks train."""
    ran_s: float | None = None
    """How long a command has run of which nothing else is seen, as far as that was recorded."""
    why: str = ""
    """Why it stands so, in words."""
    reason: str = ""
    """Why its next job waits, in the scheduler's word."""
    queued: list[str] = field(default_factory=list)
    worked_s: float | None = None
    """What its links have lasted, all together; None where that was not added up."""
    queued_s: float | None = None
    """What they waited in the queue, likewise; the wait of the next one is not over, and not in."""
    train_left_s: float | None = None
    """What is left to train, at the pace of its links so far; None where that is not known."""
    calendar: Calendar | None = None
    """When it will be complete; None where nothing has been measured, or nothing is left to do."""
    deadline: float | None = None
    """Unix seconds: when its last job must be over (`scheduler.deadline`)."""
    expired: bool = False
    """Whether no job that begins now could end before that."""

    @property
    def late(self) -> bool:
        """Whether it is expected to be complete after its deadline only."""
        if self.calendar is None or self.deadline is None:
            return False
        return self.calendar.expected > self.deadline

    def to_json(self) -> dict[str, Any]:
        """For `--json`, which has no word for a loss that is no number any more: null."""
        done = None
        if self.calendar is not None:
            done = {
                "best": utc(self.calendar.best),
                "expected": utc(self.calendar.expected),
                "links_left": self.calendar.links_left,
            }
        values = {
            **self.__dict__,
            "path": str(self.path),
            "calendar": done,
            "deadline": None if self.deadline is None else utc(self.deadline),
        }
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


def utc(seconds: float) -> str:
    """2026-11-23T13:20:00Z"""
    moment = datetime.datetime.fromtimestamp(round(seconds), tz=datetime.timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


#: `status --exit-code`
EXIT_CODES = {
    "complete": 0,
    "running": 10,
    "waiting": 11,
    "stopped": 12,
    "failed": 20,
    "stalled": 21,
}


def read_status(
    run: RunDir,
    jobs: Sequence[JobInfo] | None,
    note: str = "",
    *,
    story: Story | None = None,
    committed: Sequence[Committed] | None = None,
    add_up: bool = True,
) -> RunStatus:
    """How a run stands.

    `jobs` are its living jobs; None where the scheduler did not answer, and `note` says so. Who
    has read its `story`, or what is `committed`, hands it in. Without `add_up` the
    older links of a run at rest are not read, which only what they took together needs.

    Raises NotFound where it is no run, OSError where its files cannot be read.
    """
    story = glance(run) if story is None else story
    live = _live(run)
    if committed is None:
        last = newest_of_run(run, story.run_id, lineage(run, story.links))
    else:
        last = committed[-1] if committed else None
    running = _running(jobs)
    pending = [j for j in jobs or () if j.state is JobState.PENDING]
    promise = promised(story.links, story.submissions)
    state, why = _state(story, running, pending, jobs is not None)
    if state == "stalled" and promise.expired(time.time()) and not pending:
        why = f"none of its jobs could end before its deadline: hpcresume why {run.name}"
    step, total = _step(live, last, state), _whole(live.get("total_steps"))
    newest, now = story.newest, time.time()
    goes_on = state in ("running", "waiting")
    pace = measure(story.links, story.submissions) if goes_on else None
    left = max(0, total - step) if total else 0
    when = None
    if pace is not None and total:
        when = calendar(pace, promise, place_of(story, state, left, jobs))
    took = None
    if goes_on or add_up:
        alive = state == "running"
        took = ran_and_waited(story.links, story.submissions, alive=alive, now=now)
    seen, save = story.seen, None if last is not None else _save_of_command(story)
    claim = newest.claim if newest is not None else {}
    return RunStatus(
        name=run.name,
        path=run.path,
        state=state,
        step=step,
        total_steps=total,
        epoch=float(_number(live.get("epoch")) or 0.0),
        loss=_loss(live),
        link=newest.number if newest is not None else 0,
        job=running.id if running else (pending[0].id if pending else ""),
        node=running.nodes if running else str(claim.get("host", "")) if state == "running" else "",
        time_left_s=_time_left(running),
        checkpoint_step=last.step if last else (int(save["step"]) if save else None),
        checkpoint_age_s=_age_s(last.manifest.created if last else save["t"] if save else None),
        checkpoint_verified=_verified(story, last),
        seen=seen,
        ran_s=float(known_step(story.links)) if seen == "time" else None,
        why=" · ".join(part for part in (why, _unsaved(story), fell_back(story), note) if part),
        reason=pending[0].reason if pending and running is None else "",
        queued=[job.id for job in pending],
        worked_s=None if took is None else round(took[0], 3),
        queued_s=None if took is None else round(took[1], 3),
        train_left_s=None if pace is None or not total else left / pace.steps_per_s,
        calendar=when,
        deadline=promise.deadline,
        expired=promise.expired(time.time()),
    )


def place_of(story: Story, state: str, steps_left: int, jobs: Sequence[JobInfo] | None) -> Place:
    """Where a chain stands that goes on; one that rests, as if its next job were queued now."""
    alive, now, newest = state == "running", time.time(), story.newest
    running = _running(jobs)
    own = newest is not None and story.ended(newest) is None and newest.last("started") is not None
    left_s = _time_left(running)
    if running is not None and running.state is JobState.COMPLETING:
        left_s = 0.0
    waits = state == "waiting"
    since = free_since(story.links, story.submissions) if waits else None
    return Place(
        steps_left=steps_left,
        now=now,
        alive=alive,
        started=alive and own,
        left_s=left_s,
        waited_s=max(0.0, now - (since or now)),
    )


def _running(jobs: Sequence[JobInfo] | None) -> JobInfo | None:
    return next((job for job in jobs or () if job.state is not JobState.PENDING), None)


def is_alive(story: Story, status: RunStatus) -> bool:
    """Whether the newest link is what runs: its job may have ended, and the next one begun."""
    newest = story.newest
    if newest is None or status.state != "running" or story.ended(newest) is not None:
        return False
    job = str(newest.claim.get("job") or "")
    return not job or not status.job or job == status.job


def _unsaved(story: Story) -> str:
    """What the newest link tried to save last, and could not; empty where it could."""
    newest = story.newest
    failed = newest.last("save_failed") if newest is not None else None
    saved = newest.last("saved") if newest is not None else None
    if story.completed or failed is None or (saved is not None and saved["t"] > failed["t"]):
        return ""
    return f"step {failed['step']} could not be saved: {failed.get('reason')}"


def _save_of_command(story: Story) -> Record | None:
    """The newest that a command was seen to have saved."""
    saves = (r for link in reversed(story.links) for r in reversed(link.all("saved")))
    return next((record for record in saves if record.get("path")), None)


def _age_s(saved_at: float | None) -> float | None:
    return None if saved_at is None else round(max(0.0, time.time() - saved_at))


def fell_back(story: Story) -> str:
    """That a command begins again where it was before; empty where it does not."""
    record = story.newest.last("fell_back") if story.newest is not None else None
    if record is None:
        return ""
    return (
        f"its steps begin at {record['step']}, after {record.get('before')} before: did it load "
        f"its checkpoint?"
    )


def _state(
    story: Story, running: JobInfo | None, pending: Sequence[JobInfo], known: bool
) -> tuple[str, str]:
    if story.completed:
        return "complete", ""
    if running is not None:
        if has_no_driver(running):
            return "running", "its driver is gone, so that no job will follow this one"
        ending = running.state is JobState.COMPLETING
        return "running", "ending" if ending else resized(story.links)
    newest = story.newest
    if newest is not None and story.ended(newest) is None and alive_elsewhere(newest, None, None):
        return "running", "in the foreground"
    decided = story.decided()
    if decided is not None and decided.get("decision") == "stop":
        calm = decided.get("cause") in ("cancelled", "stopped")
        return ("stopped" if calm else "failed"), str(decided.get("reason", ""))
    if story.cancelled:
        return "stopped", f"cancelled by {story.cancelled}"
    if pending and all(map(waits_in_vain, pending)):
        return "stalled", f"its jobs wait and nobody starts them: hpcresume resume {story.run.name}"
    if pending:
        return "waiting", waiting_words(pending[0].reason)
    if not known:
        return "waiting", ""
    if not story.links and not story.submissions:
        return "stalled", "never submitted"
    if story.driven:
        return "waiting", f"for `hpcresume drive {story.run.name}` to submit its next job"
    return "stalled", f"no job is queued and no reason recorded: hpcresume resume {story.run.name}"


def _live(run: RunDir) -> dict[str, Any]:
    """Progress as last published: a copy that may be lost, and that other tools may have edited."""
    content = files.read_json_or_none(run.trainer_state)
    return content if isinstance(content, dict) else {}


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else _whole(value)


def _whole(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 2**63 else None


def _step(live: Mapping[str, Any], last: Committed | None, state: str) -> int:
    """Live progress counts while it runs; otherwise the checkpoint is all there is."""
    shown = _whole(live.get("global_step")) or 0
    saved = last.step if last is not None else 0
    return max(shown, saved) if state in ("running", "complete") else saved or shown


def _loss(live: Mapping[str, Any]) -> float | None:
    history = live.get("log_history")
    for entry in reversed(history if isinstance(history, list) else []):
        loss = _number(entry.get("loss")) if isinstance(entry, dict) else None
        if loss is not None:
            return float(loss)
    return None


def _time_left(job: JobInfo | None) -> float | None:
    if job is None or job.end_time is None:
        return None
    return round(max(0.0, job.end_time - time.time()))


def _verified(story: Story, last: Committed | None) -> bool:
    """A committed checkpoint was hashed while written; a restored one was read back as well."""
    if last is None:
        return False
    return any(
        record.get("digest") == last.manifest.digest
        for link in reversed(story.links)
        for record in link.all("saved", "restored")
    )
