"""A data loader whose position is a number.

The order of an epoch is a pure function of (seed, epoch), so that resuming means to begin at
batch b of epoch e: O(1), no replay, and no random state of the loader to save. Batches are read
by torch's own DataLoader.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from hpcresume.errors import UsageError
from hpcresume.training.determinism import mixed_seed
from hpcresume.training.noise import ORDER, KeyedCollate, KeyedDataset, kept, seed


class Feed(Protocol):
    """What `session.steps` goes through: the whole of it."""

    def num_batches(self) -> int | None:
        """Micro-batches of an epoch on this rank; None where nobody knows."""

    def batches(self, epoch: int, start: int, state: Any) -> Iterator[tuple[Any, bool]]:
        """The micro-batches of an epoch from number `start` on, each with "it is the last".

        `state` is what `state()` returned where the run was saved, or None. Draws nothing from a
        global random generator.
        """

    def state(self) -> Any:
        """Beyond its number, the place of the batch that was yielded last: JSON, or None."""

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed feed must have in common with the saved one."""


class ResumableLoader:
    """Batches of a map-style dataset, shared out over ranks; made by `session.loader`.

    Each rank takes `batch_size` samples of a global batch of `batch_size * world_size`. The
    epoch's ragged last batch is shared out evenly; a remainder that does not divide is filled up
    from the epoch's first samples, as torch's DistributedSampler does, or dropped by `drop_last`.

    A `sampler` gives the order of the whole epoch instead, a `batch_sampler` whole batches, of
    which the ranks take one each in turn. They are gone through at once, at the epoch's start.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int | None,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int,
        world_size: int,
        options: dict[str, Any],
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UsageError(
                f"session.loader needs a dataset with a length and an index, or an IterableDataset:"
                f" a {type(dataset).__name__} is neither."
            )
        _check_order(batch_size, shuffle, drop_last, sampler, batch_sampler)
        if "generator" in options:
            raise UsageError(
                "session.loader: the order comes from the run's seed: leave generator out, or give "
                "a sampler."
            )
        self.dataset = dataset
        self.batch_size = batch_size or 1
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.options = options
        self._sampler = sampler
        self._batch_sampler = batch_sampler
        self._source = batch_sampler if batch_sampler is not None else sampler
        self._keeper = _keeper(self._source)
        self._began: Any = None
        self._loader: DataLoader[Any] | None = None
        self._batches = _Batches(self)
        self.length = len(dataset) if sampler is None else _len(sampler)
        if not len(self):
            raise UsageError(
                f"The dataset's {self.length} samples give no batch of {self.batch_size} for each "
                f"of {world_size} ranks."
            )

    def __len__(self) -> int:
        """Batches of an epoch, on this rank."""
        if self._batch_sampler is not None:
            return _len(self._batch_sampler) // self.world_size
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return whole if self.drop_last or not rest else whole + 1

    def num_batches(self) -> int:
        """See Feed."""
        return len(self)

    def fingerprint(self) -> dict[str, Any]:
        """See Feed. A dataset may name its content: `fingerprint` or `_fingerprint`, a text."""
        named = (getattr(self.dataset, name, None) for name in ("fingerprint", "_fingerprint"))
        return {
            "length": self.length,
            "content": next((text for text in named if isinstance(text, str)), None),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
            "sampler": None if self._source is None else type(self._source).__name__,
        }

    def order(self, epoch: int) -> torch.Tensor:
        """Indices of all samples in the order of an epoch."""
        if self._sampler is not None:
            return torch.tensor(self._drawn(epoch), dtype=torch.int64)
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator)

    def batches(self, epoch: int, start: int, state: Any = None) -> Iterator[tuple[Any, bool]]:
        """See Feed."""
        self._place_sampler(state)
        self._batches.begin(epoch, start)
        if self._loader is None:
            options = dict(self.options)
            self._loader = DataLoader(
                KeyedDataset(self.dataset, self.seed),
                batch_sampler=self._batches,
                collate_fn=KeyedCollate(options.pop("collate_fn", None)),  # type: ignore[arg-type]
                generator=torch.Generator(),
                **options,
            )
        # torch draws the workers' base seed from here, and not from the global generator.
        assert self._loader.generator is not None
        self._loader.generator.manual_seed(mixed_seed(self.seed, epoch, 1))
        last = len(self) - 1
        for number, batch in enumerate(self._loader, start):
            if number == last:
                # Saved with this batch, the place is the next epoch's start.
                with kept():
                    self._began = self._sampler_state()
            yield batch, number == last

    def index_lists(self, epoch: int, start: int) -> Iterator[list[int]]:
        """This rank's batches of an epoch from number `start` on, as indices of samples."""
        if self._batch_sampler is not None:
            drawn = self._drawn(epoch)
            yield from drawn[self.rank :: self.world_size][start : len(self)]
            return
        order = self.order(epoch)
        whole = self.batch_size * self.world_size
        for number in range(start, len(self)):
            chosen = order[number * whole : (number + 1) * whole]
            short = -len(chosen) % self.world_size
            if short:
                filling = order.repeat(-(-short // len(order)))[:short]
                chosen = torch.cat([chosen, filling])
            share = len(chosen) // self.world_size
            yield chosen[self.rank * share : (self.rank + 1) * share].tolist()

    # ---- a sampler of the user's ----

    def _drawn(self, epoch: int) -> list[Any]:
        """All that the user's sampler gives in an epoch.

        What it draws from the global generators is keyed by the epoch; a state of its own is put
        back to where this epoch began.
        """
        assert self._source is not None
        with kept():
            seed(self.seed, epoch, ORDER)
            set_epoch = getattr(self._source, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            return list(self._source)

    def _place_sampler(self, state: Any) -> None:
        """Bring the sampler to where the epoch begins, and remember that place."""
        with kept():
            if isinstance(self._keeper, torch.Generator) and state is not None:
                content = bytearray(base64.b64decode(state))
                self._keeper.set_state(torch.frombuffer(content, dtype=torch.uint8))
            elif state is not None:
                self._keeper.load_state_dict(state)
            self._began = self._sampler_state()

    def _sampler_state(self) -> Any:
        if isinstance(self._keeper, torch.Generator):
            return base64.b64encode(bytes(self._keeper.get_state().tolist())).decode()
        return None if self._keeper is None else self._keeper.state_dict()

    def state(self) -> Any:
        """See Feed: a sampler's own state at the start of the epoch."""
        return self._began


class _Batches(Sampler[list[tuple[int, int]]]):
    """The places of one rank in the epoch that was begun last.

    The epoch goes along with each index, so that workers may outlive an epoch.
    """

    def __init__(self, loader: ResumableLoader) -> None:
        self._loader = loader
        self._epoch = 0
        self._start = 0

    def begin(self, epoch: int, start: int) -> None:
        """What the next iteration goes through."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return len(self._loader) - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self._epoch
        for indices in self._loader.index_lists(epoch, self._start):
            yield [(epoch, index) for index in indices]


def _check_order(
    batch_size: int | None,
    shuffle: bool,
    drop_last: bool,
    sampler: Iterable[int] | None,
    batch_sampler: Iterable[list[int]] | None,
) -> None:
    """Raise UsageError where the arguments contradict each other."""
    if batch_sampler is not None:
        if batch_size is not None or shuffle or drop_last or sampler is not None:
            raise UsageError(
                "session.loader: a batch_sampler decides batch_size, shuffle, sampler and "
                "drop_last itself: leave them out."
            )
    elif batch_size is None or batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, and must be 1 or more.")
    if sampler is not None and shuffle:
        raise UsageError("session.loader: a sampler decides the order: leave shuffle out.")
    if isinstance(sampler, DistributedSampler):
        raise UsageError(
            "session.loader shares the samples out over the ranks itself: give it shuffle=True "
            "instead of a DistributedSampler."
        )


def _keeper(sampler: Any) -> Any:
    """What holds the state of a sampler, or of the one that it wraps: itself, or its generator."""
    while sampler is not None:
        if hasattr(sampler, "state_dict") and hasattr(sampler, "load_state_dict"):
            return sampler
        if isinstance(getattr(sampler, "generator", None), torch.Generator):
            return sampler.generator
        sampler = getattr(sampler, "sampler", None)
    return None


def _len(sampler: Iterable[Any]) -> int:
    if not isinstance(sampler, Sized):
        raise UsageError(
            f"session.loader: a {type(sampler).__name__} has no length: give it a __len__."
        )
    return len(sampler)
