"""The local driver: starts a run's jobs as real processes, and ends them as Slurm would.

A time limit, a signal before it, SIGTERM, some seconds of grace, SIGKILL for whatever is left;
after that, not before, the jobs that wait for this one. Called by the command line, in the
foreground or in a process of its own (`local.spawn_detached`). All that must outlive the driver
stands in the job files, so that the next one can go on where a killed one stopped.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpcresume.errors import RunLive
from hpcresume.files import write_all
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import process
from hpcresume.scheduler.driver_file import only_driver
from hpcresume.scheduler.job import JobState
from hpcresume.scheduler.local_queue import (
    KEY_VARIABLE,
    JobFiles,
    JobRecord,
    QueuedJob,
    user_name,
)
from hpcresume.scheduler.process_table import ProcessId, family, send, session_leader
from hpcresume.signals import hints_ignored

log = logging.getLogger(__name__)

_TICK_S = 0.05
_RETRY_S = 1.0
#: A shell's word for a command that could not be started.
_NOT_STARTED = 127


def drive(
    run: RunDir,
    grace_s: float,
    *,
    on_tick: Callable[[], None] | None = None,
    interrupted: Callable[[], bool],
) -> None:
    """Serve the run's jobs until none is pending or running.

    When `interrupted()` turns true all of them are cancelled, pending ones first. `grace_s` lies
    between SIGTERM and SIGKILL. Raises RunLive where another driver serves the run.
    """
    with only_driver(run):
        _serve(run, grace_s, on_tick, interrupted)
    # Who submits a job and sees a living driver relies on it. If that was in our last moment,
    # nobody else will serve the job.
    while not interrupted() and _left_over(run):
        try:
            with only_driver(run):
                _serve(run, grace_s, on_tick, interrupted)
        except RunLive:
            return


def _serve(
    run: RunDir,
    grace_s: float,
    on_tick: Callable[[], None] | None,
    interrupted: Callable[[], bool],
) -> None:
    driver = _Driver(JobFiles(run.jobs), grace_s)
    stop = False
    while True:
        stop = stop or interrupted()
        pause_s = _TICK_S
        try:
            if not driver.tick(stop=stop):
                return
        except OSError as error:
            # A full disk must not take the running job along. What was not said is said later.
            log.warning("The local driver of %s cannot go on yet: %s", run.path, error)
            pause_s = _RETRY_S
        if on_tick is not None:
            on_tick()
        time.sleep(pause_s)


def _left_over(run: RunDir) -> bool:
    jobs = JobFiles(run.jobs)
    try:
        ids = jobs.ids(jobs.names())
    except FileNotFoundError:
        return False
    return any(not jobs.read_record(id).over and jobs.read_job(id) for id in ids)


@dataclass
class _Served:
    """A job that is not over, as the driver holds it."""

    id: str
    job: QueuedJob
    record: JobRecord
    written: JobRecord
    """The record as it stands in the file."""
    poll: Callable[[], int | None] | None = None
    """Its exit code, when it has one; only a child's can be known, not that of an adopted job."""
    hinted: bool = False
    """The signal before the limit was sent."""
    dying: list[ProcessId] = field(default_factory=list)
    """Who was signalled to end."""
    kill_at: float = 0.0
    killed: bool = False
    wish: tuple[float, float] | None = None
    """The wish for a delay that `begin_at` (monotonic) was computed from."""
    begin_at: float = 0.0


class _Driver:
    def __init__(self, jobs: JobFiles, grace_s: float) -> None:
        self._jobs = jobs
        self._grace_s = grace_s
        self._living: dict[str, _Served] = {}
        self._over: set[str] = set()

    def tick(self, *, stop: bool) -> bool:
        """Look at every job once; returns whether any is pending or running."""
        try:
            names = self._jobs.names()
        except FileNotFoundError:
            # Somebody removed the run: nothing can be said any more, but processes can be ended.
            names, stop = frozenset(), True
        self._learn(names)
        for served in self._pending():
            if who := self._cancelled_by(served, names, stop):
                served.record = JobRecord(
                    state=JobState.CANCELLED, over=True, cancelled_by=who, end_time=time.time()
                )
        for served in self._living.values():
            if not served.record.over:
                self._watch(served, self._cancelled_by(served, names, stop))
        # The end of a job is on disk before a job that waited for it can ask.
        for served in list(self._living.values()):
            self._write(served)
        for served in self._pending():
            if self._may_start(served, names):
                self._start(served)
        return bool(self._living)

    def _pending(self) -> list[_Served]:
        return [one for one in self._living.values() if one.record.state is JobState.PENDING]

    def _cancelled_by(self, served: _Served, names: frozenset[str], stop: bool) -> str:
        if self._jobs.cancel(served.id).name in names:
            return self._jobs.cancelled_by(served.id)
        return user_name() if stop else ""

    def _learn(self, names: frozenset[str]) -> None:
        for id in self._jobs.ids(names):
            if id in self._living or id in self._over:
                continue
            job = self._jobs.read_job(id)
            if job is None:
                continue
            record = self._jobs.read_record(id)
            if record.over:
                self._over.add(id)
            else:
                self._living[id] = self._adopted(_Served(id, job, record, record))

    def _adopted(self, served: _Served) -> _Served:
        """A job as a driver before this one left it, perhaps in the middle of starting it."""
        if served.record.state is not JobState.PENDING:
            if served.record.process is None:
                leader = session_leader(family(None, served.job.mark))
                served.record = replace(served.record, process=leader)
            served.kill_at = time.monotonic() + self._grace_s
            log.info("Job %s goes on under this driver.", served.id)
        return served

    def _may_start(self, served: _Served, names: frozenset[str]) -> bool:
        due = self._due(served, names)
        return due and all(self._ended(id) for id in served.job.after)

    def _ended(self, id: str) -> bool:
        # A look into the folder may have missed a job whose successor it saw; no job at all is
        # what Slurm, too, takes for one that ended long ago.
        return id in self._over or (id not in self._living and self._jobs.read_job(id) is None)

    def _due(self, served: _Served, names: frozenset[str]) -> bool:
        if served.wish is None or self._jobs.update(served.id).name in names:
            wish = self._jobs.begin(served.id, served.job)
            if wish != served.wish:
                asked, delay_s = wish
                # At most the delay itself, where the clock was set back since.
                left_s = min(max(asked + delay_s - time.time(), 0.0), delay_s)
                served.wish, served.begin_at = wish, time.monotonic() + left_s
        return time.monotonic() >= served.begin_at

    def _start(self, served: _Served) -> None:
        id, job, now = served.id, served.job, time.time()
        record = JobRecord(state=JobState.RUNNING, start_time=now)
        if job.time_s is not None:
            limit = time.monotonic() + job.time_s
            record = replace(record, end_time=now + job.time_s, limit_monotonic=limit)
        # Said before it is done: a driver that dies in between must not be followed by one that
        # starts the job a second time. The next one finds the process by its mark.
        self._jobs.write_record(id, record)
        served.record = served.written = record
        try:
            served.poll, pid = _spawn(id, job, record.end_time)
        except (OSError, ValueError) as error:
            _tell(id, job, f"hpcresume: job {id} could not be started: {error}")
            served.record = replace(
                record,
                state=JobState.FAILED,
                over=True,
                exit_code=_NOT_STARTED,
                end_time=time.time(),
            )
        else:
            log.info("Job %s runs, process %d.", id, pid)
            served.record = replace(record, process=ProcessId.of(pid))
        self._write(served)

    def _watch(self, served: _Served, cancelled_by: str) -> None:
        """Move a running or dying job on."""
        record, job, now = served.record, served.job, time.monotonic()
        if record.state is JobState.PENDING:
            return
        gone, code = _exit(served)
        if record.state is JobState.RUNNING:
            limit = record.limit_monotonic
            if cancelled_by:
                record = replace(record, state=JobState.CANCELLED, cancelled_by=cancelled_by)
            elif gone:
                state = JobState.COMPLETED if code == 0 else JobState.FAILED
                record = replace(record, state=state, lost=code is None)
            elif limit is not None and now >= limit:
                record = replace(record, state=JobState.TIMEOUT)
            elif limit is not None and job.signal_s and now >= limit - job.signal_s:
                self._hint(served)
            if record.state is not JobState.RUNNING:
                log.info("Job %s ends: %s.", served.id, record.state.value)
                served.record = record
                served.kill_at = now + self._grace_s
        if record.state is not JobState.RUNNING and self._cleared(served, gone, now):
            served.record = replace(
                record,
                over=True,
                end_time=time.time(),
                exit_code=code if code is not None and code >= 0 else None,
                exit_signal=-code if code is not None and code < 0 else None,
            )

    def _hint(self, served: _Served) -> None:
        leader = served.record.process
        if leader is not None and not served.hinted:
            served.hinted = True
            send([leader], signal.SIGUSR2)

    def _cleared(self, served: _Served, gone: bool, now: float) -> bool:
        """Whether nothing of an ending job lives; what does is told to end, and later killed.

        To look through all processes is dear: it is done at the start, when the grace is over,
        and when all who were signalled have gone.
        """
        late = now >= served.kill_at
        if any(one.alive() for one in served.dying) and served.killed == late:
            return False
        served.dying = family(served.record.process, served.job.mark)
        served.killed = late
        send(served.dying, signal.SIGKILL if late else signal.SIGTERM)
        return gone and not served.dying

    def _write(self, served: _Served) -> None:
        if served.record != served.written:
            try:
                self._jobs.write_record(served.id, served.record)
            except FileNotFoundError:
                if self._jobs.path.exists():
                    raise
            served.written = served.record
        if served.record.over:
            del self._living[served.id]
            self._over.add(served.id)


def _exit(served: _Served) -> tuple[bool, int | None]:
    """Whether a job's first process is gone, and its code where that can be known."""
    if served.poll is not None:
        code = served.poll()
        return code is not None, code
    leader = served.record.process
    return leader is None or not leader.here or not leader.alive(), None


def _spawn(id: str, job: QueuedJob, end: float | None) -> tuple[Callable[[], int | None], int]:
    environ = dict(job.environment)
    environ.pop("HPCRESUME_JOB_END", None)
    environ.update({"HPCRESUME_JOB": id, "HPCRESUME_SCHEDULER": "local", KEY_VARIABLE: job.key})
    if end is not None:
        environ["HPCRESUME_JOB_END"] = f"{end:.3f}"
    output = _open_log(id, job)
    try:
        with hints_ignored():
            child = process.spawn(
                job.argv,
                environ=environ,
                output=output,
                cwd=Path(job.workdir),
                new_session=True,
            )
    finally:
        os.close(output)
    return child.poll, child.pid


def _open_log(id: str, job: QueuedJob) -> int:
    pattern = Path(job.log)
    # Only in the name: a directory of the user's may well be called 100%job.
    path = pattern.with_name(pattern.name.replace("%j", id))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _tell(id: str, job: QueuedJob, text: str) -> None:
    log.error("%s", text)
    try:
        output = _open_log(id, job)
    except OSError:
        return
    try:
        write_all(output, text.encode(errors="replace") + b"\n")
    finally:
        os.close(output)
