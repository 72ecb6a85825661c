"""Where the callback reaches into Lightning's Trainer, because no hook of it leads there.

Tried with Lightning 2.6; another one that lacks these places is refused by name.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpcresume.adapters.lightning_files import is_local
from hpcresume.adapters.vouched import voucher_path
from hpcresume.errors import ConfigError

if TYPE_CHECKING:
    # `pytorch_lightning` has classes of its own by the same names: none is asked for at run time.
    from lightning.pytorch import Trainer

log = logging.getLogger("hpcresume.lightning")


class Steers(Protocol):
    """What is asked and told where a Trainer is reached into."""

    def choose(self, trainer: Trainer, given: Any) -> Any:
        """The checkpoint to begin with, given the script's own; None: none."""

    def batches(self, trainer: Trainer, loader: Any) -> Any:
        """What takes the place of a training loader."""

    def saved(self, trainer: Trainer, path: Path, seconds: float) -> None:
        """A checkpoint that training can go on from was saved on all ranks."""


def is_fitting(trainer: Trainer) -> bool:
    """Whether a Trainer trains in earnest."""
    return trainer.state.fn == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]


class Inside:
    """A Trainer, reached into once. Raises ConfigError where it is made otherwise than we know."""

    def __init__(self, trainer: Trainer, steers: Steers) -> None:
        self.trainer = trainer
        try:
            self._no_requeue()
            self._no_spawning()
            self._no_writing_behind()
            self._wrap(trainer._checkpoint_connector, "resume_start", self._resuming(steers))
            self._wrap(trainer.strategy, "process_dataloader", self._loading(steers))
            self._wrap(trainer.strategy, "remove_checkpoint", self._removing)
            self._wrap(trainer, "save_checkpoint", self._saving(steers))
            _ = trainer._logger_connector._callback_metrics, trainer._signal_connector.teardown
            _ = self.logged(), trainer.fit_loop._restarting, trainer.fit_loop.batch_idx
        except AttributeError as error:
            version = sys.modules[type(trainer).__module__.partition(".")[0]].__version__
            raise ConfigError(
                f"HpcResumeCallback does not know Lightning {version}: {error}. Install 2.6, "
                f"or a newer hpcresume."
            ) from None

    @staticmethod
    def _wrap(owner: Any, name: str, wrapped: Callable[[Any], Any]) -> None:
        setattr(owner, name, wrapped(getattr(owner, name)))

    def _no_requeue(self) -> None:
        """Lightning's own chain would save inside a signal handler and requeue the job as well."""
        environment = self.trainer._accelerator_connector.cluster_environment
        if getattr(environment, "auto_requeue", False):
            environment.auto_requeue = False  # type: ignore[attr-defined]
            if self.trainer.global_rank == 0:
                log.info("Lightning's auto_requeue is switched off: hpcresume chains the jobs")

    def _no_spawning(self) -> None:
        """Processes that Lightning spawns out of this one cannot end it."""
        launcher = type(self.trainer.strategy.launcher)
        if any(kind.__name__ == "_MultiProcessingLauncher" for kind in launcher.__mro__):
            raise ConfigError(
                "HpcResumeCallback: with a strategy that spawns processes nobody can leave in "
                "time: use strategy='ddp' instead of 'ddp_spawn' or 'ddp_notebook'."
            )

    def _no_writing_behind(self) -> None:
        """A file that a thread still writes can neither be vouched for nor be left behind."""
        plugin = self.trainer.strategy.checkpoint_io
        if any(kind.__name__ == "AsyncCheckpointIO" for kind in type(plugin).__mro__):
            raise ConfigError(
                "HpcResumeCallback: AsyncCheckpointIO still writes when a checkpoint is to be "
                "verified: take it out of Trainer(plugins=...)."
            )

    def _resuming(self, steers: Steers) -> Callable[[Any], Any]:
        def wrapped(resume_start: Any) -> Any:
            def with_choice(checkpoint_path: Any = None, *args: Any, **kwargs: Any) -> Any:
                if is_fitting(self.trainer):
                    checkpoint_path = steers.choose(self.trainer, checkpoint_path)
                return resume_start(checkpoint_path, *args, **kwargs)

            return with_choice

        return wrapped

    def _loading(self, steers: Steers) -> Callable[[Any], Any]:
        def wrapped(process: Any) -> Any:
            def with_place(dataloader: Any) -> Any:
                made = process(dataloader)
                trains = self.trainer.training and is_fitting(self.trainer)
                return steers.batches(self.trainer, made) if trains else made

            return with_place

        return wrapped

    def _saving(self, steers: Steers) -> Callable[[Any], Any]:
        def wrapped(save: Any) -> Any:
            def vouched(
                filepath: Any, weights_only: bool | None = None, *more: Any, **kw: Any
            ) -> None:
                local = is_local(filepath)
                if local and self.trainer.is_global_zero:
                    # Whoever is killed now leaves a file that nobody vouches for.
                    voucher_path(Path(filepath)).unlink(missing_ok=True)
                began = time.monotonic()
                save(filepath, weights_only, *more, **kw)
                if local and not weights_only:
                    steers.saved(self.trainer, Path(filepath), time.monotonic() - began)

            return vouched

        return wrapped

    @staticmethod
    def _removing(remove: Any) -> Any:
        def with_voucher(filepath: Any) -> None:
            remove(filepath)
            if is_local(filepath):
                voucher_path(Path(filepath)).unlink(missing_ok=True)

        return with_voucher

    # ---- at the start of training --------------------------------------------------------------

    def take_signals_back(self) -> None:
        """Lightning ends a fit by an exception when SIGTERM comes, and speaks to other ranks in the
        handler: the handlers from before it have seen what came."""
        self.trainer._signal_connector.teardown()
        self.trainer._signal_connector.received_sigterm = False

    def place_loaders(self) -> None:
        """Give loaders their places where they were made before the checkpoint's were known, as
        `trainer.estimated_stepping_batches` does."""
        loop = self.trainer.fit_loop
        if loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            assert loop._data_fetcher is not None
            iter(loop._data_fetcher)

    def hold_plateaus(self) -> None:
        """Lightning steps schedulers that watch a metric again where validation was just due."""
        strategy = self.trainer.strategy
        self._schedulers = strategy.lr_scheduler_configs
        strategy.lr_scheduler_configs = [c for c in self._schedulers if not c.reduce_on_plateau]

    def go_on(self, logged: int | None) -> None:
        """Put right what Lightning counts otherwise in an epoch that it resumes.

        It would leave out schedulers that watch a metric at that epoch's end, and count a step of
        the log twice where validation was due.
        """
        self.trainer.fit_loop._restarting = False
        if logged is not None:
            self.trainer.strategy.lr_scheduler_configs = self._schedulers
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = logged

    def logged(self) -> int:
        """How many steps loggers have seen."""
        return int(self.trainer.fit_loop.epoch_loop._batches_that_stepped)

    def is_plain_step(self) -> bool:
        """Whether a batch that is over leaves nothing to do but to fetch the next one: no hook of
        the model, no validation, no end of the epoch, no scheduler, no gradients to be added to."""
        hook = type(self.trainer.lightning_module).on_train_batch_end
        if hook.__qualname__ != "ModelHooks.on_train_batch_end":
            return False
        loop = self.trainer.fit_loop.epoch_loop
        assert self.trainer.fit_loop._data_fetcher is not None
        watching = any(c.reduce_on_plateau for c in self.trainer.lr_scheduler_configs)
        due = loop._should_check_val_fx(self.trainer.fit_loop._data_fetcher)
        return not (watching or due or loop._should_accumulate() or loop._is_training_done)
