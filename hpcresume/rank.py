"""One training process of a link under a supervisor: what srun starts (`hpcresume rank RUN`).

Finds the training function, and serves it; see `serving`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hpcresume import files
from hpcresume.config import RunConfig, read_frozen
from hpcresume.display.logging import debug_to, logging_to
from hpcresume.errors import ConfigError
from hpcresume.journal import asking_about
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.environment import STOP_AT, RankPlace, rank_place
from hpcresume.serving import TrainFunction, berth_for, place_of, serve
from hpcresume.signals import listen
from hpcresume.training.berth import Berth
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks
from hpcresume.training.heartbeat import Heartbeat
from hpcresume.training.saving import give_way
from hpcresume.training.start_up import VARIABLE, StartUp
from hpcresume.training.warm import WarmStart, warm_start

log = logging.getLogger(__name__)

#: Where the job ends sooner, nothing is begun any more that the next link could do without.
_ENDING_S = 5.0


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
            f"train: {target} does not import: {type(error).__name__}: {what}{place_of(error)}."
        ) from error


# ---- one rank of one link ------------------------------------------------------------------


def run_rank(run: RunDir, number: int, environ: Mapping[str, str]) -> int:
    """A rank under a supervisor; returns its exit code."""
    start_up = StartUp(environ.get(VARIABLE))
    start_up.reached("imports")
    run.check_private()
    config = read_frozen(run.config)
    link = run.link(number)
    place = rank_place(environ)
    supervisor = int(environ.get("HPCRESUME_SUPERVISOR", "0"))
    train_log = (run.train_log,) if place.rank == 0 else ()
    # Asked for by the supervisor where nothing moves any more: the interpreter's own threads need
    # not run for it, and standard error is this rank's log.
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    beat = _heartbeat(link, place, config)
    with listen() as flags, logging_to(*train_log, level=config.log.level):
        debug_to(link.debug_log(place.rank))
        clock = Clock(
            end_time=None,
            file=link.deadline,
            lead_s=config.chain.lead_s,
            guess_s=0.0,
            saves=map(float, environ.get("HPCRESUME_SAVES_S", "").split()),
        )
        warm = warm_start(run, link, environ, keeper=place.local_rank == 0)
        if warm is not None:
            os.environ.update(warm.settings(environ))
        start_up.reached("caches")
        try:
            train = load_train(config.train, code_roots(run))
        except ConfigError as error:
            record = {"type": "ConfigError", "message": str(error), "step": 0, "exit_code": 4}
            files.write_json(link.rank_failure(place.rank), record)
            log.error("%s%s", error, asking_about(run, record))
            return error.exit_code
        start_up.reached("code")
        keeping = _Keeping(warm)

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
                beat=beat,
                start_up=start_up,
                # Other nodes find in the run what the first one has copied.
                warmed=keeping.begin if place.rank == 0 else lambda: None,
                stop_at=int(environ[STOP_AT]) if STOP_AT in environ else None,
            )

        how, _, code = serve(berth_of, train, place, config)
        left_s = clock.remaining_s()
        keeping.end(last=how != "failed" and (left_s is None or left_s > _ENDING_S))
        beat.close()
        return code


class _Keeping:
    """Has what was compiled kept for later links, beside the training."""

    def __init__(self, warm: WarmStart | None) -> None:
        self._warm = warm
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Copy in the background what there is now."""
        if self._warm is not None:
            # It must not hold up the end of a process whose disk is gone.
            self._thread = threading.Thread(target=self._copy, name="compiled", daemon=True)
            self._thread.start()

    def _copy(self) -> None:
        assert self._warm is not None
        give_way()
        self._warm.keep()

    def end(self, *, last: bool) -> None:
        """Copy what has been added, if there is still the time, and give the folder up."""
        if self._thread is not None and last:
            self._thread.join(_ENDING_S)
        if self._warm is None or (self._thread is not None and self._thread.is_alive()):
            return
        if last:
            self._warm.keep()
        self._warm.leave()


def _heartbeat(link: LinkDir, place: RankPlace, config: RunConfig) -> Heartbeat:
    """Signs of life for whoever watches this rank; none where the configuration wants none."""
    watched = config.chain.hang_s != 0
    path = link.beat(place.rank) if watched else None
    return Heartbeat(path, fixed_s=config.chain.hang_s or None)


def code_roots(run: RunDir) -> list[Path]:
    """Where the training function is looked for: the frozen code, else the project itself."""
    project = Path(run.identify()["project"])
    return [run.code] if run.code.is_dir() else [project]
