"""Weights & Biases: one run over all links, resumed by its id.

W&B keeps the first value of a step: replayed steps are not told again. Its own variables hold
(WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_DIR…). Offline, each link leaves a folder of its own
in `trackers/wandb/` of the run; `wandb sync` joins them by the id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import wandb

from hpcresume.trackers.tracker import Line, Subject


class WandB:
    """The run with the id that this run has remembered."""

    def __init__(self, subject: Subject) -> None:
        self._memory = subject.memory
        self._last = self._memory.told
        folder = subject.run.trackers
        self._run = wandb.init(
            id=self._memory.keep_id(self._memory.id or subject.id),
            resume="allow",
            name=os.environ.get("WANDB_NAME") or subject.run.name,
            project=os.environ.get("WANDB_PROJECT") or subject.project,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=dict(subject.args),
            # What this process prints is no training's output.
            settings=wandb.Settings(console="off"),
        )

    def begin(self, restored: int) -> int:
        """Behind what the server has; offline behind what the links before have closed.

        Also a SIGTERM to the whole job ends W&B's own process, with what it had not written.
        """
        return self._run.step - 1 if self._run.step else self._memory.told

    def tell(self, lines: Sequence[Line]) -> None:
        """Hand them to W&B's own process, which loses them where it is killed."""
        for line in lines:
            self._run.log(dict(line.values), step=line.step)
        self._last = lines[-1].step

    def close(self, how: str) -> None:
        """Wait until W&B has it all. Between links its run counts as preempted."""
        if how == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if how == "completed" else 1)
        self._memory.reached(self._last)
