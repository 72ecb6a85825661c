"""Commands that jobs and drivers are started with; not for typing."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import click

from hpcresume.cli.options import origin_options, root_of, runs_option
from hpcresume.errors import UsageError, unavailable
from hpcresume.run_dir import RunDir, is_run


@click.command(hidden=True)
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="Wins over TARGET.")
@click.option("--set", "sets", multiple=True, metavar="a.b=VALUE")
@origin_options
@runs_option
def link(
    target: Path | None,
    config: Path | None,
    sets: tuple[str, ...],
    resume: str | None,
    trust: bool,
    runs: str | None,
) -> int:
    """Supervise one link: of the run in $HPCRESUME_RUN or TARGET, or of the one CONFIG makes."""
    from hpcresume.config import default_path
    from hpcresume.link import supervise

    frozen = os.environ.get("HPCRESUME_RUN")
    if frozen:
        run = RunDir(Path(frozen))
    elif target is not None and is_run(target) and config is None and resume is None:
        run = RunDir(target.absolute())
    else:
        from hpcresume.batch import adopt_batch

        # A batch script names its own configuration, and its command line may name another.
        path = config or target or default_path(Path.cwd())
        if path is None:
            raise UsageError("Name the configuration: hpcresume link CONFIG.")
        if trust and resume is None:
            raise UsageError("--trust says something of what --resume PATH names: name it.")
        run = adopt_batch(
            path,
            sets=sets,
            root=root_of(runs),
            environ=os.environ,
            resume=resume,
            trust=trust,
        )
    return supervise(run, os.environ).exit_code


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--link", "number", type=int)
@click.option("--check", is_flag=True)
def rank(run: Path, number: int | None, check: bool) -> int:
    """One training process of a link; with --check, only import the training function."""
    from hpcresume.config import read_frozen

    chosen = RunDir(run.absolute())
    if number is not None and read_frozen(chosen.config).command:
        from hpcresume.adapters.command import run_command

        return run_command(chosen, number, os.environ)
    from hpcresume import rank as ranks

    if check:
        from hpcresume.trackers.choice import check_installed

        config = read_frozen(chosen.config)
        entry = config.train
        if config.scheduler.container is None:
            check_installed(config.log.trackers)
        ranks.load_train(entry, ranks.code_roots(chosen))
        # Code that ends the process while it is imported does not come to this.
        click.echo(entry)
        return 0
    if number is None:
        raise UsageError("hpcresume rank needs --link.")
    return ranks.run_rank(chosen, number, os.environ)


@click.command(hidden=True)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--trust", is_flag=True)
def origin(path: Path, trust: bool) -> int:
    """Say as JSON how far what lies at PATH has trained; it is absolute."""
    from hpcresume.checkpoint.foreign import look
    from hpcresume.checkpoint.origin import Origin

    try:
        told = look(Origin(asked=str(path), path=str(path), trust=trust))
    except OSError as error:
        raise unavailable(error) from None
    click.echo(json.dumps(asdict(told)))
    return 0


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
def local_driver(run: Path) -> int:
    """Serve the jobs of a run until none is left, without a terminal."""
    from hpcresume.config import read_frozen
    from hpcresume.scheduler.driver import drive
    from hpcresume.signals import listen

    chosen = RunDir(run.absolute())
    with listen() as flags:
        grace_s = read_frozen(chosen.config).scheduler.grace_s
        drive(chosen, grace_s, interrupted=lambda: flags.stop_asked() is not None)
    sys.stdout.flush()
    return 0


@click.command(hidden=True)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--link", "number", type=int, required=True)
@click.option("--name", required=True)
@click.option("--rank-pid", type=int, required=True)
def tracker(run: Path, number: int, name: str, rank_pid: int) -> int:
    """Tell one tracker what a link's training logs, until the link has ended."""
    from hpcresume.trackers.follow import follow

    follow(RunDir(run.absolute()), number, name, rank_pid)
    return 0
