"""The last step boundary, remembered so that it can still be committed when the step after it
fails in the training code. Used by the session.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from hpcresume.training.random_state import RandomState
from hpcresume.training.watch import Watch

_Mark = TypeVar("_Mark")
#: The part of a step's time that remembering the boundary behind it may take...
_SHARE = 0.01
#: ...and the duration from which a step may be worth it at all, in seconds.
_SHORTEST_S = 0.002
#: The first boundary is looked at as often, so that one pause does not count as the cost of it.
_TRIALS = 3


class Sentinel(Generic[_Mark]):
    """Whether a step boundary can be gone back to, and how.

    After a step of `from_s` seconds or more, `remember` takes at most a hundredth of its time.
    """

    def __init__(
        self, items: Sequence[tuple[str, Any]], generators: Mapping[str, Any], *, num_ranks: int
    ) -> None:
        self._items = items
        self._generators = generators
        self._watch: Watch | None = None
        self._never = ""
        self.from_s = _SHORTEST_S
        self._cost_s = math.inf
        self._step = -1
        if num_ranks > 1:
            self._give_up("the other ranks cannot be asked for their random state any more")

    def remember(self, step: int, mark: Callable[[], _Mark]) -> None:
        """Take the boundary behind a step; `mark()` is what the session knows about it."""
        trials = 1
        if self._watch is None:
            self._watch, trials = Watch(self._items), _TRIALS
        for _ in range(trials):
            began = time.perf_counter()
            self._watch.look()
            self._random = RandomState(self._generators)
            self._mark = mark()
            self._cost_s = min(self._cost_s, time.perf_counter() - began)
        self._step = step
        self.from_s = max(_SHORTEST_S, self._cost_s / _SHARE)
        if self._watch.blind:
            self._give_up(next(iter(self._watch.blind.values())))

    def _give_up(self, why: str) -> None:
        self._never = why
        self.from_s = math.inf

    def refusal(self, step: int) -> str | None:
        """Why the boundary behind `step` cannot be gone back to; None where it can."""
        if self._never:
            return self._never
        if self._step != step or self._watch is None:
            return (
                f"the step before was too short to remember its state (that takes a hundredth of "
                f"a step from {self.from_s * 1e3:.0f} ms on)"
            )
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                return f"the GPU gives its memory no more ({str(error).splitlines()[0]})"
        return self._watch.changed()

    def go_back(self) -> _Mark:
        """Put back what can be; returns the mark. There must be no refusal."""
        assert self._watch is not None
        self._watch.give_back()
        self._random.put_back()
        return self._mark
