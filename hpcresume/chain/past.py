"""The past of a chain, as far as decisions need it, and what it has used up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from hpcresume.chain.causes import CRASHES, NODE_CAUSES, Cause, Failure

#: For how long a node that failed is remembered, in seconds.
_MEMORY_OF_NODES_S = 7 * 86400.0
#: Failures that make a node one to stay away from.
_FAILURES_OF_A_NODE = 2
#: No more nodes than these are avoided: a list that only grows would leave a chain without any.
MOST_EXCLUDED = 16


@dataclass(frozen=True, kw_only=True)
class PastLink:
    """One link of the history, as far as decisions need it."""

    number: int
    cause: Cause
    first_step: int
    committed_step: int
    """The newest step that stood committed when it ended."""
    failure: Failure | None = None
    at_step: int | None = None
    """The step that rank 0 was in by its last sign of life, where memory ran out without a word."""
    who: str = ""
    """Who cancelled it."""
    detail: str = ""
    """One sentence about the end: exit code, signal, node, words of the scheduler."""
    retries: int = 0
    """How often its command, which had failed, was started again since it last got further."""
    seconds: float = 0.0
    nodes: tuple[str, ...] = ()
    """The nodes that failed."""
    num_nodes: int = 1
    """How many nodes its job had."""
    ended_at: float = 0.0
    """Unix seconds."""

    @property
    def failed_step(self) -> int | None:
        """The step that it failed in, as well as that is known."""
        return self.at_step if self.failure is None else self.failure.step

    @property
    def progressed(self) -> bool:
        """Whether it committed a step that was not committed before."""
        return self.committed_step > self.first_step


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a history has used up: the numbers behind a decision."""

    links: int
    hours: float
    """Of the links together."""
    node_hours: float
    idle_links: int
    """Links at the end that committed no new step..."""
    crashes: int
    """...and how many of them the code may have ended."""

    def to_json(self) -> dict[str, float]:
        """For the journal."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def spent(history: Sequence[PastLink]) -> Spent:
    """What a history has used up."""
    idle = idle_links(history)
    return Spent(
        links=len(history),
        hours=sum(link.seconds for link in history) / 3600,
        node_hours=sum(link.seconds * link.num_nodes for link in history) / 3600,
        idle_links=len(idle),
        crashes=_crashes(history, idle),
    )


def _crashes(history: Sequence[PastLink], idle: Sequence[PastLink]) -> int:
    """Crashes since something new was committed, with those that ended no link."""
    last = history[-1] if history else None
    if last and not idle and last.retries and last.cause in CRASHES:
        # It got further, and crashed so often after that.
        return last.retries + 1
    return sum((link.cause in CRASHES) + link.retries for link in idle)


def idle_links(history: Sequence[PastLink]) -> Sequence[PastLink]:
    """The links at the end of a history that committed nothing new."""
    return history[len(history) - trailing(history, lambda link: not link.progressed) :]


def trailing(history: Sequence[PastLink], match: Callable[[PastLink], bool]) -> int:
    """How many links at the end of a history match."""
    count = 0
    for link in reversed(history):
        if not match(link):
            break
        count += 1
    return count


def bad_nodes(history: Sequence[PastLink], now: float) -> tuple[str, ...]:
    """The nodes that failed twice within the week before `now` (Unix seconds), newest first."""
    since = now - _MEMORY_OF_NODES_S
    counts: dict[str, int] = {}
    for link in reversed(history):
        if link.cause in NODE_CAUSES and link.ended_at > since:
            for node in dict.fromkeys(link.nodes):
                counts[node] = counts.get(node, 0) + 1
    bad = [node for node, count in counts.items() if count >= _FAILURES_OF_A_NODE]
    return tuple(bad[:MOST_EXCLUDED])
