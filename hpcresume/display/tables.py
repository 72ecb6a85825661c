"""How all runs stand, as a table, and the words for times that several displays share.

Written without rich, whose import alone costs half of what `status` may take: people type it all
day, on login nodes with slow file systems.
"""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcresume.display.terminal import bar, printable, styled, terminal_width, wrapped
from hpcresume.status import RunStatus
from hpcresume.training.progress import clock

#: SGR codes of a terminal, and the same shapes as on the page in the browser.
_STATES = {
    "complete": ("32", "✔"),
    "running": ("36", "●"),
    "waiting": ("33", "○"),
    "stopped": ("35", "■"),
    "failed": ("1;31", "✖"),
    "stalled": ("1;31", "▲"),
}
#: All columns in their order.
_COLUMNS = (
    *("RUN", "STATE", "", "STEP", "%", "LOSS", "LINK", "JOB", "LEFT", "TRAIN", "DONE"),
    *("QUEUED", "RAN", "CHECKPOINT"),
)
_TO_THE_RIGHT = frozenset({"STEP", "%", "LOSS", "LINK", "LEFT", "TRAIN", "QUEUED", "RAN"})
#: What a terminal has no room for, the first first; a column in brackets has a shorter form.
_LEFT_OUT = (
    *("[CHECKPOINT]", "TRAIN", "RAN", "QUEUED", "[JOB]", "LOSS", "", "JOB", "CHECKPOINT"),
    "LEFT",
)
_BAR_CELLS, _LONGEST_NAME = 10, 28


@dataclass(frozen=True)
class _Cell:
    """What stands in a table's cell: its letters, the same in colours, and in fewer letters."""

    text: str
    shown: str = ""
    short: str | None = None


def status_table(rows: Sequence[RunStatus]) -> str:
    """One row a run, with its reason below; on a narrow terminal, a few lines a run."""
    cells = [dict(zip(_COLUMNS, _cells(row), strict=True)) for row in rows]
    columns = [c for c in _COLUMNS if c in ("RUN", "STEP") or any(row[c].text for row in cells)]
    dropped = iter(_LEFT_OUT)
    widths = _widths(cells)
    while sum(widths[c] + 2 for c in columns) - 2 > terminal_width():
        column = next(dropped, None)
        if column is None:
            return "\n".join(line for row in rows for line in _card(row))
        if column[:1] == "[":
            for found in cells:
                cell = found[column[1:-1]]
                found[column[1:-1]] = cell if cell.short is None else _Cell(cell.short)
            widths = _widths(cells)
        elif column in columns:
            columns.remove(column)
    widths = {column: widths[column] for column in columns}
    lines = [styled(_line({column: _Cell(column) for column in columns}, widths), "dim")]
    for row, found in zip(rows, cells, strict=True):
        lines += [_line(found, widths), *_remarks(row)]
    return "\n".join(lines)


def _widths(cells: Sequence[dict[str, _Cell]]) -> dict[str, int]:
    return {c: max(len(c), *(len(row[c].text) for row in cells)) for c in _COLUMNS}


def _line(row: dict[str, _Cell], widths: dict[str, int]) -> str:
    padded = []
    for column, width in widths.items():
        cell = row[column]
        gap = " " * (width - len(cell.text))
        shown = cell.shown or cell.text
        padded.append(gap + shown if column in _TO_THE_RIGHT else shown + gap)
    return "  ".join(padded).rstrip()


def _remarks(row: RunStatus, indent: str = "  ") -> Iterator[str]:
    """Why a run stands so, and that it will be late, below it."""
    for text in (row.why, late_words(row)):
        if text:
            for line in wrapped(printable(text), indent=indent, hang=indent).split("\n"):
                yield styled(line, "dim")


def _card(row: RunStatus) -> Iterator[str]:
    """A run on a few short lines."""
    yield f"{styled(shown_name(row), 'strong')}  {state_sign(row.state)}"
    share = percent(row)
    loss = "" if row.loss is None else f"loss {row.loss:.4f}"
    yield from _short(f"step {steps(row)}", share, loss)
    left = "" if row.time_left_s is None else f"{clock(row.time_left_s)} left"
    yield from _short(
        f"link {row.link}" if row.link else "", f"job {row.job}" if row.job else "", left
    )
    if row.calendar is not None:
        yield from _short(f"done {day_and_hour(row.calendar.expected, time.time())}")
    yield from _short(f"saved {checkpoint(row)}")
    yield from _remarks(row)


def _short(*parts: str) -> Iterator[str]:
    # A value stays beside its name.
    text = " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts if part)
    if text:
        yield wrapped(text, indent="  ", hang="  ").replace("\N{NO-BREAK SPACE}", " ")


def _cells(row: RunStatus) -> Iterator[_Cell]:
    """In the order of the columns."""
    fancy, total = sys.stdout.isatty(), row.total_steps
    sign = _STATES[row.state][1] + " " if fancy else ""
    yield _Cell(shown_name(row), styled(shown_name(row), "strong") if fancy else "")
    yield _Cell(sign + row.state, state_sign(row.state))
    cells = _BAR_CELLS if total and fancy else 0
    yield _Cell(" " * cells, progress_bar(row, cells) if total and cells else "")
    yield _Cell(steps(row))
    yield _Cell(percent(row))
    yield _Cell("" if row.loss is None else f"{row.loss:.4f}")
    yield _Cell(str(row.link or ""))
    node = f" ({printable(row.node)})" if row.node else ""
    yield _Cell(row.job + node, short=row.job)
    yield _Cell("" if row.time_left_s is None else clock(row.time_left_s))
    yield _Cell("" if row.train_left_s is None else clock(row.train_left_s))
    now = time.time()
    yield _Cell("" if row.calendar is None else day_and_hour(row.calendar.expected, now))
    goes_on = row.state in ("running", "waiting")
    yield _Cell(clock(row.queued_s) if goes_on and row.queued_s is not None else "")
    yield _Cell(clock(row.worked_s) if goes_on and row.worked_s is not None else "")
    yield _Cell(checkpoint(row), short=_checkpoint_age(row))


def shown_name(row: RunStatus) -> str:
    """A run's name, cut where it would fill a terminal."""
    name = printable(row.name)
    if sys.stdout.isatty() and len(name) > _LONGEST_NAME:
        return name[: _LONGEST_NAME - 1] + "…"
    return name


def state_sign(state: str) -> str:
    """A state in its colour; with its sign, on a terminal."""
    code, sign = _STATES[state]
    return styled(f"{sign} {state}" if sys.stdout.isatty() else state, code)


def progress_bar(row: RunStatus, cells: int) -> str:
    """How far a run of known length is, in the colour of its state."""
    share = row.step / row.total_steps if row.total_steps else 0.0
    return bar(share, cells, _STATES[row.state][0])


def steps(row: RunStatus) -> str:
    """84210/100000; for how long it ran where nothing else is seen."""
    if row.ran_s is not None and not row.step:
        return clock(row.ran_s)
    return f"{row.step}/{row.total_steps}" if row.total_steps else str(row.step)


def percent(row: RunStatus) -> str:
    """84%; never 100% before it is complete. Nothing where no end is known."""
    if not row.total_steps:
        return ""
    share = 100 * row.step // row.total_steps
    return f"{share if row.state == 'complete' else min(share, 99)}%"


def checkpoint(row: RunStatus) -> str:
    """step 84000, 4 min ago, verified"""
    if row.checkpoint_step is None:
        return "its own" if row.seen else "none yet"
    age = ago(row.checkpoint_age_s or 0)
    return f"step {row.checkpoint_step}, {age} ago{', verified' if row.checkpoint_verified else ''}"


def _checkpoint_age(row: RunStatus) -> str:
    if row.checkpoint_step is None:
        return checkpoint(row)
    return f"{ago(row.checkpoint_age_s or 0)} ago{' ✓' if row.checkpoint_verified else ''}"


def calendar_words(row: RunStatus, now: float) -> str:
    """`about Mon 14:20, in this and 2 more links; at best Mon 12:05`"""
    calendar = row.calendar
    assert calendar is not None
    expected, best = (day_and_hour(at, now) for at in (calendar.expected, calendar.best))
    runs = row.state == "running"
    further = calendar.links_left - runs
    more = f"{further} more link{'s' * (further != 1)}" if further else "link"
    words = f"about {expected}, in {'this ' * runs}{'and ' * (runs and further > 0)}{more}"
    return words if best == expected else f"{words}; at best {best}"


def late_words(row: RunStatus) -> str:
    """That a run will not be complete by its deadline; nothing where it will, or nobody knows."""
    if not row.late or row.deadline is None:
        return ""
    when = day_and_hour(row.deadline, time.time())
    return f"its deadline, {when}, comes before it is complete"


def day_and_hour(at: float, now: float) -> str:
    """A moment in local time (both in Unix seconds): 14:20 today, Mon 14:20, or 24 Dec."""
    then, today = datetime.datetime.fromtimestamp(at), datetime.datetime.fromtimestamp(now)
    if then.date() == today.date():
        return f"{then:%H:%M}"
    return f"{then:%a %H:%M}" if abs(at - now) < 6 * 86400 else f"{then.day} {then:%b}"


def ago(seconds: float) -> str:
    """45 s, 12 min, 5 h, 3 d"""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
