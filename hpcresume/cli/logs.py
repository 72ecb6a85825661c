"""`hpcresume logs`: what the run printed, over all its jobs; with --metrics, what it measured."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hpcresume import files
from hpcresume.cli.options import chosen_run, runs_option
from hpcresume.errors import NotFound, UsageError
from hpcresume.run_dir import RunDir

if TYPE_CHECKING:
    from hpcresume.story import Story

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
    text, position = _read_all(chosen, numbers, rank)
    if not text and not follow:
        raise NotFound(f"{chosen.name} has printed nothing yet.")
    for line in _last(text, lines):
        click.echo(line)
    if follow:
        _follow(chosen, rank, numbers[-1] if numbers else 0, position)
    return 0


def _last(items: Sequence[T], number: int | None) -> Sequence[T]:
    return items if number is None else items[max(0, len(items) - number) :]


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
        if is_over(read_story(run)):
            _print_from(run, number, rank, position)
            return
        time.sleep(_POLL_S)


def is_over(story: Story) -> bool:
    """Whether no further link is to be waited for."""
    decided = story.decided()
    rests = decided is not None and decided.get("decision") != "continue"
    return story.completed or rests or bool(story.cancelled)


def _print_from(run: RunDir, number: int, rank: int, position: int) -> int:
    """Print what is new in a log; returns how many bytes that were."""
    data = _read(run, number, rank, position) or b""
    if data:
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()
    return len(data)


# ---- metrics -------------------------------------------------------------------------------


def _print_metrics(run: RunDir, lines: int | None, follow: bool) -> int:
    from hpcresume.story import read_story

    tail = MetricTail(run)
    records = tail.look()
    if not records and not follow:
        raise NotFound(f"{run.name} has logged no metrics yet.")
    _write(_last(records, lines))
    while follow:
        # Asked before the look, so that nothing is missed which came before the end.
        follow = not is_over(read_story(run))
        _write(tail.look())
        if follow:
            time.sleep(_POLL_S)
    return 0


class MetricTail:
    """The metrics of a run as they grow, merged over its links: each step once, in order."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._step = 0
        self._link = 0
        self._position: int | None = 0
        """How far the newest link's log is read; None: to its end."""

    def look(self) -> list[dict[str, Any]]:
        """What has come since the last look."""
        from hpcresume.journal import Lineage, lineage, read_metrics

        over = lineage(self._run)
        new: list[Any] = []
        if over.link != self._link:
            # Another link trains: what stands of those before, its lineage tells.
            self._link, self._position = over.link, 0
            missed = tuple(part for part in over.segments if part.upto_step > self._step)
            new += read_metrics(self._run, Lineage(missed))
        if self._link != self._run.newest_link() and self._position is not None:
            # The next link is there: it has said how much of this one counts.
            self._position = None
            new += read_metrics(self._run, Lineage((), self._link))
        elif self._position is not None and self._link:
            new += self._grown(self._run.link(self._link).metrics, self._position)
        return list(self._later(new))

    def _grown(self, path: Path, position: int) -> list[Any]:
        """The values of the whole lines behind a position."""
        try:
            with path.open("rb") as file:
                file.seek(position)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position = position + len(whole)
        values = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                values.append(json.loads(line))
        return values

    def _later(self, records: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The records of later steps than before; what is no record of ours is passed over."""
        for record in records:
            step = record.get("step") if isinstance(record, dict) else None
            if isinstance(step, int) and step > self._step:
                self._step = step
                yield record


def _write(records: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write("".join(files.to_json(record).decode() for record in records))
    sys.stdout.flush()
