"""Where in the data a rank is: which epoch, how far in it, and what a roll-back leaves out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hpcresume.errors import CheckpointError
from hpcresume.training.changes import Verdict, reconcile
from hpcresume.training.roll_back import RollBack


class Place:
    """A place in the data, counted in epochs and micro-batches; all ranks are at the same one."""

    def __init__(self) -> None:
        self.epoch = 0
        self.position = 0
        """Micro-batches of this epoch that are behind it."""
        self.feed_state: Any = None
        """What the feed remembers of this place; None at the beginning of an epoch."""
        self.left_out: list[Any] = []
        """All that was ever left out, for the checkpoints."""
        self._through: tuple[int, int] | None = None

    def take_over(self, progress: Mapping[str, Any]) -> None:
        """Be where a checkpoint was."""
        self.epoch, self.position = progress["epoch"], progress["position"]
        self.left_out = progress.get("skipped", [])

    def leave_out(self, back: RollBack, step: int) -> str:
        """Pass over the data from here, after `step`, up to where a roll-back says; in words."""
        self._through = back.epoch, back.position
        begin, end = [self.epoch, self.position], [back.epoch, back.position]
        self.left_out = [*self.left_out, {"after": begin, "through": end, "step": back.bad_step}]
        return (
            f"{back.metric} was not finite in step {back.bad_step}: the run goes back to step "
            f"{step}, and leaves out the batches after {_words(begin)} up to {_words(end)}; "
            f"its result is not that of an uncut run"
        )

    def go_on(
        self,
        progress: Mapping[str, Any],
        now: Mapping[str, Any],
        *,
        rank: int,
        accept: Collection[str],
    ) -> tuple[str, ...]:
        """Find the same place in the data as they are `now`; what is not as before, as sentences.

        `now` is the feed's fingerprint with accumulate and world_size. Raises CheckpointError
        where the data do not let it go on.
        """

        def reconciled(epoch: int, position: int) -> Verdict:
            saved = {**progress["loader"], "world_size": progress["world_size"]}
            return reconcile(saved, now, epoch=epoch, position=position, accept=accept)

        verdict = reconciled(self.epoch, self.position)
        if verdict.refused is not None:
            step = progress["global_step"]
            raise CheckpointError(f"checkpoint-{step} cannot be continued: {verdict.refused}.")
        if self._through is not None:
            through = reconciled(*self._through)
            # Of other data, nobody knows which are bad.
            self._through = None if verdict.new_data else (through.epoch, through.position)
        self.epoch, self.position = verdict.epoch, verdict.position
        states = progress.get("data", [])
        if states and not verdict.new_data:
            # Where the number of ranks may change, all of them are in the same place.
            self.feed_state = states[rank if rank < len(states) else 0]
        return verdict.said

    def end_epoch(self) -> None:
        """All micro-batches of this epoch are behind it."""
        self.epoch += 1
        self.position = 0

    def is_left_out(self, last: bool) -> bool:
        """Whether the micro-batch just read is to be passed over; `last`: of its epoch."""
        if self._through is None:
            return False
        if (self.epoch, self.position) > self._through:
            self._through = None
            return False
        if last:
            self.end_epoch()
        return True

    def steps_left(self, num_batches: int, accumulate: int, epochs: int) -> int:
        """Steps until so many epochs are over, counted from the last step boundary.

        From here on, because the epochs before may have had other data.
        """
        epoch, position = self._through or (self.epoch, self.position)
        left = max(0, epochs - epoch) * -(-num_batches // accumulate)
        return left - -(-position // accumulate)


def _words(place: list[int]) -> str:
    epoch, position = place
    return f"batch {position} of epoch {epoch + 1}"
