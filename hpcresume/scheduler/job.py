"""What a job is, in words that no scheduler owns, and the whole of what the chain asks of one.

Foreign states are translated once, in the backend that reads them; a word that nobody knows
becomes `JobState.UNKNOWN` and is never fatal.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hpcresume.scheduler.hardware import Hardware


class JobState(enum.Enum):
    """Where a job stands. The first four are alive, the others are ends, UNKNOWN is neither."""

    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    COMPLETING = "completing"
    COMPLETED = "completed"
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    NODE_FAIL = "node_fail"
    BOOT_FAIL = "boot_fail"
    OUT_OF_MEMORY = "out_of_memory"
    DEADLINE = "deadline"
    REQUEUED = "requeued"
    UNKNOWN = "unknown"

    @property
    def alive(self) -> bool:
        """Whether the job may still run, or runs."""
        return self in _ALIVE

    @property
    def ended(self) -> bool:
        """Whether the job will never run again."""
        return not self.alive and self is not JobState.UNKNOWN


_ALIVE = frozenset({JobState.PENDING, JobState.RUNNING, JobState.SUSPENDED, JobState.COMPLETING})


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """What the scheduler tells about one job; empty or None where it does not say."""

    id: str
    state: JobState
    raw_state: str = ""
    """The scheduler's own word, for people."""
    reason: str = ""
    """Why it waits, in the scheduler's word."""
    token: str = ""
    """The token that it was submitted with."""
    nodes: str = ""
    cancelled_by: str = ""
    """User name or uid of who cancelled it; "unknown" where the scheduler keeps no record."""
    exit_code: int | None = None
    exit_signal: int | None = None
    restarts: int = 0
    start_time: float | None = None
    """Unix seconds."""
    end_time: float | None = None
    """Unix seconds; while it runs: when the limit is reached."""


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job of a chain, ready to be submitted.

    What it executes is the scheduler's to know: Slurm has a launcher, the local one a command. A
    `script` that a user wrote (slurm/train.sbatch) takes the place of the rendered one.
    """

    name: str
    token: str
    run: Path
    """The run directory: also what the supervisor is told to continue."""
    log: Path
    """A pattern for the job's own output; %j is the job id. Its directory exists."""
    workdir: Path
    time_s: int | None = None
    time_min_s: int | None = None
    """The least that Slurm may lower `time_s` to, so that the job starts earlier."""
    deadline: float | None = None
    """Unix seconds: Slurm removes the job from the queue once it could not end before."""
    signal_s: int = 0
    """How long before the end the pre-timeout signal is wished for; 0: none."""
    begin_delay_s: int = 0
    exclude_nodes: tuple[str, ...] = ()
    hardware: Hardware = field(default_factory=Hardware)
    """The kind of node that is asked for (Slurm only)."""
    allow_requeue: bool = False
    """Slurm may restart the job itself (only in requeue mode)."""
    environment: dict[str, str] = field(default_factory=dict)
    """The whole environment of the submission, as frozen at submit."""
    script: Path | None = None
    script_options: tuple[str, ...] = ()
    """Real options of the first job of a user's own script, e.g. ("--partition=x", …)."""

    def too_late(self, now: float) -> bool:
        """Whether the job, begun at `now` (Unix seconds), could not end before its deadline."""
        shortest = self.time_min_s or self.time_s or 0
        return self.deadline is not None and now + shortest > self.deadline


class Scheduler(Protocol):
    """All that the chain needs of a scheduler; `slurm` and `local` are the two of them."""

    name: str

    def submit(self, spec: JobSpec, after: Sequence[str] = ()) -> str:
        """Queue a job that may start when all of `after` have ended, however; returns its id.

        Raises SubmissionRejected with the scheduler's words, or Unavailable when nothing
        answered and no job with the spec's token is found afterwards.
        """

    def find(self, token_prefix: str) -> list[JobInfo]:
        """The living jobs of this user whose token begins so, oldest first.

        Raises Unavailable."""

    def state(self, ids: Sequence[str]) -> dict[str, JobInfo]:
        """What became of jobs; an id that nobody knows is UNKNOWN. Raises Unavailable."""

    def end_time(self, id: str) -> float | None:
        """Unix time at which a RUNNING job reaches its limit; None when unlimited or not running.

        Raises Unavailable."""

    def update(
        self,
        id: str,
        *,
        exclude_nodes: Sequence[str] | None = None,
        begin_delay_s: int | None = None,
        requeue: bool = False,
    ) -> None:
        """Change a pending job, or put a running one back into the queue (`requeue`).

        Raises SubmissionRejected or Unavailable."""

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs, pending ones before running ones; ended or unknown ids are no error.

        Raises Unavailable."""
