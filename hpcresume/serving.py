"""What every rank does, under a supervisor or in the foreground: trains in a session, and records
how that ended. Used by `rank` and by `foreground`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from hpcresume import files
from hpcresume.config import RunConfig
from hpcresume.errors import HpcResumeError, NonFinite
from hpcresume.journal import (
    Journal,
    Record,
    asking_about,
    known_step,
    lineage,
    read_chain,
)
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.session import LinkEnds, Session
from hpcresume.signals import SignalFlags
from hpcresume.trackers.beside import PATIENCE_S, Beside
from hpcresume.training.berth import Berth, Show
from hpcresume.training.clock import Clock
from hpcresume.training.determinism import make_deterministic, seed_everything
from hpcresume.training.distributed import Ranks
from hpcresume.training.heartbeat import Heartbeat
from hpcresume.training.start_up import StartUp

#: In the name of the process that serves: "rank" is the word that people know.
log = logging.getLogger("hpcresume.rank")

TrainFunction = Callable[[Session], None]
#: How long a rank that has failed waits for trackers.
_FAILED_S = 2.0
_OWN_CODE = f"{Path(__file__).parent}{os.sep}"


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
    told = config.log.trackers if place.rank == 0 else []
    trackers = Beside(berth.run, berth.link, told)
    how, why, code = _trained(berth, train)
    if told:
        trackers.end(_patience_s(how, berth.clock))
    return how, why, code


def _patience_s(how: str, clock: Clock) -> float:
    """How long trackers may hold up the end of a rank, in seconds."""
    if how == "failed":
        # The peers may hang in a collective until this rank has left.
        return _FAILED_S
    left_s = clock.remaining_s()
    return PATIENCE_S if left_s is None else max(0.0, min(PATIENCE_S, left_s / 2))


def _trained(berth: Berth, train: TrainFunction) -> tuple[str, str, int]:
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
        record = _record_failure(berth, session, error, code)
        if session is not None:
            session._abandon()
        _say_failure(berth, session, error, record)
    if berth.journal is not None:
        with contextlib.suppress(OSError):
            berth.journal.write("ended", how=how, reason=why, pace=berth.beat.paces())
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


def _record_failure(
    berth: Berth, session: Session | None, error: BaseException, code: int
) -> Record | None:
    """Leave the record of a failure; None where the disk refuses it."""
    record = {
        "t": time.time(),
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "step": _failed_step(session),
        "rank": berth.ranks.rank,
        "traceback": "".join(traceback.format_exception(error))[-20000:],
        "exit_code": code,
    }
    if isinstance(error, NonFinite):
        # Noticed later than it came up.
        record |= {"step": error.step, "metric": error.metric}
    try:
        files.write_json(berth.link.rank_failure(berth.ranks.rank), record)
    except OSError:
        return None
    return record


def _say_failure(
    berth: Berth, session: Session | None, error: BaseException, record: Record | None
) -> None:
    """The last word of the rank's log: where, what, and who tells more."""
    text = "".join(traceback.format_exception(error))
    more = asking_about(berth.run, record)
    if isinstance(error, HpcResumeError):
        log.error("%s%s%s", error, place_of(error), more)
        log.debug("%s", text)
    else:
        where = (berth.ranks.rank, _failed_step(session), place_of(error))
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        log.error("rank %d failed in step %d%s: %s%s\n%s", *where, what, more, text)


def _failed_step(session: Session | None) -> int:
    return 1 if session is None else session.global_step + 1


def place_of(error: BaseException) -> str:
    """File and line of an error of the user's code, in brackets; nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and not frame.filename.startswith(_OWN_CODE)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


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
    beat: Heartbeat | None = None,
    start_up: StartUp | None = None,
    warmed: Callable[[], None] = lambda: None,
    stop_at: int | None = None,
    show: Show | None = None,
) -> Berth:
    """What the session of one rank of a claimed link is made of."""
    start_up = start_up or StartUp()
    start_up.reached("ranks")
    journal = Journal(link.training, link=link.number, job=job) if ranks.rank == 0 else None
    links = read_chain(run)
    fresh = config.resume == "never" and link.number == 1
    beat = beat or Heartbeat()
    beat.remember(links)
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
        known_step=known_step(links, own=True),
        begin_fresh=fresh,
        orphaned=orphaned,
        beat=beat,
        start_up=start_up,
        warmed=warmed,
        stop_at=stop_at,
        show=show,
    )
