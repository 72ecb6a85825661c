"""The one metric that a training watches, and the best that it has been."""

from __future__ import annotations

import math
from typing import Any


class Best:
    """The best value of a metric so far, and what was reported in the step in progress."""

    def __init__(self) -> None:
        self.so_far: dict[str, Any] | None = None
        """Name, value, mode and step of the best."""
        self.now: dict[str, Any] | None = None
        """Name, value and mode of what was reported in this step."""
        self.is_new = False
        """Whether the best is of this step."""

    def report(self, name: str, value: float, mode: str, step: int) -> bool:
        """Take a value of this step in; whether it is the best so far. What is no number is not."""
        self.now = {"name": name, "value": value, "mode": mode}
        if not math.isfinite(value):
            return False
        before = self.value_of(name)
        if before is not None and not (value < before if mode == "min" else value > before):
            return False
        self.so_far = {**self.now, "step": step}
        self.is_new = True
        return True

    def value_of(self, name: str) -> float | None:
        """The best value so far of the metric `name`; None where another one was watched."""
        best = self.so_far
        return best["value"] if best is not None and best["name"] == name else None

    def end_step(self) -> None:
        """A step is over: what comes is another one's."""
        self.now = None
        self.is_new = False
