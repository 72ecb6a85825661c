"""When a checkpoint is due: a pure policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Save every so many steps, every so many minutes, at each epoch's end; whichever come."""

    steps: int | None = None
    minutes: float | None = 30.0
    each_epoch: bool = True

    def by_count(self, global_step: int, *, epoch_ended: bool) -> str | None:
        """The reason to save at this step boundary that all ranks see alike, or None."""
        if self.each_epoch and epoch_ended:
            return "epoch"
        if self.steps is not None and global_step % self.steps == 0:
            return "steps"
        return None

    def by_clock(self, seconds_since_save: float) -> str | None:
        """The reason to save that depends on one rank's clock, or None."""
        if self.minutes is not None and seconds_since_save >= self.minutes * 60:
            return "minutes"
        return None
