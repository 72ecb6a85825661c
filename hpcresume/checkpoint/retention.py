"""Which checkpoints may go: a pure policy over what is committed.

Order is by committed step, never by file times, which shared file systems and copies change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpcresume.checkpoint.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How many to keep: the newest `last` and the `best` by the watched metric."""

    last: int = 5
    best: int = 1


def to_remove(manifests: Sequence[Manifest], policy: Policy) -> list[int]:
    """Steps that may be removed, oldest first; the newest is never among them."""
    ordered = sorted(manifests, key=lambda m: m.step)
    kept = {m.step for m in ordered[-max(policy.last, 1) :]}
    kept |= set(best_steps(ordered, policy.best))
    return [m.step for m in ordered if m.step not in kept]


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
