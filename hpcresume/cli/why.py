"""`hpcresume why`: one sentence with its evidence, what to do next, and the chain's history."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from hpcresume.cli.options import chosen_run, root_of, run_argument, runs_option
from hpcresume.display.terminal import printable, styled, terminal_width, wrapped
from hpcresume.errors import HpcResumeError, Unavailable
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.choice import asking_scheduler
from hpcresume.scheduler.job import JobInfo
from hpcresume.status import read_status
from hpcresume.story import Story, find_jobs, read_story
from hpcresume.training.progress import clock
from hpcresume.why import Explanation, explain, is_settled, link_to_ask_about
from hpcresume.why.advice import Advice
from hpcresume.why.evidence import ChainLine

SCHEMA_VERSION = 1
_PATIENCE_S = 10.0


@click.command()
@run_argument
@click.option("--record", metavar="ID", help="Only one record, by the name in a log line.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@runs_option
def why(run: str | None, record: str | None, as_json: bool, runs: str | None) -> int:
    """Say why RUN stands as it does: cause, evidence, what to do next, and its history.

    \b
    Examples:
      hpcresume why
      hpcresume why toy --record 1f3a9c02
    """
    chosen = chosen_run(run, runs)
    if record is not None:
        return _show_record(chosen, record, as_json)
    story = read_story(chosen)
    answer = _Answer([])
    if not is_settled(story):
        if not as_json:
            # Said before the scheduler is asked, which may take its time.
            click.echo(str(chosen.path))
        answer = _ask(chosen, story)
    status = read_status(chosen, answer.jobs, answer.note)
    explanation = explain(
        story,
        status,
        answer.ends,
        _settings(chosen),
        now=time.time(),
        called=_called(chosen),
    )
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, **explanation.to_json()}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        click.echo("\n".join(_lines(explanation)))
    return 0


def _called(run: RunDir) -> str:
    """What a run is called in commands that are typed here."""
    return run.name if run.path.parent == root_of(None) else str(run.path)


def _show_record(run: RunDir, wanted: str, as_json: bool) -> int:
    """Print one record, its traceback, and what to do."""
    from hpcresume.why.record import find_record

    found = find_record(run, wanted, _called(run))
    record = found.record
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, **found.to_json()}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
        return 0
    width = terminal_width()
    link = f"link {found.path.parent.name.lstrip('0')}"
    job = f"job {record['job']}" if record.get("job") else ""
    when = time.strftime("%m-%d %H:%M:%S", time.localtime(float(record.get("t") or 0)))
    head = " · ".join(part for part in (found.kind.replace("_", " "), link, job, when) if part)
    click.echo(styled(head, "strong"))
    click.echo()
    click.echo("\n".join(_facts(found.facts, "", (), width)))
    if record.get("traceback"):
        click.echo()
        click.echo(str(record["traceback"]).rstrip())
    click.echo()
    click.echo("\n".join(_steps([found.advice], width)))
    return 0


# ---- the scheduler's word ------------------------------------------------------------------


@dataclass
class _Answer:
    """What the scheduler told in time."""

    jobs: list[JobInfo] | None = None
    """The run's living jobs; None where that is not known, and `note` says why."""
    ends: dict[str, JobInfo] = field(default_factory=dict)
    """What became of jobs whose end no file tells."""
    note: str = ""


def _ask(run: RunDir, story: Story) -> _Answer:
    """The run's living jobs, and the ends of those that could not record their own."""
    scheduler = asking_scheduler(run, os.environ)
    if scheduler is None:
        return _Answer([])
    answer = _Answer(note=f"the scheduler gave no answer in {_PATIENCE_S:.0f} s")

    def ask() -> None:
        try:
            jobs = find_jobs(scheduler, story.run_id)
            answer.jobs, answer.note = jobs, ""
            living = {"", *(job.id for job in jobs)}
            asked = dict.fromkeys([link_to_ask_about(story), *story.unclaimed()])
            gone = [id for id in asked if id not in living]
            if gone:
                answer.ends = dict(scheduler.state(gone))
        except Unavailable as error:
            answer.note = str(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    # A late answer must not change what is being told.
    return _Answer(answer.jobs, dict(answer.ends), answer.note)


def _settings(run: RunDir) -> Mapping[str, Any]:
    """The frozen configuration; nothing where it cannot be read, which silences nobody."""
    from hpcresume.config import read_frozen, to_mapping

    with contextlib.suppress(HpcResumeError, OSError):
        return to_mapping(read_frozen(run.config))
    return {}


# ---- as text -------------------------------------------------------------------------------

_BAD = frozenset({"user code", "non-finite", "hang", "killed", "configuration", "storage"}) | {
    "out of host memory",
    "out of GPU memory",
    "node failure",
    "boot failure",
}


def _lines(told: Explanation) -> Iterator[str]:
    width = terminal_width()
    yield from (styled(line, "strong") for line in _wrapped(told.sentence, width, ""))
    if told.facts or told.log:
        yield ""
        yield from _facts(told.facts, told.log, told.log_lines, width)
    if told.next:
        yield ""
        yield from _steps(told.next, width)
    if told.chain:
        yield ""
        yield from _table(_folded(told.chain), width)


def _steps(steps: Sequence[Advice], width: int) -> Iterator[str]:
    for reason, command in steps:
        yield from _wrapped(reason + (":" if command else ""), width, "→ ")
        if command:
            # Whole, however narrow the terminal is: it is there to be copied.
            yield "  " + styled(command, "command")


def _facts(
    facts: Sequence[tuple[str, str]], log: str, log_lines: Sequence[str], width: int
) -> Iterator[str]:
    rows = [*facts, *([("log", log)] if log else [])]
    widest = max(len(label) for label, _ in rows)
    for label, text in rows:
        first, *rest = _wrapped(" ".join(text.split()), width - widest - 4, "")
        yield f"  {styled(label.ljust(widest), 'dim')}  {first}"
        yield from (" " * (widest + 4) + line for line in rest)
    for line in log_lines:
        shown = line.expandtabs(4)
        cut = shown if len(shown) <= width - 4 else shown[: max(1, width - 5)] + "…"
        yield f"  {styled('│', 'dim')} {cut}".rstrip()


@dataclass(frozen=True)
class _Row:
    """A line of the table: one link, or several of one kind."""

    cells: dict[str, str]
    cause: str


def _folded(chain: Sequence[ChainLine]) -> list[_Row]:
    """One row a link; more than two in a row that ended alike are one."""

    def kind(line: ChainLine) -> tuple[str, bool]:
        return line.cause, line.committed_step > line.first_step

    rows = []
    for _, group in itertools.groupby(chain, kind):
        lines = list(group)
        parts = [lines] if len(lines) > 2 else [[line] for line in lines]
        rows += [_row(part) for part in parts]
    return rows


def _row(lines: Sequence[ChainLine]) -> _Row:
    first, last = lines[0], lines[-1]
    nodes = dict.fromkeys(line.node for line in lines)
    times = f" ×{len(lines)}" if len(lines) > 1 else ""
    cells = {
        "LINK": _span(str(first.link), str(last.link)),
        "JOB": _span(first.job, last.job),
        "NODE": first.node if len(nodes) == 1 else f"{len(nodes)} nodes",
        # Of a command that shows no steps only its time is known, which stands beside it.
        "STEPS": "" if first.seen == "time" else f"{first.first_step} → {last.committed_step}",
        "TIME": clock(min(sum(line.seconds for line in lines), 1e12)),
        "ENDED BY": first.cause + times if first.cause != "running" else "(running)",
    }
    return _Row(cells, first.cause)


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}–{last}"


_TO_THE_RIGHT = frozenset({"TIME"})
#: What a narrow terminal can do without, the first first.
_DROPPED = ("JOB", "NODE", "TIME")


def _table(rows: Sequence[_Row], width: int) -> Iterator[str]:
    columns = [c for c in rows[0].cells if any(row.cells[c] for row in rows)]
    widths = {c: max(len(c), *(len(row.cells[c]) for row in rows)) for c in columns}
    for column in _DROPPED:
        if column in columns and sum(widths[c] + 2 for c in columns) - 2 > width:
            columns.remove(column)

    def line(cells: Mapping[str, str]) -> str:
        padded = (
            cells[c].rjust(widths[c]) if c in _TO_THE_RIGHT else cells[c].ljust(widths[c])
            for c in columns[:-1]
        )
        return "  ".join([*padded, cells[columns[-1]]])

    yield styled(line({c: c for c in columns}), "dim")
    for row in rows:
        text = line(row.cells)
        end = row.cells["ENDED BY"]
        if row.cause in _BAD:
            text = text.removesuffix(end) + styled(end, "bad")
        yield text


def _wrapped(text: str, width: int, lead: str) -> list[str]:
    """A text as lines of a terminal, the first behind a lead; whole where it is no terminal."""
    # The message of somebody's exception may hold anything.
    return wrapped(printable(text), indent=lead, hang=" " * len(lead), width=width).split("\n")
