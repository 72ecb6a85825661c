"""A Lightning training that chains: `Trainer(callbacks=[HpcResumeCallback()])`.

Between two steps the callback asks whether to stop, has the Trainer save, vouches for the file, and
leaves; the next start goes on from the newest file that is whole. Data and random state go along,
so that a training which was cut ends as one that was not.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from hpcresume.adapters.guest import Guest, Left
from hpcresume.adapters.lightning_files import is_local, look, number_of, own
from hpcresume.adapters.lightning_inside import Inside, is_fitting
from hpcresume.adapters.lightning_log import Told
from hpcresume.adapters.lightning_state import Restoring, capture
from hpcresume.adapters.resumable import ResumableBatches, Turn
from hpcresume.adapters.vouched import Newest
from hpcresume.errors import CheckpointError
from hpcresume.scheduler.environment import RankPlace
from hpcresume.training import buckets
from hpcresume.training.distributed import EXCHANGE_S, Agreement, Ranks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
elif "pytorch_lightning" in sys.modules or find_spec("lightning") is None:
    # The same under its older name. Nothing of it is needed here but hooks that do nothing.
    from pytorch_lightning.callbacks import Callback
else:
    from lightning.pytorch.callbacks import Callback

log = logging.getLogger("hpcresume.lightning")

#: Where each training of this process has had its checkpoints.
fits: list[Path] = []

_KEY = "hpcresume"
#: Of the callback's own files so many of the newest are kept.
_KEEP = 2
#: At the beginning of an epoch it saves when this part of `every_min` has passed.
_AT_EPOCHS = 0.1
#: Where a checkpoint was saved: between two steps, in a hook at the end of a batch or of an epoch,
#: at the end of it all, or anywhere else.
_BETWEEN, _BATCH, _EPOCH, _END = "between steps", "batch end", "epoch end", "end of training"
_WITHIN = "within a step"


class HpcResumeCallback(Callback):
    """Makes `trainer.fit` resumable, bit for bit, over any number of jobs.

    `every_n_steps` and `every_min` (minutes; a tenth of them at the beginning of an epoch) say how
    often it saves besides, at a step boundary, for the case that a job is killed; None: never.
    `dirpath` is where, in a folder of the run's name; None: in the run's directory.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_min: float | None = 30.0,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        self._every_n_steps = every_n_steps
        self._every_min = every_min
        self._dirpath = None if dirpath is None else Path(dirpath).absolute()
        self._inside: Inside | None = None
        self._guest: Guest | None = None
        self._loaded: dict[str, Any] | None = None
        self._start_anew()

    def _start_anew(self) -> None:
        self._began = False
        self._at: Turn | None = None
        self._moment = _WITHIN
        self._restoring: Restoring | None = None
        self._found: Newest | None = None
        self._stepped_at = -1
        self._wish = False
        self._saved_at = 0
        self._saved_time = self._step_time = time.monotonic()

    # ---- before the first step ---------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See Callback: take part in a fit, from before Lightning looks for a checkpoint."""
        if not is_fitting(trainer):
            return
        self._start_anew()
        self._loaded = None
        self._guest = Guest(os.environ, rank=trainer.global_rank)
        self._guest.listen()
        self._told = Told(self._guest, every_steps=trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._ranks = _ranks(trainer)
        self._agreement = Agreement(self._ranks)
        # As the script has seeded it; of rank 0, because all ranks share one order.
        self._seed = int(self._ranks.broadcast(torch.initial_seed() % 2**63))
        folder = self._own_folder(trainer)
        fits.append(folder)
        # A script may train several times: each time has a place of its own.
        if (number := fits.count(folder)) > 1:
            folder /= f"fit-{number}"
        self._folder = Path(self._ranks.broadcast(str(folder)))
        if self._inside is None or self._inside.trainer is not trainer:
            self._inside = Inside(trainer, self)

    def _own_folder(self, trainer: Trainer) -> Path:
        assert self._guest is not None
        run = self._guest.run
        if self._dirpath is not None:
            return self._dirpath if run is None else self._dirpath / run.name
        if run is not None:
            return run.framework
        # The same command line goes on with the same training.
        name = xxhash.xxh3_64_hexdigest("\0".join(sys.argv).encode())[:8]
        return Path(trainer.default_root_dir).absolute() / "hpcresume" / name

    def choose(self, trainer: Trainer, given: Any) -> Any:
        """What to resume from, found by rank 0 for all: see Steers."""
        assert self._guest is not None
        told: dict[str, Any] = {}
        if self._ranks.rank == 0:
            try:
                self._found, self._words = look(self._guest, trainer, self._folder, given)
            except CheckpointError as error:
                told = {"error": str(error)}
            else:
                told = {"path": None if self._found.path is None else str(self._found.path)}
        told = self._ranks.broadcast(told)
        if "error" in told:
            if self._ranks.rank == 0:
                log.error("%s", told["error"])
            raise SystemExit(CheckpointError.exit_code)
        return told["path"] or (given if given and not is_local(given) else None)

    def _tell_beginning(self, step: int) -> None:
        """All is loaded; once."""
        assert self._guest is not None
        if self._found is not None:
            self._guest.began(step, self._found, looked_in=self._folder, words=self._words)
        self._found = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See Callback: keep what was saved until it can be put back."""
        if trainer.state.fn != "fit" or self._guest is None:
            return
        self._loaded = checkpoint.get(_KEY)
        self._saved_at = int(checkpoint["global_step"])
        if self._loaded is None:
            log.warning(
                "the checkpoint was saved without HpcResumeCallback: it holds no random state and "
                "no place in the data, so that only what follows will be exact"
            )
            return
        self._seed = int(self._loaded["seed"])
        before, now = len(self._loaded["ranks"]), self._ranks.world_size
        if before != now:
            log.warning(
                "the checkpoint was saved by %d ranks, and %d go on: the training is another one "
                "from here",
                before,
                now,
            )
        if not self._loaded["exact"]:
            log.warning(
                "the checkpoint was saved in a hook of Lightning (%s): what was still to be done "
                "in that step is left out, so that what follows may differ",
                self._loaded["moment"],
            )

    def batches(self, trainer: Trainer, loader: Any) -> ResumableBatches:
        """A training loader as one that can be resumed."""
        shared = getattr(trainer._accelerator_connector, "use_distributed_sampler", True)
        return ResumableBatches(
            loader,
            seed=self._seed,
            rank=self._ranks.rank if shared else 0,
            world_size=self._ranks.world_size if shared else 1,
            turn=lambda: _turn(trainer),
            before=lambda: self._between_batches(trainer),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback."""
        if self._guest is None or self._inside is None:
            return
        self._inside.take_signals_back()
        self._inside.place_loaders()
        for sentence in buckets.settle([trainer.model] if trainer.model is not None else []):
            log.warning("%s", sentence)
        self._began = True
        self._tell_beginning(trainer.global_step)
        if self._loaded is None:
            return
        if self._ranks.rank < len(self._loaded["ranks"]):
            self._restoring = Restoring(self._loaded["ranks"][self._ranks.rank])
            self._restoring.start(trainer)
            self._told.begin(trainer, self._loaded.get("taken", ()))
            if self._loaded["moment"] in (_EPOCH, _END):
                self._restoring.end_epoch()
        if self._loaded["moment"] == _BETWEEN:
            self._inside.hold_plateaus()
        if self._loaded["stopped"]:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback: what was saved at an epoch's end goes on here."""
        if self._loaded is not None and self._loaded["moment"] in (_EPOCH, _END):
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        """Just before the first batch: everything else of the start has drawn what it drew."""
        loaded, self._loaded = self._loaded, None
        self._saved_time = self._step_time = time.monotonic()
        if loaded is None:
            return
        assert self._inside is not None
        self._inside.go_on(loaded["logged"] if loaded["moment"] == _BETWEEN else None)
        if self._restoring is not None:
            for sentence in self._restoring.begin(trainer.lightning_module):
                log.warning("%s", sentence)

    # ---- steps -------------------------------------------------------------------------------

    def _between_batches(self, trainer: Trainer) -> None:
        """Called before each batch is fetched: nothing of the one before is under way."""
        turn = _turn(trainer)
        if not self._began or turn == self._at:
            return
        first, self._at, self._moment = self._at is None, turn, _WITHIN
        if first:
            self._begin(trainer)
        step = trainer.global_step
        if step == self._stepped_at:
            # Gradients are being added up: no optimizer has made a step.
            return
        self._stepped_at = step
        assert self._guest is not None
        now = time.monotonic()
        # How long a step takes is known after the first one: until then the ranks meet at each.
        took = EXCHANGE_S if first else now - self._step_time
        self._step_time = now
        if not turn.consumed and not first:
            # Lightning has settled the metrics of the epoch before behind the last hook.
            self._told.metrics(trainer)
        self._told.progress(trainer)
        reason = self._guest.why_stop()
        self._wish = self._wish or self._due(turn, now)
        stop, save = self._agreement.exchange(
            step, stop=reason is not None, save=self._wish, step_s=took
        )
        # What is counted, all ranks see alike.
        counted = self._every_n_steps is not None and step % self._every_n_steps == 0
        if (stop or save or counted) and step > self._saved_at:
            self._moment = _BETWEEN
            self._save(trainer)
            self._moment = _WITHIN
        if stop:
            self._agreement.settle()
            self._guest.leaves(step, reason or "another rank was asked to stop")
            raise Left

    def _due(self, turn: Turn, now: float) -> bool:
        if self._every_min is None:
            return False
        part = 1.0 if turn.consumed else _AT_EPOCHS
        return now - self._saved_time >= 60 * self._every_min * part

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See Callback."""
        if not self._began:
            return
        self._moment = _BATCH
        if self._restoring is not None:
            self._restoring.after_batch(trainer)
        self._told.step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback."""
        if self._began:
            self._told.metrics(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback."""
        if not self._began:
            return
        self._moment = _EPOCH
        if self._restoring is not None:
            self._restoring.end_epoch()
            self._restoring = None
        self._told.metrics(trainer)

    # ---- saves -------------------------------------------------------------------------------

    def _save(self, trainer: Trainer) -> None:
        path = self._folder / f"step-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self._saved_at = trainer.global_step
        self._saved_time = time.monotonic()
        self._wish = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See Callback: what Lightning leaves out, of every rank; on all of them at once."""
        if not self._began or self._inside is None:
            return
        checkpoint[_KEY] = {
            "seed": self._seed,
            "moment": self._moment,
            "exact": self._exact(trainer),
            "stopped": self._moment == _END and trainer.should_stop,
            "logged": self._inside.logged(),
            "taken": self._told.taken(trainer),
            "ranks": self._ranks.gather(capture(trainer, pl_module)),
        }

    def saved(self, trainer: Trainer, path: Path, seconds: float) -> None:
        """The Trainer has saved: vouch for it, and tell; then older ones of the callback's go."""
        if self._ranks.rank or self._guest is None or not self._began:
            return
        # What a checkpoint follows on must be on the disk with it.
        self._told.flush()
        about = {"exact": self._exact(trainer), "place": self._folder.name}
        try:
            self._guest.saved(trainer.global_step, path, seconds, about)
        except OSError as error:
            log.warning("%s is not vouched for: %s", path, error)
            return
        if path.parent == self._folder:
            # What lies beyond was passed over when this training began: it counts as none.
            kept = [p for p in own(self._guest, path.parent) if number_of(p) <= number_of(path)]
            for old in kept[_KEEP:]:
                trainer.strategy.remove_checkpoint(old)

    def _exact(self, trainer: Trainer) -> bool:
        """Whether a checkpoint that is saved now leaves nothing of the step to be done."""
        if self._moment != _BATCH:
            return self._moment in (_BETWEEN, _END)
        assert self._inside is not None
        return self._inside.is_plain_step()

    # ---- the end -----------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback: a last checkpoint, so that what follows can be repeated."""
        if not self._began:
            return
        self._moment = _END
        self._agreement.settle()
        self._told.metrics(trainer)
        if trainer.global_step > self._saved_at:
            self._save(trainer)
        self._told.flush()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See Callback: training has come to its end by itself."""
        if self._guest is None:
            return
        self._tell_beginning(trainer.global_step)
        words = "it has stopped by itself" if trainer.should_stop else "fit has come to its end"
        self._guest.completed(trainer.global_step, words)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See Callback."""
        self._leave()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """See Callback."""
        self._leave()

    def _leave(self) -> None:
        if self._guest is not None:
            self._guest.unlisten()
            self._guest.close()
        self._guest = None
        self._began = False


def inject() -> None:
    """Give every Trainer that is made from now on a callback, if it has none."""
    for name in ("lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer"):
        trainer = getattr(sys.modules.get(name), "Trainer", None)
        if trainer is not None and not hasattr(trainer.__init__, "hpcresume"):
            _inject_into(trainer)


def _inject_into(kind: Any) -> None:
    made = kind.__init__

    @functools.wraps(made)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if not any(isinstance(callback, HpcResumeCallback) for callback in self.callbacks):
            # Callbacks that save come last, as Lightning sorts them.
            self.callbacks.insert(0, HpcResumeCallback())

    make.hpcresume = True  # type: ignore[attr-defined]
    kind.__init__ = make


def _ranks(trainer: Trainer) -> Ranks:
    """The ranks of a Trainer, which may have chosen another GPU than we would."""
    place = RankPlace(
        rank=trainer.global_rank, world_size=trainer.world_size, local_rank=trainer.local_rank
    )
    ranks = Ranks(place)
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.set_device(trainer.strategy.root_device)
    return ranks


def _turn(trainer: Trainer) -> Turn:
    return Turn(epoch=trainer.current_epoch, consumed=trainer.fit_loop.batch_idx + 1)
