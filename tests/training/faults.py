"""What the trainings of test_slurm_scenarios meet in step `args.at`; `args.fault` names it.

The file `met` in the run tells the test. What has been met is not met again, but for `args.always`.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import hpcresume


def meet(session: hpcresume.Session) -> float:
    """Called in every step; what is added to its loss."""
    args, met = session.args, session.path / "met"
    if session.global_step + 1 != args["at"] or (met.exists() and not args.get("always")):
        return 0.0
    met.touch()
    return float(globals()[args["fault"]](session) or 0.0)


def wait(session: hpcresume.Session) -> None:
    """Until the test lets it go on, or the link is to save and leave."""
    stop = Path(os.environ["HPCRESUME_STOP"])
    while not (stop.exists() or (session.path / "go").exists()):
        time.sleep(0.05)


def block(session: hpcresume.Session) -> None:
    """As in a long kernel: no handler runs, and the step does not end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    hang(session)


def hang(session: hpcresume.Session) -> None:
    time.sleep(3600)


def fail(session: hpcresume.Session) -> None:
    raise ValueError("this step fails")


def not_a_number(session: hpcresume.Session) -> float:
    return math.nan


def fill_memory(session: hpcresume.Session) -> None:
    filled = []
    while True:
        filled.append(bytearray(os.urandom(1000) * 10_000))
