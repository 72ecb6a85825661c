"""How far a training is, as lines of a terminal: bars, and the numbers below them.

Drawn by `progress` at the bottom of a terminal and by `screen` in the midst of one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from hpcresume.training.progress import (
    Progress,
    clock,
    epoch_text,
    memory_text,
    metric_text,
    percent,
    rate_text,
    shown_metrics,
)

_SPINNER, _PLAIN_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "-\\|/"
_TURNS_PER_S = 8
_SHORTEST_BAR = 8
_UNKNOWN = "-:--:--"


@dataclass(frozen=True)
class _Bar:
    """One bar: what it is about, how much is done, since when, for how long yet."""

    label: str
    done: float
    total: float | None
    elapsed_s: float
    left_s: float | None
    counts: bool = True
    """Whether the numbers of what is done are worth showing."""


def progress_lines(
    now: Progress, width: int, *, plain: bool = False, lead: str = "", logged: bool = True
) -> list[Text]:
    """Lines of at most `width` columns; `plain` for terminals that know ASCII alone.

    The last line has `lead`, what was logged (unless that stands elsewhere), rates and memory.
    """
    bars = _bars(now)
    metrics = shown_metrics(now.metrics) if logged else []
    texts = [f"{name} {metric_text(name, value)}" for name, value in metrics]
    values = _values_line(now, texts, width, plain, lead)
    return [*_bar_lines(bars, width, plain), *([values] if values.plain.strip() else [])]


def spinner(plain: bool) -> str:
    """The sign of this moment that something goes on."""
    frames = _PLAIN_SPINNER if plain else _SPINNER
    return frames[int(time.monotonic() * _TURNS_PER_S) % len(frames)]


def _bars(now: Progress) -> list[_Bar]:
    whole = _Bar("all steps", now.step, now.total_steps, now.train_s, now.left_s)
    epoch = epoch_text(now.epoch, now.epochs)
    if now.steps_per_epoch:
        total = now.step_in_epoch + now.steps_left_in_epoch
        bars = [_Bar(epoch, now.step_in_epoch, total, now.epoch_s, now.epoch_left_s)]
        if now.epochs != 1:
            bars.append(whole)
    else:
        bars = [_Bar(epoch, whole.done, whole.total, whole.elapsed_s, whole.left_s)]
    if now.busy:
        usual = now.busy_usual_s or None
        left = None if usual is None else max(0.0, usual - now.busy_s)
        bars.append(_Bar(now.busy, now.busy_s, usual, now.busy_s, left, counts=False))
    return bars


def _bar_lines(bars: Sequence[_Bar], width: int, plain: bool) -> list[Text]:
    labels = max(len(bar.label) for bar in bars)
    for detail in (3, 2, 1, 0):
        numbers = _aligned([_numbers(bar, detail) for bar in bars])
        room = width - 2 - labels - 1 - 2 - len(numbers[0])
        if room >= _SHORTEST_BAR:
            break
    room = max(3, room)
    lines = []
    for at, (bar, text) in enumerate(zip(bars, numbers, strict=True)):
        turns = at == 0 or not bar.counts
        line = Text(f"{spinner(plain) if turns else ' '} ", style="cyan", no_wrap=True)
        line.append(bar.label.ljust(labels) + " ", style="bold" if at == 0 else "default")
        line.append(_drawn(bar, room, plain))
        line.append("  ")
        line.append(text.replace("•", "|") if plain else text, style="default")
        line.truncate(width)
        lines.append(line)
    return lines


def _numbers(bar: _Bar, detail: int) -> tuple[str, str, str]:
    """Percent, n/total, and elapsed < left, as far as there is room for so much detail."""
    share = "" if bar.total is None else percent(bar.done, bar.total)
    if not bar.counts:
        share = ""
    count = f"{bar.done:g}" if bar.total is None else f"{bar.done:.0f}/{bar.total:.0f}"
    left = _UNKNOWN if bar.left_s is None else clock(bar.left_s)
    times = f"{clock(bar.elapsed_s)} < {left}" if detail > 2 else left if detail else ""
    if bar.left_s is None and not bar.counts:
        # The first of its kind: nobody can know.
        times = clock(bar.elapsed_s) + " " * len(" < 0:00:00") if detail > 2 else ""
    return share, count if bar.counts and detail > 1 else "", times


def _aligned(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(3)]
    texts = []
    for row in rows:
        share, count, times = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        done = "  ".join(part for part in (share, count) if part)
        texts.append(" • ".join(part for part in (done, times) if part))
    return texts


def _drawn(bar: _Bar, room: int, plain: bool) -> Text:
    """`━━━━━╸────`; where the end is not known, a light that runs along."""
    full, half, rest = ("#", "", ".") if plain else ("━", "╸", "━")
    if not bar.total:
        at = int(time.monotonic() * _TURNS_PER_S * 2) % (room + 4)
        signs = [
            (full, "cyan") if at - 4 <= i < at else (rest, "bright_black") for i in range(room)
        ]
        return Text.assemble(*signs)
    share = min(1.0, bar.done / bar.total)
    halves = int(share * room * 2)
    whole, odd = divmod(halves, 2)
    done = full * whole + (half if odd else "")
    style = "green" if share == 1 else "cyan"
    return Text.assemble((done, style), (rest * (room - len(done)), "bright_black"))


def _values_line(now: Progress, logged: Sequence[str], width: int, plain: bool, lead: str) -> Text:
    """`loss 2.1234 • lr 0.000300 • 12.3 steps/s • 4.1k samples/s • 8.5GB/16GB`, as far as it fits.

    What was logged gives way to the rates and the memory, from the last on.
    """
    rates = [rate_text(now.steps_per_s, "steps/s")] if now.steps_per_s else []
    rates += [rate_text(*now.per_second)] if now.per_second is not None else []
    rates += [memory_text(*now.gpu_memory)] if now.gpu_memory is not None else []
    parts = [*([lead] if lead else []), *logged[:2], *rates]
    for more in logged[2:]:
        if len("  " + " • ".join([*parts, more])) <= width:
            parts.insert(len(parts) - len(rates), more)
    while len(parts) > 1 and len("  " + " • ".join(parts)) > width:
        del parts[-1]
    line = Text("  ", no_wrap=True)
    for at, part in enumerate(parts):
        if at:
            line.append(" | " if plain else " • ", style="bright_black")
        line.append(part, style="default")
    line.truncate(width)
    return line
