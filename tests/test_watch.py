"""What a change of registered state is noticed by, and what of it can be given back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcresume.training.random_state import RandomState
from hpcresume.training.trace import Unwatchable, trace
from hpcresume.training.watch import Watch


class Average:
    """An average of weights as many people write it."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0
        self.past: deque[float] = deque([0.5])

    def state_dict(self) -> dict[str, Any]:
        raise AssertionError("it may cost much, or draw random numbers")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


class Extra(nn.Linear):
    """A module that saves what is no tensor."""

    def get_extra_state(self) -> Any:
        return {"calls": 1}


class Made:
    """Registered objects, and a watch that has looked at them."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.large = nn.BatchNorm1d(200_000)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=9)
        self.average = Average(self.model)
        self.scaler = torch.amp.GradScaler("cpu")
        self.counters: dict[str, Any] = {"seen": 0, "best": [1.0, 2.0]}
        self.loss().backward()
        self.optimizer.step()
        names = ("model", "optimizer", "schedule", "average", "scaler", "counters")
        self.watch = Watch([(name, getattr(self, name)) for name in names])
        assert not self.watch.blind
        self.watch.look()

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.scaler.scale(self.model(torch.randn(16, 4)).square().mean())
        return loss


@pytest.fixture
def made() -> Made:
    return Made()


def in_place(made: Made) -> None:
    with torch.no_grad():
        made.model[0].weight[3, 1] += 1


def past_the_counter(made: Made) -> None:
    made.model[0].weight.data.mul_(0.5)


def other_memory(made: Made) -> None:
    made.model[2].bias.data = torch.zeros(1)


def other_parameter(made: Made) -> None:
    made.model[2].bias = nn.Parameter(torch.zeros(1))


def another_parameter(made: Made) -> None:
    made.model[0].register_parameter("gain", nn.Parameter(torch.ones(1)))


def rate_as_a_tensor(made: Made) -> None:
    rate = torch.tensor(0.01)
    made.optimizer.param_groups[0]["lr"] = rate
    made.watch.look()
    rate.fill_(0.5)


CHANGES: list[tuple[Callable[[Made], Any], str]] = [
    (in_place, "the state of 'model' had changed (0.weight)"),
    (past_the_counter, "tensors had changed past autograd's counters"),
    (other_memory, "the state of 'model' had changed (2.bias)"),
    (other_parameter, "the state of 'model' had changed (2.bias)"),
    (another_parameter, "'model' has other parameters or buffers (0.gain)"),
    (rate_as_a_tensor, "the settings of 'optimizer' had changed"),
    (lambda made: made.optimizer.step(), "the step of 'optimizer' had begun"),
    (lambda made: made.schedule.step(), "the state of 'schedule' had changed"),
    (lambda made: made.scaler.update(2.0), "the state of 'scaler' had changed"),
    (lambda made: made.counters.update(seen=1), "the state of 'counters' had changed"),
    (lambda made: made.counters["best"].append(3), "the state of 'counters' had changed"),
    (lambda made: setattr(made.average, "updates", 1), "the state of 'average' had changed"),
    (lambda made: made.average.past.append(1.0), "the state of 'average' had changed"),
    (
        lambda made: made.average.shadow["0.weight"].lerp_(torch.ones(8, 4), 0.1),
        "the state of 'average' had changed",
    ),
    (
        lambda made: made.average.shadow.update(
            {name: tensor.clone() for name, tensor in made.average.shadow.items()}
        ),
        "the state of 'average' had changed",
    ),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[str(i) for i in range(len(CHANGES))])
def test_a_change_is_noticed_and_named(
    made: Made, change: Callable[[Made], Any], words: str
) -> None:
    change(made)
    assert made.watch.changed() == words


def test_a_pass_that_only_computes_changes_nothing(made: Made) -> None:
    made.loss().backward()
    made.optimizer.zero_grad()
    made.model.eval()
    made.loss()
    assert made.watch.changed() is None


def test_small_buffers_and_the_settings_of_an_optimizer_are_given_back(made: Made) -> None:
    before = [buffer.clone() for buffer in made.model.buffers()]
    made.loss()
    made.optimizer.param_groups[0]["lr"] = 3.0
    made.watch.give_back()
    assert all(map(torch.equal, before, made.model.buffers()))
    assert made.optimizer.param_groups[0]["lr"] == 0.01


def test_counters_are_given_back_in_place() -> None:
    counters, best = {"seen": 3, "name": None}, [1.0, 2.0]
    watch = Watch([("counters", counters), ("best", best)])
    watch.look()
    counters["seen"] += 1
    counters["more"] = 5
    best.append(3.0)
    assert watch.changed() is None
    watch.give_back()
    assert counters == {"seen": 3, "name": None}
    assert best == [1.0, 2.0]


def test_a_change_of_a_large_buffer_is_noticed_although_torch_does_not_count_it(made: Made) -> None:
    made.large.num_batches_tracked = None
    watch = Watch([("large", made.large)])
    watch.look()
    made.large(torch.randn(2, 200_000))
    assert watch.changed() == "tensors had changed past autograd's counters"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Extra(1, 1), "'x' cannot be watched: its Extra has a get_extra_state() of its own"),
        ({"dice": random.Random(1)}, "'x' cannot be watched: it holds a Random, in which a change"),
        (
            {"inner": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            "'x' cannot be watched: it holds an optimizer that is not registered",
        ),
    ],
    ids=["extra state", "generator", "optimizer"],
)
def test_what_cannot_be_watched_is_said(value: Any, why: str) -> None:
    watch = Watch([("x", value)])
    watch.look()
    assert watch.blind["x"].startswith(why)
    assert watch.changed() is None


def test_state_behind_a_class_of_another_language_is_not_overlooked() -> None:
    class Dice(random.Random):
        pass

    with pytest.raises(Unwatchable, match="Dice"):
        trace({"dice": Dice(1)})


def test_state_in_slots_is_not_overlooked() -> None:
    class Slotted:
        __slots__ = ("seen",)

    with pytest.raises(Unwatchable, match="Slotted"):
        trace(Slotted())


def test_an_array_is_compared_by_its_content() -> None:
    value = OrderedDict(counts=np.zeros(3))
    before = trace(value)
    assert trace(value) == before
    value["counts"][1] = 1
    assert trace(value) != before


def test_an_object_that_refers_to_itself_has_a_trace() -> None:
    average = Average(nn.Linear(1, 1))
    average.shadow["self"] = average  # type: ignore[assignment]
    assert trace(average) == trace(average)


def test_random_generators_go_on_from_where_they_were() -> None:
    own: dict[str, Any] = {
        "torch": torch.Generator(),
        "numpy": np.random.default_rng(3),
        "legacy": np.random.RandomState(4),
        "python": random.Random(5),
    }

    def draw() -> list[Any]:
        return [
            random.random(),
            np.random.normal(),
            torch.rand(3).tolist(),
            torch.rand(3, generator=own["torch"]).tolist(),
            own["numpy"].normal(),
            own["legacy"].normal(),
            own["python"].random(),
        ]

    np.random.normal()  # The second of a pair is kept: it belongs to the state.
    state = RandomState(own)
    first = draw()
    state.put_back()
    assert draw() == first
