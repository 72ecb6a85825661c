"""The local backend from the command line: drive a run's jobs here, or detached."""

from __future__ import annotations

import signal
import sys

import click

from hpcresume import status
from hpcresume.config import RunConfig
from hpcresume.display.progress import LocalProgress
from hpcresume.errors import HpcResumeError
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.driver import drive
from hpcresume.scheduler.local import spawn_detached
from hpcresume.signals import listen


def detach_driver(run: RunDir) -> int:
    """Start a driver that survives this terminal."""
    argv = [sys.executable, "-m", "hpcresume", "local-driver", str(run.path)]
    pid = spawn_detached(run, argv)
    click.echo(f"It runs in the background (driver process {pid}).")
    return 0


def drive_here(run: RunDir, config: RunConfig) -> int:
    """Serve a run's jobs until none is left, showing progress; Ctrl-C saves and rests."""
    said = False
    with (
        listen(second_interrupt_kills=True) as flags,
        LocalProgress(run, lambda: flags.stop_asked() is not None) as progress,
    ):

        def interrupted() -> bool:
            nonlocal said
            asked = flags.stop_asked() is not None
            if asked and not said:
                said = True
                progress.say("stopping: the state is saved first (Ctrl-C again to leave at once)")
            return asked

        drive(run, config.scheduler.grace_s, on_tick=progress.tick, interrupted=interrupted)
        progress.finish()
    return _end(run, interrupted_by=signal.SIGINT if flags.count(signal.SIGINT) else None)


def _end(run: RunDir, interrupted_by: signal.Signals | None) -> int:
    now = status.read_status(run, [])
    if now.state == "complete":
        loss = "" if now.loss is None else f", loss {now.loss:.4f}"
        model = f"\nmodel      {run.final_model}" if not now.seen else ""
        steps = f": {now.step} steps{loss}" if now.step else ""
        click.echo(f"\n{run.name} is complete{steps}{model}")
        return 0
    if interrupted_by is not None:
        click.echo(f"\nSaved at step {now.step}. To go on: hpcresume resume {run.name}")
        return 130
    raise _Ended(f"{run.name} {now.state} at step {now.step}: {now.why}", now.state)


class _Ended(HpcResumeError):
    """The chain ended otherwise than by completion."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        self.exit_code = 0 if state == "stopped" else 8
