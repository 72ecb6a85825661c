"""The metric log of a link, and trainer_state.json."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch

from hpcresume import files
from hpcresume.errors import UsageError
from hpcresume.run_dir import LinkDir

log = logging.getLogger(__name__)

_HISTORY = 100
#: What each line begins with.
_OWN = frozenset({"step", "epoch"})


class MetricLog:
    """One line a step in metrics.jsonl, written in batches.

    A GPU's tensors are kept as they are until a flush: turning each into a number at once would
    make the CPU wait at every step. A value logged several times in one step (gradient
    accumulation) is averaged.
    """

    def __init__(self, link: LinkDir | None) -> None:
        self._lines = None if link is None else files.LineWriter(link.metrics)
        self._step: dict[str, Any] = {}
        self._waiting: list[tuple[int, int, dict[str, Any]]] = []
        self.latest: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        """The lines at the last saves, bounded."""

    def add(self, values: Mapping[str, Any]) -> None:
        """Log values for the step in progress."""
        if self._lines is None:
            return
        step = self._step
        for name, value in values.items():
            if name in _OWN:
                raise UsageError(f"session.log({name}=…): {name} is logged without asking.")
            kept = value if type(value) is float else _kept(name, value)
            if name not in step:
                step[name] = kept
            elif type(step[name]) is _Several:
                step[name].append(kept)
            else:
                step[name] = _Several((step[name], kept))

    def end_step(self, step: int, epoch: int) -> None:
        """The step is over; what was logged belongs to it."""
        if self._step:
            self._waiting.append((step, epoch, self._step))
            self._step = {}

    def remember(self) -> None:
        """Take the latest line into the history, if it is not there."""
        if self.latest and (not self.history or self.history[-1]["step"] != self.latest["step"]):
            self.history = [*self.history, self.latest][-_HISTORY:]

    def flush(self) -> None:
        """Write what waits; the latest line is in `latest` then.

        What a full disk refuses is kept for the next time: training does not end by it.
        """
        if self._lines is None or not self._waiting:
            return
        lines = [
            {"step": step, "epoch": epoch, **{k: _mean(v) for k, v in values.items()}}
            for step, epoch, values in self._waiting
        ]
        self._waiting = []
        self.latest = lines[-1]
        try:
            self._lines.append(*lines)
        except OSError as error:
            log.warning("the metrics wait in memory, their file cannot be written: %s", error)

    def written(self) -> int:
        """Flush; the length of the log in bytes. Raises OSError where the disk refuses."""
        self.flush()
        return 0 if self._lines is None else self._lines.flush()

    def sync(self) -> None:
        """Make what is written survive a power loss; from any thread. Raises OSError."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        """Flush and give the file back."""
        if self._lines is not None:
            self.flush()
            self._lines.close()


class _Several(list[Any]):
    """The values of one name in one step; a list that was logged is a plain one."""


def _mean(value: Any) -> Any:
    if type(value) is not _Several:
        return value if type(value) is float else _number(value)
    numbers = [_number(each) for each in value]
    if not all(isinstance(n, (int, float)) for n in numbers):
        return numbers[-1]
    return math.fsum(numbers) / len(numbers)


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value


def _kept(name: str, value: Any) -> Any:
    """A value as it is now; numbers and arrays of NumPy become Python's."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if value.device.type != "cpu" else _number(value)
    if isinstance(value, (bool, int, float, str)):
        return value
    tolist = getattr(value, "tolist", None)
    plain = tolist() if callable(tolist) else value
    try:
        files.to_json(plain)
    except (TypeError, ValueError):
        raise UsageError(
            f"session.log({name}=…): a {type(value).__name__} cannot be logged, only numbers, "
            f"texts, tensors, and lists of them."
        ) from None
    return plain


def trainer_state(
    *,
    global_step: int,
    total_steps: int | None,
    epoch: float,
    num_train_epochs: int | None,
    best_metric: float | None,
    best_step: int | None,
    history: list[dict[str, Any]],
    completed: bool,
    train_seconds: float,
    link: int,
    num_ranks: int,
) -> dict[str, Any]:
    """The content of trainer_state.json, in Hugging Face's words.

    The progress stands at the end, so that `tail` shows it.
    """
    return {
        "best_metric": best_metric,
        "best_model_checkpoint": None if best_step is None else f"checkpoint-{best_step}",
        "is_world_process_zero": True,
        "log_history": history[-_HISTORY:],
        "num_train_epochs": num_train_epochs,
        "train_seconds": round(train_seconds, 3),
        "link": link,
        "world_size": num_ranks,
        "max_steps": total_steps,
        "epoch": round(epoch, 6),
        "global_step": global_step,
        "total_steps": total_steps,
        "completed": completed,
    }
