"""`hpcresume submit`: prepare a run and queue its first link."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import click

from hpcresume.cli.behind import (
    TakesCommand,
    command_of,
    command_options,
    default_config,
    settings_of_command,
)
from hpcresume.cli.options import chosen_origin, origin_options, root_of, runs_option
from hpcresume.config import RunConfig, read_frozen
from hpcresume.display.terminal import let_go_of_stdout
from hpcresume.errors import SubmissionRejected, UsageError
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.doctor.way import Way


@click.command(cls=TakesCommand)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--config", "config_option", type=click.Path(path_type=Path), help="Same as CONFIG.")
@click.option("--time", "time", metavar="TIME", help="Time limit of each job, as sbatch writes it.")
@click.option("--time-min", metavar="TIME", help="The least that Slurm may lower --time to.")
@click.option("--deadline", metavar="WHEN", help="When the last job must be over: now+3days, …")
@click.option("--name", help="Name of the run [the configuration's].")
@click.option(
    "--cluster", type=click.Choice(["auto", "slurm", "local", "debug"]), help="Where jobs run."
)
@click.option("-p", "--partition", help="Partition, or several with commas.")
@click.option("-A", "--account", help="Account that is charged.")
@click.option("-q", "--qos", help="Quality of service.")
@click.option("-N", "--nodes", metavar="N", help="Nodes of each job: 2, or 2-4: what is free.")
@click.option("--tasks-per-node", type=int, help="Ranks on each node.")
@click.option("--cpus-per-task", type=int, help="CPU cores of each rank.")
@click.option("--gpus-per-node", help="GPUs on each node: 4, or a100:4.")
@click.option("--mem", help="Memory on each node: 64G.")
@click.option(
    "--set", "sets", multiple=True, metavar="a.b=VALUE", help="Set a configuration value."
)
@click.option(
    "--sbatch", "extra", multiple=True, metavar="KEY=VALUE", help="Goes to sbatch untouched."
)
@command_options
@origin_options
@runs_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the batch script, and when it would start; submit nothing.",
)
@click.option("--force-new", is_flag=True, help="If the name is taken, append -2.")
@click.option("--detach", is_flag=True, help="Local backend: do not wait, survive the terminal.")
def submit(config: Path | None, config_option: Path | None, runs: str | None, **flags: Any) -> int:
    """Submit a run: CONFIG, else ./hpcresume.yaml, else configs/quickstart.yaml.

    What follows `--` is a command to run instead of a training function.

    \b
    Examples:
      hpcresume submit
      hpcresume submit configs/train.yaml --time 04:00:00 --set args.lr=0.001
      hpcresume submit --time 02:00:00 -- python main.py
      hpcresume submit --dry-run
    """
    from hpcresume import submit as verbs

    if config and config_option and config != config_option:
        raise UsageError(f"Two configurations are named, {config} and {config_option}: name one.")
    words = command_of()
    path = config_option or config or default_config(words)
    if path is None and words is None:
        raise UsageError(
            "There is no ./hpcresume.yaml and no configs/quickstart.yaml here: name a "
            "configuration (hpcresume submit CONFIG)."
        )
    settings = verbs.read_config(
        path,
        sets=flags["sets"],
        options={**_options(flags), **settings_of_command(words, flags)},
        environ=os.environ,
    )
    root = root_of(runs)
    origin = chosen_origin(flags["resume"], flags["trust"], root)
    if origin is not None:
        verbs.check_takes_origin(settings)
    if flags["dry_run"]:
        return _dry(settings, root)
    if origin is not None:
        told = verbs.check_origin(origin, settings, os.environ)
        where = f"step {told.global_step}, in epoch {told.epoch + 1}"
        click.echo(f"begins with {origin.path}, {told.layout}: {where}")
        for note in told.notes:
            click.echo(f"  {note}", err=True)
    run = verbs.prepare(
        settings,
        root,
        project=Path.cwd(),
        environ=os.environ,
        force_new=flags["force_new"],
        origin=origin,
    )
    try:
        return begin(run, read_frozen(run.config), detach=flags["detach"])
    except SubmissionRejected:
        # Nothing was begun: the name is free for the next attempt.
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def _options(flags: dict[str, Any]) -> dict[str, Any]:
    names = (
        "time",
        "time_min",
        "deadline",
        "cluster",
        "partition",
        "account",
        "qos",
        "nodes",
        "tasks_per_node",
    )
    scheduler = {name: flags[name] for name in (*names, "cpus_per_task", "gpus_per_node", "mem")}
    for name in ("nodes", "gpus_per_node"):
        if (scheduler[name] or "").isdigit():
            scheduler[name] = int(scheduler[name])
    sbatch: dict[str, Any] = {}
    for pair in flags["extra"]:
        key, separator, value = pair.partition("=")
        sbatch[key.lstrip("-")] = value if separator else True
    options: dict[str, Any] = {"name": flags["name"], "scheduler": scheduler}
    if sbatch:
        scheduler["sbatch"] = sbatch
    return options


def _dry(settings: RunConfig, root: Path) -> int:
    """The script to standard output, what is known about it to standard error."""
    from hpcresume import preview

    about: dict[str, Any] = {"project": Path.cwd(), "environ": os.environ}
    click.echo(preview.first_job(settings, root, **about), nl=False)
    start = preview.first_start(settings, root, now=time.time(), **about)
    if start is not None:
        click.echo(start, err=True)
    return 0


def begin(run: RunDir, config: RunConfig, *, detach: bool) -> int:
    """Queue the run's next job and say so; drive it here where the backend is this machine."""
    from hpcresume import submit as verbs
    from hpcresume.display.tables import late_words
    from hpcresume.status import read_status

    cluster = str(run.identify()["cluster"])
    warnings = verbs.warn_of_few_saves(config), verbs.ignored_elsewhere(config.scheduler, cluster)
    for warning in filter(None, warnings):
        click.echo(warning, err=True)
    submission = verbs.launch(run, config, os.environ)
    if submission.scheduler is None or submission.job is None:
        outcome = verbs.run_debug(run)
        click.echo(f"{outcome.decision}: {outcome.reason}")
        return outcome.exit_code
    local = submission.scheduler.name == "local"
    try:
        word = "local job" if local else "job"
        click.echo(_receipt(run, submission.job, word, submission.way))
    except BrokenPipeError:
        # The job is queued, and wants a driver all the same.
        let_go_of_stdout()
    if not local:
        late = late_words(read_status(run, None))
        if late:
            click.echo(f"{run.name}: {late}", err=True)
        return 0
    from hpcresume.cli.drive import detach_driver, drive_here

    return detach_driver(run) if detach else drive_here(run, config)


def _receipt(run: RunDir, job: str, word: str, way: Way | None) -> str:
    name = run.name
    driven = way is not None and way.mode == "drive"
    useful = [(f"hpcresume drive {name}", "keep it going, from here")] if driven else []
    useful += [
        ("hpcresume status", "how it stands"),
        (f"hpcresume logs -f {name}", "what it prints, over all jobs"),
        (f"hpcresume cancel {name}", "end the chain"),
    ]
    width = max(len(command) for command, _ in useful)
    return (
        f"run        {name}\n"
        f"{word:<10} {job}\n"
        f"directory  {run.path}\n"
        f"log        {run.train_log}\n"
        f"{_way_line(way)}"
        f"\n" + "\n".join(f"  {command:<{width}}  {what}" for command, what in useful) + "\n"
    )


def _way_line(way: Way | None) -> str:
    """How the further jobs follow, where it is not the way that most runs go."""
    if way is None:
        return ""
    ahead = f", {way.ahead} ahead" if way.ahead else ""
    return f"way        {way.mode}{ahead}: {'; '.join(way.reasons)}\n"
