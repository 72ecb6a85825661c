"""How a run stands: its journals, its checkpoints and the scheduler's word, put together.

Used by the supervisor to know what became of the links before it, and by the command line. Reads
only; never imports torch.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.chain import Cause, Evidence, Failure, PastLink, cause_of
from hpcresume.checkpoint.manifest import Committed
from hpcresume.checkpoint.store import Store
from hpcresume.journal import (
    LinkRecords,
    Record,
    known_step,
    lineage,
    read_chain,
    read_metrics,
    read_submissions,
)
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import node_names
from hpcresume.scheduler.job import JobInfo, JobState, Scheduler
from hpcresume.scheduler.process import pid_alive

TOKEN = "hpcresume"


def token_prefix(run_id: str) -> str:
    """How the tokens of all jobs of a run begin."""
    return f"{TOKEN}:{run_id}:"


@dataclass(frozen=True)
class Story:
    """Everything that the files of a run tell, read once."""

    run: RunDir
    run_id: str
    links: list[LinkRecords]
    submissions: list[Record]
    cancelled: str
    """Who asked for the end; empty if nobody."""

    @property
    def after_link(self) -> int:
        """Links up to this number were ended by an earlier submission; their stops are settled."""
        numbers = [
            int(r.get("after_link", 0)) for r in self.submissions if r["kind"] == "submitted"
        ]
        return max(numbers, default=0)

    @property
    def newest(self) -> LinkRecords | None:
        """The newest link."""
        return self.links[-1] if self.links else None

    @property
    def completed(self) -> bool:
        """Whether training is complete: recorded by the newest link that trained."""
        for link in reversed(self.links):
            if link.last("completed"):
                return self.run.final_model.is_dir()
            if link.last("restored"):
                return False
        return False

    def ended(self, link: LinkRecords) -> Record | None:
        """The record of a link's end: its supervisor's, or what a later link found out."""
        for other in reversed(self.links):
            for record in reversed(other.all("ended")):
                if "cause" in record and record.get("of", other.number) == link.number:
                    return record
        return None

    def decided(self) -> Record | None:
        """The decision that stands since the last submission, if the newest one ended the chain."""
        for link in reversed(self.links):
            if link.number <= self.after_link:
                return None
            record = link.last("decided")
            if record is not None:
                return record
            if link.last("restored") or link.last("started"):
                return None
        return None

    def committed_step(self, link: LinkRecords) -> int:
        """The newest step that stood committed when a link had ended.

        A link that fell back to an older checkpoint begins below what was known before it.
        """
        return known_step([other for other in self.links if other.number <= link.number])


def read_story(run: RunDir) -> Story:
    """Read a run's files."""
    cancelled = ""
    if run.cancel.exists():
        request = files.read_json_or_none(run.cancel)
        cancelled = str(request.get("by", "unknown")) if isinstance(request, dict) else "unknown"
    return Story(run, run.identify()["id"], read_chain(run), read_submissions(run), cancelled)


def past_links(story: Story, jobs: Mapping[str, JobInfo]) -> list[PastLink]:
    """The history since the last submission, for `chain.decide`.

    `jobs` are the scheduler's words on jobs whose links have no recorded end.
    """
    return [
        past_link(story, link, jobs.get(str(link.claim.get("job"))))
        for link in story.links
        if link.number > story.after_link
    ]


def past_link(story: Story, link: LinkRecords, job: JobInfo | None) -> PastLink:
    """One link: as its end was recorded, else as the evidence tells."""
    record = story.ended(link)
    restored = link.last("restored")
    committed = story.committed_step(link)
    first = int(restored["step"]) if restored else committed
    if record is not None:
        failure = record.get("failure")
        return PastLink(
            number=link.number,
            cause=_cause(record["cause"]),
            first_step=first,
            committed_step=committed,
            failure=Failure(**failure) if failure else None,
            who=str(record.get("who", "")),
            detail=str(record.get("detail", "")),
            seconds=float(record.get("seconds", 0.0)),
            nodes=tuple(record.get("nodes", ())),
        )
    evidence = gather(story.run, link, job, exit_code=None, user_stop=story.cancelled)
    cause, detail = cause_of(evidence)
    times = [float(r["t"]) for r in link.records] or [0.0]
    return PastLink(
        number=link.number,
        cause=cause,
        first_step=first,
        committed_step=committed,
        failure=evidence.failure,
        who=story.cancelled or (job.cancelled_by if job is not None else ""),
        detail=detail,
        seconds=max(times) - min(times),
        nodes=failed_nodes(link) if cause is Cause.NODE_FAILURE else (),
    )


def failed_nodes(link: LinkRecords) -> tuple[str, ...]:
    """The node to stay away from; of several nobody says here which one it was."""
    names = node_names(str(link.claim.get("nodes") or ""))
    return tuple(names) if len(names) == 1 else ()


def _cause(word: str) -> Cause:
    try:
        return Cause(word)
    except ValueError:
        return Cause.UNKNOWN


def gather(
    run: RunDir, link: LinkRecords, job: JobInfo | None, *, exit_code: int | None, user_stop: str
) -> Evidence:
    """The evidence on a link's end."""
    asked = link.last("stop_asked")
    how = next((str(r["how"]) for r in reversed(link.all("ended")) if "how" in r), "")
    return Evidence(
        job=job,
        completed=link.last("completed") is not None,
        how=how,
        asked=str(asked["reason"]) if asked else "",
        failure=first_failure(run, link.number, int(link.claim.get("num_tasks", 1))),
        exit_code=exit_code,
        user_stop=user_stop,
    )


def first_failure(run: RunDir, number: int, num_tasks: int) -> Failure | None:
    """The exception that ended a rank first, by the time of its record."""
    found = []
    for rank in range(num_tasks):
        content = files.read_json_or_none(run.link(number).rank_failure(rank))
        if isinstance(content, dict):
            found.append((float(content.pop("t", 0.0)), rank, content))
    return Failure(**min(found, key=lambda item: item[:2])[2]) if found else None


def alive_elsewhere(link: LinkRecords, job: JobInfo | None, me: str | None) -> str | None:
    """Where a link without a recorded end still lives; None if it does not."""
    claim = link.claim
    where = str(claim.get("job") or "")
    if where and where != me and job is not None:
        if job.state in (JobState.RUNNING, JobState.SUSPENDED):
            return f"job {where} on {job.nodes or claim.get('host', '?')}"
        return None
    if not where and claim.get("host") == socket.gethostname() and pid_alive(int(claim["pid"])):
        return f"process {claim['pid']} on {claim['host']}"
    return None


# ---- what the command line shows --------------------------------------------------------


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
    why: str = ""
    queued: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**self.__dict__, "path": str(self.path)}


#: `status --exit-code`
EXIT_CODES = {
    "complete": 0,
    "running": 10,
    "waiting": 11,
    "stopped": 12,
    "failed": 20,
    "stalled": 21,
}


def read_status(run: RunDir, jobs: Sequence[JobInfo] | None, note: str = "") -> RunStatus:
    """How a run stands.

    `jobs` are its living jobs; None where the scheduler did not answer, and `note` says so.
    """
    story = read_story(run)
    live = files.read_json_or_none(run.trainer_state) or {}
    over = lineage(run, story.links)
    committed = Store(run, story.run_id).committed(over)
    last = committed[-1] if committed else None
    running = next((j for j in jobs or () if j.state is not JobState.PENDING), None)
    pending = [j for j in jobs or () if j.state is JobState.PENDING]
    state, why = _state(story, running, pending, jobs is not None)
    newest = story.newest
    claim = newest.claim if newest is not None else {}
    return RunStatus(
        name=run.name,
        path=run.path,
        state=state,
        step=_step(live, last, state),
        total_steps=live.get("total_steps"),
        epoch=float(live.get("epoch", 0.0)),
        loss=_loss(run, live),
        link=newest.number if newest is not None else 0,
        job=running.id if running else (pending[0].id if pending else ""),
        node=running.nodes if running else str(claim.get("host", "")) if state == "running" else "",
        time_left_s=_time_left(running),
        checkpoint_step=last.step if last else None,
        checkpoint_age_s=round(max(0.0, time.time() - last.manifest.created)) if last else None,
        checkpoint_verified=_verified(story, last),
        why=" · ".join(part for part in (why, note) if part),
        queued=[job.id for job in pending],
    )


def _state(
    story: Story, running: JobInfo | None, pending: Sequence[JobInfo], known: bool
) -> tuple[str, str]:
    if story.completed:
        return "complete", ""
    if running is not None:
        return "running", "ending" if running.state is JobState.COMPLETING else ""
    newest = story.newest
    if newest is not None and story.ended(newest) is None and alive_elsewhere(newest, None, None):
        return "running", "in the foreground"
    decided = story.decided()
    if decided is not None and decided.get("decision") == "stop":
        calm = decided.get("cause") in (Cause.CANCELLED.value, Cause.STOPPED.value)
        return ("stopped" if calm else "failed"), str(decided.get("reason", ""))
    if story.cancelled:
        return "stopped", f"cancelled by {story.cancelled}"
    if pending:
        return "waiting", pending[0].reason
    if not known:
        return "waiting", ""
    if not story.links and not story.submissions:
        return "stalled", "never submitted"
    return "stalled", f"no job is queued and no reason recorded: hpcresume resume {story.run.name}"


def _step(live: Mapping[str, Any], last: Committed | None, state: str) -> int:
    """Live progress counts while it runs; otherwise the checkpoint is all there is."""
    shown = int(live.get("global_step", 0))
    saved = last.step if last is not None else 0
    return max(shown, saved) if state in ("running", "complete") else saved or shown


def _loss(run: RunDir, live: Mapping[str, Any]) -> float | None:
    for entry in reversed(live.get("log_history") or []):
        if isinstance(entry.get("loss"), (int, float)):
            return float(entry["loss"])
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
        for link in story.links
        for record in link.all("saved", "restored")
    )


def read_all_metrics(run: RunDir) -> list[Record]:
    """The merged metric log."""
    return list(read_metrics(run))


def find_jobs(scheduler: Scheduler, run_id: str) -> list[JobInfo]:
    """The living jobs of a run. Raises Unavailable."""
    return scheduler.find(token_prefix(run_id))
