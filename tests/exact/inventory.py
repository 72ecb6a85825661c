"""A training that holds what the cells' training does not, so that each component can be missed.

Buffers that no state dict holds, tied weights, extra state, JSON values that training changes, a
metric whose best is early, objects that draw random numbers when they are saved, and data whose
place is more than a number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import EVALUATE_EVERY, STEPS_PER_EPOCH
from program import Interrupt, draw, make_generators
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    get_worker_info,
)

import hpcresume

BATCH = 4
NUM_POINTS = BATCH * STEPS_PER_EPOCH
#: Enough numbers that their sum is split by the number of threads.
MANY = 200_000


class Net(nn.Module):
    """Every kind of state that a module may have, beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.up.weight
        self.register_buffer("drift", torch.zeros(8), persistent=False)
        self.register_buffer("seen", torch.zeros(0), persistent=False)
        self.calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x) + self.drift
        with torch.no_grad():
            self.drift += 0.1 * hidden.mean(0)
            self.seen = torch.cat([self.seen, x.mean()[None]])
        self.calls += 1
        return (1 + 0.01 * self.calls + self.seen.sum()) * (hidden @ self.tied.weight)


class Centre(nn.Module):
    """Takes away the mean of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.running_mean.lerp_(x.mean(0), 0.1)
        return x - self.running_mean


class Restless:
    """Draws random numbers whenever it is asked for its state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        random.random(), np.random.rand(), torch.rand(())
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        random.random(), np.random.rand(), torch.rand(())
        self.count = state["count"]


class Words:
    """As much of a tokenizer as is saved."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "words.json").write_text(json.dumps(["a", "b"]))


class Shifting:
    """A sampler with a state of its own, which changes from epoch to epoch."""

    def __init__(self) -> None:
        self.shift = 0

    def __len__(self) -> int:
        return NUM_POINTS

    def __iter__(self) -> Iterator[int]:
        self.shift += 5
        return iter([(index + self.shift) % NUM_POINTS for index in range(NUM_POINTS)])

    def state_dict(self) -> dict[str, int]:
        return {"shift": self.shift}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.shift = state["shift"]


class RestlessSampler(Shifting):
    """Draws random numbers when it is brought to its place."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        random.random(), np.random.rand(), torch.rand(())
        super().load_state_dict(state)


class Stream(IterableDataset[Any]):
    """Points with noise that know their place; each worker has a part."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points = points
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        own = self.points[first::step]
        while self.place < len(own):
            self.place += 1
            yield (own[self.place - 1] + 0.1 * torch.randn(4),)
        self.place = 0


class Again:
    """Batches with noise from the global generators, to be read from the beginning only."""

    def __init__(self, points: torch.Tensor) -> None:
        self.points = points

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        for batch in self.points.split(BATCH):
            yield (batch + 0.1 * torch.randn(4),)


class Placed(Again):
    """The same, and they know their place."""

    def __init__(self, points: torch.Tensor) -> None:
        super().__init__(points)
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        batches = self.points.split(BATCH)
        while self.place < len(batches):
            self.place += 1
            yield (batches[self.place - 1] + 0.1 * torch.randn(4),)
        self.place = 0


class Noisy(TensorDataset):
    """Points with noise from the global generators."""

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, ...]:
        (point,) = super().__getitem__(index)
        return (point + 0.1 * torch.randn(4) + random.gauss(0, 0.1),)


class OwnLoader(DataLoader[Any]):
    """A class that may do anything: it can only be read again."""


def without_place(states: list[Any], key: str) -> list[Any]:
    """What a stream of workers saved, without one part of it; None at the start of an epoch."""
    (state,) = states
    if state is None:
        return states
    if key == "turn":
        return [{**state, "turn": 0}]
    if key == "batches":
        return [{**state, "workers": [{**w, "batches": 0} for w in state["workers"]]}]
    return [{**state, "workers": [{**w, "state": {"place": 0}} for w in state["workers"]]}]


def _loader(session: hpcresume.Session, data: str) -> Any:
    points = torch.randn(NUM_POINTS, 4, generator=torch.Generator().manual_seed(7))
    if data.startswith("stream"):
        workers = int(data.rpartition("-")[2])
        context = "fork" if workers else None
        return session.loader(
            Stream(points),
            batch_size=BATCH,
            num_workers=workers,
            multiprocessing_context=context,
        )
    if data.endswith("iterable"):
        return Placed(points) if data.startswith("placed") else Again(points)
    if data.startswith("loader"):
        workers = 2 if data.endswith("workers") else 0
        context = "fork" if workers else None
        return OwnLoader(
            Noisy(points), BATCH, shuffle=True, num_workers=workers, multiprocessing_context=context
        )
    dataset: Dataset[Any] = TensorDataset(points)
    samplers: dict[str, Callable[[], Any]] = {
        "sampler": Shifting,
        "restless sampler": RestlessSampler,
        "drawn": lambda: RandomSampler(range(NUM_POINTS), replacement=True),
    }
    return session.loader(dataset, batch_size=BATCH, sampler=samplers[data]())


def train(
    session: hpcresume.Session,
    interrupt: Interrupt = lambda place, step: None,
    *,
    data: str = "sampler",
    edited: bool = False,
) -> None:
    """Train on data of a kind; `edited`: by code that gives another rate to a resumed link."""
    net = Net()
    rate = 0.01 if edited and session.global_step else 0.02
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    generators = {**make_generators(), "numpy_state": np.random.RandomState(4)}
    curriculum, marks, restless = {"level": 0}, [0.0], Restless()
    centre = Centre()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    # With buffers that are averaged, and not those of the model after each update.
    ema = torch.optim.swa_utils.AveragedModel(centre, multi_avg_fn=average, use_buffers=True)
    session.register(model=net, optimizer=optimizer, centre=centre, ema=ema, keep=("lr",))
    session.register(curriculum=curriculum, marks=marks, restless=restless, words=Words())
    session.register(**generators)
    loader = _loader(session, data)
    # As a look at the untrained model would.
    random.random(), np.random.rand(), torch.rand(())

    many = torch.rand(8, MANY, generator=torch.Generator().manual_seed(8))
    for (inputs,) in session.steps(loader):
        step = session.global_step + 1
        draws = {**draw(generators), "numpy_state": float(generators["numpy_state"].normal())}
        if session.device.type == "cuda":
            draws["cuda"] = float(torch.randn((), device=session.device))
        factor = 1 + 0.01 * (sum(draws.values()) + curriculum["level"] + marks[-1])
        loss = nn.functional.mse_loss(net(centre(inputs) * factor), inputs.sin())
        loss.backward()
        interrupt("step", step)
        sums = {f"sum_{number}": float(row.sum()) for number, row in enumerate(many)}
        session.log(loss=loss, **draws, **sums)
        optimizer.step()
        optimizer.zero_grad()
        curriculum["level"] += 1
        marks[:] = [*marks, draws["python"]][-3:]
        restless.count += 1
        ema.update_parameters(centre)
        if step % EVALUATE_EVERY == 0:
            interrupt("evaluation", step)
            session.best(first=float(step))
    interrupt("end", session.global_step)
