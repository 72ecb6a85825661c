"""The process beside rank 0 that tells one tracker what the training logs.

It reads the link's files as they grow, looks at once when it gets a signal, and leaves when the
journal says that the training has ended, when the rank is gone, or when a newer link has claimed
the run. Whatever goes wrong is one line of the log: what was not told, the next link tells.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from hpcresume.config import read_frozen
from hpcresume.display.logging import logging_to
from hpcresume.journal import Lineage, segments_from_json
from hpcresume.observe.growing import GrowingLines
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.trackers.beside import WAKE
from hpcresume.trackers.choice import open_tracker
from hpcresume.trackers.lines import Lines
from hpcresume.trackers.memory import Memory
from hpcresume.trackers.tracker import Subject

#: In the name of what is spoken of.
log = logging.getLogger("hpcresume.tracker")

_EVERY_S = 2.0
#: Steps that are told at once, where many have been missed.
_AT_ONCE = 500
_NICE = 10
#: The job's signals are for the training; here each of them only ends a pause.
_WAKING = (
    WAKE,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def follow(run: RunDir, number: int, name: str, rank_pid: int) -> None:
    """Tell a tracker of a link until that has ended; `rank_pid` is the process that trains."""
    pause = _Pause()
    os.nice(_NICE)
    config = read_frozen(run.config)
    with logging_to(run.train_log, level=config.log.level):
        try:
            _follow(run, _Link(run.link(number), rank_pid), name, config.args, pause)
        except (Exception, SystemExit) as error:
            # Nobody can say what somebody else's package raises.
            what = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("%s is off for the rest of this link: %s", name, what)
            log.debug("", exc_info=True)


def _follow(run: RunDir, link: _Link, name: str, args: Mapping[str, Any], pause: _Pause) -> None:
    restored = link.record("restored")
    while restored is None:
        if link.over(run):
            return
        pause.wait()
        restored = link.record("restored")
    memory = Memory(run, name)
    identity = run.identify()
    subject = Subject(
        run=run,
        id=str(identity["id"]),
        project=Path(identity["project"]).name or run.name,
        link=link.number,
        args=args,
        memory=memory,
    )
    tracker = open_tracker(name, subject)
    over = Lineage(segments_from_json(restored.get("segments", [])), link.number)
    lines = Lines(run, over, tracker.begin(int(restored["step"])))
    while True:
        # Asked before the last look, which then sees everything.
        last = link.over(run)
        found = lines.look()
        for begin in range(0, len(found), _AT_ONCE):
            if run.newest_link() != link.number:
                return
            tracker.tell(found[begin : begin + _AT_ONCE])
        if last:
            break
        pause.wait()
    if run.newest_link() != link.number:
        # The tracker run and its memory are the next link's now.
        return
    ended = link.record("ended")
    tracker.close("failed" if ended is None else str(ended.get("how")))
    memory.reached(memory.told, sync=True)


class _Pause:
    """The time between two looks, which a signal ends, also one that came before it began."""

    def __init__(self) -> None:
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        for number in _WAKING:
            signal.signal(number, self._note)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        # A full pipe wakes as well.
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake, b".")

    def wait(self) -> None:
        """A while, or until the next signal."""
        if self._poll.poll(_EVERY_S * 1000):
            os.read(self._woken, 1 << 16)


class _Link:
    """What the link's training has recorded so far."""

    def __init__(self, link: LinkDir, rank_pid: int) -> None:
        self.number = link.number
        self._records: dict[str, Mapping[str, Any]] = {}
        self._lines = GrowingLines(link.training)
        self._rank_pid = rank_pid

    def record(self, kind: str) -> Mapping[str, Any] | None:
        """The newest record of a kind."""
        for record in self._lines.look():
            if isinstance(record, dict) and isinstance(record.get("kind"), str):
                self._records[record["kind"]] = record
        return self._records.get(kind)

    def over(self, run: RunDir) -> bool:
        """Whether the training has ended, by its word or without one."""
        if self.record("ended") is not None or os.getppid() != self._rank_pid:
            return True
        return run.newest_link() != self.number
