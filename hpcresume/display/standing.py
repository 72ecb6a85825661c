"""How one run stands: `hpcresume status RUN`, and with `--plan` the checkpoints to come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpcresume.display.tables import (
    calendar_words,
    checkpoint,
    day_and_hour,
    late_words,
    percent,
    progress_bar,
    shown_name,
    state_sign,
    steps,
)
from hpcresume.display.terminal import printable, styled, terminal_width, wrapped
from hpcresume.status import RunStatus
from hpcresume.training.progress import clock

if TYPE_CHECKING:
    from hpcresume.chain.plan import PlannedSave
    from hpcresume.observe.plan import RunPlan

_LABEL = 12
_WIDEST_BAR = 60


def standing(row: RunStatus) -> str:
    """A run as a heading, a bar, and a line for each thing that is known."""
    lines = [f"{styled(shown_name(row), 'strong')}  {state_sign(row.state)}"]
    if row.total_steps:
        share = f"  {percent(row)}"
        cells = min(_WIDEST_BAR, max(10, terminal_width() - len(share)))
        lines.append(progress_bar(row, cells) + share)
    for label, text in _facts(row):
        lines += _fact(label, text)
    return "\n".join(lines)


def _fact(label: str, text: str) -> list[str]:
    hang = " " * _LABEL
    body = wrapped(printable(text), indent=hang, hang=hang)
    return [styled(label.ljust(_LABEL), "dim") + body[_LABEL:]]


def _facts(row: RunStatus) -> Iterator[tuple[str, str]]:
    """A word each, and what it stands for; nothing of what is not known."""
    now = time.time()
    if row.why:
        yield "why", row.why
    parts = [steps(row)]
    parts += [f"epoch {row.epoch:.2f}"] if row.epoch else []
    parts += [f"loss {row.loss:.4f}"] if row.loss is not None else []
    yield "step" if row.step or not row.seen else "ran", " · ".join(parts)
    job = f"job {row.job}{' is next' * (row.state == 'waiting')}" if row.job else ""
    node = f"on {row.node}" if row.node else ""
    left = f"{clock(row.time_left_s)} left" if row.time_left_s is not None else ""
    where = [f"{row.link}" if row.link else "", " ".join(p for p in (job, node) if p), left]
    if any(where):
        yield "link", " · ".join(part for part in where if part)
    behind = [job for job in row.queued if job != row.job]
    if behind:
        yield "queued", ", ".join(f"job {job}" for job in behind)
    yield "checkpoint", checkpoint(row)
    if row.train_left_s is not None:
        yield "training", f"{clock(row.train_left_s)} left at the pace of its links so far"
    if row.calendar is not None:
        yield "complete", calendar_words(row, now)
    if late_words(row):
        yield "deadline", late_words(row)
    if row.worked_s:
        waited = f" · {clock(row.queued_s)} in the queue" if row.queued_s else ""
        yield "so far", f"{clock(row.worked_s)} in {_counted(row.link, 'link')}{waited}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


# ---- the checkpoints to come ---------------------------------------------------------------

#: Of a longer plan only the links' last checkpoints are shown.
_MOST_ROWS = 24
_HEADS = ("CHECKPOINT", "TIME", "CUMULATIVE", "%", "LINK", "WHEN", "BY")
_TO_THE_LEFT = frozenset({"WHEN", "BY"})
_DROPPED = ("BY", "WHEN", "TIME")


def plan_table(plan: RunPlan, *, everything: bool) -> str:
    """A line for each checkpoint to come; of a long plan, unless `everything`, for each link."""
    if plan.missing:
        return plan.missing
    saves = list(plan.saves)
    if len(saves) > _MOST_ROWS and not everything:
        saves = list({save.link: save for save in saves}.values())
    before = [0.0, *(save.cumulative_s for save in saves)]
    rows = [
        _row(save, save.cumulative_s - since, plan.total_steps or save.step)
        for save, since in zip(saves, before, strict=False)
    ]
    columns = list(_HEADS)
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    for column in _DROPPED:
        if sum(widths[c] + 2 for c in columns) - 2 > terminal_width():
            columns.remove(column)
    lines = [styled(_line(dict(zip(_HEADS, _HEADS, strict=True)), columns, widths), "dim")]
    lines += [_line(row, columns, widths) for row in rows]
    if len(saves) < len(plan.saves):
        more = f"The last checkpoint of each link is shown; -a shows all {len(plan.saves)}."
        lines += ["", *_note(more)]
    return "\n".join([*lines, "", *_note(_NOTE)])


_NOTE = (
    "TIME is since the line above and CUMULATIVE from now on, both without the queue, at the pace "
    "of the links so far; WHEN is with the waits that links had."
)


def _row(save: PlannedSave, seconds: float, total: int) -> dict[str, str]:
    cells = (
        *(str(save.step), clock(seconds), clock(save.cumulative_s)),
        *(f"{100 * save.step // total}%", str(save.link)),
        *(day_and_hour(save.at, time.time()), save.reason),
    )
    return dict(zip(_HEADS, cells, strict=True))


def _line(row: dict[str, str], columns: list[str], widths: dict[str, int]) -> str:
    padded = (
        row[c].ljust(widths[c]) if c in _TO_THE_LEFT else row[c].rjust(widths[c]) for c in columns
    )
    return "  ".join(padded).rstrip()


def _note(text: str) -> Iterator[str]:
    yield from (styled(line, "dim") for line in wrapped(text).split("\n"))
