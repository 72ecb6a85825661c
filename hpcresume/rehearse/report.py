"""What a rehearsal saw of each link, and the verdict in words. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcresume.errors import ChainStopped, CheckpointError

#: The rules of `chain.decide` that are budgets.
_BUDGETS = frozenset(
    {"max_links", "max_hours", "max_node_hours", "no_progress_links", "max_crashes"}
)


@dataclass(frozen=True)
class End:
    """How a link is ended."""

    name: str
    told: str
    """What is said of it beforehand."""
    warned: bool
    """The training is told, and has time to save."""


PREEMPTION = End("preempted", "then is preempted: SIGTERM, a grace, SIGKILL", True)
TIME_LIMIT = End("time limit", "until the time limit of its job is near", True)
KILL = End("kill -9", "then its ranks are killed", False)
LAST = End("STOP", "to show that it goes on, and is stopped then", True)


def end_of_link(number: int) -> End:
    """The end of link 1, 2, 3…: the first is warned, because what it needs is measured in it."""
    return (PREEMPTION, TIME_LIMIT, KILL)[(number - 1) % 3]


@dataclass(frozen=True, kw_only=True)
class Played:
    """One link of a rehearsal, as its journals tell."""

    link: int
    end: str
    warned: bool
    first_step: int | None = None
    """The step that it began with; None where it did not come so far."""
    cut_at: int | None = None
    """The last step that it is known to have made."""
    committed: int = 0
    """The newest step that stood saved when it had ended."""
    expected: int = 0
    """The step that the links before had saved."""
    save_s: float | None = None
    """How long its last save took."""
    lead_s: float | None = None
    """How long before SIGKILL or the limit it was told to save."""
    completed: bool = False
    seen: str = ""
    """Of a command, which saves when it likes, how its progress is seen; see `Story.seen`."""
    fell_back: str = ""
    """Of a command: from which step to which it fell back."""
    failure: str = ""
    """The exception that ended it."""
    rule: str = ""
    """The rule by which the chain was ended."""
    reason: str = ""
    log: Path | None = None

    @property
    def over(self) -> bool:
        """Whether no further link can follow."""
        return self.completed or bool(self.trouble())

    @property
    def saved(self) -> bool:
        """Whether the end cost nothing that was trained, or only what an unwarned one may."""
        if self.completed or not self.warned or self.seen:
            return True
        return self.cut_at is not None and self.committed >= self.cut_at

    @property
    def lost(self) -> int:
        """Steps that the next link must train again."""
        return max(0, (self.cut_at or 0) - self.committed)

    def trouble(self) -> str:
        """Why a chain would not survive this; empty where it would."""
        if self.failure:
            return f"link {self.link} failed: {self.failure}"
        if self.rule:
            return f"the chain ended in link {self.link}: {self.reason}"
        if self.completed and self.first_step is not None:
            return ""
        if self.first_step is None:
            return (
                f"link {self.link} made no step: the training never came to `for batch in "
                f"session.steps(loader)`, which alone saves and can end a link"
            )
        if self.fell_back:
            return (
                f"link {self.link} fell back {self.fell_back}: the command did not load what it "
                f"had saved, or saves too seldom"
            )
        if self.first_step != self.expected:
            return f"link {self.link} began with step {self.first_step}, not {self.expected}"
        if not self.saved:
            within = "" if self.lead_s is None else f" within {self.lead_s:.0f} s"
            return (
                f"link {self.link} ({self.end}) was at step {self.cut_at} and had saved step "
                f"{self.committed} only: the training did not come to its next step boundary, or "
                f"its save not to an end,{within}"
            )
        return ""


@dataclass(frozen=True)
class Rehearsal:
    """All links of a rehearsal, and what follows from them."""

    played: tuple[Played, ...]
    kept: Path | None = None

    @property
    def trouble(self) -> str:
        """The first reason that this chain would not survive; empty where it would."""
        return next((found for played in self.played if (found := played.trouble())), "")

    @property
    def exit_code(self) -> int:
        """0 where the chain would survive, 8 where it used up a budget, 7 otherwise."""
        if not self.trouble:
            return 0
        budget = any(played.rule in _BUDGETS for played in self.played)
        return ChainStopped.exit_code if budget else CheckpointError.exit_code

    def lines(self) -> Iterator[str]:
        """The verdict for people."""
        if self.trouble:
            yield f"this chain would not survive: {self.trouble}"
            log = next((played.log for played in self.played if played.trouble()), None)
            if log is not None and self.kept is not None:
                yield f"  what it printed: {log}"
            elif self.kept is None:
                yield "  hint: --keep DIR leaves the logs"
        else:
            yield f"this chain would survive: {self._what_held()}"
        lost = sum(played.lost for played in self.played if not played.warned)
        own = next((played.seen for played in self.played if played.seen), "")
        if own and not self.trouble:
            yield "  note: what the command itself saves was not read; it decides where it goes on"
        elif lost and not self.trouble:
            steps = "1 step" if lost == 1 else f"{lost} steps"
            yield (
                f"  note: kill -9 cost {steps}, all since the last checkpoint: checkpoint.steps "
                f"and checkpoint.minutes say how many that may be"
            )
        if self.played and self.played[-1].completed:
            yield f"  note: the training was complete in link {self.played[-1].link}"
        if self.kept is not None:
            yield f"  the run is kept in {self.kept}"

    def _what_held(self) -> str:
        ends = [played.end for played in self.played if played.end != LAST.name]
        ends = ends[: len(self.played) - 1] or ends
        if len(self.played) == 1:
            return "the training was complete before any end, so that nothing was tried"
        count = "1 end" if len(ends) == 1 else f"{len(ends)} ends"
        return f"after {count} ({', '.join(ends)}) the next link went on from what was saved"

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value, the sentences included."""
        links = [
            {**asdict(played), "log": str(played.log), "saved": played.saved, "lost": played.lost}
            for played in self.played
        ]
        return {
            "survives": not self.trouble,
            "exit_code": self.exit_code,
            "links": links,
            "kept": None if self.kept is None else str(self.kept),
            "text": "\n".join(self.lines()),
        }
