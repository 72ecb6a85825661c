"""Prepares a run directory and submits its next link.

What can be checked is checked here, before a job queues; then everything that the links need is
frozen: the configuration, the code, the environment of submissions, the versions.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.checkpoint.cadence import cadence_of, few_saves
from hpcresume.checkpoint.origin import Origin, Told, check_end, check_own_place
from hpcresume.commands import check_command, name_of
from hpcresume.config import (
    RunConfig,
    SchedulerConfig,
    check_complete,
    difference,
    dump,
    format_moment,
    format_time,
    from_mapping,
    load,
    parse_moment,
    parse_time,
    read_frozen,
    to_mapping,
)
from hpcresume.errors import (
    CheckpointError,
    ConfigError,
    NotFound,
    RunLive,
    Unavailable,
    UsageError,
)
from hpcresume.journal import Journal
from hpcresume.link import Link, LinkOutcome, exiting_link
from hpcresume.run_dir import RunDir, is_run
from hpcresume.scheduler import process
from hpcresume.scheduler.choice import chosen_cluster, scheduler_of
from hpcresume.scheduler.doctor.way import Way
from hpcresume.scheduler.job import JobSpec, Scheduler
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.snapshot import check_entry, check_train, freeze_code, versions
from hpcresume.story import live_jobs, read_story, user_name
from hpcresume.successors import job_spec, note_queued, pin_hardware, too_late
from hpcresume.ways import find_way, is_default, to_json

FIRST_LEAD_S = 30.0


@dataclass(frozen=True)
class Submission:
    """A run whose next job is queued."""

    run: RunDir
    config: RunConfig
    scheduler: Scheduler | None
    job: str | None
    way: Way | None = None
    """How the further jobs follow, where it is another way than most runs go."""


def read_config(
    path: Path | None,
    *,
    sets: Sequence[str],
    options: Mapping[str, object],
    environ: Mapping[str, str],
) -> RunConfig:
    """The resolved configuration of a new run, complete and named."""
    config = load(path, sets=sets, options=options, environ=environ)
    try:
        check_complete(config)
        check_ways(config)
    except ConfigError as error:
        where = "command line" if path is None else path
        lines = (f"{where}: {line}" for line in str(error).splitlines())
        raise ConfigError("\n".join(lines)) from None
    config = at_fixed_time(config, time.time())
    if config.name is None:
        name = path.stem if path is not None else config.train.rpartition(":")[0].rpartition("/")[2]
        name = name_of(config.command) if config.command and path is None else name
        config = from_mapping({**to_mapping(config), "name": name.removesuffix(".py")}, "the name")
    return config


def check_ways(config: RunConfig) -> None:
    """Raise ConfigError where two settings cannot be had together."""
    _check_least_time(config.scheduler)
    if not config.scheduler.pin_hardware:
        return
    if "*" in (config.scheduler.constraint or ""):
        raise ConfigError(
            f"scheduler.pin_hardware cannot be had with scheduler.constraint "
            f"{config.scheduler.constraint}: Slurm adds nothing to a constraint that counts nodes. "
            f"Leave one of them out."
        )
    if config.chain.mode == "requeue":
        raise ConfigError(
            "scheduler.pin_hardware has no effect with chain.mode requeue, which starts the same "
            "job again as it was: choose another mode, or leave pin_hardware out."
        )


def _check_least_time(asked: SchedulerConfig) -> None:
    """Raise ConfigError where a job may be given no less than more than it asks for."""
    if asked.time_min is None:
        return
    least = parse_time(asked.time_min)
    most = None if asked.time is None else parse_time(asked.time)
    if least is None or (most is not None and least > most):
        raise ConfigError(
            f"scheduler.time_min is {asked.time_min}, above scheduler.time "
            f"({asked.time or 'not set'}): it is the least that Slurm may lower a job's limit to."
        )


def at_fixed_time(config: RunConfig, now: float) -> RunConfig:
    """With a deadline that is one moment for all jobs: counted from `now` (Unix seconds)."""
    deadline = config.scheduler.deadline
    if deadline is None:
        return config
    settled = format_moment(parse_moment(deadline, now=now))
    mapping = to_mapping(config)
    mapping["scheduler"] = {**mapping["scheduler"], "deadline": settled}
    return from_mapping(mapping, "the deadline")


# ---- a new run ---------------------------------------------------------------------------


def prepare(
    config: RunConfig,
    root: Path,
    *,
    project: Path,
    environ: Mapping[str, str],
    force_new: bool = False,
    origin: Origin | None = None,
) -> RunDir:
    """Make the run directory with all that is frozen. Raises ConfigError, RunLive."""
    assert config.name is not None
    name = config.name
    if force_new:
        number = 2
        while (root / name).exists():
            name = f"{config.name}-{number}"
            number += 1
        config = from_mapping({**to_mapping(config), "name": name}, "the name")
    run = RunDir(root / name)
    if run.path.exists():
        refuse_existing(run, config, environ)
    if config.command:
        check_command(config, project, environ)
    else:
        check_entry(config.train, project)
    check_limits(run, config, environ)
    if origin is not None:
        check_own_place(run, origin)
    try:
        run.create(
            dump(config),
            cluster=chosen_cluster(config.scheduler.cluster, environ),
            project=project,
            versions=versions(),
            origin=None if origin is None else origin.to_json(),
        )
    except FileExistsError:
        refuse_existing(run, config, environ)
    try:
        if not config.command:
            # A command runs where it was submitted, and writes there: nothing of it is copied.
            freeze_code(project, config.train, run.code)
            check_train(run, config, environ)
        secret = files.to_json(process.scrubbed(environ))
        files.write_durably(run.environment, secret, mode=0o600)
    except BaseException:
        shutil.rmtree(run.path, ignore_errors=True)
        raise
    return run


def refuse_existing(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Say why a name cannot be used again, and the ways out. Always raises."""
    if not is_run(run.path):
        raise ConfigError(f"{run.path} exists and is no run: choose another name (--name).")
    old = read_frozen(run.config)
    where = live_jobs(run, environ)
    if where:
        raise RunLive(f"{run.name} is live: {where}. `hpcresume status` shows it.")
    changed = "\n  ".join(difference(old, config))
    complete = read_story(run).completed
    other = "begin a new one with --force-new or another --name"
    ways = other if complete else f"go on with it by `hpcresume resume {run.name}`, or {other}"
    if changed:
        what = "is complete, and " if complete else ""
        raise ConfigError(
            f"{run.path} {what}belongs to another configuration:\n  {changed}\nTo train with this "
            f"one, {other}."
            + ("" if complete else f" The old one goes on by `hpcresume resume {run.name}`.")
        )
    if complete:
        what = f"{run.name} is complete{_model(run, old)}"
        raise ConfigError(f"{what}. To train again, {ways}.")
    raise ConfigError(f"{run.name} is not finished: {ways}.")


def _model(run: RunDir, config: RunConfig) -> str:
    return "" if config.command else f": {run.final_model}"


def check_limits(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a job beyond the deadline or the partition's limit, on Slurm.

    sbatch --test-only looks at neither.
    """
    time_s = None if config.scheduler.time is None else parse_time(config.scheduler.time)
    if chosen_cluster(config.scheduler.cluster, environ) != "slurm":
        return
    _refuse_late(job_spec(run, config, lead_s=0.0, run_id=""))
    scheduler = SlurmScheduler(config.scheduler, environ=process.scrubbed(environ), launcher=None)
    found = scheduler.partition_limit_s(config.scheduler.partition)
    if found is None:
        return
    name, limit_s = found
    if limit_s is not None and time_s is not None and time_s > limit_s:
        raise ConfigError(
            f"--time {format_time(time_s)} is above the limit of partition {name}, "
            f"{format_time(limit_s)}: a job would wait for ever. Ask for less; the chain goes on "
            f"by itself."
        )


def _refuse_late(spec: JobSpec) -> None:
    """Raise ConfigError where a job could not end before its deadline."""
    late = too_late(spec, time.time())
    if late is not None:
        raise ConfigError(
            f"{late.reason[0].upper()}{late.reason[1:]}: Slurm would remove it from the queue. "
            f"Name a later scheduler.deadline, or let jobs be shorter (scheduler.time_min)."
        )


def check_takes_origin(config: RunConfig) -> None:
    """Raise UsageError where a run has nobody who would begin with a state that is named."""
    if config.command:
        raise UsageError(
            "--resume begins a training function with what it names; a command loads its own "
            "checkpoint: name that among its arguments."
        )


def check_origin(origin: Origin, config: RunConfig, environ: Mapping[str, str]) -> Told:
    """Look into what a run is to begin with, in a child process.

    Raises what the child says of it, and ConfigError where it leaves nothing to train.
    """
    argv = [sys.executable, "-m", "hpcresume", "origin", *(["--trust"] if origin.trust else [])]
    done = process.run([*argv, "--", origin.path], environ=process.scrubbed(environ), timeout_s=300)
    if done.code == 0:
        # What trusted code printed itself stands before it.
        content = json.loads(done.out.strip().splitlines()[-1])
        told = Told(**{**content, "notes": tuple(content["notes"])})
        check_end(config, told, origin)
        return told
    said = done.err.rpartition("hpcresume: ")[2].strip()
    for kind in (NotFound, CheckpointError, Unavailable):
        if done.code == kind.exit_code and said:
            raise kind(said)
    end = "gave no answer in 300 s" if done.timed_out else f"left with code {done.code}"
    last = "\n  ".join(["", *done.err.strip().splitlines()[-12:]])
    raise CheckpointError(f"{origin.path} cannot be read: the process that tried {end}.{last}")


# ---- the first and the next job ----------------------------------------------------------


def first_spec(run: RunDir, config: RunConfig, way: Way | None = None) -> JobSpec:
    """The job that submitting a run would queue."""
    return job_spec(run, config, lead_s=config.chain.lead_s or FIRST_LEAD_S, way=way)


def warn_of_few_saves(config: RunConfig) -> str | None:
    """What to say where a job saves at its end only; None where it saves often enough."""
    given = config.scheduler.time_min or config.scheduler.time
    time_s = None if given is None else parse_time(given)
    if time_s is None or config.command:
        return None
    return few_saves(cadence_of(config.checkpoint), link_s=time_s)


def ignored_elsewhere(config: SchedulerConfig, cluster: str) -> str | None:
    """What to say where Slurm alone knows what was asked for; None where nothing is ignored."""
    names = [name for name in ("time_min", "deadline") if getattr(config, name) is not None]
    if cluster == "slurm" or not names:
        return None
    verb = "is" if len(names) == 1 else "are"
    words = " and ".join(f"scheduler.{name}" for name in names)
    return (
        f"{words} {verb} ignored: jobs run on this machine ({cluster}), and only Slurm knows them."
    )


def launch(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> Submission:
    """Queue the next job of a run, and record it."""
    cluster = str(run.identify()["cluster"])
    if cluster == "debug":
        record_submitted(run, None, None)
        return Submission(run, config, None, None)
    clean = process.scrubbed(environ)
    scheduler = scheduler_of(run, cluster, clean, config.scheduler, exiting_link)
    pin_hardware(run, config, scheduler)
    way = find_way(config, cluster, clean)
    spec = first_spec(run, config, way)
    _refuse_late(spec)
    # Recorded first: a job that starts at once must find itself submitted.
    record_submitted(run, spec.token, None, way)
    job = scheduler.submit(spec)
    note_queued(run, job, spec)
    return Submission(run, config, scheduler, job, None if is_default(way, config) else way)


def record_submitted(
    run: RunDir, token: str | None, job: str | None, way: Way | None = None
) -> None:
    """Journal that a job of the run is, or is about to be, submitted."""
    journal = Journal(run.submissions, link=0, job=job)
    journal.write(
        "submitted",
        after_link=run.newest_link(),
        token=token,
        by=user_name(),
        host=os.uname()[1],
        way=None if way is None else to_json(way),
    )
    journal.close()


def run_debug(run: RunDir) -> LinkOutcome:
    """Links of a run one after the other in this process, through submitit's debug executor."""
    from hpcresume.scheduler.launcher import run_debug as run_one

    while True:
        outcome: LinkOutcome = run_one(Link, run.path, run.jobs)
        if outcome.decision != "continue":
            return outcome
