"""The processes beside rank 0 that tell the trackers: started, and ended in time."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from typing import Protocol

from hpcresume.errors import ConfigError
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler import process
from hpcresume.trackers.choice import check_installed

#: In the name of what is spoken of.
log = logging.getLogger("hpcresume.tracker")

#: How long the end of a link waits for trackers, in seconds: they may have to send something.
PATIENCE_S = 15.0
_TICK_S = 0.01
#: Has a tracker's process look at once. One that has not begun to listen is not ended by it.
WAKE = signal.SIGCONT


class _Running(Protocol):
    """What is used of the processes that `process.spawn` starts."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def kill(self) -> None: ...


class Beside:
    """The trackers of a link. Nothing that becomes of them changes what becomes of the link."""

    def __init__(self, run: RunDir, link: LinkDir, names: Iterable[str]) -> None:
        self._link = link
        self._running: dict[str, _Running] = {}
        for name in names:
            argv = [sys.executable, "-m", "hpcresume", "tracker", str(run.path)]
            argv += ["--link", str(link.number), "--name", name, "--rank-pid", str(os.getpid())]
            try:
                check_installed([name])
                with link.tracker_log(name).open("ab") as output:
                    self._running[name] = process.spawn(argv, environ=os.environ, output=output)
            except (ConfigError, OSError) as error:
                log.warning("%s is off for this link: %s", name, error)

    def end(self, patience_s: float) -> None:
        """The training has ended, and its journal says so: let them tell the rest.

        Whoever is not done in so many seconds is ended; the next link tells what is left.
        """
        for running in self._running.values():
            running.send_signal(WAKE)
        deadline = time.monotonic() + patience_s
        for name, running in self._running.items():
            code = _ended(running, deadline)
            if code is None:
                running.kill()
                # Not longer: one that waits for a dead disk cannot even be killed.
                _ended(running, time.monotonic() + 1)
                late = f"was not done within {patience_s:.0f} s: the next link tells it the rest"
                log.warning("%s %s", name, late)
            elif code:
                where = self._link.tracker_log(name)
                log.warning("%s was off at the end (code %d): see %s", name, code, where)


def _ended(running: _Running, deadline: float) -> int | None:
    """The exit code of a process as soon as it has one, or None at the deadline."""
    while (code := running.poll()) is None and time.monotonic() < deadline:
        time.sleep(_TICK_S)
    return code
