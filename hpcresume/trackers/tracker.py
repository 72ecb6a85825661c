"""What a tracker is, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hpcresume.run_dir import RunDir
from hpcresume.trackers.memory import Memory


class Line(NamedTuple):
    """The numbers of one step; `t` is Unix seconds."""

    step: int
    values: Mapping[str, float]
    t: float


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The run as a tracker knows it."""

    run: RunDir
    id: str
    """The run's own, which no other run has."""
    project: str
    """What groups runs, where the tracker's own variables name nothing: the project's folder."""
    link: int
    args: Mapping[str, Any]
    """The training's settings."""
    memory: Memory


class Tracker(Protocol):
    """One link's way to the tracker run. May raise anything; it is off for the link then."""

    def begin(self, restored: int) -> int:
        """The link goes on behind a step; returns the step behind which it wants to be told."""

    def tell(self, lines: Sequence[Line]) -> None:
        """Take lines in the order of their steps, and have remembered what of them is safe."""

    def close(self, how: str) -> None:
        """The link has ended: completed, stopped or failed. All that was told is safe on return."""
