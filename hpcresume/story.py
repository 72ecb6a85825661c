"""What the files of a run tell: its links, submissions and requests, read once.

Used by the supervisor, by `history` and `status`. Reads only; never imports torch.
"""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass

from hpcresume import files
from hpcresume.journal import LinkRecords, Record, known_step, read_chain, read_submissions
from hpcresume.run_dir import RunDir
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


def find_jobs(scheduler: Scheduler, run_id: str) -> list[JobInfo]:
    """The living jobs of a run. Raises Unavailable."""
    return scheduler.find(token_prefix(run_id))


def user_name() -> str:
    """Who is asking."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
