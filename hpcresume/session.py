"""What a training loop holds: it registers its objects, goes through its steps, and may end.

A step boundary (after the optimizer's step, before the next batch is fetched) is the only place
where state is saved and where a link can end. Made by `rank`; everything that a training function
may use is public here, and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from hpcresume import files
from hpcresume.checkpoint import contents, rng, writer
from hpcresume.checkpoint.cadence import Cadence
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.manifest import Committed, FileEntry, read_committed
from hpcresume.checkpoint.retention import Policy
from hpcresume.checkpoint.store import Store
from hpcresume.config import RunConfig
from hpcresume.errors import CheckpointError, Fenced, Unavailable, UsageError
from hpcresume.journal import (
    Journal,
    Lineage,
    Segment,
    segments_from_json,
    segments_to_json,
)
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.signals import SignalFlags
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Agreement, Ranks
from hpcresume.training.loader import ResumableLoader
from hpcresume.training.record import MetricLog, trainer_state

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_PUBLISH_S = 5.0
#: What a shared file system writes at the least, for the first guess of a save's duration.
SLOW_DISK_BYTES_S = 100e6


class LinkEnds(BaseException):
    """Unwinds the training function once its state is saved. `except Exception` lets it pass."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(kw_only=True)
class Berth:
    """Where a session runs: what `rank` hands in."""

    run: RunDir
    run_id: str
    link: LinkDir
    config: RunConfig
    ranks: Ranks
    flags: SignalFlags
    clock: Clock
    journal: Journal | None
    """Rank 0's; None on the other ranks."""
    lineage: Lineage
    """As it stood before this link."""
    known_step: int = 0
    """The newest step that the journals know as committed."""
    begin_fresh: bool = False
    """Do not resume, although there may be checkpoints (`resume: never`)."""
    orphaned: Callable[[], bool] = lambda: False
    """Whether the supervisor is gone."""
    stop_at: int | None = None
    """The step after which this link saves and leaves; None: whenever it must."""


class _UnknownArg(UsageError, KeyError):
    """A KeyError as well, so that `args.get(name, default)` works."""

    __str__ = Exception.__str__


class Args(Mapping[str, Any]):
    """The configuration's `args`: by attribute or by key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise self._unknown(name)
        return self._values[name]

    def _unknown(self, name: str) -> UsageError:
        known = ", ".join(self._values) or "none"
        return _UnknownArg(
            f"The training function reads args.{name}, which the configuration does not set "
            f"(args there: {known})."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Session:
    """One rank's part in one link of a run."""

    def __init__(self, berth: Berth) -> None:
        self._berth = berth
        self._config = berth.config
        self._ranks = berth.ranks
        self._clock = berth.clock
        self._store = Store(berth.run, berth.run_id)
        self._contents = Contents()
        self._metrics = MetricLog(berth.link if berth.ranks.rank == 0 else None)
        self._agreement = Agreement(berth.ranks)
        checkpoint = berth.config.checkpoint
        self._cadence = Cadence(
            steps=checkpoint.steps, minutes=checkpoint.minutes, each_epoch=checkpoint.each_epoch
        )
        self._policy = Policy(last=checkpoint.keep_last, best=checkpoint.keep_best)

        self._loader: ResumableLoader | None = None
        self._accumulate = 1
        self._position = 0
        self._in_body = False
        self._train_seconds = 0.0
        self._best: dict[str, Any] | None = None
        self._metric_now: dict[str, Any] | None = None
        self._save_asked: str | None = None
        self._history: list[dict[str, Any]] = []
        self._looked_at = 0.0
        self._step_began = time.monotonic()
        self._epoch_ended = False
        self._saved_at = time.monotonic()
        self._published_at = 0.0
        self._rate_from = (time.monotonic(), 0)
        self.args = Args(berth.config.args)
        self.rank = berth.ranks.rank
        self.world_size = berth.ranks.world_size
        self.device = berth.ranks.device
        self.path: Path = berth.run.path
        self.global_step = 0
        self.epoch = 0
        self.max_steps: int | None = berth.config.max_steps
        self.sync_gradients = True

        self._committed, self._saved_state = self._find_checkpoint()
        self._tried_step = self.global_step
        self._lineage = self._adopt()

    # ---- what a training function calls -------------------------------------------------

    def register(self, **objects: Any) -> None:
        """Have objects saved and, where the run has a checkpoint, restored: here and now.

        Anything with `state_dict()` and `load_state_dict()`, a tokenizer, or a JSON value. May be
        called repeatedly, for other names. Raises UsageError or CheckpointError.
        """
        for name, value in objects.items():
            if self._loader is not None:
                raise UsageError(f"'{name}' is registered after session.steps has begun.")
            self._contents.add(name, value)
            if self._committed is not None and self._saved_state is not None:
                for difference in self._contents.restore(name, self._committed, self._saved_state):
                    log.warning(difference)

    def loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        **options: Any,
    ) -> ResumableLoader:
        """A loader that resumes at its position. `batch_size` is per rank.

        `options` go to torch's DataLoader (num_workers, collate_fn, pin_memory…).
        """
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=self._config.seed,
            rank=self.rank,
            world_size=self.world_size,
            options=options,
        )

    def steps(self, loader: ResumableLoader, accumulate: int = 1) -> Iterator[Any]:
        """Go through the remaining micro-batches of all remaining epochs.

        A step is `accumulate` micro-batches, or what is left at the epoch's end; in its last one
        `sync_gradients` is true. When the link must end, the state is saved and the training
        function is left from here.
        """
        self._begin(loader, accumulate)
        self._stop_at_once_if_asked()
        while not self._finished():
            per_epoch = len(loader)
            if self._position == 0 and self._rank0:
                self._say_epoch()
            for batch in loader.batches(self.epoch, self._position):
                self._position += 1
                self.sync_gradients = (
                    self._position % accumulate == 0 or self._position == per_epoch
                )
                self._in_body = True
                yield batch
                self._in_body = False
                if self.sync_gradients:
                    self._boundary()
                    if self._finished():
                        break
                    self._look_after()

    def log(self, **values: Any) -> None:
        """Note metrics of the step in progress; tensors are read later, in batches."""
        self._metrics.add(values)

    def save(self) -> None:
        """Save at the end of this step."""
        self._save_asked = "asked"

    def best(self, *, mode: str = "min", **metric: float) -> bool:
        """Report one metric to watch, e.g. `best(val_loss=0.3)`; whether it is the best so far.

        If so, the state is saved at the end of this step; retention keeps the best. All ranks
        must report the same value.
        """
        if len(metric) != 1 or mode not in ("min", "max"):
            raise UsageError('session.best takes one metric and mode="min" or "max".')
        ((name, value),) = metric.items()
        value = float(value)
        self._metric_now = {"name": name, "value": value, "mode": mode}
        if not math.isfinite(value):
            return False
        before = self._best
        if before is not None and before["name"] == name:
            better = value < before["value"] if mode == "min" else value > before["value"]
            if not better:
                return False
        self._best = {**self._metric_now, "step": self.global_step + 1}
        self._save_asked = "best"
        log.info("best %s so far: %.4f", name, value)
        return True

    @contextlib.contextmanager
    def busy(self, kind: str) -> Iterator[None]:
        """Mark something in the loop that takes long (evaluation): the deadline allows for it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._clock.busy_took(kind, time.monotonic() - began)

    # ---- the beginning ------------------------------------------------------------------

    @property
    def _rank0(self) -> bool:
        return self.rank == 0

    def _find_checkpoint(self) -> tuple[Committed | None, dict[str, Any] | None]:
        """The newest verified checkpoint: rank 0 decides, all ranks use the same."""
        found: Committed | None = None
        if self._rank0 and not self._berth.begin_fresh:
            found = self._store.latest_verified(self._berth.lineage, self._note_bad)
            self._store.sweep(self._berth.link.number)
            if found is None and self._berth.known_step:
                raise CheckpointError(
                    f"The journal of {self._berth.run.name} knows step {self._berth.known_step} "
                    f"as committed, but no usable checkpoint is left in {self._berth.run.path}: "
                    f"put one back, or begin a new run."
                )
        step = self._ranks.broadcast(None if found is None else found.step)
        if step is None:
            return None, None
        if found is None:
            found = read_committed(self._berth.run.checkpoint(step), self._berth.lineage)
        state = files.read_json(found.path / contents.STATE)
        progress = state["progress"]
        if progress["world_size"] != self.world_size:
            raise CheckpointError(
                f"checkpoint-{step} was written by {progress['world_size']} ranks, and this link "
                f"has {self.world_size}: start it with as many."
            )
        self.global_step = progress["global_step"]
        self.epoch = progress["epoch"]
        self._position = progress["position"]
        self._train_seconds = progress["train_seconds"]
        self._best = progress["best"]
        self._history = progress["history"]
        return found, state

    def _note_bad(self, step: int, reason: str) -> None:
        log.warning("checkpoint-%d is not used: %s; it is quarantined", step, reason)
        if self._berth.journal is not None:
            self._berth.journal.write("quarantined", step=step, reason=reason)

    def _adopt(self) -> Lineage:
        """Declare what this link builds upon: from here on the rest is off the lineage."""
        segments: tuple[Segment, ...] = ()
        if self._saved_state is not None:
            segments = segments_from_json(self._saved_state["progress"]["lineage"])
        lineage = Lineage(segments, self._berth.link.number)
        if self._berth.journal is None:
            return lineage
        found = self._committed
        self._berth.journal.write(
            "restored",
            step=self.global_step,
            epoch=self.epoch,
            digest=None if found is None else found.manifest.digest,
            bytes=0 if found is None else found.manifest.payload_bytes,
            segments=segments_to_json(segments),
        )
        if found is None:
            log.info("starting fresh: no checkpoint in %s", self._berth.run.path)
        else:
            count = len(self._store.committed(lineage))
            age_s = max(0.0, time.time() - found.manifest.created)
            log.info(
                "found %d checkpoint%s, resuming from step %d of epoch %d (verified, %s old, %s)",
                count,
                "" if count == 1 else "s",
                self.global_step,
                self.epoch + 1,
                _age(age_s),
                found.manifest.digest[:8],
            )
        return lineage

    def _begin(self, loader: ResumableLoader, accumulate: int) -> None:
        if self._loader is not None:
            raise UsageError("session.steps can be gone through once in a link.")
        if not isinstance(loader, ResumableLoader):
            raise UsageError("session.steps takes what session.loader returned.")
        if accumulate < 1:
            raise UsageError(f"accumulate is {accumulate}, and must be 1 or more.")
        self._loader = loader
        self._accumulate = accumulate
        per_epoch = -(-len(loader) // accumulate)
        epochs = self._config.epochs
        by_epochs = None if epochs is None else epochs * per_epoch
        limits = [limit for limit in (self._config.max_steps, by_epochs) if limit is not None]
        self.max_steps = min(limits) if limits else None
        self._check_same_loader()
        if self._rank0:
            payload = self._contents.payload_bytes()
            self._clock.guess(payload / SLOW_DISK_BYTES_S)
        self._started()
        # Last of all: everything before may have drawn random numbers.
        if self._committed is not None:
            states = files.read_json(self._committed.path / contents.RNG)
            rng.restore(states[self.rank])
        self._step_began = time.monotonic()
        self._rate_from = (self._step_began, self.global_step)

    def _check_same_loader(self) -> None:
        if self._saved_state is None:
            return
        assert self._loader is not None and self._committed is not None
        saved_names = {*self._saved_state["objects"], *self._saved_state["values"]}
        unused = saved_names - set(self._contents.names())
        if unused:
            raise CheckpointError(
                f"checkpoint-{self._committed.step} holds {', '.join(sorted(unused))}, which the "
                f"training function did not register before session.steps."
            )
        saved = self._saved_state["progress"]["loader"]
        now = {**self._loader.fingerprint(), "accumulate": self._accumulate}
        changed = [f"{key} {saved[key]} -> {now[key]}" for key in saved if saved[key] != now[key]]
        if changed:
            raise CheckpointError(
                f"The data are not those of checkpoint-{self._committed.step}: "
                f"{', '.join(changed)}. Set them back, or begin a new run."
            )

    def _started(self) -> None:
        if self._berth.journal is not None:
            self._berth.journal.write("started", step=self.global_step, max_steps=self.max_steps)
            self._publish()

    # ---- step boundaries ----------------------------------------------------------------

    def _finished(self) -> bool:
        if self.max_steps is not None and self.global_step >= self.max_steps:
            return True
        return self._config.epochs is not None and self.epoch >= self._config.epochs

    def _boundary(self) -> None:
        """A step is over: count it."""
        assert self._loader is not None
        took = time.monotonic() - self._step_began
        self._clock.step_took(took)
        self._train_seconds += took
        epoch = self.epoch
        self.global_step += 1
        self._epoch_ended = self._position == len(self._loader)
        if self._epoch_ended:
            self.epoch += 1
            self._position = 0
        self._metrics.end_step(self.global_step, epoch)
        if self._finished():
            self._metrics.flush()
            if self._rank0:
                self._say_step(time.monotonic())
            self._agreement.settle()
            self._save("end")
        self._step_began = time.monotonic()

    def _look_after(self) -> None:
        """Save, or end the link, where it is due."""
        if self.global_step == self._berth.stop_at:
            self._stop(f"it was to stop at step {self.global_step}")
        due = self._cadence.by_count(self.global_step, epoch_ended=self._epoch_ended)
        asked = self._save_asked or self._cadence.by_clock(time.monotonic() - self._saved_at)
        why_stop = self._why_stop()
        stop, save = self._agreement.exchange(
            self.global_step,
            stop=why_stop is not None,
            save=asked is not None,
            step_s=self._clock.last_step_s,
        )
        if stop:
            self._stop(why_stop or "another rank asked for the stop")
        if due or save:
            self._save(due or asked or "asked")
        self._metric_now = None
        now = time.monotonic()
        logging_due = self.global_step % self._config.log.every_steps == 0
        if self._rank0 and (logging_due or now - self._published_at >= _PUBLISH_S):
            self._metrics.flush()
            if logging_due:
                self._say_step(now)
            self._publish()
        self._step_began = time.monotonic()

    def _why_stop(self) -> str | None:
        signal = self._berth.flags.stop_asked()
        if signal is not None:
            return signal
        if self._clock.due():
            return f"deadline: {self._clock.remaining_s() or 0:.0f} s left"
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return None
        self._looked_at = now
        if self._berth.orphaned():
            return "the supervisor is gone"
        for path in (self._berth.link.stop, self._berth.run.stop, self._berth.run.cancel):
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace").strip()
                if path == self._berth.link.stop:
                    return text or path.name
                return path.name if path == self._berth.run.cancel or not text else f"STOP: {text}"
        return None

    def _stop_at_once_if_asked(self) -> None:
        """A link that starts too late, or is stopped while it starts, does no step."""
        if self._finished():
            return
        if self._berth.stop_at is not None and self.global_step >= self._berth.stop_at:
            self._stop(f"it was to stop at step {self._berth.stop_at}")
        asked = [reason for reason in self._ranks.gather(self._why_stop()) if reason]
        reason = self._ranks.broadcast(asked[0] if asked else None)
        if reason is not None:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        self._agreement.settle()
        if self._berth.journal is not None:
            self._berth.journal.write("stop_asked", step=self.global_step, reason=reason)
        self._save("stop")
        self._ranks.barrier()
        raise LinkEnds(reason)

    # ---- saving -------------------------------------------------------------------------

    def _save(self, reason: str) -> None:
        """Commit the state of this step boundary; on every rank, by the same step."""
        self._save_asked = None
        if self.global_step == self._tried_step:
            return
        # On every rank alike, also where rank 0's disk refuses: the gather needs them all.
        self._tried_step = self.global_step
        states = self._ranks.gather(rng.capture())
        if self._berth.journal is None:
            return
        began = time.monotonic()
        try:
            metrics_bytes = self._metrics.sync()
            progress = self._progress(metrics_bytes)
            self._committed = self._store.commit(
                lambda directory: self._write(directory, progress, states),
                step=self.global_step,
                epoch=self.epoch,
                link=self._berth.link.number,
                parent=None if self._committed is None else self._committed.manifest.digest,
                metric=self._metric_now,
                lineage=self._lineage,
                fence=self._fence,
            )
        except OSError as error:
            reason_words = f"{error.strerror or error} ({error.filename or self._berth.run.path})"
            log.error(
                "step %d could not be saved: %s; training goes on, the checkpoints before it stay",
                self.global_step,
                reason_words,
            )
            self._note("save_failed", step=self.global_step, reason=reason_words)
            self._saved_at = time.monotonic()
            return
        seconds = time.monotonic() - began
        self._saved_at = time.monotonic()
        self._clock.saves.append(seconds)
        size = self._committed.manifest.payload_bytes
        self._note(
            "saved",
            step=self.global_step,
            epoch=self.epoch,
            seconds=round(seconds, 4),
            bytes=size,
            reason=reason,
            digest=self._committed.manifest.digest,
            step_s=round(self._clock.last_step_s, 4),
            lead_s=round(self._clock.lead_s(), 2),
        )
        log.info(
            "saved step %d of epoch %d (%s in %.1f s)",
            self.global_step,
            self._epoch_of_step(),
            _size(size),
            seconds,
        )
        removed = self._store.prune(self._lineage, self._policy)
        if removed:
            log.debug("removed the checkpoints of steps %s", ", ".join(map(str, removed)))
        self._publish()

    def _note(self, kind: str, **fields: Any) -> None:
        """Journal what a full disk may make impossible to journal."""
        assert self._berth.journal is not None
        try:
            self._berth.journal.write(kind, **fields)
        except OSError as error:
            log.error("the journal cannot be written: %s", error)

    def _fence(self) -> None:
        newest = self._berth.run.newest_link()
        if newest != self._berth.link.number:
            raise Fenced(
                f"Link {newest} has taken over from link {self._berth.link.number}, which leaves "
                f"without changing anything."
            )

    def _write(
        self, directory: Path, progress: dict[str, Any], states: list[Any]
    ) -> list[FileEntry]:
        entries = self._contents.write(directory, progress, states)
        entries.append(
            writer.write_json(directory / "trainer_state.json", self._trainer_state(False))
        )
        entries.append(writer.write_json(directory / "training_args.json", self._config.args))
        return entries

    def _progress(self, metrics_bytes: int) -> dict[str, Any]:
        assert self._loader is not None
        segments = self._lineage.extended(self._berth.link.number, self.global_step, metrics_bytes)
        if self._metrics.latest:
            self._history = [*self._history, self._metrics.latest][-100:]
        return {
            "global_step": self.global_step,
            "epoch": self.epoch,
            "position": self._position,
            "world_size": self.world_size,
            "max_steps": self.max_steps,
            "train_seconds": self._train_seconds,
            "best": self._best,
            "loader": {**self._loader.fingerprint(), "accumulate": self._accumulate},
            "lineage": segments_to_json(segments),
            "history": self._history,
        }

    def _trainer_state(self, completed: bool) -> dict[str, Any]:
        per_epoch = len(self._loader) if self._loader is not None else 1
        return trainer_state(
            global_step=self.global_step,
            total_steps=self.max_steps,
            epoch=self.epoch + self._position / per_epoch,
            num_train_epochs=self._config.epochs,
            best_metric=None if self._best is None else self._best["value"],
            best_step=None if self._best is None else self._best["step"],
            history=self._history,
            completed=completed,
            train_seconds=self._train_seconds,
            link=self._berth.link.number,
            num_ranks=self.world_size,
        )

    def _publish(self, completed: bool = False) -> None:
        """Rewrite trainer_state.json: progress for people, which may be lost but never torn."""
        self._published_at = time.monotonic()
        state = self._trainer_state(completed)
        latest = {**self._metrics.latest}
        if latest and (not self._history or self._history[-1]["step"] != latest["step"]):
            state["log_history"] = [*state["log_history"], latest][-100:]
        try:
            files.write_json(self._berth.run.trainer_state, state, sync=completed)
        except OSError as error:
            log.debug("trainer_state.json cannot be written: %s", error)

    # ---- the end ------------------------------------------------------------------------

    def _complete(self) -> None:
        """The training function has returned: commit the last step, leave the finished model."""
        if self._loader is None:
            raise UsageError(
                "The training function returned without having gone through session.steps."
            )
        if self._in_body:
            # It left its loop by `break`, after the step's work but before its boundary.
            self._in_body = False
            if self.sync_gradients:
                self._boundary()
        self._agreement.settle()
        self._save("end")
        self._metrics.flush()
        if self._berth.journal is not None:
            last = self._committed
            if last is None or last.step != self.global_step:
                raise Unavailable(
                    f"Step {self.global_step} could not be saved, so the run is not complete; "
                    f"the next link trains from the last checkpoint again."
                )
            self._fence()
            self._store.finish(last, self._contents.model_files(last))
            self._berth.journal.write("completed", step=self.global_step, epoch=self.epoch)
            self._publish(completed=True)
        self._ranks.barrier()

    def _close(self) -> None:
        self._metrics.close()
        self._ranks.close()

    # ---- words --------------------------------------------------------------------------

    def _epoch_of_step(self) -> int:
        return self.epoch + 1 if self._position else max(1, self.epoch)

    def _say_epoch(self) -> None:
        total = f"/{self._config.epochs}" if self._config.epochs else ""
        log.info("━━━ Epoch %d%s ━━━", self.epoch + 1, total)

    def _say_step(self, now: float) -> None:
        since, step = self._rate_from
        rate = (self.global_step - step) / max(now - since, 1e-9)
        self._rate_from = (now, self.global_step)
        total = f"/{self.max_steps}" if self.max_steps else ""
        values = ", ".join(
            f"{name} {value:.4g}"
            for name, value in self._metrics.latest.items()
            if name not in ("step", "epoch") and isinstance(value, (int, float))
        )
        log.info("step %d%s: %s (%.1f steps/s)", self.global_step, total, values, rate)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
