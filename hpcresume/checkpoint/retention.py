"""Which checkpoints may go: a pure policy over what is committed.

Order is by committed step, never by file times, which shared file systems and copies change. Asked
by the store after each commit, before one where the disk is short of room, and by `hpcresume
checkpoints`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcresume.checkpoint.manifest import Manifest

if TYPE_CHECKING:
    # By name alone: `status` reads checkpoints without waiting for msgspec.
    from hpcresume.config import CheckpointConfig


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What stays. The rules add up: what one of them keeps, stays; and what is pinned, always."""

    last: int = 5
    """The newest ones; the newest of all stays even where this is 0."""
    best: int = 1
    """The best by the watched metric."""
    every: int | None = None
    """For good, the first at or after each multiple of so many steps; None: none."""

    def when_complete(self) -> Policy:
        """What stays of a complete run with `on_finish: keep_final`."""
        return dataclasses.replace(self, last=1)


def policy_of(settings: CheckpointConfig, *, complete: bool = False) -> Policy:
    """The policy that a run's configuration asks for, while it trains or when it is complete."""
    policy = Policy(last=settings.keep_last, best=settings.keep_best, every=settings.keep_every)
    final = complete and settings.on_finish == "keep_final"
    return policy.when_complete() if final else policy


def kept(
    manifests: Sequence[Manifest], policy: Policy, pinned: Collection[int] = ()
) -> dict[int, tuple[str, ...]]:
    """Why checkpoints stay: last, best, every, pinned, by step ascending; what may go is not in it.

    `pinned` may name steps that are not there any more.
    """
    ordered = sorted(manifests, key=lambda m: m.step)
    steps = [m.step for m in ordered]
    rules = {
        "last": set(steps[-max(policy.last, 1) :]),
        "best": set(best_steps(ordered, policy.best)),
        "every": set(_every(steps, policy.every)),
        "pinned": set(pinned),
    }
    reasons = {step: tuple(name for name, its in rules.items() if step in its) for step in steps}
    return {step: words for step, words in reasons.items() if words}


def to_remove(
    manifests: Sequence[Manifest],
    policy: Policy,
    *,
    pinned: Collection[int] = (),
    verified: Collection[int] | None = None,
) -> list[int]:
    """Steps that may be removed, oldest first; the newest and what is pinned never are.

    `verified` names the checkpoints of which every byte is known to be right (None: all of them).
    While the newest is not among them nothing may go: an older one may be needed yet.
    """
    newest = max((m.step for m in manifests), default=None)
    if verified is not None and newest not in verified:
        return []
    stays = kept(manifests, policy, pinned)
    return sorted(m.step for m in manifests if m.step not in stays)


def to_make_room(
    manifests: Sequence[Manifest],
    policy: Policy,
    *,
    pinned: Collection[int] = (),
    verified: Collection[int] | None = None,
) -> list[int]:
    """Steps that the next commit will let go, oldest first: they may go before it instead.

    Only so many that the newest stays, whatever `last` is.
    """
    sooner = dataclasses.replace(policy, last=max(policy.last - 1, 1))
    return to_remove(manifests, sooner, pinned=pinned, verified=verified)


def best_steps(manifests: Sequence[Manifest], count: int) -> list[int]:
    """Steps of the best checkpoints, best first; of equal ones the older is better."""
    scored = []
    for manifest in manifests:
        metric = manifest.metric
        if metric is None or not math.isfinite(metric["value"]):
            continue
        sign = -1.0 if metric["mode"] == "max" else 1.0
        scored.append((sign * metric["value"], manifest.step))
    return [step for _, step in sorted(scored)[:count]]


def _every(steps: Sequence[int], every: int | None) -> Iterator[int]:
    """Of ascending steps, the first at or after each multiple of `every` before the next one.

    Saves by the clock seldom meet a multiple exactly. The first stays the first whatever goes, so
    that a second look lets nothing go that the first one kept.
    """
    seen = 0
    for step in steps if every else ():
        assert every is not None
        if step // every > seen:
            seen = step // every
            yield step


def most_at_once(
    manifests: Sequence[Manifest],
    policy: Policy,
    *,
    pinned: Collection[int] = (),
    max_steps: int | None = None,
) -> int:
    """How many checkpoints a run that trains on may hold at a time: an upper bound.

    The one that is being written counts, since the oldest goes only after it is committed. Where
    `max_steps` is not known, `policy.every` counts for what it has kept so far.
    """
    steps = [m.step for m in manifests]
    every = len(list(_every(sorted(steps), policy.every)))
    if policy.every and max_steps is not None:
        every = max(every, max_steps // policy.every)
    best = policy.best if any(m.metric is not None for m in manifests) else 0
    return max(policy.last, 1) + best + every + len(set(pinned) & set(steps)) + 1
