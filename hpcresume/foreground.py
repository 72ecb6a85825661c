"""A training script that is run by hand: `python train.py` calls `main`, which claims a link itself
and trains in the foreground, alone or inside an srun allocation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcresume import chain, files
from hpcresume.checkpoint.origin import (
    Origin,
    check_end,
    check_own_place,
    check_same,
    find_origin,
)
from hpcresume.config import (
    RunConfig,
    check_complete,
    difference,
    dump,
    from_mapping,
    load,
    read_frozen,
    to_mapping,
)
from hpcresume.display.logging import debug_to, logging_to
from hpcresume.display.terminal import can_redraw, forgive, let_go_of_stdout
from hpcresume.errors import ConfigError, HpcResumeError, NotFound, RunLive, UsageError, unavailable
from hpcresume.history import past_link
from hpcresume.journal import Journal
from hpcresume.run_dir import LinkDir, RunDir, find_run, is_run, runs_root
from hpcresume.scheduler.choice import chosen_cluster
from hpcresume.scheduler.environment import allocation, rank_place
from hpcresume.serving import TrainFunction, berth_for, serve
from hpcresume.signals import SignalFlags, listen
from hpcresume.story import alive_elsewhere, live_jobs, read_story, this_process
from hpcresume.training.berth import Berth, Show
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks


def main(train: TrainFunction, argv: Sequence[str] | None = None, **settings: Any) -> None:
    """Run and resume a training function in this process; what a training script ends with.

    `settings` are top-level keys of a configuration (epochs=3, seed=1…), for where there is no
    configuration file. Alone or inside an srun allocation, with or without a scheduler. Leaves by
    SystemExit: 0 when training is complete or was asked to rest, 130 after Ctrl-C, 75 when the
    job's end came first.
    """
    options = _parse(train, argv)
    options.settings = settings
    # Before anything is drawn, which takes standard output over.
    forgive()
    try:
        code = _foreground(train, options, os.environ)
    except (HpcResumeError, OSError) as error:
        told = unavailable(error) if isinstance(error, OSError) else error
        print(f"hpcresume: {told}", file=sys.stderr)
        code = told.exit_code
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _parse(train: TrainFunction, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(train.__doc__ or "").split("\n")[0] or None)
    parser.add_argument("--config", help="configuration file (default: ./hpcresume.yaml, if any)")
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help="a run to go on with; with --config or --name, or where it is no run: what a new run "
        "begins with (a run, a checkpoint, another program's checkpoint)",
    )
    parser.add_argument(
        "--trust", action="store_true", help="PATH is your own: its pickles may hold anything"
    )
    parser.add_argument("--name", help="name of the run (default: the script's)")
    parser.add_argument("--runs", help="folder of runs (default: $HPCRESUME_RUNS or ./runs)")
    parser.add_argument("--dashboard", action="store_true", help="draw on the whole terminal")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=VALUE")
    return parser.parse_args(argv)


def _foreground(
    train: TrainFunction, options: argparse.Namespace, environ: Mapping[str, str]
) -> int:
    place = rank_place(environ)
    run, config = _open_run(train, options, environ, create=place.rank == 0)
    job = allocation(environ)
    claim = {
        "job": job.job_id,
        "restart": job.restart_count,
        **this_process(),
        "num_tasks": place.world_size,
        "foreground": True,
        "t": round(time.time(), 3),
    }
    with listen(second_interrupt_kills=True) as flags:
        clock = Clock(end_time=job.end_time, file=None, lead_s=config.chain.lead_s, guess_s=0.0)
        taken: list[LinkDir] = []

        def berth_of(ranks: Ranks) -> Berth:
            number = None
            if ranks.rank == 0:
                number = _claimed(run, claim, environ).number
                # Who starts it again wants it to go on, whatever was asked for before.
                for request in (run.cancel, run.stop):
                    request.unlink(missing_ok=True)
            link = run.link(ranks.broadcast(number))
            taken.append(link)
            debug_to(link.debug_log(place.rank))
            return berth_for(run, link, config, ranks, flags, clock, job=job.job_id, show=show)

        paths = (run.train_log,) if place.rank == 0 else ()
        whole = run if options.dashboard else None
        draws = place.rank == 0 and can_redraw()
        with (
            _drawn(flags, whole) if draws else contextlib.nullcontext() as show,
            logging_to(*paths, level=config.log.level),
        ):
            how, why, code = serve(berth_of, train, place, config)
    if place.rank == 0 and taken:
        _close_link(run, taken[0], job.job_id)
        _say_end(run, how, why)
    if how == "stopped":
        asked = flags.stop_asked()
        return 130 if flags.count(signal.SIGINT) else 143 if asked else 75 if clock.due() else 0
    return code


@contextlib.contextmanager
def _drawn(flags: SignalFlags, whole: RunDir | None) -> Iterator[Show]:
    """Live progress in this terminal, or a run on the whole of it: what a session shows it by."""

    def interrupted() -> bool:
        return flags.stop_asked() is not None

    if whole is None:
        from hpcresume.display.progress import RankProgress

        with RankProgress(interrupted) as progress:
            yield progress.show
    else:
        from hpcresume.display.watch import Dashboard

        with Dashboard(whole, interrupted) as dashboard:
            yield dashboard.show


def _open_run(
    train: TrainFunction, options: argparse.Namespace, environ: Mapping[str, str], *, create: bool
) -> tuple[RunDir, RunConfig]:
    root = runs_root(options.runs, environ)
    if options.trust and not options.resume:
        raise UsageError("--trust says something of what --resume PATH names: name it.")
    if options.resume and not (options.config or options.name):
        with contextlib.suppress(NotFound):
            run = find_run(options.resume, root)
            if options.set:
                raise UsageError(
                    "--resume takes a run as it is: leave --set out, or give the new run that is "
                    "to begin with it a name by --name."
                )
            return run, read_frozen(run.config)
    own = Path("hpcresume.yaml")
    path = Path(options.config) if options.config else own if own.is_file() else None
    source = Path(getattr(sys.modules[train.__module__], "__file__", "train.py")).absolute()
    given = {} if path else options.settings
    named = {"name": options.name} if options.name else {}
    config = load(path, sets=options.set, options={**given, **named}, environ=environ)
    name = config.name or source.stem
    entry = f"{source.name}:{train.__name__}"
    frozen = _with(config, name=name, train=entry)
    check_complete(frozen)
    run = RunDir(root / name)
    if options.resume and is_run(run.path):
        check_same(run, options.resume, root)
    if create and not is_run(run.path):
        origin = _checked_origin(options, root, run, frozen) if options.resume else None
        with contextlib.suppress(FileExistsError):
            run.create(
                dump(frozen),
                cluster=chosen_cluster(frozen.scheduler.cluster, environ),
                project=source.parent,
                versions={},
                origin=None if origin is None else origin.to_json(),
            )
    deadline = time.monotonic() + 60
    while not is_run(run.path):
        if time.monotonic() > deadline:
            raise ConfigError(f"{run.path} did not appear: is it on a file system all ranks share?")
        time.sleep(0.1)
    same_config(run, frozen)
    return run, read_frozen(run.config)


def _checked_origin(
    options: argparse.Namespace, root: Path, run: RunDir, config: RunConfig
) -> Origin:
    """What a new run is to begin with, looked into before there is a run."""
    from hpcresume.checkpoint.foreign import look

    origin = find_origin(options.resume, root, trust=options.trust)
    check_own_place(run, origin)
    told = look(origin)
    check_end(config, told, origin)
    return origin


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return from_mapping({**to_mapping(config), **changes}, "the script")


def same_config(run: RunDir, config: RunConfig) -> None:
    """Raise ConfigError, with the difference, if a run was begun with another configuration."""
    changed = difference(read_frozen(run.config), config)
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{run.path} was begun with another configuration:\n  {lines}\nGo on with the old one "
            f"by --resume {run.name}, or give the new run another name by --name."
        )


def _claimed(run: RunDir, claim: Mapping[str, Any], environ: Mapping[str, str]) -> LinkDir:
    """The next link of a run. Raises RunLive where it has one that is alive."""
    while True:
        newest = run.newest_link()
        _check_free(run, environ)
        taken = run.claim_after(newest, claim)
        if taken is not None:
            return taken


def _check_free(run: RunDir, environ: Mapping[str, str]) -> None:
    story = read_story(run)
    # Only a run that was submitted has jobs: the others need no scheduler here.
    newest = story.newest
    if story.submissions:
        where = live_jobs(run, environ)
    elif newest is not None and story.ended(newest) is None:
        where = alive_elsewhere(newest, None, None) or ""
    else:
        where = ""
    if where:
        raise RunLive(
            f"{run.name} is live: {where}. `hpcresume status` shows it; wait for its end, or end "
            f"it by `hpcresume cancel {run.name}`."
        )


def _close_link(run: RunDir, link: LinkDir, job: str | None) -> None:
    """Record the end of a foreground link, as a supervisor would."""
    story = read_story(run)
    own = next(records for records in story.links if records.number == link.number)
    past = past_link(story, own, None)
    if past.cause is chain.Cause.DEADLINE and "deadline" not in past.detail:
        # A signal from the keyboard or the scheduler: rest until somebody goes on.
        past = _stopped(past)
    decision = chain.decide([past], chain.Budgets())
    journal = Journal(link.journal, link=link.number, job=job)
    journal.write("ended", cause=past.cause.value, detail=past.detail, seconds=past.seconds)
    journal.write(
        "decided",
        decision="stop" if decision.kind == "continue" else decision.kind,
        reason=decision.reason,
        cause=decision.cause.value,
        rule=decision.rule,
        numbers=decision.numbers,
    )
    journal.close()


def _stopped(past: chain.PastLink) -> chain.PastLink:
    detail = f"stopped by {past.detail}"
    return dataclasses.replace(past, cause=chain.Cause.STOPPED, detail=detail)


def _say_end(run: RunDir, how: str, why: str) -> None:
    state = files.read_json_or_none(run.trainer_state) or {}
    if how == "failed":
        return
    if how == "completed":
        text = f"Training is complete at step {state.get('global_step')}: {run.final_model}"
    else:
        command = shlex.join([sys.executable, *sys.argv])
        text = f"Saved at step {state.get('global_step')} ({why}). To go on: {command}"
    try:
        print(text, flush=True)
    except BrokenPipeError:
        let_go_of_stdout()
