"""A user's own DataLoader, made to read the same after any resume.

Other loaders draw the order of an epoch, and what datasets and collate functions draw for a sample,
from global generators, whose state at a step depends on how far workers have read ahead. Here they
are keyed as in a loader of ours (`training.noise`): order by (seed, epoch), samples by (seed,
epoch, index), a batch's collation by its first sample, and the global generators are left as they
were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hpcresume.training.determinism import mixed_seed
from hpcresume.training.noise import COLLATE, ORDER, KeyedCollate, KeyedDataset, kept, seed


@dataclass
class Reading:
    """What is read of a loader, as whoever drives it says."""

    epoch: int = 0
    over: bool = False
    """No batch is to be read any more."""


def make_keyed(loader: Any, seed: int, reading: Reading, *, rank: int = 0) -> str | None:
    """Key what a DataLoader reads, in place, before it is iterated; or say why that cannot be.

    `rank` tells streams of several ranks apart. A loader of accelerate's is keyed inside.
    """
    base = getattr(loader, "base_dataloader", loader)
    if not isinstance(base, DataLoader):
        return f"a {type(loader).__name__} is no DataLoader of torch"
    for part in (base.dataset, base.batch_sampler):
        if isinstance(part, (KeyedStream, KeyedBatches)):
            # It was keyed for the training before: a user's `get_train_dataloader` may keep it.
            part.reading = reading
            return None
    if isinstance(base.dataset, IterableDataset):
        if base.batch_size is None:
            return "it reads a stream of whole batches (batch_size=None)"
        # Every rank of accelerate's shard reads all samples, and must find the same ones.
        shared = type(base.dataset).__name__ == "IterableDatasetShard"
        key = (seed, 0 if shared else rank)
        stream = KeyedStream(base.dataset, key, reading)
        _replace(base, "dataset", stream)
        base.collate_fn = _StreamCollate(base.collate_fn, stream)
        return None
    if base.batch_sampler is None:
        return "it reads single samples (batch_size=None)"
    _replace(base, "batch_sampler", KeyedBatches(base.batch_sampler, seed, reading))
    _replace(base, "dataset", _Keyed(base.dataset, seed))
    base.collate_fn = KeyedCollate(base.collate_fn)
    return None


def _replace(loader: DataLoader[Any], name: str, value: Any) -> None:
    """Past DataLoader's own guard, which is there because a running iteration would not notice."""
    object.__setattr__(loader, name, value)


class KeyedBatches:
    """The batches of a batch sampler, each index with its epoch, so that workers know it."""

    def __init__(self, inner: Any, seed: int, reading: Reading) -> None:
        self._inner = inner
        self._seed = seed
        self.reading = reading

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.reading.epoch
        if self.reading.over:
            return
        with kept():
            seed(self._seed, epoch, ORDER)
            _begin(self._inner, epoch, mixed_seed(self._seed, epoch, ORDER))
            batches = list(self._inner)
        for indices in batches:
            yield [(epoch, index) for index in indices]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)


def _begin(sampler: Any, epoch: int, seed: int) -> None:
    """Tell a sampler its epoch, and those that it wraps: not every wrapper passes that on.

    One that knows no epochs and has a generator of its own begins with that one seeded.
    """
    for name in ("batch_sampler", "sampler"):
        inner = getattr(sampler, name, None)
        if inner is not None and inner is not sampler:
            _begin(inner, epoch, seed)
    set_epoch = getattr(sampler, "set_epoch", None)
    generator = getattr(sampler, "generator", None)
    if callable(set_epoch):
        set_epoch(epoch)
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)


class _Keyed(KeyedDataset):
    """What else is asked of the dataset, it answers itself."""

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._dataset, name)


class KeyedStream(IterableDataset[Any]):
    """The samples of an IterableDataset; noise is keyed by (seed, epoch, worker, number).

    It is exact as far as the stream begins each epoch by itself: what was read already is read
    again, and passed over.
    """

    def __init__(self, inner: Any, key: Sequence[int], reading: Reading) -> None:
        self._inner = inner
        self._key = tuple(key)
        self.reading = reading
        self._begun = 0
        self.key: tuple[int, ...] = self._key
        """Of the sample that was read last."""

    def __len__(self) -> int:
        return len(self._inner)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        # A worker that outlives an epoch keeps the place that it was started with.
        epoch = self.reading.epoch + (self._begun if info is not None else 0)
        self._begun += 1
        if self.reading.over:
            return
        key = (*self._key, epoch, 0 if info is None else info.id)
        with kept():
            seed(*key, ORDER)
            samples = iter(self._inner)
        number = 0
        while True:
            self.key = (*key, number)
            with kept():
                seed(*self.key)
                try:
                    sample = next(samples)
                except StopIteration:
                    return
            number += 1
            yield sample

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)


class _StreamCollate:
    """A collate function whose noise is keyed by the last sample that the stream has read."""

    def __init__(self, collate: Callable[[list[Any]], Any], stream: KeyedStream) -> None:
        self._collate = collate
        self._stream = stream

    def __call__(self, samples: list[Any]) -> Any:
        with kept():
            seed(*self._stream.key, COLLATE)
            return self._collate(samples)
