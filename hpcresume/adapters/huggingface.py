"""Hugging Face's Trainer in a chain: one callback stops it in time, and has it go on.

    trainer = Trainer(..., callbacks=[HpcResumeCallback()])

`Trainer.train` is wrapped when the first callback is made: where it goes on from is decided before
it loads anything, and how it reads its data when it makes its loader. All else is done through the
events of a TrainerCallback. Needs transformers 5; nothing is unpickled here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl

from hpcresume import files
from hpcresume.adapters.folders import choose, superseded
from hpcresume.adapters.guest import Guest, Left
from hpcresume.adapters.keyed import Reading, make_keyed
from hpcresume.adapters.vouched import Newest, numbered
from hpcresume.errors import CheckpointError
from hpcresume.scheduler.environment import RankPlace
from hpcresume.training import buckets
from hpcresume.training.distributed import Agreement, Ranks

log = logging.getLogger("hpcresume.huggingface")

_OTHER = "another rank was asked to stop"
#: Of what was logged since the last line, what the checkpoint of Trainer does not hold.
_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")


class HpcResumeCallback(TrainerCallback):
    """Has a Trainer stop, save and go on as its link demands; without a link, go on.

    After a stop that was asked for, the process ends with code 0 as soon as its checkpoint is
    verified: what follows `trainer.train()` in a script runs when training is complete.
    """

    def __init__(self) -> None:
        self._training: _Training | None = None
        _wrap()

    def train(self, trainer: Any, train: Callable[[Any], Any], asked: Any) -> Any:
        """Run `train(resume_from_checkpoint)` of a trainer, whose user has `asked` for one."""
        self._training = training = _Training(trainer)
        try:
            with training.prepared() as chosen:
                return train(chosen(asked))
        finally:
            self._training = None

    # Each event passes through `_training`, which is there while `train` runs.

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.begin(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.begin_epoch(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.end_step(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.end_epoch(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.mark()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.log(state, logs or {})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.saved(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See TrainerCallback."""
        if self._training is not None:
            self._training.complete(state)


class _Training:
    """One call of `trainer.train()`, as this rank sees it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        args = trainer.args
        self._args = args
        self._folder = Path(args.output_dir)
        self._guest = Guest(os.environ, rank=args.process_index)
        local_rank = max(0, args.local_process_index)
        self._ranks = Ranks(
            RankPlace(rank=args.process_index, world_size=args.world_size, local_rank=local_rank)
        )
        self._agreement = Agreement(self._ranks)
        self._reading = Reading()
        self._first_epoch = True
        self._limit = args.save_total_limit
        self._found = Newest()
        self._about: dict[str, Any] = {}
        """What was kept with the checkpoint of this run that it goes on from."""
        self._leaving: str | None = None
        self._save_at_epoch_end = False
        self._saved_step = -1
        self._marked_at = self._stepped_at = time.monotonic()

    # ---- before it begins --------------------------------------------------------------------

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Callable[[Any], str | None]]:
        """The trainer as it is to be while it trains; how to choose what it goes on from."""
        trainer = self._trainer
        read = trainer.get_train_dataloader
        own = "get_train_dataloader" in vars(trainer)
        trainer.get_train_dataloader = lambda: self._keyed(read())
        # Trainer would remove older checkpoints before the new one is verified.
        self._args.save_total_limit = None
        self._guest.listen()
        try:
            yield self._chosen
        finally:
            self._guest.unlisten()
            self._guest.close()
            self._args.save_total_limit = self._limit
            if own:
                trainer.get_train_dataloader = read
            else:
                del trainer.get_train_dataloader

    def _chosen(self, asked: Any) -> str | None:
        """What to go on from, found by rank 0 for all; None for a fresh start."""
        told: dict[str, Any] = {}
        if self._guest.rank == 0:
            try:
                self._found, words = choose(self._guest, self._folder, asked)
                voucher = self._found.voucher
                own = self._guest.owns(voucher)
                told = {
                    "path": None if self._found.path is None else str(self._found.path),
                    "about": dict(voucher.about) if voucher is not None and own else {},
                    "words": words,
                    "over": own and _ended_early(self._found.path),
                }
            except CheckpointError as error:
                told = {"error": str(error)}
        told = self._ranks.broadcast(told)
        if "error" in told:
            if self._guest.rank == 0:
                log.error("%s", told["error"])
            raise SystemExit(CheckpointError.exit_code)
        self._about, self._words = told["about"], told["words"]
        self._reading.over = told["over"]
        path: str | None = told["path"]
        return path

    def _keyed(self, loader: Any) -> Any:
        """The trainer's loader, whose random numbers depend on nothing but the sample."""
        seed = self._args.data_seed if self._args.data_seed is not None else self._args.seed
        wrong = make_keyed(loader, seed, self._reading, rank=self._args.process_index)
        if wrong is not None:
            self._warn(f"what the training data draw at random is another after a resume: {wrong}")
        collate = getattr(self._trainer.data_collator, "seed", None)
        if collate is not None:
            self._warn(
                "the data collator has a seed and so a generator of its own, which goes on "
                "elsewhere after a resume: leave its seed out"
            )
        return loader

    def _warn(self, words: str) -> None:
        if self._guest.rank == 0:
            log.warning("%s", words)

    # ---- events --------------------------------------------------------------------------------

    def begin(self, state: Any) -> None:
        """All is loaded, and the first epoch has not begun."""
        self._first_epoch = True
        self._guest.began(state.global_step, self._found, looked_in=self._folder, words=self._words)
        for sentence in buckets.settle([self._trainer.model_wrapped]):
            self._warn(sentence)
        if self._args.save_only_model:
            self._warn(
                "save_only_model leaves the optimizer out of checkpoints: what goes on from one is "
                "not the training that was cut"
            )
        if self._args.ignore_data_skip:
            self._warn("ignore_data_skip begins an epoch anew where it was cut")
        if self._about:
            self._compare()
            _restore_callbacks(self._trainer, state)
            self._restore_sums()
        if state.global_step >= state.max_steps > 0:
            self._reading.over = True
        wish = torch.tensor([int(self._guest.why_stop() is not None)])
        if self._ranks.world_size > 1:
            self._ranks.reduce_max_async(wish).wait()
        if int(wish) and not self._reading.over:
            self._leave(state)

    def begin_epoch(self, state: Any) -> None:
        """Its data are about to be read."""
        if self._first_epoch:
            self._reading.epoch = int(state.epoch or 0)
        else:
            self._reading.epoch += 1
        self._first_epoch = False

    def end_step(self, state: Any, control: Any) -> None:
        """A step boundary: the only place where a stop is asked for."""
        now = time.monotonic()
        took, self._stepped_at = now - self._stepped_at, now
        self._guest.progress(
            state.global_step,
            max_steps=state.max_steps,
            epoch=float(state.epoch or 0),
            epochs=state.num_train_epochs,
        )
        why = self._guest.why_stop()
        stop, _ = self._agreement.exchange(
            state.global_step, stop=why is not None, save=False, step_s=took
        )
        if stop and self._leaving is None:
            self._leaving = why or _OTHER
        # A training that ends with this step is left to come to its end.
        if self._leaving is not None and not control.should_training_stop:
            control.should_save = True
        if control.should_save and float(state.epoch or 0).is_integer():
            # What evaluates at the end of an epoch belongs before its checkpoint.
            control.should_save, self._save_at_epoch_end = False, True
        self.mark()

    def end_epoch(self, state: Any, control: Any) -> None:
        """The epoch's last step is done."""
        if self._reading.over:
            # It was over before: nothing has happened, and nothing is to be told.
            control.should_log = control.should_evaluate = control.should_save = False
            control.should_training_stop = True
        elif self._save_at_epoch_end:
            control.should_save, self._save_at_epoch_end = True, False
        if state.global_step == self._saved_step:
            # It is saved, and verified: to write over it would put it at risk.
            control.should_save = False
        self.mark()

    def mark(self) -> None:
        """What follows may be a save, which begins now."""
        self._marked_at = time.monotonic()

    def log(self, state: Any, logs: dict[str, Any]) -> None:
        """It has logged some numbers."""
        values = {name: value for name, value in logs.items() if name != "epoch"}
        self._guest.metrics(state.global_step, float(state.epoch or 0), values)
        self.mark()

    def saved(self, state: Any, control: Any) -> None:
        """It has saved: all ranks are behind their writes when rank 0 vouches for them."""
        seconds = time.monotonic() - self._marked_at
        sums = self._ranks.gather(self._sums())
        self._ranks.barrier()
        self._saved_step = state.global_step
        if self._guest.rank == 0:
            path = self._folder / f"checkpoint-{state.global_step}"
            try:
                about = {"sums": sums, "shape": self._shape()}
                self._guest.saved(state.global_step, path, seconds, about)
            except OSError as error:
                log.warning("%s is not vouched for: %s", path, error)
            else:
                for old in superseded(
                    numbered(self._folder), path, self._limit, state.best_model_checkpoint
                ):
                    shutil.rmtree(old, ignore_errors=True)
        if self._leaving is not None and not control.should_training_stop:
            self._leave(state)

    def complete(self, state: Any) -> None:
        """It has come to its end by itself."""
        self._agreement.settle()
        step, last = state.global_step, state.max_steps
        early = "" if step >= last else ", where it was ended early"
        self._guest.completed(step, f"step {step} of {last}{early}")

    def _leave(self, state: Any) -> None:
        self._agreement.settle()
        self._ranks.barrier()
        reason = self._leaving or self._guest.why_stop() or _OTHER
        self._guest.leaves(state.global_step, reason)
        raise Left

    # ---- what Trainer's own checkpoints do not hold ------------------------------------------

    def _sums(self) -> list[float]:
        """The losses since the last line of the log, so that the next one is right."""
        found = [getattr(self._trainer, name, None) for name in _SUMS]
        values = [float(value) for value in found if value is not None]
        return values if len(values) == len(_SUMS) else []

    def _shape(self) -> dict[str, Any]:
        """What must stay as it is for the batches to be those of the uncut training."""
        args, data = self._args, self._trainer.train_dataset
        stream = isinstance(data, IterableDataset)
        return {
            "world_size": args.world_size,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "samples": None if stream or data is None else len(data),
            "dataloader_num_workers": args.dataloader_num_workers if stream else None,
        }

    def _compare(self) -> None:
        before, now = self._about.get("shape") or {}, self._shape()
        changed = [f"{n} {before[n]} -> {now[n]}" for n in now if before.get(n, now[n]) != now[n]]
        if changed:
            self._warn(
                f"{', '.join(changed)}: it goes on, with other batches than the uncut training's"
            )

    def _restore_sums(self) -> None:
        sums = self._about.get("sums") or []
        if self._args.process_index >= len(sums) or len(sums) != self._args.world_size:
            return
        own = sums[self._args.process_index]
        if len(own) == len(_SUMS) and self._sums():
            self._trainer._tr_loss.fill_(own[0])
            self._trainer._total_loss_scalar = own[1]
            self._trainer._globalstep_last_logged = int(own[2])


def _ended_early(path: Path | None) -> bool:
    """Whether a training had come to its end when it saved this, before its last step."""
    state = None if path is None else files.read_json_or_none(path / "trainer_state.json")
    if not isinstance(state, dict):
        return False
    control = (state.get("stateful_callbacks") or {}).get(TrainerControl.__name__)
    told = control.get("args", {}) if isinstance(control, dict) else {}
    ended = bool(told.get("should_training_stop"))
    return ended and state.get("global_step", 0) < state.get("max_steps", 0)


def _restore_callbacks(trainer: Any, state: Any) -> None:
    """What callbacks count goes on, as in a training that was never cut (early stopping, say)."""
    if trainer.args.restore_callback_states_from_checkpoint:
        return
    stored = {n: [*d] if isinstance(d, list) else [d] for n, d in state.stateful_callbacks.items()}
    for callback in trainer.callback_handler.callbacks:
        states = stored.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and states:
            for name, value in states.pop(0).get("attributes", {}).items():
                setattr(callback, name, value)


def inject() -> None:
    """Give every Trainer that is made from now on a callback, if it has none."""
    from transformers.trainer import Trainer

    made = Trainer.__init__

    @functools.wraps(made)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if _callback_of(self) is None:
            self.add_callback(HpcResumeCallback())

    Trainer.__init__ = make  # type: ignore[method-assign]


def _wrap() -> None:
    """Have `Trainer.train` ask its callback; once."""
    from transformers.trainer import Trainer

    trained = Trainer.train
    if hasattr(trained, "hpcresume"):
        return

    @functools.wraps(trained)
    def train(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback = _callback_of(self)
        trial = args[0] if args else kwargs.get("trial")
        # A search of hyperparameters makes trainings of its own, which no checkpoint of ours knows.
        if callback is None or trial is not None:
            return trained(self, resume_from_checkpoint, *args, **kwargs)

        def go(chosen: str | None) -> Any:
            return trained(self, chosen, *args, **kwargs)

        return callback.train(self, go, resume_from_checkpoint)

    train.hpcresume = True  # type: ignore[attr-defined]
    Trainer.train = train  # type: ignore[method-assign]


def _callback_of(trainer: Any) -> HpcResumeCallback | None:
    callbacks = trainer.callback_handler.callbacks
    return next((c for c in callbacks if isinstance(c, HpcResumeCallback)), None)
