"""`hpcresume rehearse`: whether a training survives what ends the jobs of a chain, tried at once.

A scratch copy of the run is trained on this machine, in short links that are really ended: by
preemption (SIGTERM, then SIGKILL), by their time limit, by kill -9 of the ranks. What is looked at
is what a chain stands or falls with: does the training leave its loop in time, is the save over
before the end, does the next link go on from there. One more link at the end shows it of the last.

    report     what was seen of each link, and the verdict; pure
    stage      one link: its job, its end, what its journals tell
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from hpcresume.config import RunConfig, from_mapping, to_mapping
from hpcresume.rehearse.report import LAST, Played, Rehearsal, end_of_link
from hpcresume.rehearse.stage import Stage
from hpcresume.signals import SignalFlags, listen
from hpcresume.submit import prepare
from hpcresume.verify.scratch import scratch_folder

__all__ = ["Played", "Rehearsal", "rehearse"]


def rehearse(
    config: RunConfig,
    *,
    project: Path,
    environ: Mapping[str, str],
    links: int = 3,
    time_s: int | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Rehearsal:
    """Train a scratch copy in `links` links that are ended, and one that shows it goes on.

    `time_s` is the time limit of each job; by default what the first link was measured to need.
    The scratch run is removed, or put below `keep`. Raises KeyboardInterrupt or SystemExit where
    a signal asks this process to leave, UsageError where `keep` is in use, and what `submit`
    raises where the configuration does not even start.
    """
    with scratch_folder(keep, "rehearse") as folder, listen(second_interrupt_kills=True) as flags:
        say("the training function is imported")
        run = prepare(_scratch(config), folder, project=project, environ=environ)
        _leave_if_asked(flags)
        stage = Stage(run, environ, time_s=time_s, asked=lambda: flags.stop_asked() is not None)
        played: list[Played] = []
        try:
            for number in range(1, links + 2):
                end = LAST if number > links else end_of_link(number)
                say(f"link {number}: trains, {end.told}")
                played.append(stage.play(end))
                _leave_if_asked(flags)
                if played[-1].over:
                    break
        finally:
            stage.close()
    return Rehearsal(tuple(played), kept=None if keep is None else run.path)


def _scratch(config: RunConfig) -> RunConfig:
    """The configuration on this machine, whose next job is queued from here."""
    plain = to_mapping(config)
    plain["scheduler"] |= {"cluster": "local", "nodes": 1, "time": None, "pin_hardware": False}
    plain["chain"]["mode"] = "drive"
    # Nobody else is told of what is not meant.
    plain["log"]["trackers"] = []
    plain["notify"]["url"] = None
    # What a rank is at is read from its signs of life.
    plain["chain"]["hang_s"] = config.chain.hang_s or None
    return from_mapping(plain, "the rehearsal")


def _leave_if_asked(flags: SignalFlags) -> None:
    if flags.count(signal.SIGINT):
        raise KeyboardInterrupt
    if flags.stop_asked():
        raise SystemExit(128 + signal.SIGTERM)
