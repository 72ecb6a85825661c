"""What a resumed training may change about data, optimizer and schedule, and what holds then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcresume.training import hyperparameters, machine
from hpcresume.training.changes import Verdict, reconcile

SAVED = {
    "length": 48,
    "content": None,
    "batch_size": 4,
    "shuffle": True,
    "seed": 5,
    "accumulate": 1,
    "world_size": 2,
}


def judge(
    accept: tuple[str, ...] = (), position: int = 3, without: str = "", **now: Any
) -> Verdict:
    saved = {key: value for key, value in SAVED.items() if key != without}
    return reconcile(saved, {**saved, **now}, epoch=1, position=position, accept=accept)


def test_same_data_are_gone_on_with_where_they_were() -> None:
    assert judge() == Verdict(1, 3)


@pytest.mark.parametrize(
    ("now", "position"),
    [
        ({"world_size": 1, "batch_size": 8}, 3),
        ({"world_size": 4, "batch_size": 2}, 3),
        ({"world_size": 1, "accumulate": 2}, 6),
        ({"world_size": 8, "batch_size": 1}, 3),
    ],
    ids=str,
)
def test_same_global_batch_on_other_ranks_goes_on_at_the_same_sample(
    now: dict[str, int], position: int
) -> None:
    verdict = judge(**now)
    assert (verdict.epoch, verdict.position, verdict.refused) == (1, position, None)
    assert "not one is lost or repeated" in verdict.said[0]


@settings(database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(*[st.integers(1, 6) for _ in range(5)])
def test_elastic_place_is_the_same_sample_in_every_shape(
    ranks: int, share: int, before: int, after: int, steps: int
) -> None:
    whole = ranks * share * before * after
    saved = {"length": 9999, "batch_size": whole // before, "accumulate": before, "world_size": 1}
    micro = whole // (after * ranks)
    now = {**saved, "batch_size": micro, "accumulate": after, "world_size": ranks}
    verdict = reconcile(saved, now, epoch=0, position=steps * before, accept=())
    assert verdict.position * micro * ranks == steps * whole
    assert verdict.position % after == 0


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"length": 50}, "length 48 -> 50"),
        ({"content": "b1"}, "content None -> b1"),
        ({"shuffle": False}, "shuffle True -> False"),
        ({"seed": 6}, "seed 5 -> 6"),
        ({"batch_size": 5}, "8 samples, and would have 10"),
        ({"world_size": 3}, "8 samples, and would have 12"),
        ({"accumulate": 3}, "8 samples, and would have 24"),
    ],
    ids=str,
)
def test_other_data_or_another_global_batch_are_refused(now: dict[str, Any], words: str) -> None:
    verdict = judge(**now)
    assert verdict.refused is not None and words in verdict.refused


def test_accepted_data_begin_with_the_next_epoch() -> None:
    verdict = judge(accept=("dataset",), length=50)
    assert (verdict.epoch, verdict.position, verdict.refused) == (2, 0, None)


def test_accepted_data_at_an_epoch_s_start_lose_no_epoch() -> None:
    assert judge(accept=("dataset",), length=50, position=0).epoch == 1


def test_accepted_batch_goes_on_at_the_last_whole_step_before_the_place() -> None:
    verdict = judge(accept=("batch",), batch_size=5, accumulate=2)
    assert (verdict.position, verdict.refused) == (2, None)


def test_accepting_one_thing_accepts_nothing_else() -> None:
    assert judge(accept=("batch",), length=50).refused is not None
    assert judge(accept=("dataset",), batch_size=8).refused is not None


def test_stream_on_other_ranks_is_refused_even_where_it_is_accepted() -> None:
    verdict = judge(accept=("batch", "dataset"), without="length", world_size=1, batch_size=8)
    assert verdict.refused is not None and "stream" in verdict.refused


# Optimizers and schedules


def built(lr: float = 0.1, **options: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=lr, **options)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)


def test_settings_of_the_same_code_are_the_same_after_training() -> None:
    (optimizer, scheduler), fresh = built(), built()
    was = [hyperparameters.given(value) for value in built()]
    for _ in range(25):
        optimizer.step()
        scheduler.step()
    for before, value in zip(was, fresh, strict=True):
        now = hyperparameters.given(value)
        assert before is not None and now is not None
        assert hyperparameters.changes(before, now) == []


def test_changed_setting_is_named_with_both_values() -> None:
    was, now = (hyperparameters.given(built(lr)[0]) for lr in (0.1, 0.02))
    assert was is not None and now is not None
    found = [str(change) for change in hyperparameters.changes(was, now)]
    assert "lr 0.1 -> 0.02" in found


def take_over(optimizer: Any, scheduler: Any, lr: float) -> None:
    """As a session does with keep=("lr",)."""
    for value, fresh in zip((optimizer, scheduler), built(lr), strict=True):
        was, now = (hyperparameters.given(v) for v in (built()[value is scheduler], fresh))
        assert was is not None and now is not None
        for change in hyperparameters.changes(was, now):
            if hyperparameters.wanted(change, ("lr",)):
                hyperparameters.apply(value, change)


def test_kept_learning_rate_goes_on_in_the_schedule_as_if_it_had_always_been() -> None:
    (optimizer, scheduler), (other, reference) = built(0.1), built(0.02)
    for _ in range(15):
        for one, schedule in ((optimizer, scheduler), (other, reference)):
            one.step()
            schedule.step()
    take_over(optimizer, scheduler, 0.02)
    for _ in range(20):
        rates = [o.param_groups[0]["lr"] for o in (optimizer, other)]
        assert rates[0] == pytest.approx(rates[1])
        for one, schedule in ((optimizer, scheduler), (other, reference)):
            one.step()
            schedule.step()


def test_settings_that_were_not_taken_over_are_remembered_as_they_were() -> None:
    was, now = (hyperparameters.given(built(weight_decay=w)[0]) for w in (0.1, 0.2))
    assert was is not None and now is not None
    found = hyperparameters.changes(was, now)
    assert hyperparameters.changes(was, hyperparameters.without(now, found)) == []


def test_horizon_of_a_schedule_is_named() -> None:
    optimizer, _ = built()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=70)
    assert hyperparameters.horizon(cosine) == "T_max=70"
    assert hyperparameters.horizon(built()[1]) is None


# Machines


def test_another_processor_is_called_another_silicon_and_another_torch_another_library() -> None:
    now = machine.describe()
    assert machine.differences(now, now) == []
    silicon, libraries = machine.differences({**now, "cpu": "Other", "torch": "1.0"}, now)
    assert silicon.startswith("not the same silicon: processor Other -> ")
    assert libraries == f"not the same libraries: torch 1.0 -> {now['torch']}"


def test_threads_of_the_first_link_are_used_again() -> None:
    before = torch.get_num_threads()
    try:
        machine.pin_threads({"threads": before + 1})
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
