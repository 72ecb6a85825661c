"""Slurm's own programs: how they are called, and what it means when they fail. Used by `slurm`."""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from hpcresume.errors import Unavailable
from hpcresume.scheduler import process, slurm_text
from hpcresume.scheduler.job import JobInfo, JobState

log = logging.getLogger(__name__)

_TIMEOUT_S = {"squeue": 10.0, "scontrol": 10.0, "sacct": 15.0, "sbatch": 60.0, "scancel": 15.0}
#: The accounting is asked about one job at most this often...
_RECORD_AGE_S = 2.0
#: ...and, when it gave no answer, about none for this long.
_RECORD_PAUSE_S = 60.0
#: A job that has just begun is in the accounting after this long at the latest; asked this often.
_NEW_RECORD_S = 20.0
_NEW_RECORD_PAUSE_S = 1.0


class SlurmClients:
    """Calls the clients from one environment, and remembers the ends that sacct told."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = process.scrubbed(environ) | {"SLURM_TIME_FORMAT": "%s"}
        self._records: dict[str, JobInfo] = {}
        self._asked: dict[str, float] = {}
        self._ask_records_after = 0.0
        self._complained = False

    def call(
        self, *argv: str, environ: Mapping[str, str] | None = None, text: str | None = None
    ) -> process.Completed:
        """What a client answered, a refusal too. Raises Unavailable where Slurm did not answer.

        The client is this machine's, also where `environ` was frozen on another one.
        """
        program = shutil.which(argv[0], path=self._environ.get("PATH")) or argv[0]
        done = process.run(
            [program, *argv[1:]],
            environ=environ or self._environ,
            timeout_s=_TIMEOUT_S[argv[0]],
            text=text,
        )
        complaint = slurm_text.words(done.err)
        unreached = done.code and slurm_text.says_no_answer(complaint)
        if done.timed_out or done.code == 127 or unreached:
            raise Unavailable(f"{argv[0]}: {complaint}. Try again later.")
        return done

    def squeue(self, *selection: str) -> list[JobInfo]:
        """Jobs in the queue, oldest first; those in hidden partitions are jobs as well."""
        done = self.call(
            "squeue", "--noheader", "--all", f"--format={slurm_text.QUEUE_FORMAT}", *selection
        )
        # Asked about a single job that is gone, squeue fails; among several it is left out.
        if done.code and "invalid job id" not in done.err.lower():
            raise Unavailable(f"squeue: {slurm_text.words(done.err)}.")
        return slurm_text.parse_queue(done.out)

    def living(self, token_prefix: str) -> list[JobInfo]:
        """The living jobs of this user whose token begins so, oldest first. Raises Unavailable."""
        jobs = self.squeue(f"--user={os.getuid()}")
        # A state that nobody knows is no end.
        living = [job for job in jobs if not job.state.ended]
        return [job for job in living if job.token.startswith(token_prefix)]

    def describe(self, id: str) -> dict[str, str] | None:
        """The controller's record of a job, which it keeps for some minutes after the end."""
        done = self.call("scontrol", "show", "job", id)
        return slurm_text.parse_job(done.out) if "JobId=" in done.out else None

    def forget(self, ids: Iterable[str]) -> None:
        """These jobs live again: what was recorded about an earlier life has no meaning."""
        for id in ids:
            self._records.pop(id, None)

    def newest_records(self, ids: Sequence[str]) -> dict[str, JobInfo]:
        """The newest life of jobs, as far as the accounting tells.

        An end is asked for once, anything else again after two seconds.
        """
        now = time.monotonic()
        due = [id for id in ids if self._is_due(id, now)]
        if due and now >= self._ask_records_after:
            self._asked |= dict.fromkeys(due, now)
            self._records |= {id: self._told(life[-1]) for id, life in self.records(due).items()}
        return {id: self._records[id] for id in ids if id in self._records}

    def _told(self, record: JobInfo) -> JobInfo:
        """A record with what only the controller knows of a failure: that it was a preemption."""
        if record.state is JobState.FAILED:
            with contextlib.suppress(Unavailable):
                if slurm_text.was_preempted(self.describe(record.id) or {}):
                    return replace(record, state=JobState.PREEMPTED)
        return record

    def _is_due(self, id: str, now: float) -> bool:
        if id in self._records and is_end(self._records[id]):
            return False
        return now - self._asked.get(id, -_RECORD_AGE_S) >= _RECORD_AGE_S

    def records(self, ids: Sequence[str]) -> dict[str, list[JobInfo]]:
        """Every life of jobs, oldest first; nothing where there is no accounting: said once."""
        complaint = "no answer"
        with contextlib.suppress(Unavailable):
            done = self.call(
                *("sacct", "--noheader", "--parsable2", "--duplicates", "--allusers"),
                *(f"--jobs={','.join(ids)}", f"--format={slurm_text.RECORD_FORMAT}"),
            )
            if not done.code:
                found = slurm_text.parse_records(done.out)
                return {id: [_named(life) for life in lives] for id, lives in found.items()}
            complaint = slurm_text.words(done.err)
        self._ask_records_after = time.monotonic() + _RECORD_PAUSE_S
        if not self._complained:
            self._complained = True
            log.warning("sacct: %s. Why a job ended is then less certain.", complaint)
        return {}

    def submit_line(self, id: str) -> str:
        """The command line that a job was submitted with; empty where nobody keeps it.

        The accounting hears of a job some seconds after that has begun: so long it is asked again.
        """
        patience_s = _NEW_RECORD_S
        while True:
            try:
                done = self.call(
                    *("sacct", "--noheader", "--parsable2", "--allocations"),
                    *(f"--jobs={id}", "--format=SubmitLine"),
                )
            except Unavailable:
                return ""
            line = done.out.strip()
            if done.code or line or patience_s <= 0:
                return "" if done.code else line
            time.sleep(_NEW_RECORD_PAUSE_S)
            patience_s -= _NEW_RECORD_PAUSE_S


def is_end(record: JobInfo) -> bool:
    """Whether a record tells how a job ended. REQUEUED means that the same id goes on."""
    return record.state.ended and record.state is not JobState.REQUEUED


def _named(job: JobInfo) -> JobInfo:
    """The job with the name of who cancelled it, where the uid has one here."""
    if not job.cancelled_by.isdigit():
        return job
    try:
        return replace(job, cancelled_by=pwd.getpwuid(int(job.cancelled_by)).pw_name)
    except KeyError:
        return job
