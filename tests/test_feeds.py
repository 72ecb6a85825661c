"""Whatever `session.steps` goes through, it goes on after any batch as if it had not stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from hpcresume.errors import UsageError
from hpcresume.training.feeds import feed_of
from hpcresume.training.loader import Feed, ResumableLoader
from hpcresume.training.stream import StreamLoader

EPOCHS = 3


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, random.random()


class Stream(IterableDataset[Any]):
    """Numbers with noise; each worker has a part. It can be read again from the start only."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def begin(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for number in range(first + step * self.begin(), 11, step):
            yield 100 * self.epoch + number, torch.rand(()).item()


class PlacedStream(Stream):
    """A stream that knows its place."""

    def __init__(self) -> None:
        super().__init__()
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def begin(self) -> int:
        return self.place

    def __iter__(self) -> Iterator[Any]:
        for sample in super().__iter__():
            self.place += 1
            yield sample
        self.place = 0


class Placed:
    """An iterable of batches with a state, whose order comes from a generator of its own."""

    def __init__(self) -> None:
        self.rest: list[int] = []
        self.dice = random.Random(3)

    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = self.dice.getstate()
        return {"rest": list(self.rest), "dice": [version, list(internal), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rest = list(state["rest"])
        version, internal, gauss = state["dice"]
        self.dice.setstate((version, tuple(internal), gauss))

    def __iter__(self) -> Iterator[int]:
        if not self.rest:
            self.rest = self.dice.sample(range(100), 5)
        while self.rest:
            yield self.rest.pop(0)


class Again:
    """An iterable without a state."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(10 * self.epoch, 10 * self.epoch + 5))


class Shrinking:
    """A sampler with a state of its own, which changes from epoch to epoch."""

    def __init__(self) -> None:
        self.shift = 0

    def __len__(self) -> int:
        return 11

    def __iter__(self) -> Iterator[int]:
        self.shift += 1
        return iter([(index + self.shift) % 11 for index in range(11)])

    def state_dict(self) -> dict[str, int]:
        return {"shift": self.shift}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.shift = state["shift"]


def loader(**fields: Any) -> Feed:
    fixed: dict[str, Any] = {
        "batch_size": 2,
        "shuffle": False,
        "drop_last": False,
        "seed": 5,
        "rank": 0,
        "world_size": 1,
        "options": {},
    }
    return ResumableLoader(Noisy(), **{**fixed, **fields})


def stream(dataset: IterableDataset[Any], num_workers: int = 0, drop_last: bool = False) -> Feed:
    options: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        options["multiprocessing_context"] = "fork"
    return StreamLoader(dataset, batch_size=2, drop_last=drop_last, seed=5, rank=0, options=options)


def weighted() -> WeightedRandomSampler:
    return WeightedRandomSampler([1.0] * 11, 11, generator=torch.Generator().manual_seed(2))


FEEDS: dict[str, Callable[[], Any]] = {
    "list": lambda: [1, 2, 3, 4],
    "iterable": Again,
    "stateful iterable": Placed,
    "loader": lambda: loader(shuffle=True),
    "loader with workers": lambda: loader(
        options={"num_workers": 2, "multiprocessing_context": "fork"}
    ),
    "sampler": lambda: loader(sampler=RandomSampler(range(11), replacement=True)),
    "sampler with a generator": lambda: loader(sampler=weighted()),
    "sampler with a state": lambda: loader(sampler=Shrinking()),
    "batch sampler": lambda: loader(batch_size=None, batch_sampler=[[1, 2], [3], [4, 5, 6]]),
    "stream": lambda: stream(Stream()),
    "stream with workers": lambda: stream(Stream(), 3),
    "placed stream": lambda: stream(PlacedStream()),
    "placed stream with workers": lambda: stream(PlacedStream(), 3),
    "placed stream without its ragged end": lambda: stream(PlacedStream(), 2, drop_last=True),
    "DataLoader": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "DataLoader of a stream": lambda: DataLoader(PlacedStream(), batch_size=3),
}


def feed(name: str) -> Feed:
    return feed_of(FEEDS[name](), seed=5, rank=0, world_size=1)


def walk(name: str, epoch: int, start: int, state: Any) -> Iterator[tuple[int, int, str, Any]]:
    """What is left of all epochs: place behind each batch, the batch, and the state to save."""
    going = feed(name)
    while epoch < EPOCHS:
        number = start
        for batch, last in going.batches(epoch, start, state):
            number += 1
            place = (epoch + 1, 0) if last else (epoch, number)
            yield *place, repr(batch), json.loads(json.dumps(going.state()))
        epoch, start, state = epoch + 1, 0, None


@pytest.mark.parametrize("name", FEEDS)
def test_it_goes_on_after_any_batch_in_a_new_process_s_feed(name: str) -> None:
    uncut = list(walk(name, 0, 0, None))
    assert len({batch for _, _, batch, _ in uncut}) > 2
    for number, (epoch, start, _, state) in enumerate(uncut, 1):
        resumed = list(walk(name, epoch, start, state))
        assert [batch for *_, batch, _ in resumed] == [batch for *_, batch, _ in uncut[number:]]


@pytest.mark.parametrize("name", FEEDS)
def test_it_draws_nothing_from_the_global_generators(name: str) -> None:
    before = random.getstate(), torch.get_rng_state().tolist()
    list(walk(name, 0, 0, None))
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_dataloader_of_torch_keeps_its_data_and_sizes() -> None:
    plain = DataLoader(TensorDataset(torch.arange(11)), batch_size=3, drop_last=True)
    batches = feed_of(plain, seed=5, rank=0, world_size=1).batches(0, 0, None)
    assert [batch[0].tolist() for batch, _ in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    "source", [12, "text", {"a": 1}, iter([1])], ids=["number", "text", "dict", "iterator"]
)
def test_what_cannot_be_gone_through_again_is_refused(source: Any) -> None:
    with pytest.raises(UsageError, match=r"session\.steps"):
        feed_of(source, seed=5, rank=0, world_size=1)
