"""One training process of a link: finds the training function, gives it a session, and records
how it ended.

Two ways lead here. Under a supervisor, `hpcresume rank RUN` is what srun starts. Without one,
`python train.py` calls `main`, which claims a link itself and trains in the foreground.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hpcresume import chain, files
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
from hpcresume.display.logging import logging_to
from hpcresume.display.terminal import let_go_of_stdout
from hpcresume.errors import ConfigError, HpcResumeError, RunLive, UsageError, unavailable
from hpcresume.history import past_link
from hpcresume.journal import Journal, known_step, lineage, read_chain
from hpcresume.run_dir import LinkDir, RunDir, find_run, is_run, runs_root
from hpcresume.scheduler.choice import chosen_cluster
from hpcresume.scheduler.environment import STOP_AT, RankPlace, allocation, rank_place
from hpcresume.session import LinkEnds, Session
from hpcresume.signals import SignalFlags, listen
from hpcresume.story import alive_elsewhere, live_jobs, read_story, this_process
from hpcresume.training.berth import Berth
from hpcresume.training.clock import Clock
from hpcresume.training.determinism import make_deterministic, seed_everything
from hpcresume.training.distributed import Ranks

log = logging.getLogger(__name__)

TrainFunction = Callable[[Session], None]
_OWN_CODE = f"{Path(__file__).parent}{os.sep}"


# ---- the training function ---------------------------------------------------------------


def load_train(entry: str, roots: Sequence[Path]) -> TrainFunction:
    """The function that "file.py:func" or "package.module:func" names.

    Files are looked for below `roots`, which also go first on the import path. Raises ConfigError
    with the file and line where the import fails.
    """
    target, _, function = entry.partition(":")
    function = function or "train"
    for root in reversed(roots):
        if str(root) not in sys.path:
            sys.path.insert(0, str(root))
    module = _import_file(target, roots) if target.endswith(".py") else _import_module(target)
    found = getattr(module, function, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(
            f"train: {target} has no function '{function}' (it has: "
            f"{', '.join(known[:8]) or 'none'})."
        )
    _check_takes_session(found, f"{target}:{function}")
    return found  # type: ignore[no-any-return]


def _check_takes_session(function: Callable[..., Any], entry: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ConfigError(
            f"train: {entry} cannot be called with the session alone: {error}."
        ) from None


def _import_file(target: str, roots: Sequence[Path]) -> ModuleType:
    path = next((root / target for root in roots if (root / target).is_file()), None)
    if path is None:
        raise ConfigError(f"train: there is no file {target} in {', '.join(map(str, roots))}.")
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # DataLoader workers that are spawned import it again by this name.
    sys.modules[path.stem] = module
    with _import_errors(target):
        spec.loader.exec_module(module)
    return module


def _import_module(target: str) -> ModuleType:
    with _import_errors(target):
        return importlib.import_module(target)


@contextlib.contextmanager
def _import_errors(target: str) -> Any:
    try:
        yield
    except (Exception, SystemExit) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(
            f"train: {target} does not import: {type(error).__name__}: {what}{_place(error)}."
        ) from error


def _place(error: BaseException) -> str:
    """File and line of an error of the user's code, in brackets; nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and not frame.filename.startswith(_OWN_CODE)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


# ---- one rank of one link ------------------------------------------------------------------


def serve(
    berth_of: Callable[[Ranks], Berth], train: TrainFunction, place: RankPlace, config: RunConfig
) -> tuple[str, str, int]:
    """Train until the run is complete or the link must end.

    Returns how it ended (completed, stopped or failed), why, and the exit code.
    """
    if config.deterministic:
        make_deterministic()
    ranks = Ranks(place)
    seed_everything(config.seed + place.rank)
    berth = berth_of(ranks)
    session: Session | None = None
    try:
        session = Session(berth)
        train(session)
        session._complete()
        how, why, code = "completed", "", 0
    except LinkEnds as end:
        how, why, code = "stopped", end.reason, 0
    except BaseException as error:
        how, why, code = "failed", f"{type(error).__name__}: {error}", _exit_code(error)
        _record_failure(berth, session, error, code)
        if session is not None:
            session._abandon()
        _say_failure(berth, session, error)
    if berth.journal is not None:
        with contextlib.suppress(OSError):
            berth.journal.write("ended", how=how, reason=why)
    if how == "failed":
        # The peers may hang in a collective: leave at once, the step's end takes them along.
        return how, why, code
    if session is not None:
        session._close()
    return how, why, code


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else 1
    return error.exit_code if isinstance(error, HpcResumeError) else 1


def _record_failure(berth: Berth, session: Session | None, error: BaseException, code: int) -> None:
    record = {
        "t": time.time(),
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "step": _failed_step(session),
        "rank": berth.ranks.rank,
        "traceback": "".join(traceback.format_exception(error))[-20000:],
        "exit_code": code,
    }
    with contextlib.suppress(OSError):
        files.write_json(berth.link.rank_failure(berth.ranks.rank), record)


def _say_failure(berth: Berth, session: Session | None, error: BaseException) -> None:
    """The last word of the rank's log."""
    text = "".join(traceback.format_exception(error))
    if isinstance(error, HpcResumeError):
        log.error("%s%s", error, _place(error))
        log.debug("%s", text)
    else:
        log.error("rank %d failed in step %d\n%s", berth.ranks.rank, _failed_step(session), text)


def _failed_step(session: Session | None) -> int:
    return 1 if session is None else session.global_step + 1


def run_rank(run: RunDir, number: int, environ: Mapping[str, str]) -> int:
    """A rank under a supervisor; returns its exit code."""
    run.check_private()
    config = read_frozen(run.config)
    link = run.link(number)
    place = rank_place(environ)
    supervisor = int(environ.get("HPCRESUME_SUPERVISOR", "0"))
    train_log = (run.train_log,) if place.rank == 0 else ()
    with listen() as flags, logging_to(*train_log, level=config.log.level):
        clock = Clock(
            end_time=None,
            file=link.deadline,
            lead_s=config.chain.lead_s,
            guess_s=float(environ.get("HPCRESUME_SAVE_GUESS_S", "0")),
        )
        try:
            train = load_train(config.train, code_roots(run))
        except ConfigError as error:
            record = {"type": "ConfigError", "message": str(error), "step": 0, "exit_code": 4}
            files.write_json(link.rank_failure(place.rank), record)
            log.error("%s", error)
            return error.exit_code

        def berth_of(ranks: Ranks) -> Berth:
            return berth_for(
                run,
                link,
                config,
                ranks,
                flags,
                clock,
                job=environ.get("HPCRESUME_JOB_ID"),
                orphaned=(lambda: os.getppid() != supervisor) if supervisor else (lambda: False),
                stop_at=int(environ[STOP_AT]) if STOP_AT in environ else None,
            )

        return serve(berth_of, train, place, config)[2]


def code_roots(run: RunDir) -> list[Path]:
    """Where the training function is looked for: the frozen code, else the project itself."""
    project = Path(run.identify()["project"])
    return [run.code] if run.code.is_dir() else [project]


def berth_for(
    run: RunDir,
    link: LinkDir,
    config: RunConfig,
    ranks: Ranks,
    flags: SignalFlags,
    clock: Clock,
    *,
    job: str | None,
    orphaned: Callable[[], bool] = lambda: False,
    stop_at: int | None = None,
) -> Berth:
    """What the session of one rank of a claimed link is made of."""
    journal = Journal(link.training, link=link.number, job=job) if ranks.rank == 0 else None
    links = read_chain(run)
    fresh = config.resume == "never" and link.number == 1
    return Berth(
        run=run,
        run_id=run.identify()["id"],
        link=link,
        config=config,
        ranks=ranks,
        flags=flags,
        clock=clock,
        journal=journal,
        lineage=lineage(run, links),
        known_step=known_step(links),
        begin_fresh=fresh,
        orphaned=orphaned,
        stop_at=stop_at,
    )


# ---- in the foreground ---------------------------------------------------------------------


def main(train: TrainFunction, argv: Sequence[str] | None = None, **settings: Any) -> None:
    """Run and resume a training function in this process; what a training script ends with.

    `settings` are top-level keys of a configuration (epochs=3, seed=1…), for where there is no
    configuration file. Alone or inside an srun allocation, with or without a scheduler. Leaves by
    SystemExit: 0 when training is complete or was asked to rest, 130 after Ctrl-C, 75 when the
    job's end came first.
    """
    options = _parse(train, argv)
    options.settings = settings
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
    parser.add_argument("--resume", metavar="RUN", help="run directory to go on with")
    parser.add_argument("--name", help="name of the run (default: the script's)")
    parser.add_argument("--runs", help="folder of runs (default: $HPCRESUME_RUNS or ./runs)")
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
                _check_free(run, environ)
                number = run.claim_link(claim).number
                # Who starts it again wants it to go on, whatever was asked for before.
                for request in (run.cancel, run.stop):
                    request.unlink(missing_ok=True)
            link = run.link(ranks.broadcast(number))
            taken.append(link)
            return berth_for(run, link, config, ranks, flags, clock, job=job.job_id)

        with logging_to(*((run.train_log,) if place.rank == 0 else ()), level=config.log.level):
            how, why, code = serve(berth_of, train, place, config)
    if place.rank == 0 and taken:
        _close_link(run, taken[0], job.job_id)
        _say_end(run, how, why)
    if how == "stopped":
        asked = flags.stop_asked()
        return 130 if flags.count(signal.SIGINT) else 143 if asked else 75 if clock.due() else 0
    return code


def _open_run(
    train: TrainFunction, options: argparse.Namespace, environ: Mapping[str, str], *, create: bool
) -> tuple[RunDir, RunConfig]:
    root = runs_root(options.runs, environ)
    if options.resume:
        if options.set or options.config or options.name:
            raise UsageError("--resume takes a run as it is: leave --config, --name and --set out.")
        run = find_run(options.resume, root)
        return run, read_frozen(run.config)
    own = Path("hpcresume.yaml")
    path = Path(options.config) if options.config else own if own.is_file() else None
    source = Path(getattr(sys.modules[train.__module__], "__file__", "train.py")).absolute()
    given = {} if path else options.settings
    config = load(path, sets=options.set, options={**given, "name": options.name}, environ=environ)
    name = config.name or source.stem
    entry = f"{source.name}:{train.__name__}"
    frozen = _with(config, name=name, train=entry)
    check_complete(frozen)
    run = RunDir(root / name)
    if create and not is_run(run.path):
        with contextlib.suppress(FileExistsError):
            run.create(
                dump(frozen),
                cluster=chosen_cluster(frozen.scheduler.cluster, environ),
                project=source.parent,
                versions={},
            )
    deadline = time.monotonic() + 60
    while not is_run(run.path):
        if time.monotonic() > deadline:
            raise ConfigError(f"{run.path} did not appear: is it on a file system all ranks share?")
        time.sleep(0.1)
    same_config(run, frozen)
    return run, read_frozen(run.config)


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
