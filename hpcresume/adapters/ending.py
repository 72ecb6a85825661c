"""How an attempt at a command ended, and what that means for its link. Pure."""

from __future__ import annotations

import signal
from dataclasses import dataclass

COMPLETED, STOPPED, HANDED_OVER, FAILED = "completed", "stopped", "handed over", "failed"
#: How people, and what schedulers send, end a program that means no harm.
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a command, ended."""

    code: int
    """Its exit code, negative for a signal."""
    told: str = ""
    """Why it was told to leave; empty where it was not."""
    killed: bool = False
    """Whether it had to be killed, having been told."""
    took_s: float = 0.0
    """From being told to its end; 0 where it was told nothing, or had left before."""
    ran_s: float = 0.0
    lines: tuple[str, ...] = ()
    """The last that it printed."""

    @property
    def exit_code(self) -> int:
        """As a shell tells it: 128 and the number for a signal."""
        return self.code if self.code >= 0 else 128 - self.code

    @property
    def words(self) -> str:
        """How it ended, and the last words of one that failed."""
        if self.code < 0:
            return f"signal {-self.code}"
        last = next((line.strip() for line in reversed(self.lines) if line.strip()), "")
        return f"exit code {self.code}" + (f": {last[:300]}" if last and self.code else "")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an attempt means: completed, stopped, handed over or failed, and why."""

    how: str
    reason: str


def judge(attempt: Attempt, *, done: str, missing: str) -> Verdict:
    """What an attempt means.

    `done` says why the command counts as done, `missing` what it lacks to be done; both are empty
    where nothing was named that could tell, and its exit code alone does.
    """
    if attempt.code == 0 and done:
        return Verdict(how=COMPLETED, reason=f"exit code 0, and {done}")
    if attempt.told:
        # It was asked to leave: with which code it does so is its own habit.
        return Verdict(how=STOPPED, reason=attempt.told)
    if attempt.code == 0 and missing:
        return Verdict(how=HANDED_OVER, reason=f"the command left with 0, but {missing}")
    if attempt.code == 0:
        return Verdict(how=COMPLETED, reason="exit code 0")
    return Verdict(how=FAILED, reason=attempt.words)


def may_have_been_told(code: int) -> bool:
    """Whether it ended as by a signal that may be on its way to its parent as well."""
    number = -code if code < 0 else code - 128
    return number in _POLITE
