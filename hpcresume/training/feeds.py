"""Turns what people hand to `session.steps` into a Feed: our loaders, torch's, lists, iterables."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from hpcresume.errors import UsageError
from hpcresume.training.loader import Feed, ResumableLoader
from hpcresume.training.noise import ORDER, kept
from hpcresume.training.noise import seed as seed_generators
from hpcresume.training.stream import StreamLoader

#: What an iterator gives at its end.
_END = object()

log = logging.getLogger(__name__)

#: What of a DataLoader goes on to the one that we make in its place.
_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


def feed_of(source: Any, *, seed: int, rank: int, world_size: int) -> Feed:
    """What `session.steps` goes through for `source`. Raises UsageError."""
    if isinstance(source, (ResumableLoader, StreamLoader)):
        return source
    if type(source) is DataLoader:
        return _adopted(source, seed=seed, rank=rank, world_size=world_size)
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        return SequenceFeed(source)
    if not isinstance(source, Iterable) or isinstance(source, (str, bytes, Mapping)):
        raise UsageError(
            f"session.steps goes through a loader, a list of batches or another iterable; a "
            f"{type(source).__name__} is none."
        )
    if isinstance(source, Iterator) and not hasattr(source, "load_state_dict"):
        raise UsageError(
            f"session.steps cannot go through a {type(source).__name__} again: hand it a loader, "
            f"a list, or an object whose __iter__ begins anew."
        )
    return IterableFeed(source, seed=seed, rank=rank)


class SequenceFeed:
    """Batches in a list, the same in every epoch."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._all = batches

    def num_batches(self) -> int:
        """See Feed."""
        return len(self._all)

    def batches(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[Any, bool]]:
        """See Feed."""
        last = len(self._all) - 1
        for number in range(start, last + 1):
            yield self._all[number], number == last

    def state(self) -> None:
        """See Feed."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """See Feed."""
        return {"sequence": type(self._all).__name__, "length": len(self._all)}


class IterableFeed:
    """Batches of any iterable: by its own state where it has one, else read again to the place.

    One batch is read ahead, because nothing else tells that a batch is the last. The state is
    taken before that, and at an epoch's end after the iterator has ended: some would begin an
    empty epoch from the place behind the last batch. What the iterable draws from the global
    generators is keyed by (seed, epoch, rank, batch).
    """

    def __init__(self, source: Iterable[Any], *, seed: int, rank: int) -> None:
        self._source = source
        self._key = (seed, rank)
        self._stateful = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self._state: Any = None

    def num_batches(self) -> None:
        """See Feed: its length is known at its end."""
        return None

    def batches(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[Any, bool]]:
        """See Feed."""
        numbers = count(start if self._stateful else 0)
        with kept():
            seed_generators(*self._key, epoch, ORDER)
            if state is not None:
                self._source.load_state_dict(state)  # type: ignore[attr-defined]
            for place in (self._source, getattr(self._source, "sampler", None)):
                set_epoch = getattr(place, "set_epoch", None)
                if set_epoch is not None:
                    set_epoch(epoch)
            batches = iter(self._source)

        def read() -> Any:
            with kept():
                seed_generators(*self._key, epoch, next(numbers))
                return next(batches, _END)

        if start and not self._stateful:
            log.info("reading %d batches again to find the place in the data", start)
            for _ in range(start):
                read()
        batch = read()
        while batch is not _END:
            before = self._place()
            following = read()
            self._state = self._place() if following is _END else before
            yield batch, following is _END
            batch = following

    def _place(self) -> Any:
        if not self._stateful:
            return None
        with kept():
            return self._source.state_dict()  # type: ignore[attr-defined]

    def state(self) -> Any:
        """See Feed."""
        return self._state

    def fingerprint(self) -> dict[str, Any]:
        """See Feed."""
        return {"iterable": type(self._source).__name__}


def _adopted(loader: DataLoader[Any], *, seed: int, rank: int, world_size: int) -> Feed:
    """A loader of ours in the place of torch's, whose position could not be restored."""
    options = {name: getattr(loader, name) for name in _OPTIONS}
    if not loader.num_workers:
        for name in ("prefetch_factor", "multiprocessing_context", "persistent_workers"):
            del options[name]
    if isinstance(loader.dataset, IterableDataset):
        return StreamLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            drop_last=loader.drop_last,
            seed=seed,
            rank=rank,
            options=options,
        )
    if loader.batch_sampler is None:
        raise UsageError(
            "session.steps: this DataLoader makes no batches (batch_size=None): use session.loader."
        )
    order: dict[str, Any] = {"batch_size": None, "shuffle": False, "drop_last": False}
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        order["batch_sampler"] = batches
    else:
        sampler = batches.sampler
        order |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
        if isinstance(sampler, DistributedSampler):
            order["shuffle"] = sampler.shuffle
        elif isinstance(sampler, RandomSampler) and _is_a_permutation(sampler):
            order["shuffle"] = True
        elif not isinstance(sampler, SequentialSampler):
            order["sampler"] = sampler
    return ResumableLoader(
        loader.dataset, seed=seed, rank=rank, world_size=world_size, options=options, **order
    )


def _is_a_permutation(sampler: RandomSampler) -> bool:
    return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
