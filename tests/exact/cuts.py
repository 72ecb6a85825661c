"""Where a chain is cut: kinds of cuts, and the schedules that cells take in turn."""

from __future__ import annotations

from dataclasses import dataclass

from cells import STEPS, STEPS_PER_EPOCH

KINDS = (
    *(f"step {number}" for number in range(1, STEPS_PER_EPOCH + 1)),
    "epoch end",
    "last step",
    "evaluation",
    "zero steps",
    "crash",
)


@dataclass(frozen=True)
class Cut:
    """How one link ends.

    step 1 … 7: saved and left after that step of an epoch. epoch end: killed in the first step of
    the second epoch. last step: killed when the last step is committed and the run is not yet
    complete. evaluation: asked to stop in the middle of an evaluation. zero steps: left before
    its first step. crash: killed within a step, after steps that no checkpoint holds.
    """

    kind: str
    step: int
    """The step after which (step 1 … 7) or in which it is cut."""

    @property
    def stop_at(self) -> int | None:
        """For the berth: the step after which the link saves and leaves."""
        return self.step if self.kind.startswith("step") or self.kind == "zero steps" else None

    @property
    def kills(self) -> bool:
        """Whether the link gets no chance to save."""
        return self.kind in ("epoch end", "last step", "crash")

    @property
    def place(self) -> str:
        """Where the training function is interrupted, in its own words; empty: nowhere."""
        places = {"last step": "end", "evaluation": "evaluation"}
        return "" if self.stop_at is not None else places.get(self.kind, "step")


def after(step: int) -> Cut:
    """Cut after a step, counted from the beginning of the run."""
    return Cut(f"step {(step - 1) % STEPS_PER_EPOCH + 1}", step)


ZERO = Cut("zero steps", 0)
EPOCH_END = Cut("epoch end", STEPS_PER_EPOCH + 1)
LAST = Cut("last step", STEPS)

#: Three cuts, so four links, each; together every kind at least twice.
SCHEDULES = (
    (after(1), Cut("crash", 6), Cut("evaluation", 9)),
    (after(2), ZERO, after(12)),
    (Cut("evaluation", 3), after(6), LAST),
    (after(3), EPOCH_END, Cut("crash", 11)),
    (ZERO, after(4), after(7)),
    (after(7), after(8), after(9)),
    (after(4), after(5), EPOCH_END),
    (after(6), after(10), LAST),
)
#: Every kind in one chain; it begins with a link that dies before its first checkpoint.
EVERY = (
    Cut("crash", 3),
    ZERO,
    *(after(step) for step in range(1, STEPS_PER_EPOCH + 1)),
    EPOCH_END,
    Cut("evaluation", 9),
    ZERO,
    LAST,
)
