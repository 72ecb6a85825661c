"""How long what a rank does usually lasts, and how long it may: learned in this link and from the
journals of the links before. Used by `heartbeat`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcresume.journal import LinkRecords, Record

#: Nothing is taken for hung before these seconds...
SHORTEST_S = 60.0
#: ...and what has not been seen often enough not before these: a first step may be a compilation.
UNKNOWN_S = 1800.0
#: How often something must have been seen for its limit to be learned from it.
ENOUGH = 3
#: What was taken for hung in a link may last so many times longer in the next one: if that was
#: wrong, the chain must not end for it.
RELIEF = 10.0
#: How many links of the past are remembered.
_LINKS = 16


@dataclass(frozen=True)
class Pace:
    """How often something was seen, and how long it lasted, in seconds."""

    count: int = 0
    p99_s: float = 0.0
    longest_s: float = 0.0

    @property
    def limit_s(self) -> float:
        """How long it may last.

        Five times the 99th percentile, but twice the longest: an evaluation that nobody marked is
        one step among thousands.
        """
        if self.count < ENOUGH:
            return UNKNOWN_S
        return max(SHORTEST_S, 5 * self.p99_s, 2 * self.longest_s)

    def with_(self, other: Pace) -> Pace:
        """Both together, with the slower of their durations."""
        return Pace(
            self.count + other.count,
            max(self.p99_s, other.p99_s),
            max(self.longest_s, other.longest_s),
        )


@dataclass
class Durations:
    """What one kind of work has taken in this link."""

    _latest: deque[float] = field(default_factory=lambda: deque(maxlen=512))
    _count: int = 0
    _longest_s: float = 0.0

    def add(self, seconds: float) -> None:
        """Note one more."""
        self._latest.append(seconds)
        self._count += 1
        self._longest_s = max(self._longest_s, seconds)

    def pace(self) -> Pace:
        """What they amount to."""
        ordered = sorted(self._latest)
        p99_s = ordered[-1 - len(ordered) // 100] if ordered else 0.0
        return Pace(self._count, round(p99_s, 3), round(self._longest_s, 3))


def to_json(paces: Mapping[str, Pace]) -> dict[str, list[float]]:
    """As records carry it: {"save": [3, 1.2, 1.5]}."""
    return {kind: [p.count, p.p99_s, p.longest_s] for kind, p in paces.items() if p.count}


def remembered(links: Sequence[LinkRecords]) -> dict[str, Pace]:
    """What the last links of a run have recorded, by kind."""
    found: dict[str, Pace] = {}
    for link in links[-_LINKS:]:
        # A link records all that it has seen each time, so that its newest word says the most.
        told = [r["pace"] for r in link.all("saved", "ended") if isinstance(r.get("pace"), dict)]
        for kind, value in told[-1].items() if told else ():
            pace = _pace(value)
            if pace is not None:
                found[kind] = found.get(kind, Pace()).with_(pace)
    return found


def _pace(value: Any) -> Pace | None:
    """A pace as it was recorded; None for what is none of ours."""
    if not isinstance(value, list) or len(value) != 3:
        return None
    if not all(type(number) in (int, float) and 0 <= number < 1e9 for number in value):
        return None
    return Pace(int(value[0]), float(value[1]), float(value[2]))


def relieved(links: Sequence[LinkRecords]) -> dict[str, float]:
    """Kinds that were taken for hung in the last links, and how long they may last after that."""
    found: dict[str, float] = {}
    for record in (r for link in links[-_LINKS:] for r in link.all("ended") if _is_hang(r)):
        kind, limit_s = record["at"], float(record["limit_s"])
        found[kind] = max(found.get(kind, 0.0), min(UNKNOWN_S, RELIEF * limit_s))
    return found


def _is_hang(record: Record) -> bool:
    limit_s = record.get("limit_s")
    hung = record.get("how") == "hung" and isinstance(record.get("at"), str)
    return hung and type(limit_s) in (int, float) and 0 <= limit_s < 1e9  # type: ignore[operator]
