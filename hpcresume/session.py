"""What a training loop holds: it registers its objects, goes through its steps, and may end.

A step boundary (after the optimizer's step, before the next batch is fetched) is the only place
where state is saved and where a link can end. Made by `rank`; everything that a training function
may use is public here, and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset, IterableDataset

from hpcresume import files
from hpcresume.checkpoint import contents, rng
from hpcresume.checkpoint.cadence import cadence_of
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.foreign.giving import Giver
from hpcresume.config import RunConfig
from hpcresume.errors import CheckpointError, HpcResumeError, Unavailable, UsageError
from hpcresume.training import buckets, hyperparameters, machine, roll_back
from hpcresume.training.account import Account
from hpcresume.training.args import Args
from hpcresume.training.berth import Berth
from hpcresume.training.best import Best
from hpcresume.training.determinism import mixed_seed, seed_everything
from hpcresume.training.distributed import Agreement
from hpcresume.training.emergency import Sentinel
from hpcresume.training.feeds import feed_of
from hpcresume.training.heartbeat import END, FIRST_STEP, SAVE, STOP
from hpcresume.training.loader import Feed, ResumableLoader
from hpcresume.training.monitor import Monitor
from hpcresume.training.non_finite import Guard
from hpcresume.training.place import Place
from hpcresume.training.progress import Progress
from hpcresume.training.record import MetricLog, trainer_state
from hpcresume.training.retrying import TRANSIENT, retried
from hpcresume.training.roll_back import RollBack
from hpcresume.training.saving import Saver
from hpcresume.training.start_up import LONG_S
from hpcresume.training.stopping import StopWatch
from hpcresume.training.stream import StreamLoader
from hpcresume.training.watch import Watch

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: How old trainer_state.json may be: to replace a file is slow on shared disks.
_PUBLISH_S = 2.0
#: What a shared file system writes at the least, for the first guess of a save's duration.
SLOW_DISK_BYTES_S = 100e6
#: Saves that may come a little later, or not at all where the one at the deadline is near.
_PATIENT = frozenset({"steps", "minutes", "auto", "epoch", "asked"})


class LinkEnds(BaseException):
    """Unwinds the training function once its state is saved. `except Exception` lets it pass."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Mark(NamedTuple):
    """What of a step boundary the session itself knows."""

    epoch: int
    position: int
    best: dict[str, Any] | None
    data: Any


class Session:
    """One rank's part in one link of a run."""

    def __init__(self, berth: Berth) -> None:
        self._berth = berth
        self._config: RunConfig = berth.config
        self._ranks = berth.ranks
        self._clock = berth.clock
        self._beat = berth.beat
        self._contents = Contents(berth.ranks.rank, berth.ranks.world_size)
        self._metrics = MetricLog(berth.link if berth.ranks.rank == 0 else None)
        self._account = Account(berth, self._metrics)
        self._agreement = Agreement(berth.ranks)
        self._stops = StopWatch(berth)
        self._cadence = cadence_of(berth.config.checkpoint)
        self.args = Args(berth.config.args)
        self.rank = berth.ranks.rank
        self.world_size = berth.ranks.world_size
        self.device = berth.ranks.device
        self.path: Path = berth.run.path
        self.global_step = 0
        self.max_steps: int | None = berth.config.max_steps
        self.sync_gradients = True

        self._feed: Feed | None = None
        self._accumulate = 1
        self._place = Place()
        self._last = False
        self._in_body = False
        self._train_seconds = 0.0
        self._best = Best()
        self._save_asked: str | None = None
        self._given: dict[str, Any] = {}
        self._retry_watch: Watch | None = None
        self._sentinel: Sentinel[_Mark] = Sentinel((), {}, num_ranks=self.world_size)
        self._took_s = 0.0
        self._back = roll_back.told(berth)
        if self._back is not None:
            number = berth.link.number
            berth = dataclasses.replace(berth, lineage=self._back.narrowed(berth.lineage, number))
        self._saver = Saver(berth, self._contents, self._metrics)
        self._start_up = berth.start_up
        self._start_up.reached("checkpoint")
        self._take_over()
        self._guard = Guard(berth, self._metrics, self._saver, self._back)
        self._published_at = 0.0
        self._step_began = self._asked_at = time.monotonic()

    # ---- what a training function calls -------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch of the step in progress, counted from 0."""
        return self._place.epoch

    def register(self, *, keep: Collection[str] = (), **objects: Any) -> None:
        """Have objects saved and, where the run has a checkpoint, restored: here and now.

        Anything with `state_dict()` and `load_state_dict()`, a random generator (of torch, NumPy
        or Python), a tokenizer, or a JSON value. May be called repeatedly, for other names.

        The checkpoint's settings of optimizers and schedules win over the code's, which is said;
        `keep=("lr",)` names settings for which a change of the code wins, from this step on.
        Raises UsageError or CheckpointError.
        """
        for name, value in objects.items():
            if self._feed is not None:
                raise UsageError(f"'{name}' is registered after session.steps has begun.")
            code = hyperparameters.given(value)
            self._contents.add(name, value)
            images, saved = self._saver.images, self._saver.state
            if images is not None and saved is not None:
                for difference in self._contents.restore(name, images, saved):
                    self._say_changed(difference)
            elif self._giver is not None:
                for words in self._giver.give(name, value, dict(self._contents.items())):
                    self._say_changed(words)
            if code is not None:
                self._given[name] = self._settled(name, value, code, keep)

    def loader(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        **options: Any,
    ) -> ResumableLoader | StreamLoader:
        """A loader that resumes at its position. `batch_size` is per rank.

        `dataset` has a length and an index, or is an IterableDataset (with `state_dict()` and
        `load_state_dict()`, or it is read again up to its place). `options` go to torch's
        DataLoader (num_workers, collate_fn, pin_memory…). Raises UsageError.
        """
        if isinstance(dataset, IterableDataset):
            if shuffle or sampler is not None or batch_sampler is not None:
                raise UsageError("session.loader: the order of an IterableDataset is its own.")
            return StreamLoader(
                dataset,
                batch_size=batch_size,
                drop_last=drop_last,
                seed=self._config.seed,
                rank=self.rank,
                options=options,
            )
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            sampler=sampler,
            batch_sampler=batch_sampler,
            seed=self._config.seed,
            rank=self.rank,
            world_size=self.world_size,
            options=options,
        )

    def steps(self, loader: Iterable[Any] | Feed, accumulate: int = 1) -> Iterator[Any]:
        """Go through the remaining micro-batches of all remaining epochs.

        `loader` is what `session.loader` returned, a DataLoader of torch's, a list of batches, or
        another iterable (with `state_dict()` and `load_state_dict()`, or it is read again up to
        its place). A step is `accumulate` micro-batches, or what is left at the epoch's end; in
        its last one `sync_gradients` is true. When the link must end, the state is saved and the
        training function is left from here.
        """
        feed = self._begin(loader, accumulate)
        self._stop_at_once_if_asked()
        account, place = self._account, self._place
        try:
            while not self._finished():
                self._say_epoch()
                came = False
                for batch, last in feed.batches(place.epoch, place.position, place.feed_state):
                    account.waited_s += time.monotonic() - self._asked_at
                    if not came:
                        self._start_up.reached("batch")
                    came = True
                    place.position += 1
                    if place.is_left_out(last):
                        self._asked_at = time.monotonic()
                        continue
                    self._last = last
                    self.sync_gradients = last or place.position % accumulate == 0
                    self._in_body = True
                    yield batch
                    self._in_body = False
                    if self.sync_gradients:
                        self._boundary()
                        if self._finished():
                            break
                        self._look_after()
                        self._asked_at = self._step_began
                    else:
                        self._asked_at = time.monotonic()
                if not came:
                    raise UsageError(f"The data give no batch in epoch {self.epoch + 1}.")
                place.feed_state = None
        finally:
            # What comes after the loop is no step any more, also after a `break`.
            self._beat.enter(END)

    def log(self, **values: Any) -> None:
        """Note metrics of the step in progress; tensors are read later, in batches."""
        self._metrics.add(values)

    def save(self) -> None:
        """Save at the end of this step."""
        self._save_asked = "asked"

    def best(self, *, mode: str = "min", **metric: float) -> bool:
        """Report one metric to watch, e.g. `best(val_loss=0.3)`; whether it is the best so far.

        If so, the state is saved at the end of this step; retention keeps the best. All ranks
        must call it; the value of rank 0 counts.
        """
        if len(metric) != 1 or mode not in ("min", "max"):
            raise UsageError('session.best takes one metric and mode="min" or "max".')
        ((name, value),) = metric.items()
        value = self._ranks.broadcast(float(value))
        before = self._best.value_of(name)
        is_best = self._best.report(name, value, mode, self.global_step + 1)
        if is_best and self._rank0:
            self._account.best(name, value, before)
        return is_best

    def retry(
        self,
        fn: Callable[[], _Result],
        attempts: int = 3,
        *,
        on: type[Exception] | tuple[type[Exception], ...] = TRANSIENT,
    ) -> _Result:
        """What `fn()` returns; what fails by something that may pass is tried again.

        That is an OSError (files, connections, timeouts) or a GPU without memory left, or what
        `on` names. Waits 2, 4, 8, at most 10 s before another attempt, less where the link must
        end; each attempt draws the same random numbers. Gradients, small buffers (BatchNorm) and
        flat counters are given back; where a failed attempt has changed other registered state,
        none follows, and HpcResumeError is raised. The exception of the last attempt goes on.

        Each rank tries for itself, so `fn` must not communicate with the others: an attempt that
        did is not repeated.
        """
        watch = self._retry_watch or Watch(self._contents.items())
        if self._feed is not None:
            # Nothing more can be registered.
            self._retry_watch = watch
        return retried(
            fn,
            attempts,
            on,
            watch=watch,
            generators=self._contents.generators,
            wait=self._wait,
        )

    def _wait(self, seconds: float) -> str | None:
        with self._beat.during("retry"):
            return self._stops.wait(seconds)

    @contextlib.contextmanager
    def busy(self, kind: str) -> Iterator[None]:
        """Mark something in the loop that takes long (evaluation): the deadline allows for it."""
        began = time.monotonic()
        try:
            with self._beat.during(kind):
                yield
        finally:
            self._clock.busy_took(kind, time.monotonic() - began)

    # ---- the beginning ------------------------------------------------------------------

    @property
    def _rank0(self) -> bool:
        return self.rank == 0

    @property
    def _giver(self) -> Giver | None:
        """Gives the state of another program's checkpoint, where the run begins with one."""
        beginning = self._saver.beginning
        return None if beginning is None else beginning.giver

    def _take_over(self) -> None:
        """Be where the checkpoint was; the data's place is settled when they are known."""
        machines: list[Any] = []
        if self._saver.state is not None:
            progress = self._saver.progress
            self.global_step = progress["global_step"]
            self._place.take_over(progress)
            self._train_seconds = progress["train_seconds"]
            self._best.so_far = progress["best"]
            self._metrics.history = progress["history"]
            self._leave_out(self._back)
            machines = progress.get("machines", [])
        elif self._giver is not None:
            source = self._giver.source
            self.global_step, self._place.epoch = source.global_step, source.epoch
            for words in source.notes:
                self._say_changed(f"{source.path}: {words}")
        was = machines[self.rank] if self.rank < len(machines) else None
        if self._config.deterministic:
            machine.pin_threads(was)
        self._machine = machine.describe()
        if was is not None:
            for difference in machine.differences(was, self._machine):
                self._say_changed(f"{difference}: the bits may differ from here on")

    def _leave_out(self, back: RollBack | None) -> None:
        """Have the data left out that a roll-back names, unless a later link has done so."""
        committed = self._saver.committed
        if back is None or committed is None or committed.manifest.link > back.link:
            self._back = None
            return
        self._say_changed(self._place.leave_out(back, self.global_step))

    def _settled(
        self, name: str, value: Any, code: dict[str, Any], keep: Collection[str]
    ) -> dict[str, Any]:
        """Decide which settings of an optimizer or schedule hold; what is remembered as given."""
        override = self._config.override
        was = code
        if self._saver.state is not None:
            was = self._saver.progress.get("given", {}).get(name, code)
        elif self._giver is not None:
            # What its own code gave is not known; what its state holds is used.
            was = hyperparameters.laid_out(value) or code
        now = hyperparameters.overridden(code, override)
        unwanted = []
        for change in hyperparameters.changes(was, now):
            if hyperparameters.wanted(change, {*keep, *override}):
                hyperparameters.apply(value, change)
                self._say_changed(f"'{name}' takes over {change}")
            else:
                unwanted.append(change)
        if unwanted:
            words = ", ".join(map(str, unwanted))
            log.warning(
                "the code now gives '%s' %s; the checkpoint's values are used. To take the new "
                "ones: hpcresume resume --set lr=…, or session.register(…, keep=(%s,))",
                name,
                words,
                ", ".join(sorted({repr(change.key) for change in unwanted})),
            )
        return now if self._giver is not None else hyperparameters.without(now, unwanted)

    def _begin(self, loader: Any, accumulate: int) -> Feed:
        if self._feed is not None:
            raise UsageError("session.steps can be gone through once in a link.")
        if accumulate < 1:
            raise UsageError(f"accumulate is {accumulate}, and must be 1 or more.")
        seed = self._config.seed
        feed = feed_of(loader, seed=seed, rank=self.rank, world_size=self.world_size)
        self._feed = feed
        self._accumulate = accumulate
        if self._saver.state is not None:
            self._check_registered()
            self._find_place()
        elif self._giver is not None:
            self._say_given(self._giver)
        self._set_end()
        if self._rank0:
            self._clock.guess(self._contents.payload_bytes() / SLOW_DISK_BYTES_S)
        self._start_up.reached("restore")
        if self._berth.journal is not None:
            self._berth.journal.write(
                "started",
                step=self.global_step,
                max_steps=self.max_steps,
                start_up=self._start_up.to_json(),
            )
            objects = dict(self._contents.items()).values()
            monitor = Monitor(self._berth.link, self.device, objects)
            self._account.begin(feed, accumulate, monitor, self.global_step)
            self._publish()
        if self._config.deterministic and self.world_size > 1:
            for words in buckets.settle(dict(self._contents.items()).values()):
                self._say_changed(words)
        if any(_is_scaler(value) for _, value in self._contents.items()):
            # It tries scales that are too large, and skips the steps in which the norm tells so.
            self._metrics.watched = ("loss",)
        registered = self._contents
        self._sentinel = Sentinel(
            registered.items(), registered.generators, num_ranks=self.world_size
        )
        # Last of all: everything before may have drawn random numbers.
        self._restore_rng()
        self._saver.begun()
        self._step_began = self._asked_at = time.monotonic()
        self._beat.enter(FIRST_STEP)
        if self._rank0:
            self._account.show(self._now)
        return feed

    def _first_step_done(self) -> None:
        start = self._start_up
        start.done()
        seconds = round(start.seconds, 3)
        self._saver.note(
            "stepped", step=self.global_step, seconds=seconds, start_up=start.to_json()
        )
        if self._rank0:
            log.log(logging.INFO if seconds > LONG_S else logging.DEBUG, "%s", start.words())
        self._berth.warmed()

    def _check_registered(self) -> None:
        """Raise CheckpointError where the checkpoint holds what nobody has asked for."""
        assert self._saver.state is not None
        saved = {*self._saver.state["objects"], *self._saver.state["values"]}
        unused = saved - set(self._contents.names())
        if unused:
            raise CheckpointError(
                f"checkpoint-{self.global_step} holds {', '.join(sorted(unused))}, which the "
                f"training function did not register before session.steps."
            )

    def _say_given(self, giver: Giver) -> None:
        """Say what of another program's checkpoint is used, and what is not."""
        log.info("taken over: %s", ", ".join(giver.given) or "nothing")
        if giver.unused():
            self._say_changed(f"{giver.source.path}: left out: {', '.join(giver.unused())}")
        if not giver.given:
            raise CheckpointError(
                f"{giver.source.path} has nothing for what the training function registers: "
                f"register its model before session.steps."
            )

    def _loader_now(self) -> dict[str, Any]:
        assert self._feed is not None
        return {**self._feed.fingerprint(), "accumulate": self._accumulate}

    def _find_place(self) -> None:
        """Go on in the data where the checkpoint was, as far as they are the same."""
        said = self._place.go_on(
            self._saver.progress,
            {**self._loader_now(), "world_size": self.world_size},
            rank=self.rank,
            accept=self._config.accept,
        )
        for words in said:
            self._say_changed(words)

    def _set_end(self) -> None:
        """How many steps there are; a schedule that was laid out for another number is named."""
        assert self._feed is not None
        micro, epochs = self._feed.num_batches(), self._config.epochs
        by_epochs = None
        if micro is not None and epochs is not None:
            left = self._place.steps_left(micro, self._accumulate, epochs)
            by_epochs = self.global_step + left
        limits = [limit for limit in (self._config.max_steps, by_epochs) if limit is not None]
        self.max_steps = min(limits) if limits else None
        was = None if self._saver.state is None else self._saver.progress["max_steps"]
        if was is None or was == self.max_steps:
            return
        self._say_changed(f"the end moves from step {was} to {self.max_steps or 'an unknown one'}")
        for name, value in self._contents.items():
            horizon = hyperparameters.horizon(value)
            if horizon is not None:
                log.warning(
                    "'%s' was laid out with %s, and keeps it: beyond that it does what it does at "
                    "its end. To lay it out anew: session.register(…, keep=(%r,))",
                    name,
                    horizon,
                    horizon.partition("=")[0],
                )

    def _restore_rng(self) -> None:
        if self._saver.images is None:
            return
        states = self._saver.images.json(contents.RNG)
        if self.rank < len(states):
            for words in rng.restore(states[self.rank], self._contents.generators):
                self._say_changed(words)
        else:
            seed_everything(mixed_seed(self._config.seed, self.global_step, self.rank))
            self._say_changed(f"rank {self.rank} is new: it draws random numbers of its own")

    def _say_changed(self, words: str) -> None:
        """Say and journal what is not as in an uncut run."""
        log.warning("%s", words)
        self._saver.note("changed", step=self.global_step, change=words)

    # ---- step boundaries ----------------------------------------------------------------

    def _finished(self) -> bool:
        if self.max_steps is not None and self.global_step >= self.max_steps:
            return True
        return self._config.epochs is not None and self.epoch >= self._config.epochs

    def _boundary(self) -> None:
        """A step is over: count it."""
        now = time.monotonic()
        took = now - self._step_began
        self._step_began = now
        self._clock.step_took(took)
        self._took_s = took
        self._train_seconds += took
        self.global_step += 1
        self._beat.step(self.global_step)
        if not self._start_up.over:
            self._first_step_done()
        self._metrics.end_step(self.global_step, self.epoch, self._place.position)
        if self._last:
            self._place.end_epoch()
        finished = self._finished()
        if finished:
            self._beat.enter(END)
        if finished or self._last:
            self._say_boundary(finished)
        if finished:
            self._agreement.settle()
            self._save("end")

    def _look_after(self) -> None:
        """Save, or end the link, where it is due."""
        now = self._step_began
        if self.global_step == self._berth.stop_at:
            self._stop(f"it was to stop at step {self.global_step}")
        due = self._cadence.by_count(self.global_step, epoch_ended=self._last)
        if due is None and self._best.is_new:
            due = "best"
        asked = None
        if not self._saver.settle():
            since = now - self._saver.saved_at
            asked = self._save_asked or self._cadence.by_clock(since, self._saver.auto_s)
        why_stop = self._stops.why(now)
        stop, save = self._agreement.exchange(
            self.global_step,
            stop=why_stop is not None,
            save=asked is not None,
            step_s=self._took_s,
        )
        if stop:
            self._stop(why_stop or "another rank asked for the stop")
        if due or save:
            with self._beat.during(SAVE):
                self._save(due or asked or "asked")
            self._step_began = time.monotonic()
        self._best.end_step()
        if self._rank0:
            said = self.global_step >= self._account.line_due
            if said or now - self._published_at >= _PUBLISH_S:
                self._metrics.flush()
                self._account.look(now, self.global_step, self._train_seconds)
                if said or self._account.is_line_overdue(now, self.global_step, self.max_steps):
                    self._account.say_step(self._now())
                if now - self._published_at >= _PUBLISH_S:
                    self._publish()
                self._step_began = time.monotonic()
        if self._metrics.bad is not None:
            self._stops.ask("a metric is not finite")
        if self._took_s >= self._sentinel.from_s:
            self._sentinel.remember(self.global_step, self._mark)

    def _stop_at_once_if_asked(self) -> None:
        """A link that starts too late, or is stopped while it starts, does no step."""
        if self._finished():
            return
        if self._berth.stop_at is not None and self.global_step >= self._berth.stop_at:
            self._stop(f"it was to stop at step {self._berth.stop_at}")
        asked = [reason for reason in self._ranks.gather(self._stops.look()) if reason]
        reason = self._ranks.broadcast(asked[0] if asked else None)
        if reason is not None:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        self._beat.enter(STOP)
        self._agreement.settle()
        self._check_finite()
        if self._berth.journal is not None:
            self._berth.journal.write("stop_asked", step=self.global_step, reason=reason)
        self._save("stop")
        self._saver.wait()
        if self._rank0:
            self._publish()
        self._ranks.barrier()
        raise LinkEnds(reason)

    # ---- saving -------------------------------------------------------------------------

    def _check_finite(self) -> None:
        """Leave, on every rank, where one of them has logged what is not a finite number.

        Raises NonFinite; or LinkEnds, where the next link is to go back.
        """
        verdict = self._guard.verdict(self.global_step)
        if isinstance(verdict, RollBack):
            self._ranks.barrier()
            raise LinkEnds(verdict.reason)
        if verdict is not None:
            raise verdict

    def _save(self, reason: str, mark: _Mark | None = None) -> None:
        """Save the state of this step boundary; on every rank, by the same step.

        Of a boundary that was gone back to, the feed has moved on since: its `mark` tells.
        """
        self._save_asked = None
        if self.global_step == self._saver.tried_step:
            return
        if reason in _PATIENT and not self._ranks.broadcast(self._can_save()):
            self._save_asked = reason if self._rank0 else None
            return
        self._check_finite()
        # On every rank alike, also where rank 0's disk refuses: the gather needs them all.
        self._saver.tried_step = self.global_step
        assert self._feed is not None
        own = rng.capture(self._contents.generators)
        parts = self._ranks.gather(
            {
                "rng": own,
                "data": self._feed.state() if mark is None else mark.data,
                "machine": self._machine,
            }
        )
        if self._rank0:
            self._save_whole(reason, parts)
        else:
            self._saver.save_share()
        # A state_dict() may draw random numbers; a save must leave no trace in the training.
        rng.restore(own, self._contents.generators)

    def _save_whole(self, reason: str, parts: list[dict[str, Any]]) -> None:
        """Rank 0's part of a save; `parts` are what the ranks have each of their own."""
        progress = {
            **self._progress(),
            "data": [part["data"] for part in parts],
            "machines": [part["machine"] for part in parts],
        }
        self._saver.save(
            progress,
            [part["rng"] for part in parts],
            lambda: self._trainer_state(False),
            metric=self._best.now,
            record={
                "reason": reason,
                "step_s": round(self._took_s, 4),
                # Later links learn from it how long things take.
                "pace": self._beat.paces(),
            },
        )

    def _mark(self) -> _Mark:
        assert self._feed is not None
        # Some feeds go on in the very object that they gave.
        data = copy.deepcopy(self._feed.state())
        return _Mark(self.epoch, self._place.position, self._best.so_far, data)

    def _save_in_emergency(self) -> None:
        """Commit the last step boundary, where a failed step has left it as it was; else say why.

        The batch that was begun is not in it: the next link takes it again.
        """
        self._saver.wait()
        if self._feed is None or self.global_step == self._saver.tried_step:
            return
        refusal = self._sentinel.refusal(self.global_step)
        if refusal is not None:
            self._say_unsaved(refusal)
            return
        mark = self._sentinel.go_back()
        self._place.epoch, self._place.position = mark.epoch, mark.position
        self._best.so_far, self._best.now = mark.best, None
        with self._beat.during(SAVE):
            self._save("emergency", mark)
            self._saver.wait()

    def _say_unsaved(self, why: str) -> None:
        log.warning("step %d is not saved in spite of the failure: %s", self.global_step, why)
        self._saver.note("save_failed", step=self.global_step, reason=f"emergency: {why}")

    def _can_save(self) -> bool:
        """Whether a save that can wait may begin: none is being written, and it has the time."""
        return not self._saver.settle() and self._clock.has_time_for_a_save()

    def _progress(self) -> dict[str, Any]:
        return {
            "global_step": self.global_step,
            "epoch": self.epoch,
            "position": self._place.position,
            "world_size": self.world_size,
            "max_steps": self.max_steps,
            "train_seconds": self._train_seconds,
            "best": self._best.so_far,
            "loader": self._loader_now(),
            "given": self._given,
            "skipped": self._place.left_out,
        }

    def _trainer_state(self, completed: bool) -> dict[str, Any]:
        micro = None if self._feed is None else self._feed.num_batches()
        best = self._best.so_far
        return trainer_state(
            global_step=self.global_step,
            total_steps=self.max_steps,
            epoch=self.epoch + (self._place.position / micro if micro else 0.0),
            num_train_epochs=self._config.epochs,
            best_metric=None if best is None else best["value"],
            best_step=None if best is None else best["step"],
            history=self._metrics.history,
            completed=completed,
            train_seconds=self._train_seconds,
            link=self._berth.link.number,
            num_ranks=self.world_size,
        )

    def _publish(self, completed: bool = False) -> None:
        """Rewrite trainer_state.json: progress for people, which may be lost but never torn."""
        self._published_at = time.monotonic()
        state = self._trainer_state(completed)
        latest, history = self._metrics.latest, state["log_history"]
        if latest and (not history or history[-1]["step"] != latest["step"]):
            state["log_history"] = [*history, latest][-100:]
        # In front: the last lines of the file are the words that `tail` shows.
        state = {"progress": self._now().to_json(), **state}
        try:
            files.write_json(self._berth.run.trainer_state, state, sync=completed)
        except OSError as error:
            log.debug("trainer_state.json cannot be written: %s", error)

    # ---- the end ------------------------------------------------------------------------

    def _complete(self) -> None:
        """The training function has returned: commit the last step, leave the finished model."""
        self._beat.enter(END)
        if self._feed is None:
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
        self._saver.wait()
        self._metrics.flush()
        if self._berth.journal is not None:
            last = self._saver.committed
            if last is None or last.step != self.global_step:
                raise Unavailable(
                    f"Step {self.global_step} could not be saved, so the run is not complete; "
                    f"the next link trains from the last checkpoint again."
                )
            self._saver.finish()
            self._berth.journal.write("completed", step=self.global_step, epoch=self.epoch)
            self._publish(completed=True)
            self._saver.tidy()
        self._ranks.barrier()

    def _abandon(self) -> None:
        """Training has failed, by the exception that is being handled: save what still can be.

        A save that was begun is worth its end all the same.
        """
        error = sys.exc_info()[1]
        try:
            if isinstance(error, Exception) and not isinstance(error, HpcResumeError):
                self._save_in_emergency()
        except (Exception, LinkEnds) as failure:
            # The training's own exception is what has to be told.
            self._say_unsaved(f"{type(failure).__name__}: {failure}")
        finally:
            self._saver.close()

    def _close(self) -> None:
        self._saver.close()
        self._account.close()
        self._metrics.close()
        self._ranks.close()

    # ---- words --------------------------------------------------------------------------

    def _say_epoch(self) -> None:
        if self._rank0:
            continued = self._place.position > 0
            self._account.epoch_begins(self.epoch, self._now(), continued=continued)

    def _say_boundary(self, finished: bool) -> None:
        """Tell of the end of an epoch, or of all steps."""
        self._metrics.flush()
        if self._rank0:
            now = self._now()
            if finished:
                self._account.say_step(now)
            if self._last:
                self._account.epoch_ends(self.epoch - 1, now)

    def _now(self) -> Progress:
        """How far this rank is; from any thread."""
        step_s = time.monotonic() - self._step_began if self._in_body else 0.0
        return self._account.now(
            step=self.global_step,
            total_steps=self.max_steps,
            epoch=self.epoch,
            position=self._place.position - self._in_body,
            train_s=self._train_seconds + step_s,
        )


def _is_scaler(value: Any) -> bool:
    return isinstance(value, torch.amp.GradScaler) and value.is_enabled()
