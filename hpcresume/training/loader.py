"""A data loader whose position is a number.

The order of an epoch is a pure function of (seed, epoch), so that resuming means to begin at
batch b of epoch e: O(1), no replay, and no random state of the loader to save. Batches are read
by torch's own DataLoader.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from hpcresume.errors import UsageError
from hpcresume.training.determinism import mixed_seed


class ResumableLoader:
    """Batches of a map-style dataset, shared out over ranks; made by `session.loader`.

    Each rank takes `batch_size` samples of a global batch of `batch_size * world_size`. The
    epoch's ragged last batch is shared out evenly; a remainder that does not divide is filled up
    from the epoch's first samples, as torch's DistributedSampler does, or dropped by `drop_last`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int,
        world_size: int,
        options: dict[str, Any],
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise UsageError(
                "session.loader needs a dataset with a length and an index (a map-style "
                "dataset): the position in a stream cannot be restored."
            )
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}, and must be 1 or more.")
        self.dataset = dataset
        self.length = len(dataset)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.options = options
        if not len(self):
            raise UsageError(
                f"The dataset's {self.length} samples give no batch of {batch_size} for each of "
                f"{world_size} ranks."
            )

    def __len__(self) -> int:
        """Batches of an epoch, on this rank."""
        whole, rest = divmod(self.length, self.batch_size * self.world_size)
        return whole if self.drop_last or not rest else whole + 1

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed loader must have in common with the saved one."""
        return {
            "length": self.length,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "seed": self.seed,
        }

    def order(self, epoch: int) -> torch.Tensor:
        """Indices of all samples in the order of an epoch."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
        return torch.randperm(self.length, generator=generator)

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        """This rank's batches of an epoch from batch `start` on.

        Draws nothing from a global random generator: torch's DataLoader would, at each `iter`.
        """
        sampler = _BatchSampler(self, epoch, start)
        loader: DataLoader[Any] = DataLoader(
            _Keyed(self.dataset, self.seed, epoch),
            batch_sampler=sampler,
            generator=torch.Generator().manual_seed(mixed_seed(self.seed, epoch, 1)),
            **self.options,
        )
        return iter(loader)


class _BatchSampler(Sampler[list[int]]):
    """The index lists of one rank and epoch, from a batch on."""

    def __init__(self, loader: ResumableLoader, epoch: int, start: int) -> None:
        self._loader = loader
        self._epoch = epoch
        self._start = start

    def __len__(self) -> int:
        return len(self._loader) - self._start

    def __iter__(self) -> Iterator[list[int]]:
        loader = self._loader
        order = loader.order(self._epoch)
        whole = loader.batch_size * loader.world_size
        for number in range(self._start, len(loader)):
            chosen = order[number * whole : (number + 1) * whole]
            short = -len(chosen) % loader.world_size
            if short:
                filling = order.repeat(-(-short // loader.length))[:short]
                chosen = torch.cat([chosen, filling])
            share = len(chosen) // loader.world_size
            yield chosen[loader.rank * share : (loader.rank + 1) * share].tolist()


class _Keyed(Dataset[Any]):
    """Seeds a worker's generators from (seed, epoch, index) before each sample.

    A worker process lives for one epoch of one link, so its own random state would begin anew at
    each resume. In the main process the global generators are saved and restored, and stay.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch = epoch

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            seed = mixed_seed(self._seed, self._epoch, index)
            random.seed(seed)
            torch.manual_seed(seed)
            numpy = sys.modules.get("numpy")
            if numpy is not None:
                numpy.random.seed(seed % 2**32)
        return self._dataset[index]
