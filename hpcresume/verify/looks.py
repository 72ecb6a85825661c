"""What ranks saw in the training's variables, and what of it a cut has lost.

A rank looks as its steps begin and as they end (`watch`); here the looks of several links are put
side by side. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.run_dir import LinkDir


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Something that a training holds, at the moment of a look."""

    kind: str
    """What a person calls it: "AdamW", "numpy Generator", "dict"."""
    digest: str | None
    """Of its state; None where that cannot be read, or is too large to be more than data."""
    stateful: bool
    """Made to have a state, unlike a number or a list that is only a variable."""
    registered: bool


#: What one look saw, by the names that the code gives.
Look = dict[str, Seen]


@dataclass(frozen=True)
class Lost:
    """What a training keeps without having registered it, and a cut therefore begins anew."""

    name: str
    kind: str
    rank: int
    stateful: bool = True
    """False for a plain variable: a number, an array, a list of these."""

    def __str__(self) -> str:
        """The name in the code, and what it is."""
        where = f" of rank {self.rank}" if self.rank else ""
        return f"{self.name} ({self.kind}){where}"


@dataclass(frozen=True)
class Looks:
    """Both looks of one rank in one link; empty where it could not look."""

    begin: Look
    end: Look


def looks_file(link: LinkDir, rank: int) -> Path:
    """Where a rank writes its looks, beside its log."""
    return link.rank_log(rank).with_suffix(".looks.json")


def read_looks(link: LinkDir, rank: int) -> Looks:
    """What a rank of a link saw."""
    content = files.read_json_or_none(looks_file(link, rank)) or {}
    begin, end = (
        {name: Seen(**seen) for name, seen in content.get(when, {}).items()}
        for when in ("begin", "end")
    )
    return Looks(begin, end)


def moved(rank: int, uncut: Looks, again: Looks) -> Iterator[Lost]:
    """What two trainings hold differently before their first step."""
    for name, seen in uncut.begin.items():
        if seen.stateful and name in again.begin and again.begin[name].digest != seen.digest:
            yield Lost(name, seen.kind, rank)


def lost(rank: int, uncut: Looks, again: Looks, first: Looks, third: Looks) -> Iterator[Lost]:
    """What the third link began anew, and holds differently at its end for that reason.

    Not what differs between any two trainings, like a time; nor what is made again before it is
    used, like a generator that is seeded at every evaluation.
    """
    for name, seen in third.begin.items():
        looks = [look.get(name) for look in (first.end, third.end, uncut.end, again.end)]
        digests = [None if other is None else other.digest for other in looks]
        if seen.registered or None in digests:
            continue
        left, last, whole, repeated = digests
        if seen.digest != left and last != whole and whole == repeated:
            yield Lost(name, seen.kind, rank, stateful=seen.stateful)
