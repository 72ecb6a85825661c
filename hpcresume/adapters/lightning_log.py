"""What a Lightning training tells of itself: progress and metrics, without waiting for a GPU."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from hpcresume.adapters.guest import Guest

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Told:
    """The metrics that callbacks see, every so many steps; numbers are made of them later."""

    def __init__(self, guest: Guest, *, every_steps: int) -> None:
        self._guest = guest
        self._every_steps = max(1, every_steps)
        self._last: dict[str, Any] = {}
        self._step = 0
        self._waiting: list[tuple[int, float, dict[str, torch.Tensor], Any]] = []

    def taken(self, trainer: Trainer) -> list[str]:
        """Which of the metrics that callbacks see have been taken: for a checkpoint."""
        return [k for k, v in trainer.callback_metrics.items() if v is self._last.get(k)]

    def begin(self, trainer: Trainer, taken: Collection[str]) -> None:
        """Go on behind a checkpoint: what was taken before it is not taken again."""
        self._step = trainer.global_step
        self._last = {k: v for k, v in trainer.callback_metrics.items() if k in taken}

    def progress(self, trainer: Trainer) -> None:
        """Where the training is."""
        batches = trainer.num_training_batches
        done = trainer.fit_loop.batch_idx + 1
        part = done / batches if batches and math.isfinite(batches) else 0.0
        self._guest.progress(
            trainer.global_step,
            max_steps=_max_steps(trainer),
            epoch=trainer.current_epoch + part,
            epochs=trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None,
        )

    def step(self, trainer: Trainer) -> None:
        """A batch is over: now and then its metrics are taken, and those of before told."""
        step = trainer.global_step
        if step != self._step and step % self._every_steps == 0:
            self._step = step
            self.flush()
            self.metrics(trainer)

    def metrics(self, trainer: Trainer) -> None:
        """Take the metrics that are new; on all ranks, since some are reduced over them."""
        values = {k: v for k, v in trainer.callback_metrics.items() if v is not self._last.get(k)}
        self._last |= values
        if not values or self._guest.rank:
            return
        for optimizer in trainer.optimizers[:1]:
            # Not every optimizer has one.
            if (rate := optimizer.param_groups[0].get("lr")) is not None:
                values["learning_rate"] = torch.as_tensor(rate, dtype=torch.float64)
        on_cpu, event = _to_cpu({k: v for k, v in values.items() if v.numel() == 1})
        self._waiting.append((trainer.global_step, float(trainer.current_epoch), on_cpu, event))

    def flush(self) -> None:
        """Tell what was taken."""
        waiting, self._waiting = self._waiting, []
        for step, epoch, values, event in waiting:
            if event is not None:
                event.synchronize()
            self._guest.metrics(step, epoch, {name: float(v) for name, v in values.items()})


def _to_cpu(values: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    """Copies that will be there when the event has passed; the GPU is not waited for."""
    if all(value.device.type != "cuda" for value in values.values()):
        return {name: value.detach().clone() for name, value in values.items()}, None
    copies = {}
    for name, value in values.items():
        copies[name] = torch.empty_like(value, device="cpu", pin_memory=True)
        copies[name].copy_(value.detach(), non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copies, event


def _max_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole training; None where nobody knows."""
    if trainer.max_steps > 0 and (trainer.max_epochs or -1) < 0:
        return trainer.max_steps
    batches = trainer.estimated_stepping_batches
    return int(batches) if math.isfinite(batches) and batches > 0 else None
