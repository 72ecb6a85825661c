"""What a session tells of its way: how far it is, when a line is due, how the machine does.

Rank 0's session holds one. All that it is asked at every step is one comparison (`line_due`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hpcresume.training.berth import Berth
from hpcresume.training.heartbeat import END, STEP
from hpcresume.training.loader import Feed
from hpcresume.training.monitor import Monitor
from hpcresume.training.progress import (
    Progress,
    clock,
    epoch_text,
    learning_rate,
    metric_text,
    number,
    progress_line,
)
from hpcresume.training.record import MetricLog

#: In the name of the training: "train" is the word that people know.
log = logging.getLogger("hpcresume.session")

#: Where nothing is drawn live, a line comes at the latest after the longer of these two.
_LINE_S, _LINE_SHARE = 30.0, 0.01


class Account:
    """The way of one rank through one link."""

    def __init__(self, berth: Berth, metrics: MetricLog) -> None:
        self._berth = berth
        self._metrics = metrics
        self._monitor: Monitor | None = None
        self._every_steps = berth.config.log.every_steps
        self._epochs = berth.config.epochs
        self._steps_per_epoch: int | None = None
        self._samples_per_step: float | None = None
        self._accumulate = 1
        self._epoch_at = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._line_at, self._line_step = time.monotonic(), 0
        self.waited_s = 0.0
        """How long training has waited for data in this link."""
        self.line_due = 0
        """The step at which the next line is due."""

    def begin(self, feed: Feed, accumulate: int, monitor: Monitor, step: int) -> None:
        """What is registered and what it goes through are known; a step follows."""
        self._accumulate = accumulate
        self._monitor = monitor
        micro = feed.num_batches()
        self._steps_per_epoch = None if micro is None else -(-micro // accumulate)
        size = feed.fingerprint().get("batch_size")
        if isinstance(size, int):
            self._samples_per_step = size * accumulate * self._berth.ranks.world_size
        self.line_due = step + 1

    def show(self, look: Callable[[], Progress]) -> None:
        """Have the progress shown that `look` gives at any time, where somebody draws it."""
        if self._berth.show is not None:
            self._berth.show(look)

    def now(
        self, *, step: int, total_steps: int | None, epoch: int, position: int, train_s: float
    ) -> Progress:
        """How far it is; `epoch` counts from 0, `position` the epoch's micro-batches that are done.

        From any thread.
        """
        now = time.monotonic()
        steps_s = self._berth.clock.steps_s()
        epochs, per_epoch = self._epochs, self._steps_per_epoch
        if epochs is None and total_steps and per_epoch:
            epochs = -(-total_steps // per_epoch)
        done = position // self._accumulate
        if epochs is not None and epoch >= epochs:
            epoch, done = epochs - 1, per_epoch or 0
        kind, since = self._berth.beat.doing
        busy = "" if kind in (STEP, END) else kind
        return Progress(
            step=step,
            total_steps=total_steps,
            epoch=epoch + 1,
            epochs=epochs,
            step_in_epoch=done,
            steps_per_epoch=per_epoch,
            epoch_s=round(now - self._epoch_at, 3),
            train_s=round(train_s, 3),
            steps_per_s=len(steps_s) / max(sum(steps_s), 1e-9),
            left_s=self._left_s(now, step, total_steps),
            samples_per_step=self._samples_per_step,
            busy=busy,
            busy_s=round(now - since, 3) if busy else 0.0,
            busy_usual_s=self._berth.clock.longest_s(busy),
            metrics=self._metrics.latest,
            monitor={} if self._monitor is None else self._monitor.latest,
        )

    def _left_s(self, now: float, step: int, total_steps: int | None) -> float | None:
        """By the rate since the first step, with all saves and evaluations between."""
        if total_steps is None or self._first is None or step <= self._first[1]:
            return None
        return (total_steps - step) * (now - self._first[0]) / (step - self._first[1])

    # ---- lines --------------------------------------------------------------------------

    def epoch_begins(self, epoch: int, total: Progress, *, continued: bool) -> None:
        """Say so; `epoch` counts from 0."""
        self._epoch_at = time.monotonic()
        words = epoch_text(epoch + 1, total.epochs)
        if continued:
            where = f"/{total.steps_per_epoch}" if total.steps_per_epoch else ""
            log.info("━━━ %s ━━━ goes on at step %d%s of it", words, total.step_in_epoch, where)
        else:
            log.info("━━━ %s ━━━", words)

    def epoch_ends(self, epoch: int, total: Progress) -> None:
        """Say so, with loss and learning rate of its last step; the metrics are flushed."""
        values = dict(self._metrics.latest)
        loss, rate = number(values.get("loss")), learning_rate(values)
        words = [] if loss is None else [f"loss {loss:.4f}"]
        if rate is None and self._monitor is not None:
            rate = self._monitor.learning_rate()
        words += [] if rate is None else [f"lr {rate:.6f}"]
        words += [clock(time.monotonic() - self._epoch_at)]
        log.info("━━━ %s ━━━ %s", epoch_text(epoch + 1, total.epochs), " · ".join(words))

    def is_line_overdue(self, now: float, step: int, total_steps: int | None) -> bool:
        """Whether those who see nothing but lines have seen none for long."""
        if self._berth.show is not None or now - self._line_at < _LINE_S:
            return False
        return total_steps is None or step - self._line_step >= _LINE_SHARE * total_steps

    def say_step(self, progress: Progress) -> None:
        """The line of a step; the metrics are flushed."""
        step = progress.step
        self._line_at, self._line_step = time.monotonic(), step
        self.line_due = step - step % self._every_steps + self._every_steps
        if self._first is None:
            self._first = self._line_at, step
        log.info("%s", progress_line(progress))

    def best(self, name: str, value: float, before: float | None) -> None:
        """Say that a metric is the best so far."""
        was = "" if before is None else f" (before: {metric_text(name, before)})"
        log.info("best so far: %s %s%s", name, metric_text(name, value), was)

    # ---- the machine --------------------------------------------------------------------

    def look(self, now: float, step: int, train_s: float) -> None:
        """Look at the machine, if it is time."""
        if self._monitor is not None and self._monitor.due(now):
            self._monitor.look(
                now,
                step=step,
                steps_s=self._berth.clock.steps_s(),
                train_s=train_s,
                waited_s=self.waited_s,
                metrics=self._metrics.latest,
            )

    def close(self) -> None:
        """Give back what it holds."""
        if self._monitor is not None:
            self._monitor.close()
