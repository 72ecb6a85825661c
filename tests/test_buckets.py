"""DDP's gradient buckets have their final layout before the first step; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcresume.training import buckets


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one rank: the layout is made anew there as well."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def step(model: nn.Module) -> None:
    model(torch.ones(3, 4)).sum().backward()


def is_laid_out_anew_in_the_second_step(model: DistributedDataParallel) -> bool:
    step(model)
    before = model._has_rebuilt_buckets
    step(model)
    return not before and model._has_rebuilt_buckets


def test_an_untouched_model_lays_its_buckets_out_anew_in_its_second_step() -> None:
    assert is_laid_out_anew_in_the_second_step(DistributedDataParallel(net()))


@pytest.mark.parametrize("wrapping", ["plain", "compiled", "in another"])
def test_a_settled_model_has_done_so_before_its_first_step(wrapping: str) -> None:
    wrap: dict[str, Callable[[nn.Module], nn.Module]] = {
        "plain": lambda model: model,
        "compiled": lambda model: torch.compile(model, backend="eager"),
        "in another": nn.Sequential,
    }
    model = DistributedDataParallel(net())
    assert buckets.settle([{"lr": 1}, wrap[wrapping](model)]) == []
    assert not is_laid_out_anew_in_the_second_step(model)
    assert model._has_rebuilt_buckets


def test_settling_changes_no_parameter_buffer_gradient_or_random_state() -> None:
    model = DistributedDataParallel(net())
    module = model.module
    with torch.no_grad():
        model.module[0].weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    buckets.settle([model])
    assert model.module is module
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k].nan_to_num(), before[k].nan_to_num()) for k in before)


def test_frozen_parameters_take_no_part() -> None:
    model = net()
    model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    assert buckets.settle([wrapped]) == []
    step(wrapped)
    assert model[0].weight.grad is None


def test_gradients_that_are_there_already_are_left_alone() -> None:
    model = DistributedDataParallel(net())
    step(model)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    buckets.settle([model])
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_what_would_notice_a_pass_of_its_own_is_named_instead() -> None:
    hooked, after, static = net(), net(), net()
    hooked[0].weight.register_hook(lambda gradient: pytest.fail("a hook was called"))
    after[0].weight.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook was called"))
    communicating = DistributedDataParallel(net())
    communicating.register_comm_hook(None, lambda state, bucket: pytest.fail("a hook was called"))
    said = buckets.settle(
        [
            DistributedDataParallel(hooked),
            DistributedDataParallel(after),
            DistributedDataParallel(static, static_graph=True),
            communicating,
        ]
    )
    names = ["hooks on gradients", "hooks on gradients", "static_graph", "a communication hook"]
    assert [sentence.partition(":")[0] for sentence in said] == [f"DDP with {n}" for n in names]


def test_a_model_that_keeps_its_layout_is_left_alone() -> None:
    model = DistributedDataParallel(net(), find_unused_parameters=True)
    model.module[0].weight.register_hook(lambda gradient: None)
    assert buckets.settle([model]) == []
