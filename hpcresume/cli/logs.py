"""`hpcresume logs`: what the run printed, over all its jobs."""

from __future__ import annotations

import sys
import time
from typing import Any

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
        known = f"1 to {chosen.newest_link()}" if chosen.newest_link() else "none yet"
        raise NotFound(f"{chosen.name} has no link {number} (links: {known}).")
    text, position = _read_all(chosen, numbers, rank)
    if not text and not follow:
        raise NotFound(f"{chosen.name} has printed nothing yet.")
    for line in text[-lines:] if lines else text if lines is None else []:
        click.echo(line)
    if follow:
        _follow(chosen, rank, numbers[-1] if numbers else 0, position)
    return 0


def heading(run: RunDir, number: int) -> str:
    """`── link 3 · job 4711 · gpu017 ──`"""
    claim = _claim(run, number)
    parts = [f"link {number}"]
    if claim.get("job"):
        parts.append(f"job {claim['job']}")
    parts.append(str(claim.get("nodes") or claim.get("host") or "?"))
    return f"── {' · '.join(parts)} ──"


def _claim(run: RunDir, number: int) -> dict[str, Any]:
    content = files.read_json_or_none(run.link(number).claim)
    return content if isinstance(content, dict) else {}


def _read_all(run: RunDir, numbers: list[int], rank: int) -> tuple[list[str], int]:
    """The lines of some links with their headings, and how much of the last log they are."""
    text: list[str] = []
    position = 0
    for number in numbers:
        text.append(heading(run, number))
        data = _read(run, number, rank, 0)
        if data is None and _claim(run, number).get("foreground"):
            text.append(f"(it printed to its own terminal; its log lines are in {run.train_log})")
        whole = data or b""
        position = len(whole)
        text += whole.decode(errors="replace").splitlines()
    return text, position


def _read(run: RunDir, number: int, rank: int, position: int) -> bytes | None:
    """A rank's log from a position on; None where there is none, as of a link in the foreground."""
    try:
        with run.link(number).rank_log(rank).open("rb") as file:
            file.seek(position)
            return file.read()
    except FileNotFoundError:
        return None


def _follow(run: RunDir, rank: int, number: int, position: int) -> None:
    from hpcresume.story import read_story

    while True:
        newest = run.newest_link()
        position += _print_from(run, number, rank, position)
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
    """Print what is new in a log; returns how many bytes that were."""
    data = _read(run, number, rank, position) or b""
    if data:
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()
    return len(data)
