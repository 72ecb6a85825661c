"""What a run prints, as it grows over all its links.

Used by `hpcresume logs` and by every view that shows the end of the log.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcresume import files
from hpcresume.run_dir import RunDir


@dataclass(frozen=True)
class Printed:
    """What a link has printed since the last look."""

    link: int
    text: str
    opens: bool
    """Whether nothing of this link was seen before: `opening` belongs above it."""


class LogTail:
    """The log of a rank as it grows, link after link."""

    def __init__(self, run: RunDir, rank: int = 0, links: Sequence[int] | None = None) -> None:
        """Begin with some links (all there are, by default); later looks go on behind them."""
        self._run = run
        self._rank = rank
        self._first = run.link_numbers() if links is None else links
        self._link = 0
        """The link that is being read; 0 before the first."""
        self._position = 0
        self._decoder = _decoder()

    def look(self) -> list[Printed]:
        """What has come since the last look, in order; a link that printed nothing opens too."""
        # Asked before the logs are read: a link writes nothing that counts once it is followed.
        newest = self._run.newest_link()
        found = []
        if self._link:
            found.append(Printed(self._link, self._grown(), opens=False))
        for number in self._first or range(self._link + 1, newest + 1):
            self._link, self._position, self._decoder = number, 0, _decoder()
            found.append(Printed(number, self._grown(), opens=True))
        self._first = ()
        return [printed for printed in found if printed.opens or printed.text]

    def _grown(self) -> str:
        """The text behind the position; a character that is half-written comes with the rest."""
        try:
            with self._run.link(self._link).rank_log(self._rank).open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return ""
        self._position += len(data)
        return self._decoder.decode(data)


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def opening(run: RunDir, number: int, rank: int = 0) -> list[str]:
    """The lines above a link's log: its heading, and where to look if it has none."""
    claim = _claim(run, number)
    lines = [_heading(number, claim)]
    if claim.get("foreground") and not run.link(number).rank_log(rank).exists():
        lines.append(f"(it printed to its own terminal; its log lines are in {run.train_log})")
    return lines


def _heading(number: int, claim: dict[str, Any]) -> str:
    """`── link 3 · job 4711 · gpu017 ──`"""
    parts = [f"link {number}"]
    if claim.get("job"):
        parts.append(f"job {claim['job']}")
    parts.append(str(claim.get("nodes") or claim.get("host") or "?"))
    return f"── {' · '.join(parts)} ──"


def _claim(run: RunDir, number: int) -> dict[str, Any]:
    content = files.read_json_or_none(run.link(number).claim)
    return content if isinstance(content, dict) else {}
