"""A loader for streams: IterableDatasets, which have an order but no index.

A worker sends its dataset's own state along with each batch, so that what is saved is the place of
the batch that training has consumed, however far the workers have read ahead. A dataset without a
state is read again up to its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from hpcresume.errors import UsageError
from hpcresume.training.determinism import mixed_seed
from hpcresume.training.noise import COLLATE, ORDER, kept, seed


class StreamLoader:
    """Batches of an IterableDataset; made by `session.loader`. Sharing out is the dataset's part.

    What the dataset draws from the global generators is keyed by (seed, epoch, worker, batch).
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        batch_size: int | None,
        drop_last: bool,
        seed: int,
        rank: int,
        options: dict[str, Any],
    ) -> None:
        if batch_size is None or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, and must be 1 or more.")
        self._dataset = dataset
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._seed = seed
        self._rank = rank
        self._options = {k: v for k, v in options.items() if k != "persistent_workers"}
        self._collate = self._options.pop("collate_fn", None) or default_collate
        self._turn = 0
        self._places: list[Any] = []

    def num_batches(self) -> None:
        """See Feed: a stream's length is known at its end."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """See Feed."""
        return {
            "stream": type(self._dataset).__name__,
            "batch_size": self._batch_size,
            "drop_last": self._drop_last,
            "seed": self._seed,
            "num_workers": self._options.get("num_workers", 0),
        }

    def batches(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[Any, bool]]:
        """See Feed."""
        num_workers = max(1, self._options.get("num_workers", 0))
        self._turn, self._places = 0, [None] * num_workers
        if state is not None:
            self._turn, self._places = state["turn"], list(state["workers"])
        reader = _Reader(self, epoch, self._turn, list(self._places))
        loader: DataLoader[Any] = DataLoader(
            reader,
            batch_size=None,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(mixed_seed(self._seed, epoch, 1)),
            **self._options,
        )
        items = (item for item in loader if item is not None)
        item = next(items, None)
        while item is not None:
            batch, worker, place = item
            # One batch ahead, because nothing else tells that this one is the last.
            item = next(items, None)
            self._places[worker] = place
            self._turn = (worker + 1) % num_workers
            if item is None:
                self._turn, self._places = 0, self._behind_the_end()
            yield batch, item is None

    def _behind_the_end(self) -> list[Any]:
        """Workers begin each epoch with a dataset as it was given; this process goes on with it."""
        if self._options.get("num_workers", 0) or not hasattr(self._dataset, "state_dict"):
            return []
        return [{"batches": 0, "state": self._dataset.state_dict(), "ended": False}]

    def state(self) -> Any:
        """See Feed: whose turn it is among the workers, and the place of each."""
        return {"turn": self._turn, "workers": self._places} if self._places else None


class _Reader(IterableDataset[Any]):
    """Reads one worker's part of a stream as (batch, worker, place behind it)."""

    def __init__(self, loader: StreamLoader, epoch: int, turn: int, places: list[Any]) -> None:
        self._dataset = loader._dataset
        self._batch_size = loader._batch_size
        self._drop_last = loader._drop_last
        self._collate: Callable[[list[Any]], Any] = loader._collate
        self._key = (loader._seed, epoch, loader._rank)
        self._epoch = epoch
        self._turn = turn
        self._places = places

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        place = self._places[worker]
        if worker < self._turn:
            # torch begins with worker 0; when the run was saved, this one had had its turn.
            yield None
        if place is not None and place["ended"]:
            return
        number = 0
        stateful = hasattr(self._dataset, "state_dict")
        again = 0 if place is None or stateful else place["batches"]
        with kept():
            seed(*self._key, worker, ORDER)
            set_epoch = getattr(self._dataset, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(self._epoch)
            if place is not None and stateful:
                self._dataset.load_state_dict(place["state"])  # type: ignore[attr-defined]
                number = place["batches"]
            samples = iter(self._dataset)
        while True:
            with kept():
                seed(*self._key, worker, number)
                taken = _take(samples, self._batch_size)
                state = self._dataset.state_dict() if stateful else None  # type: ignore[attr-defined]
                if not taken or (self._drop_last and len(taken) < self._batch_size):
                    return
                number += 1
                if number <= again:
                    continue
                seed(*self._key, worker, number, COLLATE)
                batch = self._collate(taken)
            # A dataset that has ended may be ready to begin anew: its state does not tell.
            ended = len(taken) < self._batch_size
            yield batch, worker, {"batches": number, "state": state, "ended": ended}


def _take(samples: Iterator[Any], count: int) -> list[Any]:
    return [sample for _, sample in zip(range(count), samples, strict=False)]


def _as_it_is(item: Any) -> Any:
    return item
