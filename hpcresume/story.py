"""What the files of a run tell: its links, submissions and requests, read once.

Used by the supervisor, by `history` and `status`. Reads only; never imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcresume import files
from hpcresume.journal import (
    ChainGlance,
    LinkRecords,
    Record,
    known_step,
    read_chain,
    read_submissions,
)
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.choice import asking_scheduler
from hpcresume.scheduler.job import JobInfo, JobState, Scheduler
from hpcresume.scheduler.process import pid_alive
from hpcresume.scheduler.process_table import ProcessId

TOKEN = "hpcresume"
#: Linux gives no number above it.
_PID_LIMIT = 1 << 22


def token_prefix(run_id: str) -> str:
    """How the tokens of all jobs of a run begin."""
    return f"{TOKEN}:{run_id}:"


@dataclass(frozen=True)
class Story:
    """Everything that the files of a run tell, read once."""

    run: RunDir
    run_id: str
    links: Sequence[LinkRecords]
    submissions: list[Record]
    cancelled: str
    """Who asked for the end; empty if nobody."""

    @property
    def after_link(self) -> int:
        """Links up to this number were ended by an earlier submission; their stops are settled."""
        submitted = [r for r in self.submissions if r["kind"] == "submitted"]
        return max(_newest_link(submitted), self.reopened_after)

    @property
    def reopened_after(self) -> int:
        """Completions of links up to this number count no more: the run was made longer since."""
        return _newest_link([r for r in self.submissions if r.get("reopened") is True])

    @property
    def seen(self) -> str:
        """How the progress of a command is seen: steps, or time alone; empty where ranks train."""
        for link in reversed(self.links):
            record = link.last("restored")
            if record is not None:
                return str(record.get("seen", ""))
        return ""

    @property
    def driven(self) -> bool:
        """Whether `hpcresume drive` submits its jobs, one after the other."""
        submitted = [r for r in self.submissions if r["kind"] == "submitted"]
        way = submitted[-1].get("way") if submitted else None
        return isinstance(way, dict) and way.get("mode") == "drive"

    @property
    def newest(self) -> LinkRecords | None:
        """The newest link."""
        return self.links[-1] if self.links else None

    @property
    def completed(self) -> bool:
        """Whether training is complete: recorded by the newest link that trained.

        The one answer for everybody. A link's own `completed` record tells how that link ended,
        and stays true when the run is made longer; this does not.
        """
        for link in reversed(self.links):
            if link.number <= self.reopened_after:
                return False
            completed = link.last("completed")
            if completed:
                # A command leaves no model of ours; its own judgement stands.
                return "judged" in completed or self.run.final_model.is_dir()
            if link.last("restored"):
                return False
        return False

    def ended(self, link: LinkRecords) -> Record | None:
        """The record of a link's end: its supervisor's, or what a later link found out."""
        for other in reversed(self.links):
            if other.number < link.number:
                break
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

    @property
    def over(self) -> bool:
        """Whether no further link is to be waited for."""
        decided = self.decided()
        rests = decided is not None and decided.get("decision") != "continue"
        return self.completed or rests or bool(self.cancelled)

    def unclaimed(self) -> list[str]:
        """The jobs that were queued since the last submission, and whose links never began.

        Of those that were queued from a login node, only what came after the newest link counts.
        """
        starts = [n for n, r in enumerate(self.submissions) if r["kind"] == "submitted"]
        newest = self.newest.number if self.newest is not None else 0
        since = self.submissions[max(starts, default=0) :]
        records = [r for r in since if int(r.get("after_link", 0)) >= newest]
        for link in self.links:
            records += link.records if link.number > self.after_link else []
        claimed = {str(link.claim.get("job")) for link in self.links}
        queued = (str(r.get("queued_job", "")) for r in records if r["kind"] == "queued")
        return [id for id in dict.fromkeys(queued) if id and id not in claimed]

    def committed_step(self, link: LinkRecords) -> int:
        """The newest step that stood committed when a link had ended.

        A link that fell back to an older checkpoint begins below what was known before it.
        """
        return known_step([other for other in self.links if other.number <= link.number])


def _newest_link(records: Sequence[Record]) -> int:
    """The newest link that there was when one of these was recorded."""
    return max((int(r.get("after_link", 0)) for r in records), default=0)


def read_story(run: RunDir) -> Story:
    """Read a run's files."""
    links, submissions = read_chain(run), read_submissions(run)
    return Story(run, run.identify()["id"], links, submissions, cancelled_by(run))


def glance(run: RunDir) -> Story:
    """A run's story for who only wants to know how it stands: what nobody asks for is not read.

    See `ChainGlance`. Raises OSError later as well, when something is asked for.
    """
    submissions = read_submissions(run)
    return Story(run, run.identify()["id"], ChainGlance(run), submissions, cancelled_by(run))


def cancelled_by(run: RunDir) -> str:
    """Who asked for the end of a run; empty if nobody."""
    if not run.cancel.exists():
        return ""
    request = files.read_json_or_none(run.cancel)
    return str(request.get("by", "unknown")) if isinstance(request, dict) else "unknown"


def alive_elsewhere(link: LinkRecords, job: JobInfo | None, me: str | None) -> str | None:
    """Where a link without a recorded end still lives; None if it does not."""
    claim = link.claim
    where = str(claim.get("job") or "")
    if where and where != me and job is not None:
        if job.state in (JobState.RUNNING, JobState.SUSPENDED):
            return f"job {where} on {job.nodes or claim.get('host', '?')}"
        return None
    if (not where or claim.get("foreground")) and _lives_here(claim):
        return f"process {claim['pid']} on {claim['host']}"
    return None


def this_process() -> dict[str, Any]:
    """How a claim names its process: `born` tells it from a later one of the same number."""
    own = ProcessId.of(os.getpid())
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "born": None if own is None else own.born,
    }


def _lives_here(claim: Mapping[str, Any]) -> bool:
    pid, host, born = claim.get("pid"), claim.get("host"), claim.get("born")
    if host != os.uname().nodename or type(pid) is not int or not 0 < pid < _PID_LIMIT:
        return False
    return ProcessId(pid, born, host).alive() if isinstance(born, str) else pid_alive(pid)


def waits_in_vain(job: JobInfo) -> bool:
    """Whether a job of the local backend waits, and no driver is there to start it."""
    return job.state is JobState.PENDING and has_no_driver(job)


def has_no_driver(job: JobInfo) -> bool:
    """Whether a job of the local backend has lost its driver."""
    return job.reason == "DriverGone"


def live_jobs(run: RunDir, environ: Mapping[str, str], me: str | None = None) -> str:
    """Where a run lives now besides job `me`, as words; empty if nowhere. Raises Unavailable."""
    story = read_story(run)
    scheduler = asking_scheduler(run, environ)
    if scheduler is not None:
        jobs = [job for job in find_jobs(scheduler, story.run_id) if job.id != me]
        words = [
            f"job {job.id} ({job.raw_state or job.state.value})"
            for job in jobs
            if not waits_in_vain(job)
        ]
        if words:
            return ", ".join(words)
    newest = story.newest
    if newest is not None and story.ended(newest) is None:
        return alive_elsewhere(newest, None, None) or ""
    return ""


def find_jobs(scheduler: Scheduler, run_id: str) -> list[JobInfo]:
    """The living jobs of a run. Raises Unavailable."""
    return scheduler.find(token_prefix(run_id))


def user_name() -> str:
    """Who is asking."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def resized(links: Sequence[LinkRecords]) -> str:
    """That the newest link has another number of ranks than the one before; empty where not."""
    sizes = [(link.number, size) for link in links if (size := link.claim.get("num_tasks"))]
    if len(sizes) < 2 or sizes[-1][1] == sizes[-2][1] or sizes[-1][0] != links[-1].number:
        return ""
    (number, before), (_, now) = sizes[-2:]
    return f"{now} rank{'s' * (now != 1)}, after {before} in link {number}"
