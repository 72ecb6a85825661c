"""`hpcresume verify`: whether cutting a training changes a bit of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from hpcresume import files
from hpcresume import submit as verbs
from hpcresume import verify as oracle
from hpcresume.config import RunConfig, default_path, load
from hpcresume.display.terminal import wrapped
from hpcresume.errors import NotFound, UsageError
from hpcresume.run_dir import RunDir

#: A script, and the function in it where it is not `train`.
_SCRIPT = re.compile(r"(?P<path>.*\.py)(?::(?P<function>\w+))?")


@click.command()
@click.argument("target", metavar="[CONFIG|train.py]", required=False)
@click.option(
    "--steps",
    type=click.IntRange(min=oracle.LEAST_STEPS),
    help="Steps to train [12, or max_steps where that is less].",
)
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks of each link."
)
@click.option(
    "--set", "sets", multiple=True, metavar="a.b=VALUE", help="Set a configuration value."
)
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the runs, in this folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(
    target: str | None,
    steps: int | None,
    ranks: int,
    sets: tuple[str, ...],
    keep: Path | None,
    as_json: bool,
) -> int:
    """Check that cutting a training into links changes no bit of it.

    A few steps are trained twice without a cut, then in three links; then all is compared.

    CONFIG is a configuration as for submit. Of a script train.py (or train.py:func) the function
    is verified with ./hpcresume.yaml, where there is one. Exit code 7 where anything differs.

    \b
    Examples:
      hpcresume verify train.py
      hpcresume verify configs/train.yaml --steps 20 --ranks 2
    """
    config, project = _chosen(target, sets)
    verdict = oracle.verify(
        config,
        project=project,
        steps=steps,
        ranks=ranks,
        keep=keep,
        say=lambda line: click.echo(line, err=as_json),
    )
    if as_json:
        click.echo(files.to_json(verdict.to_json(), indent=2).decode(), nl=False)
    else:
        click.echo("\n".join(_fitting(line) for line in verdict.lines()))
    return verdict.exit_code


def _fitting(line: str) -> str:
    """A line as a terminal shows it best, under what it belongs to."""
    hang = " " * (len(line) - len(line.lstrip()) + 4)
    return wrapped(line, hang=hang)


def _chosen(target: str | None, sets: tuple[str, ...]) -> tuple[RunConfig, Path]:
    """The configuration that is meant, and the folder of its code."""
    script = _SCRIPT.fullmatch(target or "")
    if script is not None:
        return _of_script(Path(script["path"]), script["function"] or "train", sets)
    path = Path(target) if target else default_path(Path.cwd())
    if path is None:
        raise UsageError(
            "There is no ./hpcresume.yaml and no configs/quickstart.yaml here: name a "
            "configuration or a script (hpcresume verify train.py)."
        )
    return verbs.read_config(path, sets=sets, options={}, environ=os.environ), Path.cwd()


def _of_script(path: Path, function: str, sets: tuple[str, ...]) -> tuple[RunConfig, Path]:
    """./hpcresume.yaml with another `train`; without it, a configuration of the script's own."""
    if not path.is_file():
        raise NotFound(f"{path}: no such file; expected a script with a training function.")
    here = Path.cwd()
    inside = path.absolute().is_relative_to(here)
    project = here if inside else path.absolute().parent
    options: dict[str, object] = {"train": f"{path.absolute().relative_to(project)}:{function}"}
    own = here / "hpcresume.yaml"
    config = own if own.is_file() else None
    if config is None:
        options["name"] = "verify"
        asked = load(None, sets=sets, options=options, environ=os.environ)
        if asked.max_steps is None and asked.epochs is None:
            options["epochs"] = 1
    return verbs.read_config(config, sets=sets, options=options, environ=os.environ), project


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--link", "number", type=int, required=True)
def verify_link(run: Path, number: int) -> int:
    """One rank of a link that `verify` runs."""
    from hpcresume.verify.watch import run_watched

    return run_watched(RunDir(run.absolute()), number, os.environ)
