"""A cluster in one thread: its clock, its queue, its accounting, and the lives of its jobs.

A job's life is a plain call of the production supervisor, which meets the cluster at every look at
the clock, every sleep, every record and every call of a client: at each of these moments it may be
killed, by an exception that nothing catches. While one job's node is lost, others run inside its
sleep; when it comes back it is as late as a node that was suspended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from faults import Plan

from hpcresume.errors import SubmissionRejected, Unavailable
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState
from hpcresume.signals import STOP_SIGNALS, SignalFlags

#: What the simulation's clock shows when it begins: Unix seconds.
EPOCH = 1_800_000_000.0
#: The monotonic clock's time then; above that of any real machine, which some objects begin with.
BOOTED = 1e9
#: How long a process sleeps at most without a look at anything.
_LONGEST_NAP_S = 5.0
#: What Slurm lets a requeued job wait.
_REQUEUE_S = 121.0
_CLIENT_TIMEOUT_S = 10.0
_MORE_GRACE_S = 30.0


class Killed(BaseException):
    """SIGKILL for all processes of a job."""


class Violation(AssertionError):
    """The chain did what it promises never to do."""


@dataclass
class Job:
    """A job in the queue's books."""

    id: str
    token: str
    after: tuple[str, ...]
    begin_at: float
    state: JobState = JobState.PENDING
    restarts: int = 0
    cancelled_by: str = ""
    ended_at: float = math.inf
    requeue: bool = False


@dataclass
class Life:
    """One start of a job, while it lasts."""

    job: Job
    fault: str
    began: float
    flags: SignalFlags = field(default_factory=SignalFlags)
    limit: float = math.inf
    fault_at: float = math.inf
    fault_moment: int = 0
    kill_at: float = math.inf
    kill_as: JobState = JobState.TIMEOUT
    moments: int = 0
    asleep: float = 0.0
    """For how long its node was lost."""
    overtaken_at: float | None = None
    """Its own time awake when another link was first found newer."""
    next_event: Callable[[], float] = lambda: math.inf


class Cluster:
    """The clock, the queue and the accounting."""

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.dice = plan.dice
        self.tell = tell
        self.elapsed = 0.0
        self.jobs: dict[str, Job] = {}
        self.lives: list[Life] = []
        self.faulty: Callable[[Life], None] = lambda life: None
        """Lets a life's fault happen; given by whoever knows the run."""
        self.may_die: Callable[[Life], bool] = lambda life: True
        """Whether a death now is a single fault; given likewise."""
        self.check_queueing: Callable[[], None] = lambda: None
        """Raises Violation where no job should be queued now; given likewise."""

    @property
    def life(self) -> Life:
        return self.lives[-1]

    # ---- the supervisor's surroundings -----------------------------------------------------

    def now(self) -> float:
        self.moment()
        return EPOCH + self.elapsed

    def monotonic(self) -> float:
        self.moment()
        return BOOTED + self.elapsed

    def sleep(self, seconds: float) -> None:
        """As long as asked, or as nothing happens: a loaded machine's sleep is late, too."""
        life = self.life
        events = (life.next_event(), life.fault_at, life.limit, life.kill_at)
        nap = min(*events, self.elapsed + _LONGEST_NAP_S)
        self.elapsed = max(self.elapsed + seconds, nap)
        self.moment()

    def spend(self, seconds: float) -> None:
        self.elapsed += seconds

    def moment(self) -> None:
        """Let happen what is due to the life that is going on."""
        if not self.lives:
            return
        life = self.life
        life.moments += 1
        if self.elapsed >= life.fault_at or life.moments == life.fault_moment:
            life.fault_at, life.fault_moment = math.inf, 0
            self.faulty(life)
        if self.elapsed >= life.limit:
            life.limit = math.inf
            self.end_softly(life, JobState.TIMEOUT)
        if self.elapsed >= life.kill_at:
            # Where the scheduler took no successor, a hasty end would be a second fault.
            life.kill_at = math.inf if self.may_die(life) else self.elapsed + _MORE_GRACE_S
            if life.kill_at == math.inf:
                self.kill(life, life.kill_as)

    def end_softly(self, life: Life, state: JobState, grace_s: float | None = None) -> None:
        """SIGTERM now, SIGKILL after the grace, and what the accounting will say then."""
        life.flags.note(STOP_SIGNALS[0])
        life.limit = math.inf
        life.kill_at = self.elapsed + (self.plan.grace_s if grace_s is None else grace_s)
        life.kill_as = state

    def kill(self, life: Life, state: JobState) -> None:
        self.tell(f"job {life.job.id} is killed: {state.value}")
        life.kill_as = state
        raise Killed(life.job.id)

    # ---- the queue -------------------------------------------------------------------------

    def add(self, token: str, after: Sequence[str], delay_s: float) -> Job:
        wait = delay_s + self.dice.uniform(0.5, 20)
        job = Job(str(len(self.jobs) + 1), token, tuple(after), self.elapsed + wait)
        self.jobs[job.id] = job
        return job

    def waiting(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.state is JobState.PENDING]

    def next_to_start(self) -> Job | None:
        """The next one that its dependencies let start; the clock goes on to its time."""
        ready = [
            job
            for job in self.waiting()
            if all(self.jobs[id].state.ended for id in job.after if id in self.jobs)
        ]
        return min(ready, key=lambda job: job.begin_at, default=None)

    def over(self, job: Job, state: JobState) -> None:
        if job.requeue:
            job.requeue = False
            job.state, job.restarts = JobState.PENDING, job.restarts + 1
            job.begin_at = self.elapsed + _REQUEUE_S
            self.tell(f"job {job.id} goes back into the queue")
            return
        if not job.state.ended:
            job.state = state
            job.ended_at = self.elapsed

    def cancel(self, job: Job, who: str) -> None:
        if job.state is JobState.PENDING:
            job.state, job.cancelled_by, job.ended_at = JobState.CANCELLED, who, self.elapsed
        elif not job.state.ended:
            job.cancelled_by = who
            job.ended_at = self.elapsed
            for life in self.lives:
                if life.job is job:
                    self.end_softly(life, JobState.CANCELLED)

    def silent(self) -> bool:
        return any(window.holds(self.elapsed) for window in self.plan.silent)


class SimulatedScheduler:
    """The clients, as one job's supervisor calls them; see `hpcresume.scheduler.job.Scheduler`."""

    name = "slurm"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._life = cluster.life

    def _call(self, *, commanding: bool = False) -> None:
        cluster = self._cluster
        cluster.moment()
        cluster.spend(0.1)
        if cluster.silent():
            cluster.spend(_CLIENT_TIMEOUT_S)
            raise Unavailable("the controller does not answer")
        if commanding and cluster.plan.refuses.holds(cluster.elapsed):
            raise SubmissionRejected("sbatch: error: Job violates accounting/QOS policy")

    def submit(self, spec: JobSpec, after: Sequence[str] = ()) -> str:
        cluster = self._cluster
        self._call(commanding=True)
        cluster.check_queueing()
        job = cluster.add(spec.token, after, spec.begin_delay_s)
        cluster.tell(f"job {self._life.job.id} queues job {job.id} after {', '.join(after)}")
        cluster.moment()
        if cluster.dice.random() < cluster.plan.loses_answers:
            cluster.spend(_CLIENT_TIMEOUT_S)
            raise Unavailable("sbatch gave no answer")
        return job.id

    def find(self, token_prefix: str) -> list[JobInfo]:
        self._call()
        living = [job for job in self._cluster.jobs.values() if job.token.startswith(token_prefix)]
        return [self._info(job) for job in living if job.state.alive]

    def state(self, ids: Sequence[str]) -> dict[str, JobInfo]:
        self._call()
        jobs = self._cluster.jobs
        unknown = JobState.UNKNOWN
        return {
            id: self._info(jobs[id]) if id in jobs else JobInfo(id=id, state=unknown) for id in ids
        }

    def _info(self, job: Job) -> JobInfo:
        state, cluster = job.state, self._cluster
        known = cluster.elapsed >= job.ended_at + cluster.plan.accounting_lag_s
        if state.alive and job.cancelled_by and known:
            state = JobState.CANCELLED
        elif state.ended and not known:
            state = JobState.UNKNOWN
        who = job.cancelled_by if state is JobState.CANCELLED else ""
        return JobInfo(id=job.id, state=state, token=job.token, nodes="n1", cancelled_by=who)

    def end_time(self, id: str) -> float | None:
        self._call()
        for life in self._cluster.lives:
            if life.job.id == id and life.limit < math.inf:
                return EPOCH + life.limit
        return None

    def update(
        self,
        id: str,
        *,
        exclude_nodes: Sequence[str] | None = None,
        begin_delay_s: int | None = None,
        requeue: bool = False,
    ) -> None:
        self._call(commanding=True)
        job = self._cluster.jobs[id]
        if requeue:
            job.requeue = True
            self._cluster.end_softly(self._life, JobState.COMPLETED)
        elif job.state is not JobState.PENDING:
            raise SubmissionRejected(f"job {id} is not pending")
        if begin_delay_s is not None:
            job.begin_at = self._cluster.elapsed + begin_delay_s

    def cancel(self, ids: Sequence[str]) -> None:
        self._call()
        for id in reversed(ids):
            self._cluster.cancel(self._cluster.jobs[id], "the chain")
