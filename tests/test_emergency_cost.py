"""What it costs to remember a step boundary, and where that is not worth it."""

from __future__ import annotations

import time
from typing import Any

import torch
from bug_links import Net
from torch import nn

from hpcresume.training.emergency import Sentinel


def sentinel(*items: tuple[str, Any], num_ranks: int = 1) -> Sentinel[int]:
    return Sentinel(items, {}, num_ranks=num_ranks)


def test_no_boundary_is_remembered_behind_a_step_of_less_than_two_milliseconds() -> None:
    assert sentinel().from_s == 0.002


def test_a_boundary_that_costs_more_than_a_hundredth_of_the_step_is_not_remembered() -> None:
    guard = sentinel(("model", Net()))
    slow = torch.ones(1200, 1200)
    costs: list[float] = []

    def mark() -> int:
        nonlocal slow
        began = time.perf_counter()
        slow = slow @ slow / 1200
        costs.append(time.perf_counter() - began)
        return 1

    guard.remember(3, mark)
    # Whatever this machine needs for it, and for the rest that is looked at.
    assert guard.from_s > max(0.002, 100 * min(costs))
    assert guard.refusal(3) is None
    why = guard.refusal(4)
    assert why is not None and "the step before was too short to remember its state" in why


def test_with_several_ranks_there_is_none() -> None:
    guard = sentinel(num_ranks=2)
    assert guard.from_s == float("inf")
    why = guard.refusal(0)
    assert why == "the other ranks cannot be asked for their random state any more"


def test_what_cannot_be_watched_is_said_and_costs_nothing_any_more() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return 1

    guard = sentinel(("model", Extra(1, 1)))
    guard.remember(1, lambda: 0)
    assert guard.from_s == float("inf")
    why = guard.refusal(1)
    assert why == "'model' cannot be watched: its Extra has a get_extra_state() of its own"
