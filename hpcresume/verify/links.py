"""Trains a few steps in fresh processes, as links of a run directory that is made for it.

There is no supervisor and no scheduler: a link is told the step at which it saves and leaves.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import errors, files
from hpcresume.config import RunConfig, dump, from_mapping, read_frozen, to_mapping
from hpcresume.errors import HpcResumeError, Unavailable
from hpcresume.journal import read_link
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler import step
from hpcresume.scheduler.environment import STOP_AT, Allocation
from hpcresume.signals import listen
from hpcresume.story import this_process

_LOOK_S = 0.2
_LAST_WORDS_S = 10.0


class LinkFailed(HpcResumeError):
    """The training failed, in a link that should have ended well.

    `log` holds the traceback; None where the message says all there is.
    """

    def __init__(self, message: str, exit_code: int, log: Path | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.log = log


@dataclass(frozen=True, kw_only=True)
class LinkEnd:
    """How a link left its run."""

    step: int
    """The newest committed one; 0 where there is none."""
    completed: bool
    seconds: float


def make_run(path: Path, config: RunConfig, project: Path) -> RunDir:
    """A run directory whose code is what lies in `project` now."""
    run = RunDir(path)
    plain = to_mapping(config)
    # Nobody else is told of what is no training.
    plain["log"]["trackers"] = []
    run.create(
        dump(from_mapping(plain, "the verification")), cluster="local", project=project, versions={}
    )
    return run


def run_link(run: RunDir, *, ranks: int, stop_at: int) -> LinkEnd:
    """The next link of a run, up to a step, in fresh processes.

    Raises LinkFailed where a rank fails, Unavailable where its last step could not be saved,
    KeyboardInterrupt or SystemExit where a signal asks this process to leave.
    """
    began = time.monotonic()
    config = read_frozen(run.config)
    claim = {
        "job": None,
        "restart": 0,
        **this_process(),
        "num_tasks": ranks,
        "t": round(time.time(), 3),
    }
    link = run.claim_link(claim)
    container = config.scheduler.container
    python = sys.executable if container is None else container.python
    argv = ["-m", "hpcresume", "verify-link", str(run.path), "--link", str(link.number)]
    with listen() as flags:
        started = step.start(
            Allocation(),
            config.scheduler,
            [python, *argv],
            environ=_environ(run, link, stop_at),
            log=link.rank_log,
            num_tasks=ranks,
            run=run.path,
        )
        try:
            while (code := started.wait(_LOOK_S)) is None:
                if flags.count(signal.SIGINT):
                    raise KeyboardInterrupt
                if flags.stop_asked():
                    raise SystemExit(128 + signal.SIGTERM)
        finally:
            started.kill()
            started.wait(_LAST_WORDS_S)
    if code:
        raise _failed(link, ranks, code)
    records = read_link(run, link.number)
    refused = records.last("save_failed")
    if refused is not None:
        raise Unavailable(
            f"Step {refused['step']} could not be saved: {refused.get('reason')}. Let --keep or "
            f"$TMPDIR name a folder with more room."
        )
    return LinkEnd(
        step=max(run.checkpoint_steps(), default=0),
        completed=records.last("completed") is not None,
        seconds=time.monotonic() - began,
    )


def _environ(run: RunDir, link: LinkDir, stop_at: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "HPCRESUME_RUN": str(run.path),
        "HPCRESUME_LINK": str(link.number),
        "HPCRESUME_STOP": str(link.stop),
        # The ranks leave by themselves when this process is gone.
        "HPCRESUME_SUPERVISOR": str(os.getpid()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STOP_AT: str(stop_at),
    }


def _failed(link: LinkDir, ranks: int, code: int) -> LinkFailed:
    """What ended a link, from the rank that failed first: the others only followed it."""
    found = [(rank, files.read_json_or_none(link.rank_failure(rank))) for rank in range(ranks)]
    records = [(rank, record) for rank, record in found if isinstance(record, dict)]
    if not records:
        return LinkFailed(
            f"{_where(link)}, the training {_ended(code)} and left no exception: what it printed "
            f"is in {link.rank_log(0)}.",
            1,
            link.rank_log(0),
        )
    rank, record = min(records, key=lambda pair: float(pair[1].get("t", 0.0)))
    return _told(link, rank, record)


def _told(link: LinkDir, rank: int, record: Mapping[str, Any]) -> LinkFailed:
    kind, message = str(record.get("type")), str(record.get("message"))
    code = int(record.get("exit_code") or 1)
    if kind == errors.ConfigError.__name__:
        # The code does not even import: that has nothing to do with steps or links.
        return LinkFailed(message, code, None)
    log = link.rank_log(rank)
    lines = message.strip().splitlines() or [""]
    return LinkFailed(
        f"{_where(link)}, the training fails in step {record.get('step')} (rank {rank}, "
        f"{kind}: {lines[0][:300]}): the traceback is in {log}.",
        code,
        log,
    )


def _where(link: LinkDir) -> str:
    """The first link of a run is like any training; later ones have restored something."""
    return "Without any cut" if link.number == 1 else f"In link {link.number}, after a cut"


def _ended(code: int) -> str:
    if code <= 128:
        return f"left with code {code}"
    try:
        return f"was ended by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"was ended by signal {code - 128}"
