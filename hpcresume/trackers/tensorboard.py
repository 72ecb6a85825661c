"""TensorBoard: one event file for each link, in `tensorboard/` of the run; by tensorboardX.

Readers purge what earlier files hold from the step on that a link begins with, so that each step is
there once, in the values of the link that stands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from hpcresume.trackers.tracker import Line, Subject


class TensorBoard:
    """Written here and now: tensorboardX's own SummaryWriter leaves that to a queue."""

    def __init__(self, subject: Subject) -> None:
        self._memory = subject.memory
        folder = subject.run.tensorboard
        folder.mkdir(mode=0o700, exist_ok=True)
        # The name begins with the second, by which readers order files; two links may share one.
        self._events = EventsWriter(str(folder / "events"), f".link-{subject.link:04d}")

    def begin(self, restored: int) -> int:
        """Have all purged that may be told twice."""
        since = min(self._memory.told, restored)
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(wall_time=time.time(), step=since + 1, session_log=start))
        self._events.flush()
        return since

    def tell(self, lines: Sequence[Line]) -> None:
        """Write them; they survive a power loss on return."""
        for line in lines:
            values = [Summary.Value(tag=name, simple_value=v) for name, v in line.values.items()]
            event = Event(wall_time=line.t, step=line.step, summary=Summary(value=values))
            self._events.write_event(event)
        self._events.flush()
        self._memory.reached(lines[-1].step)

    def close(self, how: str) -> None:
        """Give the file back."""
        self._events.close()
