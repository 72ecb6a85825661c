"""What a run prints, as it grows over all its links.

Used by `hpcresume logs` and by every view that shows the end of the log.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.history import as_shown
from hpcresume.run_dir import RunDir

#: What a window reads of a run that was there before it: enough to fill it.
_OPENED_LINKS = 8
_OPENED_BYTES = 1 << 16
_LONGEST_LINE = 4000


@dataclass(frozen=True)
class Printed:
    """What a link has printed since the last look."""

    link: int
    text: str
    opens: bool
    """Whether nothing of this link was seen before: `opening` belongs above it."""


class LogTail:
    """The log of a rank as it grows, link after link."""

    def __init__(
        self,
        run: RunDir,
        rank: int = 0,
        links: Sequence[int] | None = None,
        most_bytes: int | None = None,
    ) -> None:
        """Begin with some links (all there are, by default); later looks go on behind them.

        `most_bytes` is how much of the end of each log is read when it is opened. What a link in
        the foreground printed is on its own terminal: then its part of train.log is shown.
        """
        self._run = run
        self._rank = rank
        self._first = run.link_numbers() if links is None else links
        self._most_bytes = most_bytes
        self._link = 0
        """The link that is being read; 0 before the first."""
        self._positions: dict[Path, int] = {}
        """How far logs are read."""
        self._decoder = _decoder()

    def look(self) -> list[Printed]:
        """What has come since the last look, in order; a link that printed nothing opens too."""
        # Asked before the logs are read: a link writes nothing that counts once it is followed.
        newest = self._run.newest_link()
        found = []
        if self._link:
            found.append(Printed(self._link, self._grown(), opens=False))
        for number in self._first or range(self._link + 1, newest + 1):
            self._link, self._decoder = number, _decoder()
            found.append(Printed(number, self._grown(), opens=True))
        self._first = ()
        return [printed for printed in found if printed.opens or printed.text]

    def _grown(self) -> str:
        """The text behind the position; a character that is half-written comes with the rest."""
        path = self._path()
        position = self._positions.get(path)
        try:
            size = path.stat().st_size
            begin = position
            if begin is None:
                begin = 0 if self._most_bytes is None else max(0, size - self._most_bytes)
            if size <= begin:
                return ""
            data = files.read_bytes(path, begin=begin)
        except FileNotFoundError:
            return ""
        self._positions[path] = begin + len(data)
        if position is None and begin:
            # The rest of a line that began before.
            data = data[data.find(b"\n") + 1 :]
        return self._decoder.decode(data)

    def _path(self) -> Path:
        own = self._run.link(self._link).rank_log(self._rank)
        if self._most_bytes is None or own.exists():
            return own
        return self._run.train_log if _claim(self._run, self._link).get("foreground") else own


class LogWindow:
    """The last lines of a run's log over all its links, as a terminal would show them."""

    def __init__(self, run: RunDir, most_lines: int = 400) -> None:
        self._run = run
        self._most = most_lines
        numbers = run.link_numbers()[-_OPENED_LINKS:]
        self._tail = LogTail(run, links=numbers, most_bytes=_OPENED_BYTES)
        self._lines: list[str] = []
        self._unfinished = ""

    def look(self) -> list[str]:
        """The lines as they are now; the last one may still grow."""
        for printed in self._tail.look():
            if printed.opens:
                self._take("\n")
                self._lines += opening(self._run, printed.link)
            self._take(printed.text)
        del self._lines[: -self._most]
        last = as_shown(self._unfinished)
        return [*self._lines, *([last] if last else [])]

    def _take(self, text: str) -> None:
        *whole, rest = (self._unfinished + text).split("\n")
        shown = (as_shown(raw[-_LONGEST_LINE:]) for raw in whole)
        self._lines += [line for line in shown if line]
        # A progress bar goes back to the start of its line again and again.
        self._unfinished = rest[-_LONGEST_LINE:]


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def opening(run: RunDir, number: int, rank: int = 0) -> list[str]:
    """The lines above a link's log: its heading, and where to look if it has none."""
    claim = _claim(run, number)
    lines = [_heading(number, claim)]
    if claim.get("foreground") and not run.link(number).rank_log(rank).exists():
        lines.append(f"(it printed to its own terminal; its log lines are in {run.train_log})")
    return lines


def claimed_at(run: RunDir, number: int) -> float | None:
    """When a link began, in unix seconds; None where its claim does not say."""
    at = _claim(run, number).get("t")
    return float(at) if isinstance(at, (int, float)) else None


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
