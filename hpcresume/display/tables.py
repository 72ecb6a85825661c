"""Tables of the command line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpcresume.status import RunStatus

_STATE_STYLE = {
    "complete": "green",
    "running": "cyan",
    "waiting": "yellow",
    "stopped": "magenta",
    "failed": "bold red",
    "stalled": "bold red",
}


def console() -> Console:
    """Standard output. Off a terminal it is wide enough that no cell is cut."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=200)


def status_table(rows: Sequence[RunStatus]) -> None:
    """Print one row a run, and its reason below where there is one."""
    out = console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("RUN", "STATE", "STEP", "%", "LOSS", "LINK", "JOB", "LEFT", "CHECKPOINT"):
        justify = "right" if name in ("%", "LOSS", "LINK", "LEFT") else "left"
        table.add_column(name, justify=justify, no_wrap=name != "RUN", overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*_cells(row))
    out.print(table)
    for row in rows:
        if row.why:
            out.print(Text.assemble((f"{row.name}: ", "dim"), row.why))


def _cells(row: RunStatus) -> list[Text | str]:
    total = row.total_steps
    job = row.job + (f" ({row.node})" if row.node else "")
    return [
        row.name,
        Text(row.state, style=_STATE_STYLE[row.state]),
        f"{row.step}/{total}" if total else str(row.step),
        f"{100 * row.step / total:.0f}%" if total else "",
        "" if row.loss is None else f"{row.loss:.4f}",
        str(row.link or ""),
        job,
        "" if row.time_left_s is None else clock(row.time_left_s),
        _checkpoint(row),
    ]


def _checkpoint(row: RunStatus) -> str:
    if row.checkpoint_step is None:
        return "none yet"
    age = ago(row.checkpoint_age_s or 0)
    return f"step {row.checkpoint_step}, {age} ago{', verified' if row.checkpoint_verified else ''}"


def clock(seconds: float) -> str:
    """1:05:09"""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def ago(seconds: float) -> str:
    """45 s, 12 min, 5 h, 3 d"""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
