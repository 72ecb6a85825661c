"""What follows a link: the table of decisions, from top to bottom; the first row that matches wins.

No disk, no clock, no chance, no scheduler: the time and a random number are passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hpcresume.chain.causes import COMMAND, CRASHES, MEMORY, NODE_CAUSES, PLANNED, Cause
from hpcresume.chain.past import MOST_EXCLUDED, PastLink, bad_nodes, idle_links, spent, trailing


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """What a chain may use up; the names are the keys of the configuration (`chain.max_links`)."""

    max_links: int | None = None
    max_hours: float | None = None
    max_node_hours: float | None = None
    no_progress_links: int = 3
    max_crashes: int = 3


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is to be done, and why; `reason` is a sentence for people."""

    kind: str
    """finished, stop or continue."""
    reason: str
    cause: Cause
    rule: str = ""
    """The row that ended the chain: a budget's key, same_exception, same_memory, non_finite…"""
    delay_s: int = 0
    exclude_nodes: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    """What the chain has used up by now; see `past.Spent`."""


#: First and longest wait before the next link where the storage is the trouble, in seconds...
_STORAGE_DELAY_S = (30, 3600)
#: ...and how much of it is added at random, so that many runs do not come back at once.
_JITTER = 0.25

_PLANNED_WORDS = {
    Cause.DEADLINE: "the job's time was nearly over",
    Cause.HANDED_OVER: "the command left before its time was over",
    Cause.TIME_LIMIT: "the job reached its time limit",
    Cause.PREEMPTED: "the job was preempted",
}
_MEMORY_WORDS = {
    Cause.HOST_MEMORY: "ask for more by scheduler.mem, or start fewer DataLoader workers",
    Cause.GPU_MEMORY: "take a smaller batch and accumulate more, or GPUs with more memory "
    "(scheduler.constraint)",
}


def decide(
    history: Sequence[PastLink], budgets: Budgets, *, now: float = 0.0, chance: float = 0.0
) -> Decision:
    """What follows the last link of a history, which must not be empty.

    `now` is Unix time; `chance`, from 0 to 1, spreads delays.
    """
    last = history[-1]
    for row in _ROWS:
        found = row(history, budgets)
        if found is not None:
            kind, rule, reason = found
            break
    else:
        kind, rule, reason = "continue", "", _why_it_goes_on(last)
    going = kind == "continue"
    return Decision(
        kind=kind,
        reason=reason,
        cause=last.cause,
        rule=rule,
        delay_s=_delay_s(history, chance) if going else 0,
        exclude_nodes=_excluded(history, now) if going else (),
        numbers=spent(history).to_json(),
    )


#: kind, rule, reason
_Found = tuple[str, str, str] | None


def _ended_for_good(history: Sequence[PastLink], _: Budgets) -> _Found:
    last = history[-1]
    detail = last.detail.strip()
    match last.cause:
        case Cause.COMPLETED:
            done = f"the command is done: {detail}" if detail else ""
            training = f"training is complete at step {last.committed_step}"
            return "finished", "completed", done or training
        case Cause.CANCELLED:
            who = "user unknown" if last.who in ("", "unknown") else last.who
            how = f" ({detail})" if detail else ""
            saved = f", saved at step {last.committed_step}" if last.committed_step else ""
            return "stop", "cancelled", f"cancelled by {who}{how}{saved}"
        case Cause.STOPPED:
            return "stop", "stopped", detail or "stop was asked for"
        case Cause.CONFIGURATION:
            message = last.failure.message if last.failure else detail
            words = message.strip() or "the configuration or the checkpoint does not fit"
            return "stop", "configuration", words
        case Cause.EXPIRED:
            words = "its job could not end before the --deadline it was submitted with"
            return "stop", "expired", f"{words} ({detail or last.cause.value})"
    return None


def _out_of_budget(history: Sequence[PastLink], budgets: Budgets) -> _Found:
    last, used = history[-1], spent(history)
    if budgets.max_links is not None and used.links >= budgets.max_links:
        links = f"{used.links} links are" if used.links > 1 else "1 link is"
        return "stop", "max_links", f"{links} used up (max_links: {budgets.max_links})"
    if budgets.max_hours is not None and used.hours >= budgets.max_hours:
        reason = f"{used.hours:.1f} hours are used up (max_hours: {budgets.max_hours:g})"
        return "stop", "max_hours", reason
    if budgets.max_node_hours is not None and used.node_hours >= budgets.max_node_hours:
        return (
            "stop",
            "max_node_hours",
            f"{used.node_hours:.1f} node-hours are used up (max_node_hours: "
            f"{budgets.max_node_hours:g})",
        )
    if used.idle_links >= budgets.no_progress_links:
        return (
            "stop",
            "no_progress_links",
            f"no newly committed step in {used.idle_links} links (no_progress_links: "
            f"{budgets.no_progress_links}); last committed: step {last.committed_step}; the last "
            f"link ended by {_with(last.cause.value, last.detail)}",
        )
    return None


def _same_exception(history: Sequence[PastLink], _: Budgets) -> _Found:
    last = history[-1]
    failure = last.failure
    if failure is None or last.cause not in CRASHES - MEMORY:
        return None
    if failure.type == COMMAND:
        # Its last words at a step that is a guess prove nothing; max_crashes ends its chain.
        return None
    for link in _since_past(history, failure.step):
        same = link.failure is not None and link.failure.signature == failure.signature
        if same and link.cause in CRASHES:
            return (
                "stop",
                "same_exception",
                f"the same exception at the same step, twice, without progress between: it is the "
                f"code ({failure.type}: {failure.message} in step {failure.step}, in links "
                f"{link.number} and {last.number})",
            )
    return None


def _non_finite(history: Sequence[PastLink], _: Budgets) -> _Found:
    last = history[-1]
    if last.cause is not Cause.NON_FINITE:
        return None
    failure = last.failure
    what = (failure.metric if failure else "") or "loss or gradients"
    where = f" in step {failure.step}" if failure else ""
    told = f" ({failure.message})" if failure and failure.message.strip() else ""
    return (
        "stop",
        "non_finite",
        f"{what} not finite{where}{told}; step {last.committed_step} is committed, and kept",
    )


def _same_memory(history: Sequence[PastLink], _: Budgets) -> _Found:
    last = history[-1]
    if last.cause not in MEMORY:
        return None
    for link in _since_progress(history):
        if link.cause is last.cause and _may_be_one_step(link, last):
            at_once = last.failed_step is not None and link.failed_step == last.failed_step
            where = f"in step {last.failed_step}" if at_once else "without a new step"
            return (
                "stop",
                "same_memory",
                f"{last.cause.value} {where} twice (links {link.number} and {last.number}): "
                f"{_MEMORY_WORDS[last.cause]}",
            )
    return None


def _may_be_one_step(link: PastLink, last: PastLink) -> bool:
    """Whether it was one step, as well as that is known.

    A rank that the kernel ended left no more than a sign of life, which may be a second old: where
    it began stands for its step as well.
    """
    if link.failed_step == last.failed_step is not None:
        return True
    told = link.failure is not None and last.failure is not None
    return not told and not link.progressed


def _since_progress(history: Sequence[PastLink]) -> Sequence[PastLink]:
    """The links before the last one, back to the one that committed a step; newest first.

    That one counts: what it met after its last commit, it met at the place where the last one
    began. There are none where the last one committed a step itself.
    """
    begin = len(history) - len(idle_links(history)) - 1
    return history[max(0, begin) : -1][::-1]


def _since_past(history: Sequence[PastLink], step: int) -> Iterator[PastLink]:
    """The links before the last one, back to the one that got past a step; newest first.

    That one counts: it may have met the same after its last commit, at a step that is not known.
    There are none where the last one got past the step itself. What was committed below the step,
    by an emergency save, is no way past it.
    """
    for link in reversed(history):
        if link is not history[-1]:
            yield link
        if link.progressed and link.committed_step >= step:
            return


def _too_many_crashes(history: Sequence[PastLink], budgets: Budgets) -> _Found:
    last, used = history[-1], spent(history)
    if last.cause not in CRASHES or used.crashes <= budgets.max_crashes:
        return None
    return (
        "stop",
        "max_crashes",
        f"{used.crashes} links failed without a newly committed step between them (max_crashes: "
        f"{budgets.max_crashes}); the last: {last.detail.strip() or last.cause.value}",
    )


#: The rows that end a chain, in order; where none of them matches it goes on.
_ROWS = (
    _ended_for_good,
    _out_of_budget,
    _same_exception,
    _non_finite,
    _same_memory,
    _too_many_crashes,
)


def _why_it_goes_on(last: PastLink) -> str:
    detail = last.detail.strip()
    if detail.startswith("roll back"):
        return f"{detail}; its data are left out"
    if last.cause in PLANNED:
        return f"{_PLANNED_WORDS[last.cause]}; step {last.committed_step} is committed"
    if last.cause in NODE_CAUSES:
        where = ", ".join(last.nodes) or "unknown"
        verb = "failed" if last.cause is Cause.NODE_FAILURE else "did not boot"
        return f"a node {verb} ({where}); on other nodes"
    if last.cause is Cause.STORAGE:
        return f"the storage failed: {detail or 'full or unreachable'}"
    return detail or f"the link ended: {last.cause.value}"


def _delay_s(history: Sequence[PastLink], chance: float) -> int:
    """The wait grows while nothing is committed; a link that got further begins the row anew."""
    if history[-1].cause is not Cause.STORAGE:
        return 0
    row = trailing(history, lambda link: link.cause is Cause.STORAGE and not link.progressed) or 1
    first, longest = _STORAGE_DELAY_S
    return round(min(first << min(row - 1, 20), longest) * (1 + _JITTER * chance))


def _excluded(history: Sequence[PastLink], now: float) -> tuple[str, ...]:
    """The nodes that failed just now, for the next link, and those that failed twice."""
    last = history[-1]
    fresh = last.nodes if last.cause in NODE_CAUSES else ()
    return tuple(dict.fromkeys([*fresh, *bad_nodes(history, now)]))[:MOST_EXCLUDED]


def _with(text: str, detail: str) -> str:
    return f"{text}: {detail}" if detail and detail != text else text
