"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hpcresume.errors import NotFound
from hpcresume.run_dir import RunDir, all_runs, find_run, runs_root

F = TypeVar("F", bound=Callable[..., Any])


def runs_option(command: F) -> F:
    """--runs DIR."""
    return click.option(
        "--runs", metavar="DIR", help="Folder of runs [$HPCRESUME_RUNS or ./runs]."
    )(command)


def chosen_run(text: str | None, runs: str | None) -> RunDir:
    """RUN as a path or a name; by default the newest unfinished one. Raises NotFound."""
    root = runs_root(runs, os.environ)
    if text is not None:
        return find_run(text, root)
    from hpcresume.story import read_story

    known = all_runs(root)
    for run in known:
        if not read_story(run).completed:
            return run
    if known:
        return known[0]
    raise NotFound(f"There is no run in {root}: `hpcresume submit` begins one.")


def root_of(runs: str | None) -> Path:
    """The folder of runs."""
    return runs_root(runs, os.environ)
