"""Every error that a user can meet, and the exit code that it leads to.

    HpcResumeError            1   unexpected
    ├── UsageError            2   the command line makes no sense
    ├── NotFound              3   no such run, file or log
    ├── ConfigError           4   a configuration or a train entry is wrong
    ├── Unavailable           5   scheduler or storage cannot be reached: try again
    ├── SubmissionRejected    6   the scheduler said no; its words verbatim
    ├── CheckpointError       7   a checkpoint is missing, broken, or does not fit
    ├── ChainStopped          8   a budget is spent, or no progress
    │   └── NonFinite         8   a loss or a gradient norm is not a finite number
    └── RunLive               9   the run is live elsewhere
        └── Fenced            9   a newer link has claimed the run

A message is one sentence or two: what happened and where, what was expected, what to do next.
Raised everywhere, printed by the command line alone.
"""

from __future__ import annotations


class HpcResumeError(Exception):
    """Base of all errors that are meant to be read by a user."""

    exit_code = 1


class UsageError(HpcResumeError):
    """The command line makes no sense."""

    exit_code = 2


class NotFound(HpcResumeError):
    """A run, a file or a log that was named is not there."""

    exit_code = 3


class ConfigError(HpcResumeError):
    """A configuration, a value on the command line, or a train entry is wrong."""

    exit_code = 4


class Unavailable(HpcResumeError):
    """The scheduler or the storage does not answer; the same call may work later."""

    exit_code = 5


def unavailable(error: OSError) -> Unavailable:
    """What a refusal of the operating system, met where none was expected, means to a user."""
    where = f"{error.filename}: " if error.filename else ""
    return Unavailable(f"{where}{error.strerror or error}. Mend it, and try again.")


class SubmissionRejected(HpcResumeError):
    """The scheduler refused a job; the message carries its words verbatim."""

    exit_code = 6


class CheckpointError(HpcResumeError):
    """A checkpoint is missing, damaged, or does not fit the objects that it is loaded into."""

    exit_code = 7


class ChainStopped(HpcResumeError):
    """The chain stopped for a recorded reason: a budget, or no progress."""

    exit_code = 8


class NonFinite(ChainStopped):
    """A logged metric was not finite in a step; no state after that step is kept."""

    def __init__(self, message: str, *, metric: str, step: int) -> None:
        super().__init__(message)
        self.metric = metric
        self.step = step


class RunLive(HpcResumeError):
    """Another link of the run is alive."""

    exit_code = 9


class Fenced(RunLive):
    """A newer link has claimed the run: this one must change nothing more."""
