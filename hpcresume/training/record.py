"""The metric log of a link, and trainer_state.json."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hpcresume import files
from hpcresume.errors import UsageError
from hpcresume.run_dir import LinkDir

log = logging.getLogger(__name__)

_HISTORY = 100
#: What each line begins with.
_OWN = frozenset({"step", "epoch"})
#: What must be a finite number in every step that it is logged in.
WATCHED = ("loss", "grad_norm")
#: How many steps a rank that writes no log keeps before it looks at them.
_UNWRITTEN_STEPS = 64


class BadStep(NamedTuple):
    """A step in which a watched metric was not finite; `position` counts its last micro-batch."""

    metric: str
    value: str
    step: int
    epoch: int
    position: int


class MetricLog:
    """One line a step in metrics.jsonl, written in batches.

    A GPU's tensors are kept as they are until a flush: turning each into a number at once would
    make the CPU wait at every step. A value logged several times in one step (gradient
    accumulation) is averaged. Without a link, only what is `watched` is kept, and never written.
    """

    def __init__(self, link: LinkDir | None) -> None:
        self._lines = None if link is None else files.LineWriter(link.metrics)
        self._step: dict[str, Any] = {}
        self._waiting: list[tuple[int, int, int, dict[str, Any]]] = []
        self.watched: tuple[str, ...] = WATCHED
        self.bad: BadStep | None = None
        """The first step that was found not to be finite, as far as the log has been flushed."""
        self.latest: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        """The lines at the last saves, bounded."""

    def add(self, values: Mapping[str, Any]) -> None:
        """Log values for the step in progress."""
        if self._lines is None:
            values = {name: values[name] for name in self.watched if name in values}
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

    def end_step(self, step: int, epoch: int, position: int = 0) -> None:
        """The step is over, behind so many micro-batches of its epoch; what was logged is its."""
        if self._step:
            self._waiting.append((step, epoch, position, self._step))
            self._step = {}
            if self._lines is None and len(self._waiting) >= _UNWRITTEN_STEPS:
                self.flush()

    def remember(self) -> None:
        """Take the latest line into the history, if it is not there."""
        if self.latest and (not self.history or self.history[-1]["step"] != self.latest["step"]):
            self.history = [*self.history, self.latest][-_HISTORY:]

    def flush(self) -> None:
        """Write what waits; the latest line is in `latest` then.

        What a full disk refuses is kept for the next time: training does not end by it.
        """
        if not self._waiting:
            return
        lines = [
            {"step": step, "epoch": epoch, **{k: _mean(v) for k, v in values.items()}}
            for step, epoch, _, values in self._waiting
        ]
        if self.bad is None:
            self.bad = self._first_bad(lines)
        self._waiting = []
        if self._lines is None:
            return
        self.latest = lines[-1]
        try:
            self._lines.append(*lines)
        except OSError as error:
            log.warning("the metrics wait in memory, their file cannot be written: %s", error)

    def _first_bad(self, lines: list[dict[str, Any]]) -> BadStep | None:
        """The first of the waiting steps, as their lines are, that is not finite."""
        if all(_all_finite(lines, name) for name in self.watched):
            return None
        for (step, epoch, position, _), line in zip(self._waiting, lines, strict=True):
            for name in self.watched:
                if not _is_finite(line.get(name)):
                    return BadStep(name, str(line[name]), step, epoch, position)
        return None

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


def _all_finite(lines: list[dict[str, Any]], name: str) -> bool:
    """Quick, because every step passes through it; false as well where one value is no number."""
    try:
        return all(map(math.isfinite, [line[name] for line in lines if name in line]))
    except (TypeError, OverflowError):
        return False


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


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
