"""`hpcresume logs`: what the run printed, over all its jobs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from hpcresume import files
from hpcresume.cli.options import chosen_run, runs_option
from hpcresume.errors import NotFound
from hpcresume.run_dir import RunDir

_POLL_S = 0.5


@click.command()
@click.argument("run", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows, into the next jobs.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last lines.")
@click.option("--link", "number", type=int, help="Only this link.")
@click.option("--rank", "rank", type=click.IntRange(min=0), default=0, show_default=True)
@runs_option
def logs(
    run: str | None,
    follow: bool,
    lines: int | None,
    number: int | None,
    rank: int,
    runs: str | None,
) -> int:
    """Print the logs of RUN's links in order, with a heading each."""
    chosen = chosen_run(run, runs)
    numbers = [number] if number is not None else chosen.link_numbers()
    if number is not None and number not in chosen.link_numbers():
        raise NotFound(f"{chosen.name} has no link {number} (links: 1 to {chosen.newest_link()}).")
    text = [line for one in numbers for line in _of_link(chosen, one, rank)]
    if not text and not follow:
        raise NotFound(f"{chosen.name} has printed nothing yet.")
    for line in text[-lines:] if lines else text if lines is None else []:
        click.echo(line)
    if follow:
        _follow(chosen, rank, numbers[-1] if numbers else 0)
    return 0


def heading(run: RunDir, number: int) -> str:
    """`── link 3 · job 4711 · gpu017 ──`"""
    claim = files.read_json_or_none(run.link(number).claim) or {}
    parts = [f"link {number}"]
    if claim.get("job"):
        parts.append(f"job {claim['job']}")
    parts.append(str(claim.get("nodes") or claim.get("host") or "?"))
    return f"── {' · '.join(parts)} ──"


def _of_link(run: RunDir, number: int, rank: int) -> Iterator[str]:
    yield heading(run, number)
    log = _log_of(run, number, rank)
    if log.exists():
        yield from log.read_text(encoding="utf-8", errors="replace").splitlines()


def _log_of(run: RunDir, number: int, rank: int) -> Path:
    """A rank's log; a link in the foreground has none of its own and printed to its terminal."""
    return run.link(number).rank_log(rank)


def _follow(run: RunDir, rank: int, number: int) -> None:
    from hpcresume.story import read_story

    position = files.size_or_zero(_log_of(run, number, rank)) if number else 0
    while True:
        newest = run.newest_link()
        position = _print_from(run, number, rank, position)
        if number < newest:
            number, position = number + 1, 0
            click.echo(heading(run, number))
            continue
        story = read_story(run)
        if story.completed or story.decided() is not None or story.cancelled:
            _print_from(run, number, rank, position)
            return
        time.sleep(_POLL_S)


def _print_from(run: RunDir, number: int, rank: int, position: int) -> int:
    try:
        with _log_of(run, number, rank).open("rb") as file:
            file.seek(position)
            data = file.read()
    except FileNotFoundError:
        return position
    if data:
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()
    return position + len(data)
