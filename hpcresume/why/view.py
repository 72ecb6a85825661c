"""What the sentences about a run are made of, and the words that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcresume.chain import Cause, PastLink
from hpcresume.journal import LinkRecords, Record
from hpcresume.scheduler.job import JobInfo
from hpcresume.status import RunStatus
from hpcresume.story import Story

#: Budgets that a user set, and may raise.
BUDGETS = frozenset({"max_links", "max_hours", "max_node_hours"})


@dataclass(frozen=True, kw_only=True)
class View:
    """A run as it is to be explained."""

    story: Story
    status: RunStatus
    past: Sequence[PastLink]
    """The links that have ended."""
    lives: bool
    """Whether the newest link is alive."""
    decided: Record
    """The decision that stands; empty where there is none."""
    settings: Mapping[str, Any]
    """The frozen configuration as plain values; empty where it cannot be read."""
    now: float
    """Unix seconds."""
    lost: Sequence[JobInfo]
    """Jobs that ended before their links began, as the scheduler tells."""
    called: str
    """What RUN is called in commands."""

    @property
    def shown(self) -> LinkRecords | None:
        """The link that the evidence is about: the newest, alive or ended."""
        return self.story.newest

    @property
    def last(self) -> PastLink | None:
        """How that link ended; None while it lives."""
        return self.past[-1] if self.past and not self.lives else None

    @property
    def cause(self) -> Cause:
        """Why the newest link that has ended did so."""
        return self.past[-1].cause if self.past else Cause.UNKNOWN

    @property
    def rule(self) -> str:
        """The row of the table of decisions that ended the chain; older journals have none."""
        return str(self.decided.get("rule", ""))

    @property
    def lost_step(self) -> int:
        """The step that the journals know as committed, where no checkpoint is left; else 0."""
        if self.status.checkpoint_step is not None or self.status.seen or not self.past:
            return 0
        return self.past[-1].committed_step


def node_of(link: LinkRecords) -> str:
    """Where a link runs, or ran."""
    return str(link.claim.get("nodes") or link.claim.get("host") or "?")


def told(past: PastLink) -> str:
    """A cause and its detail, without saying a thing twice."""
    word, detail = past.cause.value, past.detail.strip()
    if past.failure is not None and detail == past.failure.words:
        detail = f"{past.failure.type}: {past.failure.message}".strip().rstrip(":")
    who = f"by {past.who}" if past.cause is Cause.CANCELLED and past.who else ""
    told = " ".join(part for part in (word, who) if part)
    return f"{told}: {detail}" if detail and detail != word else told
