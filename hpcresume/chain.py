"""What follows a link: a pure policy. Records of the past in, a decision with its reason out.

No disk, no clock, no scheduler: `link` gathers the history, `decide` reads the table of causes
from top to bottom (first match wins), `link` applies what it says.
"""

from __future__ import annotations

import enum
import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpcresume.scheduler.job import JobInfo, JobState


class Cause(enum.Enum):
    """Why a link ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    STOPPED = "stopped"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    NODE_FAILURE = "node failure"
    OUT_OF_MEMORY = "out of memory"
    STORAGE = "storage"
    EXCEPTION = "exception"
    KILLED = "killed"
    CONFIGURATION = "configuration"
    FENCED = "fenced"
    UNKNOWN = "unknown"


#: Ends that belong to a chain's normal life: they cost nothing, as long as they are not the
#: reason that nothing is ever committed.
PLANNED = frozenset({Cause.DEADLINE, Cause.TIME_LIMIT, Cause.PREEMPTED})

#: Ends that the code itself may have caused: they are charged to the crash budget, and the same
#: one twice is blamed on the code.
CRASHES = frozenset({Cause.EXCEPTION, Cause.KILLED, Cause.OUT_OF_MEMORY})

_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The exception that ended a rank."""

    type: str
    message: str
    step: int
    rank: int = 0
    traceback: str = ""
    exit_code: int = 1

    @property
    def signature(self) -> tuple[str, str, int]:
        """Equal for the same exception at the same step.

        Without the message where memory ran out: it tells how much was free just then.
        """
        return self.type, "" if self.type in _OUT_OF_MEMORY else self.message, self.step


@dataclass(frozen=True, kw_only=True)
class PastLink:
    """One link of the history, as far as decisions need it."""

    number: int
    cause: Cause
    first_step: int
    committed_step: int
    """The newest step that stood committed when it ended."""
    failure: Failure | None = None
    who: str = ""
    """Who cancelled it."""
    detail: str = ""
    """One sentence about the end: exit code, signal, node, words of the scheduler."""
    seconds: float = 0.0
    nodes: tuple[str, ...] = ()

    @property
    def progressed(self) -> bool:
        """Whether it committed a step that was not committed before."""
        return self.committed_step > self.first_step


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What a chain may use up."""

    max_links: int | None = None
    max_hours: float | None = None
    no_progress_links: int = 3
    max_crashes: int = 3


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done, and why; `reason` is a sentence for people."""

    kind: str
    """finished, stop or continue."""
    reason: str
    cause: Cause
    delay_s: int = 0
    exclude_nodes: tuple[str, ...] = ()


#: First and longest wait before the next link where the storage is the trouble, in seconds.
_STORAGE_DELAY_S = (30, 3600)


def decide(history: Sequence[PastLink], budgets: Budgets) -> Decision:
    """What follows the last link of a history, which must not be empty."""
    last = history[-1]
    stop = _terminal(last) or _out_of_budget(history, budgets) or _same_failure(history)
    if stop is not None:
        return stop
    cause = last.cause
    if cause is Cause.NODE_FAILURE:
        where = ", ".join(last.nodes) or "unknown"
        return _go_on(last, f"a node failed ({where}); on other nodes", exclude=last.nodes)
    if cause is Cause.STORAGE:
        # The wait grows while nothing is committed; a link that got further begins the row anew.
        row = _trailing(history, lambda link: link.cause is cause and not link.progressed) or 1
        delay = min(_STORAGE_DELAY_S[0] * 2 ** (row - 1), _STORAGE_DELAY_S[1])
        return _go_on(last, f"the storage failed: {last.detail}", delay_s=delay)
    if cause in PLANNED:
        return _go_on(last, f"{_PLANNED_WORDS[cause]}; step {last.committed_step} is committed")
    crashes = sum(link.cause in CRASHES for link in _idle(history))
    if crashes > budgets.max_crashes:
        return Decision(
            kind="stop",
            reason=f"{crashes} links failed without a newly committed step between them (allowed: "
            f"{budgets.max_crashes}); the last: {last.detail.strip() or cause.value}",
            cause=cause,
        )
    return _go_on(last, last.detail.strip() or f"the link ended: {cause.value}")


_PLANNED_WORDS = {
    Cause.DEADLINE: "the job's time was nearly over",
    Cause.TIME_LIMIT: "the job reached its time limit",
    Cause.PREEMPTED: "the job was preempted",
}


def _go_on(
    last: PastLink, reason: str, *, delay_s: int = 0, exclude: tuple[str, ...] = ()
) -> Decision:
    return Decision(
        kind="continue", reason=reason, cause=last.cause, delay_s=delay_s, exclude_nodes=exclude
    )


def _terminal(last: PastLink) -> Decision | None:
    if last.cause is Cause.COMPLETED:
        reason = f"training is complete at step {last.committed_step}"
        return Decision(kind="finished", reason=reason, cause=last.cause)
    if last.cause is Cause.CANCELLED:
        who = last.who or "unknown"
        reason = f"cancelled by {'user unknown' if who == 'unknown' else who}"
        if last.detail:
            reason += f" ({last.detail})"
        return Decision(kind="stop", reason=reason, cause=last.cause)
    if last.cause is Cause.STOPPED:
        return Decision(
            kind="stop", reason=last.detail.strip() or "stop was asked for", cause=last.cause
        )
    if last.cause is Cause.CONFIGURATION:
        message = last.failure.message if last.failure else last.detail
        reason = message.strip() or "the configuration or the checkpoint does not fit"
        return Decision(kind="stop", reason=reason, cause=last.cause)
    return None


def _out_of_budget(history: Sequence[PastLink], budgets: Budgets) -> Decision | None:
    last = history[-1]
    hours = sum(link.seconds for link in history) / 3600
    idle = len(_idle(history))
    if budgets.max_links is not None and len(history) >= budgets.max_links:
        reason = f"{len(history)} links are used up (max_links: {budgets.max_links})"
    elif budgets.max_hours is not None and hours >= budgets.max_hours:
        reason = f"{hours:.1f} hours are used up (max_hours: {budgets.max_hours:g})"
    elif idle >= budgets.no_progress_links:
        reason = (
            f"no newly committed step in {idle} links (no_progress_links: "
            f"{budgets.no_progress_links}); last committed: step {last.committed_step}; the last "
            f"link ended by {_with(last.cause.value, last.detail)}"
        )
    else:
        return None
    return Decision(kind="stop", reason=reason, cause=last.cause)


def _same_failure(history: Sequence[PastLink]) -> Decision | None:
    last = history[-1]
    failure = last.failure
    if failure is None or last.cause not in CRASHES or last.progressed:
        return None
    for link in reversed(history[:-1]):
        same = link.failure is not None and link.failure.signature == failure.signature
        if same and link.cause in CRASHES:
            return Decision(
                kind="stop",
                reason=f"the same exception at the same step, twice, without progress between: it "
                f"is the code ({failure.type}: {failure.message} in step {failure.step})",
                cause=last.cause,
            )
        if link.progressed:
            break
    return None


def _idle(history: Sequence[PastLink]) -> Sequence[PastLink]:
    """The links at the end of a history that committed nothing new."""
    return history[len(history) - _trailing(history, lambda link: not link.progressed) :]


def _trailing(history: Sequence[PastLink], match: Callable[[PastLink], bool]) -> int:
    count = 0
    for link in reversed(history):
        if not match(link):
            break
        count += 1
    return count


def _with(text: str, detail: str) -> str:
    return f"{text}: {detail}" if detail and detail != text else text


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about a link that has ended."""

    job: JobInfo | None = None
    """The scheduler's word; None where it does not know, or is not asked."""
    completed: bool = False
    """A `completed` record stands."""
    how: str = ""
    """What rank 0 recorded last: completed, stopped, failed, or nothing."""
    asked: str = ""
    """Why the ranks were told to stop."""
    failure: Failure | None = None
    exit_code: int | None = None
    """Of the ranks together, where their supervisor saw it."""
    user_stop: str = ""
    """Who asked for the end by `hpcresume cancel` or STOP."""


_BY_STATE = {
    JobState.TIMEOUT: Cause.TIME_LIMIT,
    JobState.DEADLINE: Cause.TIME_LIMIT,
    JobState.PREEMPTED: Cause.PREEMPTED,
    JobState.REQUEUED: Cause.PREEMPTED,
    JobState.NODE_FAIL: Cause.NODE_FAILURE,
    JobState.BOOT_FAIL: Cause.NODE_FAILURE,
    JobState.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
}


def cause_of(evidence: Evidence) -> tuple[Cause, str]:
    """Why a link ended, and a sentence of detail (may be empty)."""
    job = evidence.job
    if evidence.completed:
        return Cause.COMPLETED, ""
    if evidence.user_stop:
        return Cause.CANCELLED, "hpcresume cancel"
    if job is not None and job.state is JobState.CANCELLED:
        return Cause.CANCELLED, f"job {job.id}"
    if job is not None and job.state in _BY_STATE:
        return _BY_STATE[job.state], f"job {job.id}: {job.raw_state or job.state.value}"
    if evidence.failure is not None:
        return _failure_cause(evidence.failure), _failure_words(evidence.failure)
    if evidence.how == "stopped":
        cause = Cause.STOPPED if evidence.asked.startswith("STOP") else Cause.DEADLINE
        return cause, evidence.asked
    if evidence.exit_code:
        return Cause.KILLED, _exit_words(evidence.exit_code)
    if job is not None and job.state is JobState.FAILED:
        signal = f", signal {job.exit_signal}" if job.exit_signal else ""
        return Cause.KILLED, f"job {job.id} failed (exit code {job.exit_code or 0}{signal})"
    return Cause.UNKNOWN, "nothing is known about its end"


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


def _failure_cause(failure: Failure) -> Cause:
    if failure.exit_code == 9:
        return Cause.FENCED
    if failure.exit_code in (2, 4, 7):
        return Cause.CONFIGURATION
    if failure.type in _OUT_OF_MEMORY:
        return Cause.OUT_OF_MEMORY
    code = _ERRNO.search(failure.message)
    if failure.exit_code == 5 or (code is not None and int(code[1] or code[2]) in _STORAGE_ERRORS):
        return Cause.STORAGE
    return Cause.EXCEPTION


def _failure_words(failure: Failure) -> str:
    where = f"rank {failure.rank}, " if failure.rank else ""
    return f"{failure.type}: {failure.message} ({where}step {failure.step})"


def _exit_words(code: int) -> str:
    if code > 128:
        return f"a rank was ended by signal {code - 128}"
    return f"a rank left with exit code {code}"
