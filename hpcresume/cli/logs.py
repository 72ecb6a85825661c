"""`hpcresume logs`: what the run printed, over all its jobs; with --metrics, what it measured."""

from __future__ import annotations

import csv
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import click

from hpcresume import files
from hpcresume.cli.options import chosen_run, run_argument, runs_option
from hpcresume.errors import NotFound, UsageError
from hpcresume.observe.loglines import LogTail, opening
from hpcresume.observe.sieve import Sieve, parse_since
from hpcresume.run_dir import RunDir

T = TypeVar("T")

_POLL_S = 0.5


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows, into the next jobs.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last lines.")
@click.option("--since", metavar="TIME", help="Only lines from then on: 10m, 2h, 1d ago, 08:00, …")
@click.option("--link", "number", type=int, help="Only this link.")
@click.option(
    "--rank", "rank", type=click.IntRange(min=0), default=0, show_default=True, help="Of this rank."
)
@click.option("--grep", "pattern", metavar="PATTERN", help="Only lines that a pattern fits.")
@click.option("--err", "errors", is_flag=True, help="Only warnings, errors and tracebacks.")
@click.option("--metrics", is_flag=True, help="Instead, what session.log got: a JSON line a step.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "csv"]),
    help="Of --metrics: JSON lines (the default), or one CSV table.",
)
@runs_option
def logs(run: str | None, runs: str | None, **asked: Any) -> int:
    """Print the logs of RUN's links in order, with a heading each.

    What restricts them adds up: --err --since 1h --grep loader. A line that has no time of its own
    is as old as the one before it that has.

    With --metrics, each step once over all links. Following (-f), a step that was printed is never
    printed again: where a link died after its last checkpoint and the next one repeats steps, the
    values of the one that died are what you saw.

    \b
    Examples:
      hpcresume logs -f
      hpcresume logs toy -n 100 --link 3 --rank 1
      hpcresume logs toy --err --since 2h
      hpcresume logs toy --metrics --format csv > toy.csv
    """
    chosen = chosen_run(run, runs)
    if asked["metrics"]:
        return _print_metrics(chosen, **_of_metrics(asked))
    if asked["form"] is not None:
        raise UsageError("--format is that of --metrics: name both.")
    numbers, number = chosen.link_numbers(), asked["number"]
    if number is not None:
        if number not in numbers:
            known = f"1 to {chosen.newest_link()}" if chosen.newest_link() else "none yet"
            raise NotFound(f"{chosen.name} has no link {number} (links: {known}).")
        numbers = [number]
    sieve = _sieve(chosen, asked)
    tail = LogTail(chosen, asked["rank"], numbers)
    text = [line for printed in tail.look() for line in sieve.take(printed)]
    # Followed through a filter, a line is judged when it is whole.
    begun = [] if asked["follow"] and not sieve.open else sieve.rest()
    if not text and not begun and not asked["follow"]:
        what = "printed nothing yet" if sieve.open else "printed no such line"
        raise NotFound(f"{chosen.name} has {what}.")
    for line in _last([*text, *begun], asked["lines"]):
        click.echo(line)
    if asked["follow"]:
        _follow(chosen, tail, sieve)
    return 0


def _sieve(run: RunDir, asked: dict[str, Any]) -> Sieve:
    """What the options let through. Raises UsageError."""
    since, pattern = asked["since"], asked["pattern"]
    try:
        compiled = None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--grep {pattern!r} is no pattern (regular expression): {error}."
        ) from None
    return Sieve(
        run,
        asked["rank"],
        None if since is None else parse_since(since, now=time.time()),
        compiled,
        asked["errors"],
    )


def _last(items: Sequence[T], number: int | None) -> Sequence[T]:
    return items if number is None else items[max(0, len(items) - number) :]


def _follow(run: RunDir, tail: LogTail, sieve: Sieve) -> None:
    from hpcresume.story import read_story

    follow = True
    while follow:
        # Asked before the look, so that nothing is missed which came before the end.
        follow = not read_story(run).over
        for printed in tail.look():
            if sieve.open:
                # As it comes: a progress bar has no whole lines.
                if printed.opens:
                    click.echo("\n".join(opening(run, printed.link, sieve.rank)))
                sys.stdout.write(printed.text)
                sys.stdout.flush()
            else:
                for line in sieve.take(printed):
                    click.echo(line)
        if follow:
            time.sleep(_POLL_S)
    for line in sieve.rest():
        click.echo(line)


# ---- metrics -------------------------------------------------------------------------------


def _of_metrics(asked: dict[str, Any]) -> dict[str, Any]:
    """What there is to choose of metrics. Raises UsageError for the rest."""
    if asked["number"] is not None or asked["rank"]:
        raise UsageError("--metrics are those of the whole run: leave --link and --rank out.")
    if asked["since"] is not None or asked["pattern"] is not None or asked["errors"]:
        raise UsageError("--metrics have steps, no lines: leave --since, --grep and --err out.")
    table = asked["form"] == "csv"
    if table and asked["follow"]:
        raise UsageError("A CSV table needs all its columns at once: follow with --format json.")
    return {"lines": asked["lines"], "follow": asked["follow"], "table": table}


def _print_metrics(run: RunDir, *, lines: int | None, follow: bool, table: bool) -> int:
    from hpcresume.observe.metrics import MetricTail
    from hpcresume.story import read_story

    tail = MetricTail(run)
    records = tail.look()
    if not records and not follow:
        raise NotFound(f"{run.name} has logged no metrics yet.")
    (_write_table if table else _write)(_last(records, lines))
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


def _write_table(records: Sequence[dict[str, Any]]) -> None:
    """One row a step; a column for each name that was ever logged, in the order they came."""
    columns = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(sys.stdout, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    sys.stdout.flush()
