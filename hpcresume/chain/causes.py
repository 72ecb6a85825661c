"""Why a link ended: evidence in, a cause and a sentence about it out.

The words of causes stand in journals, which later code reads: a word is never given another
meaning, and one that is given up is translated in `cause_named`.
"""

from __future__ import annotations

import enum
import errno
import re
from dataclasses import dataclass

from hpcresume.scheduler.job import JobInfo, JobState


class Cause(enum.Enum):
    """Why a link ended, in the words of journals and of `hpcresume why`."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    DEADLINE = "deadline"
    HANDED_OVER = "handed over"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    EXPIRED = "expired"
    NODE_FAILURE = "node failure"
    BOOT_FAILURE = "boot failure"
    HOST_MEMORY = "out of host memory"
    GPU_MEMORY = "out of GPU memory"
    STORAGE = "storage"
    HANG = "hang"
    NON_FINITE = "non-finite"
    USER_CODE = "user code"
    KILLED = "killed"
    CONFIGURATION = "configuration"
    FENCED = "fenced"
    UNKNOWN = "unknown"


#: Ends that belong to a chain's normal life: they cost nothing, as long as they are not the
#: reason that nothing is ever committed.
PLANNED = frozenset({Cause.DEADLINE, Cause.HANDED_OVER, Cause.TIME_LIMIT, Cause.PREEMPTED})

#: Ends for which a node is to blame.
NODE_CAUSES = frozenset({Cause.NODE_FAILURE, Cause.BOOT_FAILURE})

#: Ends for want of memory.
MEMORY = frozenset({Cause.HOST_MEMORY, Cause.GPU_MEMORY})

#: Ends that the code itself may have caused: they are charged to the crash budget, and the same
#: one twice is blamed on the code.
CRASHES = frozenset({Cause.USER_CODE, Cause.KILLED, Cause.HANG} | MEMORY)

#: Types of a failure that has a cause of its own, however it was raised.
NON_FINITE, HANG = "NonFinite", "Hang"
#: A command that left with a code other than 0. What it means by the code nobody knows.
COMMAND = "CommandFailed"
_GPU_MEMORY_TYPE, _HOST_MEMORY_TYPE = "OutOfMemoryError", "MemoryError"
#: Their messages tell what was free, or for how long nothing came: never the same twice.
_CHANGING_WORDS = frozenset({HANG, _GPU_MEMORY_TYPE, _HOST_MEMORY_TYPE})
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The exception that ended a rank."""

    type: str
    message: str
    step: int
    rank: int = 0
    traceback: str = ""
    exit_code: int = 1
    metric: str = ""
    """What was not finite: "loss", "grad_norm"; empty where that is not the matter."""

    @property
    def signature(self) -> tuple[str, str, int]:
        """Equal for the same exception at the same step, whatever addresses it names."""
        message = "" if self.type in _CHANGING_WORDS else _ADDRESS.sub("0x", self.message)
        return self.type, message, self.step

    @property
    def words(self) -> str:
        """`ValueError: boom (rank 3, step 12)`."""
        where = f"rank {self.rank}, " if self.rank else ""
        told = f"{self.type}: {self.message}" if self.message.strip() else self.type
        return f"{told} ({where}step {self.step})"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a link that has ended."""

    job: JobInfo | None = None
    """The scheduler's word; None where it does not know, or is not asked."""
    completed: bool = False
    """A `completed` record stands."""
    judged: str = ""
    """Of a command: what told that it is done."""
    how: str = ""
    """What was recorded last of the ranks: completed, stopped, handed over, failed, hung, or
    nothing."""
    why: str = ""
    """What was recorded with that."""
    asked: str = ""
    """Why the ranks were told to stop."""
    failure: Failure | None = None
    exit_code: int | None = None
    """Of the ranks together, where their supervisor saw it."""
    user_stop: str = ""
    """Who asked for the end by `hpcresume cancel` or STOP."""
    last_words: str = ""
    """The last lines of rank 0's and the job's logs; they count only where a rank was killed."""


_BY_STATE = {
    JobState.TIMEOUT: Cause.TIME_LIMIT,
    JobState.DEADLINE: Cause.EXPIRED,
    JobState.PREEMPTED: Cause.PREEMPTED,
    JobState.REQUEUED: Cause.PREEMPTED,
    JobState.NODE_FAIL: Cause.NODE_FAILURE,
    JobState.BOOT_FAIL: Cause.BOOT_FAILURE,
    JobState.OUT_OF_MEMORY: Cause.HOST_MEMORY,
}


def cause_of(evidence: Evidence) -> tuple[Cause, str]:
    """Why a link ended, and a sentence of detail (may be empty). The first that matches wins."""
    job, failure = evidence.job, evidence.failure
    if evidence.completed:
        return Cause.COMPLETED, evidence.judged
    if evidence.user_stop:
        return Cause.CANCELLED, "hpcresume cancel"
    if job is not None and job.state is JobState.CANCELLED:
        return Cause.CANCELLED, f"job {job.id}"
    if failure is not None and failure.type == NON_FINITE:
        # The next link would come to it again, whatever befell the job besides.
        return Cause.NON_FINITE, failure.words
    if job is not None and job.state in _BY_STATE:
        return _BY_STATE[job.state], f"job {job.id}: {job.raw_state or job.state.value}"
    if failure is not None and failure.type == COMMAND:
        return _command_cause(evidence, failure)
    if failure is not None:
        return _lost_peer_cause(evidence, failure) or (_failure_cause(failure), failure.words)
    if evidence.how == "handed over":
        return Cause.HANDED_OVER, evidence.why
    if evidence.how == "hung":
        return Cause.HANG, "the ranks made no step any more"
    if evidence.how == "stopped":
        cause = Cause.STOPPED if evidence.asked.startswith("STOP") else Cause.DEADLINE
        return cause, evidence.asked
    failed = job is not None and job.state is JobState.FAILED
    if evidence.exit_code or failed:
        return _kill_cause(evidence)
    return Cause.UNKNOWN, "nothing is known about its end"


def cause_named(word: object, failure: Failure | None) -> Cause:
    """The cause that a journal names, in today's words or in those of older versions."""
    if word == "exception":
        return Cause.USER_CODE
    if word == "out of memory":
        on_gpu = failure is not None and failure.type == _GPU_MEMORY_TYPE
        return Cause.GPU_MEMORY if on_gpu else Cause.HOST_MEMORY
    try:
        return Cause(word)
    except ValueError:
        return Cause.UNKNOWN


# ---- an exception ----------------------------------------------------------------------------

#: How Python's OSError and Rust's libraries (safetensors) tell an error number.
_ERRNO = re.compile(r"^\[Errno (\d+)\]|\(os error (\d+)\)")
#: A disk that is full, or a file system that has gone away: NFS and Lustre give the later ones.
_STORAGE_ERRORS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EROFS,
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
    }
)
#: Memory that ran out below Python, as torch tells it by a plain RuntimeError.
_GPU_MEMORY_WORDS = re.compile(
    r"(CUDA|HIP|XPU) out of memory|(CUDA|HIP) error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
    r"Cuda failure.*out of memory"
)
_HOST_MEMORY_WORDS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|"
    # The kernel ends the largest process first: often a worker that reads data.
    r"DataLoader worker \(pid.*\) is killed by signal: Killed"
)
_HANG_WORDS = re.compile(
    r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (recv|send)"
)


def _failure_cause(failure: Failure) -> Cause:
    if failure.type == HANG or _HANG_WORDS.search(failure.message):
        return Cause.HANG
    if failure.exit_code == 9:
        return Cause.FENCED
    if failure.exit_code in (2, 4, 7):
        return Cause.CONFIGURATION
    if failure.type == _GPU_MEMORY_TYPE or _GPU_MEMORY_WORDS.search(failure.message):
        return Cause.GPU_MEMORY
    if failure.type == _HOST_MEMORY_TYPE or _HOST_MEMORY_WORDS.search(failure.message):
        return Cause.HOST_MEMORY
    found = _ERRNO.search(failure.message)
    number = int(found[1] or found[2]) if found else None
    if number == errno.ENOMEM:
        return Cause.HOST_MEMORY
    if failure.exit_code == 5 or number in _STORAGE_ERRORS:
        return Cause.STORAGE
    return Cause.USER_CODE


def _command_cause(evidence: Evidence, failure: Failure) -> tuple[Cause, str]:
    """As its last words tell, of which the failure holds the last one."""
    found, line = _last_words_cause(evidence)
    if line:
        return found, f"{failure.message}; the log says: {line}"
    if _HOST_MEMORY_WORDS.search(failure.message) or "MemoryError" in failure.message:
        return Cause.HOST_MEMORY, failure.message
    return Cause.USER_CODE, failure.message


# ---- a process that was ended from outside -----------------------------------------------------

#: Slurm's own "signal" for a task that reached the memory limit, and what srun makes of it.
_SLURM_OOM_SIGNAL = 125
_SRUN_OOM_CODE = 128 + _SLURM_OOM_SIGNAL
#: What slurmstepd, srun and the kernel print, and what a library prints before it aborts.
_LAST_WORDS = (
    (
        re.compile(
            r"oom[-_]kill event|Exceeded (job|step) memory limit|tasks? [\d,-]+: Out Of Memory"
        ),
        Cause.HOST_MEMORY,
    ),
    (_GPU_MEMORY_WORDS, Cause.GPU_MEMORY),
    (_HANG_WORDS, Cause.HANG),
    (re.compile(r"No space left on device|Disk quota exceeded|Stale file handle"), Cause.STORAGE),
)


def _kill_cause(evidence: Evidence) -> tuple[Cause, str]:
    words = _exit_words(evidence)
    job = evidence.job
    if evidence.exit_code == _SRUN_OOM_CODE or (
        job is not None and job.exit_signal == _SLURM_OOM_SIGNAL
    ):
        return Cause.HOST_MEMORY, f"{words}: a step reached the job's memory limit"
    cause, line = _last_words_cause(evidence)
    return cause, f"{words}; the log says: {line}" if line else words


#: What the ranks say that lose another one, which was killed and could say nothing.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|remote process exited|Broken pipe|"
    r"failed due to remote peer|socketProgress.*failed",
    re.IGNORECASE,
)


def _lost_peer_cause(evidence: Evidence, failure: Failure) -> tuple[Cause, str] | None:
    """Why the lost rank ended, where an exception tells no more than that one was lost."""
    if not _LOST_PEER.search(failure.message) or _failure_cause(failure) is not Cause.USER_CODE:
        return None
    cause, line = _last_words_cause(evidence)
    return cause, f"a rank was lost; {f'the log says: {line}' if line else failure.words}"


def _last_words_cause(evidence: Evidence) -> tuple[Cause, str]:
    """The cause that the logs tell, and the line that tells it; killed where none does."""
    for pattern, cause in _LAST_WORDS:
        for line in evidence.last_words.splitlines():
            if pattern.search(line):
                return cause, line.strip()[:200]
    return Cause.KILLED, ""


def _exit_words(evidence: Evidence) -> str:
    code, job = evidence.exit_code, evidence.job
    if code is not None and code > 128 and code != _SRUN_OOM_CODE:
        return f"a rank was ended by signal {code - 128}"
    if code:
        return f"a rank left with exit code {code}"
    assert job is not None
    signal = f", signal {job.exit_signal}" if job.exit_signal else ""
    return f"job {job.id} failed (exit code {job.exit_code or 0}{signal})"
