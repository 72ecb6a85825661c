"""Prepares a run directory and submits its first link; and goes on with a run that rests.

What can be checked is checked here, before a job queues; then everything that the links need is
frozen: the configuration, the code, the environment of submissions, the versions.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.checkpoint.store import Store
from hpcresume.config import (
    RunConfig,
    check_complete,
    difference,
    dump,
    format_time,
    from_mapping,
    load,
    parse_time,
    read_frozen,
    to_mapping,
)
from hpcresume.errors import CheckpointError, ConfigError, RunLive, UsageError
from hpcresume.journal import Journal, known_step, lineage
from hpcresume.link import Link, LinkOutcome, exiting_link, job_spec
from hpcresume.run_dir import RunDir, is_run
from hpcresume.scheduler import process
from hpcresume.scheduler.choice import asking_scheduler, chosen_cluster, scheduler_of
from hpcresume.scheduler.job import JobSpec, Scheduler
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.story import Story, alive_elsewhere, find_jobs, read_story, user_name

#: The most code that is frozen with a run, and the largest file in it.
CODE_BYTES = 64 << 20
CODE_FILE_BYTES = 8 << 20
_NOT_CODE = frozenset({"__pycache__", "node_modules", "runs", "venv", "env", "site-packages"})
_FIRST_LEAD_S = 30.0


@dataclass(frozen=True)
class Submission:
    """A run whose next job is queued."""

    run: RunDir
    config: RunConfig
    scheduler: Scheduler | None
    job: str | None


def read_config(
    path: Path | None,
    *,
    sets: Sequence[str],
    options: Mapping[str, object],
    environ: Mapping[str, str],
) -> RunConfig:
    """The resolved configuration of a new run, complete and named."""
    config = load(path, sets=sets, options=options, environ=environ)
    check_complete(config)
    if config.name is None:
        name = path.stem if path is not None else config.train.rpartition(":")[0].rpartition("/")[2]
        config = from_mapping({**to_mapping(config), "name": name.removesuffix(".py")}, "the name")
    return config


# ---- a new run ---------------------------------------------------------------------------


def prepare(
    config: RunConfig,
    root: Path,
    *,
    project: Path,
    environ: Mapping[str, str],
    force_new: bool = False,
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
    _check_limits(run, config, environ)
    try:
        run.create(
            dump(config),
            cluster=chosen_cluster(config.scheduler.cluster, environ),
            project=project,
            versions=versions(),
        )
    except FileExistsError:
        refuse_existing(run, config, environ)
    try:
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
    changed = difference(old, config)
    ways = f"go on with the old one by `hpcresume resume {run.name}`, " if changed else ""
    other = "begin a new one with --force-new or another --name"
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{run.path} belongs to another configuration:\n  {lines}\nEither {ways}or {other}."
        )
    story = read_story(run)
    if story.completed:
        raise ConfigError(f"{run.name} is complete: {run.final_model}. To train again, {other}.")
    raise ConfigError(
        f"{run.name} is not finished: go on with it by `hpcresume resume {run.name}`, or {other}."
    )


def live_jobs(run: RunDir, environ: Mapping[str, str], me: str | None = None) -> str:
    """Where a run lives now besides job `me`, as words; empty if nowhere. Raises Unavailable."""
    story = read_story(run)
    scheduler = asking_scheduler(run, environ)
    if scheduler is not None:
        jobs = [job for job in find_jobs(scheduler, story.run_id) if job.id != me]
        if jobs:
            words = (f"job {j.id} ({j.raw_state or j.state.value})" for j in jobs)
            return ", ".join(words)
    newest = story.newest
    if newest is not None and story.ended(newest) is None:
        return alive_elsewhere(newest, None, None) or ""
    return ""


def _check_limits(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """The partition's time limit, which sbatch --test-only does not look at."""
    time_s = None if config.scheduler.time is None else parse_time(config.scheduler.time)
    if chosen_cluster(config.scheduler.cluster, environ) != "slurm":
        return
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


def versions() -> dict[str, str]:
    """Python and every installed package."""
    found = {"python": sys.version.split()[0]}
    for dist in importlib.metadata.distributions():
        name = dist.metadata["Name"]
        if name:
            found[name] = dist.version
    return dict(sorted(found.items()))


def freeze_code(project: Path, train: str, target: Path) -> None:
    """Copy the code below `project`: what git tracks, as it is now; without git, Python files.

    Raises ConfigError where it is more than 64 MiB; single files above 8 MiB are data, and stay.
    """
    target.mkdir(mode=0o700)
    total = 0
    for name in _code_files(project, train):
        source = project / name
        try:
            size = source.stat().st_size
        except OSError:
            continue
        if not source.is_file() or size > CODE_FILE_BYTES:
            continue
        total += size
        if total > CODE_BYTES:
            raise ConfigError(
                f"The code below {project} is larger than {CODE_BYTES >> 20} MiB: keep data out "
                f"of what git tracks, or submit from the folder of the code."
            )
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copy(source, copy)


def _code_files(project: Path, train: str) -> list[str]:
    listed = process.run(["git", "ls-files", "-z"], environ=os.environ, timeout_s=30, cwd=project)
    names = [name for name in listed.out.split("\0") if name] if listed.code == 0 else []
    if not names:
        names = [
            str(path.relative_to(project))
            for path in sorted(project.rglob("*.py"))
            if not any(p.startswith(".") or p in _NOT_CODE for p in path.relative_to(project).parts)
        ]
    entry = train.rpartition(":")[0] or train
    if entry.endswith(".py") and entry not in names:
        names.append(entry)
    return names


def check_train(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Import the training function from the frozen code, in a child process.

    Raises ConfigError with the child's sentence.
    """
    entry = config.train.rpartition(":")[0] or config.train
    if Path(entry).is_absolute() or ".." in Path(entry).parts:
        raise ConfigError(f"train: {entry} must lie below the folder that you submit from.")
    argv = [sys.executable, "-m", "hpcresume", "rank", str(run.path), "--check"]
    done = process.run(argv, environ=process.scrubbed(environ), timeout_s=300)
    if done.code:
        lines = [line for line in done.err.strip().splitlines() if line] or ["no output"]
        text = lines[-1] if done.code == 4 else "\n".join(lines[-12:])
        text = text.removeprefix("hpcresume: ").replace(f"{run.code}/", "")
        raise ConfigError(text)


# ---- the first and the next job ----------------------------------------------------------


def first_spec(run: RunDir, config: RunConfig) -> JobSpec:
    """The job that submitting a run would queue."""
    return job_spec(run, config, lead_s=config.chain.lead_s or _FIRST_LEAD_S)


def dry_run(config: RunConfig, root: Path, *, project: Path, environ: Mapping[str, str]) -> str:
    """The exact batch script that submitting would hand to the scheduler."""
    from hpcresume.scheduler.launcher import command_line, prepare_lines
    from hpcresume.scheduler.script import render

    assert config.name is not None
    run = RunDir(root / config.name)
    _check_limits(run, config, environ)
    spec = job_spec(
        run, config, lead_s=config.chain.lead_s or _FIRST_LEAD_S, project=project, run_id="RUN-ID"
    )
    return render(spec, config.scheduler, command_line(spec), prepare=prepare_lines(spec))


def launch(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> Submission:
    """Queue the next job of a run, and record it."""
    cluster = str(run.identify()["cluster"])
    if cluster == "debug":
        _record(run, None, None)
        return Submission(run, config, None, None)
    clean = process.scrubbed(environ)
    scheduler = scheduler_of(run, cluster, clean, config.scheduler, exiting_link)
    spec = first_spec(run, config)
    # Recorded first: a job that starts at once must find itself submitted.
    _record(run, spec.token, None)
    job = scheduler.submit(spec)
    return Submission(run, config, scheduler, job)


def _record(run: RunDir, token: str | None, job: str | None) -> None:
    journal = Journal(run.submissions, link=0, job=job)
    journal.write(
        "submitted", after_link=run.newest_link(), token=token, by=user_name(), host=os.uname()[1]
    )
    journal.close()


def ready_to_resume(
    run: RunDir, *, sets: Sequence[str], environ: Mapping[str, str], me: str | None = None
) -> RunConfig:
    """Make a run that rests (stopped, failed, cancelled, stalled) ready for its next job.

    Values in `sets` act from here on, and are journalled. Raises RunLive, CheckpointError,
    UsageError where the run is complete.
    """
    run.check_private()
    config = read_frozen(run.config)
    where = live_jobs(run, environ, me)
    if where:
        raise RunLive(f"{run.name} is live: {where}. `hpcresume status` shows it.")
    story = read_story(run)
    if story.completed:
        raise UsageError(f"{run.name} is complete: {run.final_model}.")
    check_checkpoints(story)
    if sets:
        config = _change(run, config, sets, environ)
    for request in (run.cancel, run.stop):
        request.unlink(missing_ok=True)
    return config


def check_checkpoints(story: Story) -> None:
    """Refuse to begin afresh where the journal knows of a committed step."""
    known = known_step(story.links)
    over = lineage(story.run, story.links)
    if known and not Store(story.run, story.run_id).committed(over):
        raise CheckpointError(
            f"The journal of {story.run.name} knows step {known} as committed, but no checkpoint "
            f"is left in {story.run.path}: put one back, or begin a new run."
        )


def _change(
    run: RunDir, config: RunConfig, sets: Sequence[str], environ: Mapping[str, str]
) -> RunConfig:
    changed = load(run.config, sets=sets, options={}, environ={"HPCRESUME_SITE": os.devnull})
    lines = difference(config, changed)
    if changed.name != config.name or changed.train != config.train:
        raise UsageError("name and train belong to the run: begin a new one to change them.")
    if changed.scheduler.cluster != config.scheduler.cluster:
        identity = {**run.identify(), "cluster": chosen_cluster(changed.scheduler.cluster, environ)}
        files.write_json(run.identity, identity)
    if lines:
        files.write_durably(run.config, dump(changed).encode())
        journal = Journal(run.submissions, link=0, job=None)
        journal.write("changed", by=user_name(), changes=lines)
        journal.close()
    return changed


def run_debug(run: RunDir) -> LinkOutcome:
    """Links of a run one after the other in this process, through submitit's debug executor."""
    from hpcresume.scheduler.launcher import run_debug as run_one

    while True:
        outcome: LinkOutcome = run_one(Link, run.path, run.jobs)
        if outcome.decision != "continue":
            return outcome


# ---- a user's own batch script -----------------------------------------------------------


def adopt_batch(
    path: Path | None,
    *,
    sets: Sequence[str],
    root: Path,
    environ: Mapping[str, str],
) -> RunDir:
    """The run that a job of a user's own batch script works on: a new one, or one that rests.

    The script and the job's real options are frozen into the run, so that every further link gets
    the same job, whatever stood on sbatch's command line. Raises RunLive where it is live.
    """
    config = read_config(path, sets=sets, options={}, environ=environ)
    assert config.name is not None
    run = RunDir(root / config.name)
    job = environ.get("SLURM_JOB_ID")
    if is_run(run.path):
        _check_rests(run, config, environ)
        if read_story(run).completed:
            return run
        ready_to_resume(run, sets=(), environ=environ, me=job)
    else:
        run = prepare(config, root, project=Path.cwd(), environ=environ)
    if job:
        clean = process.scrubbed(environ)
        scheduler = SlurmScheduler(config.scheduler, environ=clean, launcher=None)
        text, options = scheduler.frozen_script(job)
        files.write_durably(run.script, text.encode(), mode=0o700)
        files.write_json(run.script_options, list(options))
        # From here on `status` and `cancel` find this job like those that we submit.
        scheduler.mark(job, first_spec(run, read_frozen(run.config)).token)
    _record(run, None, job)
    return run


def _check_rests(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Let a further job of a user's script go on with a run, unless that is live or another one.

    What the script asks of Slurm is the script's own matter, and no difference.
    """
    where = live_jobs(run, environ, me=environ.get("SLURM_JOB_ID"))
    if where:
        raise RunLive(f"{run.name} is live: {where}. `hpcresume status` shows it.")
    changed = difference(read_frozen(run.config), config)
    changed = [line for line in changed if not line.startswith("scheduler.")]
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{run.path} belongs to another configuration:\n  {lines}\nGo on with the old one by "
            f"`hpcresume resume {run.name}`, or give the new run another name."
        )
