"""Saves and restores as a link does them: `training.saving` without a session around it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from checkpoint_payload import Training, settle, timed
from torch import nn

from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.manifest import Committed, FileEntry
from hpcresume.checkpoint.retention import Policy
from hpcresume.checkpoint.staged import STATE, Staged
from hpcresume.checkpoint.store import Store
from hpcresume.errors import CheckpointError
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir
from hpcresume.training.saving import give_way
from hpcresume.training.shares import Shares

_LINEAGE = Lineage()


class Saves:
    """Checkpoints of registered objects in a run of their own, of which the newest `keep` stay."""

    def __init__(self, contents: Contents, path: Path, keep: int = 1) -> None:
        self._contents = contents
        self._run = RunDir(path)
        if not path.exists():
            self._run.create("", cluster="none", project=path.parent, versions={})
        self._store = Store(self._run, self._run.identify()["id"])
        self._keep = keep
        self._step = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)

    def stage(self) -> Staged:
        """What training waits for."""
        return self._contents.stage({}, [], {})

    def begin(self, *, links: bool = True, shares: Shares | None = None) -> Future[Committed]:
        """A save of which the rest is done by the thread.

        `links`: whether what is there already is linked. `shares`: those of all ranks.
        """
        number = 0 if shares is None else shares.next()
        return self._thread.submit(self._commit, self.stage(), links, shares, number)

    def save(self, *, links: bool = True, shares: Shares | None = None) -> float:
        """Seconds of a whole save, until it would survive a power loss."""
        seconds = timed(lambda: self.begin(links=links, shares=shares).result())
        self.retire()
        return seconds

    def _commit(self, staged: Staged, links: bool, shares: Shares | None, number: int) -> Committed:
        """What the thread does, as `Saver` in `training.saving`."""
        if links:
            staged = staged.beside(partial(self._store.twin, _LINEAGE))
        room = {"num_bytes": staged.size_bytes, "num_files": staged.num_files + 2}
        self._store.make_room(_LINEAGE, Policy(last=self._keep, best=0), **room)
        write: Callable[[Path], Sequence[FileEntry]] = staged.write
        if shares is not None:
            write = shares.write(number, write, staged.partners)
        self._step += 1
        try:
            return self._store.commit(
                write,
                step=self._step,
                epoch=0,
                link=1,
                parent=None,
                metric=None,
                lineage=_LINEAGE,
                fence=lambda: None,
            )
        finally:
            if shares is not None:
                shares.close(number)

    def retire(self) -> None:
        """Remove what is not kept; in no figure, as the removal of the raw file."""
        for step in self._run.checkpoint_steps()[: -self._keep]:
            shutil.rmtree(self._run.checkpoint(step))
        settle(self._run.path)

    @property
    def newest(self) -> Path:
        """The directory of the newest checkpoint; one is made where there is none."""
        if not self._run.checkpoint_steps():
            self.save()
        return self._run.checkpoint(self._run.checkpoint_steps()[-1])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def contents_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Contents:
    """Model and optimizer, registered as a session does."""
    contents = Contents()
    contents.add("model", model)
    contents.add("optimizer", optimizer)
    return contents


def restore(training: Training, path: Path) -> float:
    """Seconds until a new link has its state: verified, in its model and in a fresh optimizer.

    The training is left with that optimizer. Raises CheckpointError where nothing was restored.
    """
    fresh = training.new_optimizer()
    contents = contents_of(training.model, fresh)
    run = RunDir(path)
    store = Store(run, run.identify()["id"])
    began = time.perf_counter()
    images = store.latest_verified(_LINEAGE, lambda step, reason: None)
    if images is None:
        raise CheckpointError(f"There is no checkpoint in {path}.")
    state = images.json(STATE)
    for name in contents.names():
        contents.restore(name, images, state)
    del images
    seconds = time.perf_counter() - began
    if len(fresh.state) != training.num_trained:
        raise CheckpointError("The optimizer's state did not arrive.")
    training.optimizer = fresh
    return seconds
