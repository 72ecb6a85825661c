"""Random numbers that depend on the sample alone.

While a batch is read, the global generators are seeded from (seed, epoch, index) for each sample,
and put back afterwards: what a dataset draws is the same with any number of workers, in any rank,
and after any resume.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from hpcresume.training.determinism import mixed_seed

#: Keys beside the index of a sample, which is never negative.
COLLATE, ORDER = -1, -2


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """The global CPU generators leave this block as they entered it."""
    numpy = sys.modules.get("numpy")
    python, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        torch.default_generator.set_state(torch_state)
        if numpy_state is not None:
            sys.modules["numpy"].random.set_state(numpy_state)


def seed(*key: int) -> None:
    """Seed the global CPU generators with a pure function of the key."""
    value = mixed_seed(*key)
    random.seed(value)
    torch.default_generator.manual_seed(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(value % 2**32)


class Samples(list[Any]):
    """The samples of a batch, and the key of the noise that their collation may draw."""

    key: tuple[int, ...] = ()


class KeyedDataset(Dataset[Any]):
    """A map-style dataset whose places are (epoch, index), and whose noise is keyed by them."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> Samples:
        """The samples of one batch; a dataset that reads whole batches is let do so."""
        samples = Samples()
        samples.key = (self._seed, *places[0], COLLATE)
        whole = getattr(self._dataset, "__getitems__", None)
        with kept():
            if whole is not None:
                seed(self._seed, *places[0])
                samples += whole([index for _, index in places])
            else:
                for epoch, index in places:
                    seed(self._seed, epoch, index)
                    samples.append(self._dataset[index])
        return samples


class KeyedCollate:
    """A collate function whose noise (a random mask, say) is keyed by its batch."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self._collate = collate or default_collate

    def __call__(self, samples: Samples) -> Any:
        """The batch."""
        with kept():
            seed(*samples.key)
            # As the plain list that it would be without us: some functions ask for the type.
            return self._collate(list(samples))
