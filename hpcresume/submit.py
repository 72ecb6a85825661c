"""Prepares a run directory and submits its first link; and goes on with a run that rests.

What can be checked is checked here, before a job queues; then everything that the links need is
frozen: the configuration, the code, the environment of submissions, the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.checkpoint.cadence import cadence_of, few_saves
from hpcresume.checkpoint.manifest import Committed
from hpcresume.checkpoint.origin import (
    Origin,
    Told,
    check_end,
    check_own_place,
    check_same,
    find_origin,
)
from hpcresume.checkpoint.store import Store
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
from hpcresume.journal import Journal, known_step, lineage
from hpcresume.link import Link, LinkOutcome, exiting_link
from hpcresume.run_dir import RunDir, is_run
from hpcresume.scheduler import process
from hpcresume.scheduler.choice import asking_scheduler, chosen_cluster, scheduler_of
from hpcresume.scheduler.doctor.way import Way
from hpcresume.scheduler.job import JobSpec, Scheduler
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.story import Story, find_jobs, live_jobs, read_story, user_name, waits_in_vain
from hpcresume.successors import job_spec, note_queued, pin_hardware, too_late
from hpcresume.ways import find_way, is_default, to_json

#: The most code that is frozen with a run, and the largest file in it.
CODE_BYTES = 64 << 20
CODE_FILE_BYTES = 8 << 20
_NOT_CODE = frozenset({"__pycache__", "node_modules", "runs", "venv", "env", "site-packages"})
FIRST_LEAD_S = 30.0

#: What `resume --set` takes without "override.": the numbers that torch's optimizers hold.
OPTIMIZER_OPTIONS = frozenset(
    {"lr", "weight_decay", "momentum", "dampening", "eps", "alpha", "rho", "lambd", "t0"}
    | {"lr_decay", "momentum_decay", "beta2_decay"}
)


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
        _check_entry(config.train, project)
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


def versions() -> dict[str, str]:
    """Python and every installed package."""
    found = {"python": sys.version.split()[0]}
    for dist in importlib.metadata.distributions():
        name = dist.metadata["Name"]
        if name:
            found[name] = dist.version
    return dict(sorted(found.items()))


def freeze_code(project: Path, train: str, target: Path) -> None:
    """Copy the code below `project`: what git tracks, as it is now, and all Python files.

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
    names = _git_files(project)
    # A module that was written a minute ago is imported like one that git knows.
    new = _git_files(project, "--others", "--exclude-standard", "*.py")
    names += [name for name in new if _is_code(Path(name))]
    if not names:
        found = (path.relative_to(project) for path in sorted(project.rglob("*.py")))
        names = [str(path) for path in found if _is_code(path)]
    entry = train.rpartition(":")[0] or train
    if entry.endswith(".py") and entry not in names:
        names.append(entry)
    return names


def _git_files(project: Path, *options: str) -> list[str]:
    """What git lists below a folder; nothing where there is no git."""
    argv = ["git", "ls-files", "-z", *options]
    listed = process.run(argv, environ=os.environ, timeout_s=30, cwd=project)
    return [name for name in listed.out.split("\0") if name] if listed.code == 0 else []


def _is_code(path: Path) -> bool:
    return not any(part.startswith(".") or part in _NOT_CODE for part in path.parts)


def _check_entry(train: str, project: Path) -> None:
    """What can be said about a train entry without importing it. Raises ConfigError."""
    target, _, function = train.partition(":")
    if not target or not (function or "train").isidentifier():
        raise ConfigError(
            f"train is {train!r}; expected 'file.py:function' or 'package.module:function'."
        )
    if Path(target).is_absolute() or ".." in Path(target).parts:
        raise ConfigError(f"train: {target} must lie below the folder that you submit from.")
    if target.endswith(".py") and not (project / target).is_file():
        raise ConfigError(f"train: there is no file {target} in {project}.")


def check_train(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Import the training function from the frozen code, in a child process.

    Raises ConfigError with the child's sentence.
    """
    argv = [sys.executable, "-m", "hpcresume", "rank", str(run.path), "--check"]
    done = process.run(argv, environ=process.scrubbed(environ), timeout_s=300)
    if done.code == 0 and config.train in done.out:
        return
    said = done.err.replace(f"{run.code}/", "")
    if done.code == ConfigError.exit_code and "hpcresume: " in said:
        # What the code printed itself stands before it.
        raise ConfigError(said.rpartition("\nhpcresume: ")[2].removeprefix("hpcresume: ").strip())
    end = f"ended with signal {-done.code}" if done.code < 0 else f"left with code {done.code}"
    end = "gave no answer in 300 s" if done.timed_out else end
    last = "\n  ".join(["", *said.strip().splitlines()[-12:]])
    raise ConfigError(f"train: {config.train} does not import: the process that tried {end}.{last}")


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
        _record(run, None, None)
        return Submission(run, config, None, None)
    clean = process.scrubbed(environ)
    scheduler = scheduler_of(run, cluster, clean, config.scheduler, exiting_link)
    pin_hardware(run, config, scheduler)
    way = find_way(config, cluster, clean)
    spec = first_spec(run, config, way)
    _refuse_late(spec)
    # Recorded first: a job that starts at once must find itself submitted.
    _record(run, spec.token, None, way)
    job = scheduler.submit(spec)
    note_queued(run, job, spec)
    return Submission(run, config, scheduler, job, None if is_default(way, config) else way)


def _record(run: RunDir, token: str | None, job: str | None, way: Way | None = None) -> None:
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


def ready_to_resume(
    run: RunDir, *, sets: Sequence[str], environ: Mapping[str, str], me: str | None = None
) -> RunConfig:
    """Make a run that rests (stopped, failed, cancelled, stalled) ready for its next job.

    Values in `sets` act from here on, and are journalled. A complete run goes on where they raise
    its end. Raises RunLive, CheckpointError, ConfigError, and UsageError where the run is complete
    or the new end lies below what is trained.
    """
    run.check_private()
    frozen = read_frozen(run.config)
    where = live_jobs(run, environ, me)
    if where:
        raise RunLive(f"{run.name} is live: {where}. `hpcresume status` shows it.")
    story = read_story(run)
    config = _with_sets(run, frozen, sets) if sets else frozen
    if story.completed and config.command:
        raise UsageError(
            f"{run.name} is complete. To run its command again, submit it with --force-new or "
            f"another --name."
        )
    if story.completed and not _is_longer(frozen, config):
        raise UsageError(f"{run.name} is complete: {run.final_model}. {_how_longer(run, frozen)}")
    if not config.command:
        check_checkpoints(story)
    if config != frozen:
        _check_end(story, frozen, config)
        _record_change(story, frozen, config, environ)
    scheduler = asking_scheduler(run, environ)
    if scheduler is not None:
        # Their driver was killed. The new one must not start them besides the new job.
        left = [job.id for job in find_jobs(scheduler, story.run_id) if waits_in_vain(job)]
        scheduler.cancel(left)
    for request in (run.cancel, run.stop):
        request.unlink(missing_ok=True)
    return config


def check_checkpoints(story: Story) -> None:
    """Refuse to begin afresh where the journal knows of a committed step."""
    known = known_step(story.links, own=True)
    over = lineage(story.run, story.links)
    if known and not Store(story.run, story.run_id).committed(over):
        raise CheckpointError(
            f"The journal of {story.run.name} knows step {known} as committed, but no checkpoint "
            f"is left in {story.run.path}: put one back, or begin a new run."
        )


def _with_sets(run: RunDir, frozen: RunConfig, sets: Sequence[str]) -> RunConfig:
    """A run's configuration with the values of `resume --set` in it."""
    here = {"HPCRESUME_SITE": os.devnull}
    config = load(run.config, sets=[*map(_with_override, sets)], options={}, environ=here)
    check_complete(config)
    check_ways(config)
    config = at_fixed_time(config, time.time())
    kept = (config.name, config.train, config.command)
    if kept != (frozen.name, frozen.train, frozen.command):
        raise UsageError("name, train and command belong to the run: begin a new one for others.")
    return config


def _with_override(assignment: str) -> str:
    """`lr=0.01`, said for short, as the setting that it means: `override.lr=0.01`."""
    key = assignment.partition("=")[0].strip()
    return f"override.{assignment.strip()}" if key in OPTIMIZER_OPTIONS else assignment


def _is_longer(old: RunConfig, new: RunConfig) -> bool:
    """Whether one of the limits that end a training is raised, or taken away."""
    limits = ((old.max_steps, new.max_steps), (old.epochs, new.epochs))
    return any(a is not None and (b is None or b > a) for a, b in limits)


def _how_longer(run: RunDir, config: RunConfig) -> str:
    limits = {"epochs": config.epochs, "max_steps": config.max_steps}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    above = " or ".join(f"{name} above {limit}" for name, limit in known.items())
    command = f"hpcresume resume {run.name} --set {next(iter(known))}=N"
    return f"To train it longer, raise {above}: {command}."


def _check_end(story: Story, old: RunConfig, new: RunConfig) -> None:
    """Raise UsageError where the newest checkpoint lies beyond a limit that was changed.

    Of a complete run it must lie below all limits: otherwise nothing is left to train.
    """
    run = story.run
    committed = Store(run, story.run_id).committed(lineage(run, story.links))
    if not committed:
        return
    last = committed[-1]
    trained = (("max_steps", "step", last.step), ("epochs", "epoch", _epochs(run, last)))
    for name, word, done in trained:
        limit = getattr(new, name)
        if limit is None:
            continue
        if limit < done and limit != getattr(old, name):
            raise UsageError(
                f"{name}={limit} lies below {word} {done:g}, which {run.name} has saved already: "
                f"name at least {math.ceil(done)}, or begin a new run."
            )
        if limit <= done and story.completed:
            raise UsageError(
                f"{run.name} is complete: {run.final_model}. It stands at {word} {done:g}, and "
                f"{name}={limit} lets it go no further: raise that as well."
            )


def _epochs(run: RunDir, last: Committed) -> float:
    """How many passes over the data a checkpoint has behind it, a part of one included."""
    state = files.read_json_or_none(last.path / run.trainer_state.name)
    epochs = state.get("epoch") if isinstance(state, dict) else None
    return epochs if isinstance(epochs, float) else float(last.manifest.epoch)


def _record_change(
    story: Story, old: RunConfig, new: RunConfig, environ: Mapping[str, str]
) -> None:
    """Journal a change and let it act. A run that was complete is not any more.

    Journalled first: where this is cut half-way, the same command can be given again.
    """
    run = story.run
    reopened = {"reopened": True} if story.completed else {}
    journal = Journal(run.submissions, link=0, job=None)
    changes = difference(old, new)
    after = run.newest_link()
    journal.write("changed", by=user_name(), changes=changes, after_link=after, **reopened)
    journal.close()
    state = files.read_json_or_none(run.trainer_state)
    if reopened and isinstance(state, dict):
        files.write_json(run.trainer_state, {**state, "completed": False})
    if new.scheduler.cluster != old.scheduler.cluster:
        identity = {**run.identify(), "cluster": chosen_cluster(new.scheduler.cluster, environ)}
        files.write_json(run.identity, identity)
    files.write_durably(run.config, dump(new).encode())


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
    resume: str | None = None,
    trust: bool = False,
) -> RunDir:
    """The run that a job of a user's own batch script works on: a new one, or one that rests.

    The script and the job's real options are frozen into the run, so that every further link gets
    the same job, whatever stood on sbatch's command line. A new run begins with `resume`, if that
    names anything. Raises RunLive where it is live.
    """
    config = read_config(path, sets=sets, options={}, environ=environ)
    assert config.name is not None
    run = RunDir(root / config.name)
    job = environ.get("SLURM_JOB_ID")
    if is_run(run.path):
        if resume is not None:
            check_same(run, resume, root)
        _check_rests(run, config, environ)
        if read_story(run).completed:
            return run
        ready_to_resume(run, sets=(), environ=environ, me=job)
    else:
        origin = None if resume is None else find_origin(resume, root, trust=trust)
        if origin is not None:
            check_takes_origin(config)
            check_origin(origin, config, environ)
        run = prepare(config, root, project=Path.cwd(), environ=environ, origin=origin)
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

    What the script asks of Slurm, and who is notified, is no difference.
    """
    where = live_jobs(run, environ, me=environ.get("SLURM_JOB_ID"))
    if where:
        raise RunLive(f"{run.name} is live: {where}. `hpcresume status` shows it.")
    changed = difference(read_frozen(run.config), config)
    changed = [line for line in changed if not line.startswith(("scheduler.", "notify"))]
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{run.path} belongs to another configuration:\n  {lines}\nGo on with the old one by "
            f"`hpcresume resume {run.name}`, or give the new run another name."
        )
