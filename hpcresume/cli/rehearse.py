"""`hpcresume rehearse`: a chain of short links on this machine, each really ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hpcresume import files
from hpcresume.cli.behind import (
    TakesCommand,
    command_of,
    command_options,
    default_config,
    settings_of_command,
)
from hpcresume.config import parse_time
from hpcresume.display.terminal import styled, terminal_width, wrapped
from hpcresume.errors import UsageError
from hpcresume.rehearse import Played, Rehearsal
from hpcresume.rehearse import rehearse as play
from hpcresume.submit import read_config

_COLUMNS = ("LINK", "ENDED BY", "FROM STEP", "CUT AT", "SAVED", "SAVE TOOK", "WENT ON")


@click.command(cls=TakesCommand)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--links", type=click.IntRange(min=1), default=3, show_default=True, help="How many links."
)
@click.option(
    "--time",
    "limit",
    metavar="TIME",
    help="Time limit of each link: seconds or HH:MM:SS [what the first one needs].",
)
@click.option(
    "--set", "sets", multiple=True, metavar="a.b=VALUE", help="Set a configuration value."
)
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the run, in this folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@command_options
def rehearse(
    config: Path | None,
    links: int,
    limit: str | None,
    sets: tuple[str, ...],
    keep: Path | None,
    as_json: bool,
    **flags: Any,
) -> int:
    """Try on this machine whether a training survives a chain of jobs.

    A scratch copy is trained in short links, which are ended as jobs are: by preemption, by their
    time limit, by kill -9. Exit code 7 where the chain would not survive, 8 where a budget ends it.

    CONFIG is a configuration as for submit. A command behind `--` really runs in this folder, and
    writes where it always does.

    \b
    Examples:
      hpcresume rehearse
      hpcresume rehearse --time 60 --checkpoints "out/step-*" -- python main.py
    """
    words = command_of()
    path = config or default_config(words)
    if path is None and words is None:
        raise UsageError(
            "There is no ./hpcresume.yaml and no configs/quickstart.yaml here: name a "
            "configuration (hpcresume rehearse CONFIG)."
        )
    rehearsal = play(
        read_config(path, sets=sets, options=settings_of_command(words, flags), environ=os.environ),
        project=Path.cwd(),
        environ=os.environ,
        links=links,
        time_s=_seconds(limit),
        keep=keep,
        say=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(files.to_json(rehearsal.to_json(), indent=2).decode(), nl=False)
    else:
        click.echo("\n".join(shown(rehearsal)))
    return rehearsal.exit_code


def _seconds(text: str | None) -> int | None:
    """A bare number is seconds here, where no link lasts minutes."""
    if text is None:
        return None
    seconds = int(text) if text.isdecimal() else parse_time(text)
    if not seconds:
        raise UsageError(f"--time {text}: expected seconds above 0, or HH:MM:SS.")
    return seconds


def shown(rehearsal: Rehearsal) -> list[str]:
    """The links as a table, on a narrow terminal as a few lines each, and the verdict."""
    played = rehearsal.played
    following = [*(one.first_step for one in played[1:]), None]
    rows = [_cells(one, after) for one, after in zip(played, following, strict=True)]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    narrow = sum(widths) + 2 * len(widths) > terminal_width()
    lines = _cards(rows) if narrow else _table(rows, widths)
    style = "bad" if rehearsal.trouble else "good"
    verdict, *rest = (wrapped(line, hang="    ") for line in rehearsal.lines())
    return [*lines, "", styled(verdict, style), *rest]


def _table(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join(padded).rstrip()

    return [styled(line(_COLUMNS), "dim"), *map(line, rows)]


def _cards(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(f"link {row[0]}")
        for column, cell in list(zip(_COLUMNS, row, strict=True))[1:]:
            if cell:
                lines.append(f"  {styled(f'{column.lower():<10}', 'dim')} {cell}")
    return lines


def _cells(one: Played, after: int | None) -> tuple[str, ...]:
    trained = one.first_step is not None
    return (
        str(one.link),
        _ended_by(one),
        str(one.first_step) if trained else "",
        str(one.cut_at) if trained else "",
        str(one.committed) if one.committed else "nothing",
        _took(one),
        _went_on(one, after),
    )


def _ended_by(one: Played) -> str:
    if one.completed or one.failure:
        return "itself"
    return one.rule or one.end


def _took(one: Played) -> str:
    if one.save_s is None:
        return ""
    took = f"{one.save_s:.1f} s" if one.save_s >= 0.1 else "<0.1 s"
    return took if one.lead_s is None else f"{took} of {one.lead_s:.0f} s"


def _went_on(one: Played, after: int | None) -> str:
    if one.completed:
        return "complete"
    if after is None:
        return ""
    return f"at {after}" + (f" ({one.lost} again)" if one.lost else "")
