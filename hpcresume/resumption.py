"""Makes a run that rests ready for its next job, with the values that are changed from here on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence

from hpcresume import files
from hpcresume.checkpoint.manifest import Committed
from hpcresume.checkpoint.store import Store
from hpcresume.config import RunConfig, check_complete, difference, dump, load, read_frozen
from hpcresume.errors import CheckpointError, RunLive, UsageError
from hpcresume.journal import Journal, known_step, lineage
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.choice import asking_scheduler, chosen_cluster
from hpcresume.story import Story, find_jobs, live_jobs, read_story, user_name, waits_in_vain
from hpcresume.submit import at_fixed_time, check_ways

#: What `resume --set` takes without "override.": the numbers that torch's optimizers hold.
OPTIMIZER_OPTIONS = frozenset(
    {"lr", "weight_decay", "momentum", "dampening", "eps", "alpha", "rho", "lambd", "t0"}
    | {"lr_decay", "momentum_decay", "beta2_decay"}
)


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
