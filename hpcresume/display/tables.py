"""Tables of the command line.

Written without rich, whose import alone costs half of what `status` may take: people type it all
day, on login nodes with slow file systems.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence

from hpcresume.display.terminal import styled, terminal_width
from hpcresume.status import RunStatus
from hpcresume.training.progress import clock

_COLUMNS = ("RUN", "STATE", "STEP", "%", "LOSS", "LINK", "JOB", "LEFT", "DONE", "CHECKPOINT")
_TO_THE_RIGHT = frozenset({"%", "LOSS", "LINK", "LEFT"})
#: SGR codes of a terminal.
_STATES = {
    "complete": "32",
    "running": "36",
    "waiting": "33",
    "stopped": "35",
    "failed": "1;31",
    "stalled": "1;31",
}


def status_table(rows: Sequence[RunStatus]) -> str:
    """One row a run, and its reason below; on a narrow terminal, a few lines a run."""
    cells = [dict(zip(_COLUMNS, _cells(row), strict=True)) for row in rows]
    widths = {c: max(len(c), *(len(row[c]) for row in cells)) for c in _COLUMNS}
    narrow = sum(widths.values()) + 2 * len(widths) > terminal_width()
    lines = _cards(cells) if narrow else _lines(cells, widths)
    lines += [f"{styled(row.name + ':', 'dim')} {row.why}" for row in rows if row.why]
    lines += [f"{styled(row.name + ':', 'dim')} {late_words(row)}" for row in rows if row.late]
    return "\n".join(lines)


def _lines(cells: Sequence[dict[str, str]], widths: dict[str, int]) -> list[str]:
    def padded(row: dict[str, str], column: str) -> str:
        text = row[column]
        gap = " " * (widths[column] - len(text))
        shown = _state(text) if column == "STATE" else text
        return gap + shown if column in _TO_THE_RIGHT else shown + gap

    head = "  ".join(padded({c: c for c in _COLUMNS}, c) for c in _COLUMNS).rstrip()
    body = ["  ".join(padded(row, c) for c in _COLUMNS).rstrip() for row in cells]
    return [styled(head, "dim"), *body]


def _cards(cells: Sequence[dict[str, str]]) -> list[str]:
    lines = []
    for row in cells:
        lines.append(f"{row['RUN']}  {_state(row['STATE'])}")
        for column in _COLUMNS[2:]:
            if row[column]:
                lines.append(f"  {styled(f'{column.lower():<10}', 'dim')} {row[column]}")
    return lines


def _cells(row: RunStatus) -> list[str]:
    total = row.total_steps
    return [
        row.name,
        row.state,
        _progress(row),
        f"{100 * row.step / total:.0f}%" if total else "",
        "" if row.loss is None else f"{row.loss:.4f}",
        str(row.link or ""),
        row.job + (f" ({row.node})" if row.node else ""),
        "" if row.time_left_s is None else clock(row.time_left_s),
        "" if row.calendar is None else day_and_hour(row.calendar.expected, time.time()),
        _checkpoint(row),
    ]


def _progress(row: RunStatus) -> str:
    if row.ran_s is not None and not row.step:
        return clock(row.ran_s)
    return f"{row.step}/{row.total_steps}" if row.total_steps else str(row.step)


def _checkpoint(row: RunStatus) -> str:
    if row.checkpoint_step is None:
        return "its own" if row.seen else "none yet"
    age = ago(row.checkpoint_age_s or 0)
    return f"step {row.checkpoint_step}, {age} ago{', verified' if row.checkpoint_verified else ''}"


def _state(text: str) -> str:
    return styled(text, _STATES[text]) if text in _STATES else text


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
