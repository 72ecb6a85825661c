"""Our own scheduler of real processes on one machine, for laptops, rehearsals and tests.

`LocalScheduler` is what the chain talks to: it reads and writes job files, from any process of
the run. The jobs are started and ended by a driver (`driver.drive`), of which a run has one.
Queue, dependency, limit, signal, cancellation and states behave like Slurm's. Nodes, requeue and
batch scripts have no meaning here.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence

from hpcresume.errors import SubmissionRejected, Unavailable
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import process
from hpcresume.scheduler.driver_file import driver_alive
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState
from hpcresume.scheduler.local_queue import (
    KEY_VARIABLE,
    JobFiles,
    JobRecord,
    QueuedJob,
    new_key,
    user_name,
)
from hpcresume.scheduler.process_table import family, send

_POLL_S = 0.05


class LocalScheduler:
    """The jobs of one run on this machine; see `scheduler.job.Scheduler`.

    `command` is what every job executes. `grace_s` lies between SIGTERM and SIGKILL where no
    driver is alive and `cancel` must end processes itself.
    """

    name = "local"

    def __init__(self, run: RunDir, command: Sequence[str], grace_s: float = 10.0) -> None:
        self.run = run
        self.command = tuple(command)
        self.grace_s = grace_s
        self._jobs = JobFiles(run.jobs)

    def submit(self, spec: JobSpec, after: Sequence[str] = ()) -> str:
        """Queue a job that may start when all of `after` have ended, however; returns its id.

        An id in `after` that nobody knows counts as ended. Raises Unavailable.
        """
        job = QueuedJob(
            name=spec.name,
            token=spec.token,
            after=tuple(after),
            argv=self.command,
            time_s=spec.time_s,
            signal_s=spec.signal_s,
            begin_delay_s=spec.begin_delay_s,
            log=str(spec.log),
            workdir=str(spec.workdir),
            environment=dict(spec.environment),
            key=new_key(),
            submit_time=time.time(),
            uid=os.getuid(),
        )
        try:
            return self._jobs.add(job)
        except OSError as error:
            raise self._unavailable(error) from error

    def find(self, token_prefix: str) -> list[JobInfo]:
        """The living jobs whose token begins so, oldest first."""
        try:
            ids = self._jobs.ids(self._jobs.names())
        except OSError as error:
            raise self._unavailable(error) from error
        driven = driver_alive(self.run)
        infos = (self._info(id, driven) for id in ids if not self._jobs.read_record(id).over)
        return [one for one in infos if one.state.alive and one.token.startswith(token_prefix)]

    def state(self, ids: Sequence[str]) -> dict[str, JobInfo]:
        """What became of jobs; an id that nobody knows is UNKNOWN."""
        # Before the records are read: a driver that leaves writes its last word first.
        driven = driver_alive(self.run)
        return {id: self._info(id, driven) for id in ids}

    def end_time(self, id: str) -> float | None:
        """Unix time at which a RUNNING job reaches its limit; None when unlimited or not running.

        Where the clock was set since the job started, the time moves with it.
        """
        info = self.state([id])[id]
        return info.end_time if info.state is JobState.RUNNING else None

    def update(
        self,
        id: str,
        *,
        exclude_nodes: Sequence[str] | None = None,
        begin_delay_s: int | None = None,
        requeue: bool = False,
    ) -> None:
        """Let a pending job begin so many seconds from now.

        There is one node, which cannot be excluded: `exclude_nodes` changes nothing. Raises
        SubmissionRejected for a job that is not pending, and for `requeue`.
        """
        if requeue:
            raise SubmissionRejected(
                "the local backend has no requeue; set chain.mode to prequeue or resubmit."
            )
        if begin_delay_s is None:
            return
        state = self.state([id])[id].state
        if state is not JobState.PENDING:
            raise SubmissionRejected(
                f"Local job {id} is {state.value}: only a pending job can begin at another time."
            )
        try:
            self._jobs.ask_begin(id, begin_delay_s, time.time())
        except OSError as error:
            raise self._unavailable(error) from error

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs; ended or unknown ids are no error. Returns at once where a driver is alive.

        Without one the processes of a running job are ended here, which takes up to `grace_s`.
        """
        living = [info for info in self.state(ids).values() if info.state.alive]
        # Pending ones first and the newest of them before those that it waits for, so that none
        # is released before its own request is read.
        living.sort(key=lambda info: (info.state is not JobState.PENDING, -int(info.id)))
        try:
            for info in living:
                self._jobs.ask_cancel(info.id, user_name())
        except OSError as error:
            raise self._unavailable(error) from error
        if not driver_alive(self.run):
            for info in living:
                self._end(info.id)

    def _end(self, id: str) -> None:
        job, record = self._jobs.read_job(id), self._jobs.read_record(id)
        if job is None or record.state is JobState.PENDING or record.over:
            return
        kill_at = time.monotonic() + self.grace_s
        send(family(record.process, job.mark), signal.SIGTERM)
        while left := family(record.process, job.mark):
            if time.monotonic() >= kill_at:
                send(left, signal.SIGKILL)
            time.sleep(_POLL_S)

    def _info(self, id: str, driven: bool) -> JobInfo:
        job = self._jobs.read_job(id)
        if job is None:
            return JobInfo(id=id, state=JobState.UNKNOWN)
        record = self._jobs.read_record(id)
        return _info(id, job, record, self._jobs.cancelled_by(id), driven)

    def _unavailable(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"The local queue {self.run.jobs} cannot be used: {error.strerror or error}. "
            "Mend that, and try again."
        )


def _info(id: str, job: QueuedJob, record: JobRecord, cancelled_by: str, driven: bool) -> JobInfo:
    """What the files of a job mean, together with whether a driver is there to act on them."""
    state, lost = record.state, record.lost
    if not record.over:
        watched = driven or (record.process is not None and record.process.alive())
        if state in (JobState.PENDING, JobState.RUNNING) and cancelled_by:
            state = JobState.CANCELLED
        elif state is JobState.RUNNING and not watched:
            state, lost = JobState.FAILED, True
        elif state.ended and state is not JobState.CANCELLED and watched:
            state = JobState.COMPLETING
    return JobInfo(
        id=id,
        state=state,
        raw_state="lost" if lost else state.value.upper(),
        reason="DriverGone" if state.alive and not driven else "",
        token=job.token,
        nodes=record.process.host if record.process else "",
        cancelled_by=record.cancelled_by or cancelled_by if state is JobState.CANCELLED else "",
        exit_code=record.exit_code,
        exit_signal=record.exit_signal,
        start_time=record.start_time,
        end_time=_end_time(record, state),
    )


def _end_time(record: JobRecord, state: JobState) -> float | None:
    if record.over:
        return record.end_time
    if state is not JobState.RUNNING:
        return None
    if record.limit_monotonic is not None and record.process and record.process.here:
        # The clock may have been set since; what is left of the limit has not changed.
        return time.time() + record.limit_monotonic - time.monotonic()
    return record.end_time


def spawn_detached(
    run: RunDir, argv: Sequence[str], environ: Mapping[str, str] = os.environ
) -> int:
    """Start a driver in a session of its own, where a closing terminal does not reach it.

    `argv` is a command that calls `drive`. Its output goes to `run.driver_log`. Returns its pid.
    """
    output = os.open(run.driver_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    # Started within a job, it must not be taken for a part of that job and end with it.
    clean = {name: value for name, value in environ.items() if name != KEY_VARIABLE}
    try:
        child = process.spawn(argv, environ=clean, output=output, new_session=True)
    finally:
        os.close(output)
    # Nobody here waits for it, but a caller that outlives it must not keep a zombie.
    threading.Thread(target=child.wait, daemon=True).start()
    return child.pid
