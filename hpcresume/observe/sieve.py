"""Of what a run prints, the lines that are asked for: by time, by pattern, or what went wrong.

Used by `hpcresume logs`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import datetime

from hpcresume.config import parse_moment
from hpcresume.errors import ConfigError, UsageError
from hpcresume.history import as_shown
from hpcresume.observe.loglines import Printed, claimed_at, opening
from hpcresume.run_dir import RunDir

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"([0-9]{1,9})([smhdw])")
#: How our own lines begin: the time, the module, and where it matters the level.
_DATED = re.compile(
    r"(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d) \[[^\]\s]*?(-WARNING|-ERROR|-CRITICAL)?\] "
)
#: What others write before their own bad news, and how Python ends a traceback or begins a warning.
_BAD_NEWS = re.compile(
    r"(srun|slurmstepd|sbatch|torchrun): (error|fatal)|NCCL WARN|Segmentation fault|Fatal Python"
    r"|(^|[\s.])[A-Z]\w*(Error|Exception|Warning|Interrupt)(:|$)"
)
_TRACEBACK = "Traceback (most recent call last):"
_DAY_S = 86400.0


def parse_since(text: str, *, now: float) -> float:
    """Unix seconds of `10m`, `2h`, `1d` ago, or of a moment that has been. Raises UsageError."""
    ages = _AGE.findall(text)
    if ages and "".join(map("".join, ages)) == text:
        return now - sum(int(count) * _UNITS_S[unit] for count, unit in ages)
    try:
        at = parse_moment(text, now=now)
    except ConfigError:
        at = now
    if at >= now and re.fullmatch(r"[0-9:]+", text):
        at -= _DAY_S  # A time of day: the last one, not the next.
    if at >= now:
        raise UsageError(
            f"--since {text!r} is no time that has been; expected an age as 90s, 10m, 2h, 1d or "
            "1h30m, or a moment as 08:00 or 2026-11-30T08:00."
        )
    return at


@dataclass
class Sieve:
    """Lets lines pass that are late enough, fit a pattern and, with `errors`, tell of trouble."""

    run: RunDir
    rank: int = 0
    since: float | None = None
    """Unix seconds. A line without a time is as old as the line before it that has one."""
    pattern: re.Pattern[str] | None = None
    errors: bool = False
    """Only warnings, errors and tracebacks."""
    _link: int = 0
    _headed: bool = True
    _late: bool = True
    _trouble: bool = False
    """Whether what is indented below belongs to the bad news above it."""
    _traceback: bool = False
    """Whether a traceback is being printed: the first line that is not indented ends it."""
    _rest: str = ""

    @property
    def open(self) -> bool:
        """Whether everything passes."""
        return self.since is None and self.pattern is None and not self.errors

    def take(self, printed: Printed) -> list[str]:
        """The whole lines that pass, below their link's heading; a line's begin is kept back.

        Where everything passes, a link that printed nothing has its heading all the same.
        """
        lines: list[str] = []
        if printed.opens:
            lines += self._passed([self._rest] if self._rest else [])
            self._open_link(printed.link)
            if self.open:
                lines += self._heading()
        *whole, self._rest = (self._rest + printed.text).split("\n")
        return lines + self._passed(whole)

    def rest(self) -> list[str]:
        """What has come of a line that is not whole yet, if it passes; asked for at the end."""
        rest, self._rest = self._rest, ""
        return self._passed([rest] if rest else [])

    def _open_link(self, number: int) -> None:
        self._link, self._headed, self._rest = number, False, ""
        self._trouble = self._traceback = False
        began = claimed_at(self.run, number)
        self._late = self.since is None or began is None or began >= self.since

    def _heading(self) -> list[str]:
        self._headed = True
        return opening(self.run, self._link, self.rank)

    def _passed(self, whole: list[str]) -> list[str]:
        lines = whole if self.open else [line for line in whole if self._wanted(line)]
        if lines and not self._headed:
            return [*self._heading(), *lines]
        return lines

    def _wanted(self, line: str) -> bool:
        shown = as_shown(line)
        dated = _DATED.match(shown)
        if self.since is not None and dated is not None:
            at = _moment(dated)
            self._late = at is None or at >= self.since
        trouble = self._tells_of_trouble(shown, dated)
        return (
            self._late
            and (trouble or not self.errors)
            and (self.pattern is None or self.pattern.search(shown) is not None)
        )

    def _tells_of_trouble(self, shown: str, dated: re.Match[str] | None) -> bool:
        if dated is not None:
            self._trouble, self._traceback = dated[6] is not None, False
            return self._trouble
        # Ranks of torchrun have their number before every line.
        bare = re.sub(r"^\[rank\d+\]:\s?", "", shown)
        below = bare.startswith((" ", "\t"))
        ends_it = self._traceback and bool(bare) and not below
        starts_it = bare.startswith(_TRACEBACK)
        self._traceback = starts_it or (self._traceback and not ends_it)
        news = starts_it or ends_it or _BAD_NEWS.search(bare) is not None
        self._trouble = news or (self._trouble and below)
        return self._trouble


def _moment(dated: re.Match[str]) -> float | None:
    """Unix seconds of a line's time, which has no year: the last one that is not to come."""
    month, day, hour, minute, second = map(int, dated.groups()[:5])
    now = time.time()
    this_year = datetime.fromtimestamp(now).year
    for year in (this_year, this_year - 1):
        try:
            at = datetime(year, month, day, hour, minute, second).timestamp()
        except (ValueError, OverflowError):
            continue
        # Clocks of nodes differ a little.
        if at <= now + _DAY_S:
            return at
    return None
