"""`hpcresume logs`: what the run printed, over all its jobs; with --metrics, what it measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import click

from hpcresume import files
from hpcresume.cli.options import chosen_run, runs_option
from hpcresume.errors import NotFound, UsageError
from hpcresume.observe.loglines import LogTail, opening
from hpcresume.run_dir import RunDir

T = TypeVar("T")

_POLL_S = 0.5


@click.command()
@click.argument("run", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows, into the next jobs.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last lines.")
@click.option("--link", "number", type=int, help="Only this link.")
@click.option("--rank", "rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--metrics", is_flag=True, help="Instead, what session.log got: a JSON line a step.")
@runs_option
def logs(
    run: str | None,
    follow: bool,
    lines: int | None,
    number: int | None,
    rank: int,
    metrics: bool,
    runs: str | None,
) -> int:
    """Print the logs of RUN's links in order, with a heading each.

    With --metrics, each step once over all links. Following (-f), a step that was printed is never
    printed again: where a link died after its last checkpoint and the next one repeats steps, the
    values of the one that died are what you saw.
    """
    chosen = chosen_run(run, runs)
    if metrics:
        if number is not None or rank:
            raise UsageError("--metrics are those of the whole run: leave --link and --rank out.")
        return _print_metrics(chosen, lines, follow)
    numbers = [number] if number is not None else chosen.link_numbers()
    if number is not None and number not in chosen.link_numbers():
        known = f"1 to {chosen.newest_link()}" if chosen.newest_link() else "none yet"
        raise NotFound(f"{chosen.name} has no link {number} (links: {known}).")
    tail = LogTail(chosen, rank, numbers)
    text: list[str] = []
    for printed in tail.look():
        if printed.opens:
            text += opening(chosen, printed.link, rank)
        text += printed.text.splitlines()
    if not text and not follow:
        raise NotFound(f"{chosen.name} has printed nothing yet.")
    for line in _last(text, lines):
        click.echo(line)
    if follow:
        _follow(chosen, tail, rank)
    return 0


def _last(items: Sequence[T], number: int | None) -> Sequence[T]:
    return items if number is None else items[max(0, len(items) - number) :]


def _follow(run: RunDir, tail: LogTail, rank: int) -> None:
    from hpcresume.story import read_story

    follow = True
    while follow:
        # Asked before the look, so that nothing is missed which came before the end.
        follow = not read_story(run).over
        for printed in tail.look():
            if printed.opens:
                click.echo("\n".join(opening(run, printed.link, rank)))
            sys.stdout.write(printed.text)
            sys.stdout.flush()
        if follow:
            time.sleep(_POLL_S)


# ---- metrics -------------------------------------------------------------------------------


def _print_metrics(run: RunDir, lines: int | None, follow: bool) -> int:
    from hpcresume.observe.metrics import MetricTail
    from hpcresume.story import read_story

    tail = MetricTail(run)
    records = tail.look()
    if not records and not follow:
        raise NotFound(f"{run.name} has logged no metrics yet.")
    _write(_last(records, lines))
    while follow:
        # Asked before the look, so that nothing is missed which came before the end.
        follow = not read_story(run).over
        _write(tail.look())
        if follow:
            time.sleep(_POLL_S)
    return 0


def _write(records: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write("".join(files.to_json(record).decode() for record in records))
    sys.stdout.flush()
