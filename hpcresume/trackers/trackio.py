"""trackio: one run over all links, resumed by its name, which holds the id of this run.

trackio keeps all that it is told: replayed steps are not told again. Its own variables hold
(TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL…).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import trackio

from hpcresume.trackers.tracker import Line, Subject


class Trackio:
    """The run with the name that this run has remembered."""

    def __init__(self, subject: Subject) -> None:
        self._memory = subject.memory
        self._last = self._memory.told
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or subject.project,
            name=self._memory.keep_id(self._memory.id or f"{subject.run.name}-{subject.id}"),
            resume="allow",
            config=dict(subject.args),
            embed=False,
            # It would look at this process, which is not the one that trains.
            auto_log_cpu=False,
        )

    def begin(self, restored: int) -> int:
        """Behind the last step that was told, whatever is replayed."""
        return self._memory.told

    def tell(self, lines: Sequence[Line]) -> None:
        """Hand them to trackio's thread, which has taken care of those before by now."""
        self._memory.reached(self._last)
        for line in lines:
            self._run.log(dict(line.values), step=line.step)
        self._last = lines[-1].step

    def close(self, how: str) -> None:
        """Wait until trackio has it all."""
        self._run.finish()
        self._memory.reached(self._last)
