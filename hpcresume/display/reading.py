"""A bar for long reading: how much is read, and how long the rest will take.

rich is imported where the bar is shown: a pipe does not wait for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """What a reader calls while it reads."""

    say: Say
    """Prints a line; above the bar, where there is one."""
    has_read: Callable[[str, int], None]
    """Takes what is being read, and how many bytes of it are read since the last call."""


@contextlib.contextmanager
def reading(total_bytes: int, say: Say, *, bar: bool) -> Iterator[Reading]:
    """With `bar`, one at the bottom of the terminal, gone afterwards; without, lines by `say`."""
    if not bar:
        yield Reading(say, lambda what, num_bytes: None)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(compact=True),
        transient=True,
        expand=True,
    ) as progress:
        task = progress.add_task("", total=total_bytes)

        def print_above(line: str) -> None:
            progress.console.print(Text.from_ansi(line), soft_wrap=True)

        def has_read(what: str, num_bytes: int) -> None:
            progress.update(task, description=what, advance=num_bytes)

        yield Reading(print_above, has_read)
