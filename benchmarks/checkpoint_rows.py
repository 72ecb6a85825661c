"""A figure, measured in pairs with its baseline, and whether it meets its bar.

Disks and neighbours are noisy: the figure and its baseline alternate, and swap their order from
pair to pair. What is told is the median of the pairs' ratios and their quartiles.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

#: Pairs, below which a figure is a look and no measurement.
FEWEST = 9
#: Pairs, where the bar is nearer than the noise.
MOST = 25
#: Pairs of another library's figure.
PEER_PAIRS = 3

#: Seconds that a call took, as it says itself.
Call = Callable[[], float]


class Unmeasurable(Exception):
    """This machine does not allow what a figure needs; says why."""


@dataclass(frozen=True)
class Bar:
    """What a figure is to reach."""

    limit: float
    at_least: bool = False

    def margin(self, figure: float) -> float:
        """How far a figure is on the right side of the bar; negative on the wrong one."""
        return figure - self.limit if self.at_least else self.limit - figure

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:.4g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report. Without `ratios` it could not be measured, and `note` says why."""

    figure: str
    """The key of its figure; peers have that of the figure beside which they stand."""
    name: str
    tensors: int
    bar: Bar | None = None
    is_peer: bool = False
    """Whether it is another library's, which has no bar."""
    rate: bool = False
    """Whether it is rate over rate, and not time over time."""
    ratios: tuple[float, ...] = ()
    first: float | None = None
    """The ratio of the first calls, which are in no median."""
    baseline_s: float | None = None
    note: str = ""
    digits: int = 2
    """Decimal places of the figure."""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        if len(self.ratios) == 1:
            return self.ratios * 3
        low, middle, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, middle, high

    @property
    def is_open(self) -> bool:
        """Whether the bar is nearer than the range between the quartiles."""
        low, middle, high = self.quartiles
        return self.bar is not None and abs(self.bar.margin(middle)) < high - low

    @property
    def verdict(self) -> str:
        """Whether the bar is met, as far as the pairs tell; nothing where there is none."""
        if not self.ratios:
            return "not measured"
        if self.bar is None:
            return ""
        if self.is_open and len(self.ratios) < MOST:
            return "within the noise: more pairs"
        if self.bar.margin(self.quartiles[1]) >= 0:
            return "met"
        return "missed by less than the noise" if self.is_open else "missed"

    def ratio(self, own_s: float, baseline_s: float) -> float:
        """The figure of one pair, from the seconds of both."""
        return baseline_s / own_s if self.rate else own_s / baseline_s


def measure(row: Row, own: Call, baseline: Call, count: int) -> Row:
    """The row with its pairs: `count`, or more where these leave open whether the bar is met."""
    tell(f"{row.name}, {row.tensors:,} tensors")
    pairs: list[tuple[float, float]] = []

    def until(count: int) -> Row:
        while len(pairs) < count:
            if len(pairs) % 2:
                pairs.append((own(), baseline()))
            else:
                seconds = baseline()
                pairs.append((own(), seconds))
        ratios = tuple(row.ratio(*pair) for pair in pairs)
        seconds = statistics.median(seconds for _, seconds in pairs)
        return replace(row, ratios=ratios, first=first, baseline_s=seconds)

    try:
        first = row.ratio(own(), baseline())
        measured = until(count)
        if count >= FEWEST and measured.is_open:
            measured = until(MOST)
    except Unmeasurable as error:
        return replace(row, note=str(error))
    return measured


def tell(what: str) -> None:
    """Show on the terminal what is going on."""
    print(f"… {what}", file=sys.stderr, flush=True)


def as_text(row: Row) -> str:
    """A row as a line of the report; a peer is indented."""
    name = f"{'  ' if row.is_peer else ''}{row.name}"
    if not row.ratios:
        return f"{name:<44} not measured: {row.note}"
    low, middle, high = row.quartiles
    details = []
    if len(row.ratios) > 1:
        details.append(f"{low:.2f} to {high:.2f} in {len(row.ratios)} pairs")
    if row.baseline_s is not None:
        details.append(f"baseline {row.baseline_s:.3f} s")
    if row.first is not None:
        details.append(f"first call {row.first:.2f}")
    if row.note:
        details.append(row.note)
    line = f"{name:<44} {middle:6.{row.digits}f}  ({'; '.join(details)})"
    return f"{line}  {row.bar}: {row.verdict}" if row.bar else line


MARKDOWN_HEAD = (
    "| figure | tensors | median | quartiles, pairs | baseline | first call | bar | |\n"
    "|---|---|---|---|---|---|---|---|"
)


def as_markdown(row: Row) -> str:
    """A row as one of a table in Markdown."""
    name = f"— {row.name}" if row.is_peer else row.name
    middle = spread = ""
    if row.ratios:
        low, median, high = row.quartiles
        middle = f"{median:.{row.digits}f}"
        spread = f"{low:.2f} to {high:.2f}, {len(row.ratios)}" if len(row.ratios) > 1 else ""
    cells = [
        name,
        f"{row.tensors:,}",
        middle,
        spread,
        "" if row.baseline_s is None else f"{row.baseline_s:.3f} s",
        "" if row.first is None else f"{row.first:.2f}",
        str(row.bar or ""),
        "; ".join(filter(None, (row.verdict, row.note))),
    ]
    return f"| {' | '.join(cells)} |"
