"""Options that several commands share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hpcresume.errors import NotFound, UsageError
from hpcresume.run_dir import RunDir, all_runs, find_run, runs_root

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from hpcresume.checkpoint.origin import Origin

F = TypeVar("F", bound=Callable[..., Any])


def run_argument(command: F) -> F:
    """[RUN]: a path or a name, which the shell completes."""
    return click.argument("run", required=False, shell_complete=_run_names)(command)


def _run_names(ctx: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    """The runs that may be meant, newest first; below a folder, the folders there."""
    from click.shell_completion import CompletionItem

    if os.sep in begun:
        return [CompletionItem(begun, type="dir")]
    root = runs_root(ctx.params.get("runs"), os.environ)
    return [CompletionItem(run.name) for run in all_runs(root) if run.name.startswith(begun)]


def runs_option(command: F) -> F:
    """--runs DIR."""
    return click.option(
        "--runs", metavar="DIR", help="Folder of runs [$HPCRESUME_RUNS or ./runs]."
    )(command)


def origin_options(command: F) -> F:
    """--resume PATH, --trust."""
    trust = click.option(
        "--trust", is_flag=True, help="PATH is your own: its pickles may hold anything."
    )
    return click.option(
        "--resume",
        metavar="PATH",
        help="Begin with a run, a checkpoint, or another program's checkpoint.",
    )(trust(command))


def chosen_origin(resume: str | None, trust: bool, root: Path) -> Origin | None:
    """What a new run is to begin with. Raises NotFound, CheckpointError, UsageError."""
    if resume is None:
        if trust:
            raise UsageError("--trust says something of what --resume PATH names: name it.")
        return None
    from hpcresume.checkpoint.origin import find_origin

    return find_origin(resume, root, trust=trust)


def chosen_run(text: str | None, runs: str | None) -> RunDir:
    """RUN as a path or a name; by default the newest unfinished one. Raises NotFound."""
    root = root_of(runs)
    if text is not None:
        return find_run(text, root)
    from hpcresume.story import glance

    known = all_runs(root)
    for run in known:
        # One that is damaged is nobody's default, but may be named.
        with contextlib.suppress(NotFound):
            if not glance(run).completed:
                return run
    if known:
        return known[0]
    raise no_run(root)


def no_run(root: Path) -> NotFound:
    """What is said where there is no run at all."""
    return NotFound(f"There is no run in {root}: `hpcresume submit` begins one.")


def root_of(runs: str | None) -> Path:
    """The folder of runs, which may not be there yet. Raises UsageError where it is a file."""
    root = runs_root(runs, os.environ)
    for path in (root, *root.parents):
        if path.exists():
            if path.is_dir():
                break
            raise UsageError(f"{path} is no folder: let --runs or $HPCRESUME_RUNS name one.")
    return root
