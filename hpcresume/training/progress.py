"""How far a rank is: what its session knows for those who look on, and how that reads as a line.

Taken from the session's thread or any other; published with trainer_state.json, from where other
processes read it. Used by `display`; never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

#: What a learning rate is called in what people log.
_RATES = ("lr", "learning_rate")
#: What is told in another way: tokens by their rate.
_NOT_SHOWN = frozenset({"step", "epoch", "tokens"})
#: Below it, a learning rate with six decimals says too little.
_SMALL_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training stands at a moment; durations are seconds."""

    step: int
    total_steps: int | None = None
    epoch: int = 1
    """The epoch in progress, from 1."""
    epochs: int | None = None
    step_in_epoch: int = 0
    """Steps of this epoch that are done."""
    steps_per_epoch: int | None = None
    epoch_s: float = 0.0
    """Since this epoch began, or since this link began in its midst."""
    train_s: float = 0.0
    """What all links together have trained."""
    steps_per_s: float = 0.0
    """Over the last steps."""
    left_s: float | None = None
    """To the last step, at the rate of this link so far; None where that is not known."""
    samples_per_step: float | None = None
    busy: str = ""
    """What goes on besides steps (`session.busy`, a save, a wait); empty in a step."""
    busy_s: float = 0.0
    busy_usual_s: float = 0.0
    """How long that took at its longest in this link; 0 where it is the first time."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What was logged last."""
    monitor: Mapping[str, Any] = field(default_factory=dict)
    """The newest look at the machine; see `monitor`."""

    def to_json(self) -> dict[str, Any]:
        """As trainer_state.json holds it."""
        return asdict(self)

    @property
    def epoch_left_s(self) -> float | None:
        """To the epoch's end, at the rate of the whole."""
        if self.left_s is None or not self.steps_per_epoch or not self.total_steps:
            return None
        left = self.total_steps - self.step
        return self.left_s * self.steps_left_in_epoch / left if left > 0 else 0.0

    @property
    def steps_left_in_epoch(self) -> int:
        """Which may be fewer than the data have, where the training ends before."""
        left = max(0, (self.steps_per_epoch or 0) - self.step_in_epoch)
        return left if self.total_steps is None else min(left, self.total_steps - self.step)

    @property
    def per_second(self) -> tuple[float, str] | None:
        """Tokens a second where the tokens of a step are logged, else samples, else None."""
        if not self.steps_per_s:
            return None
        tokens = number(self.metrics.get("tokens"))
        if tokens is not None and tokens > 0:
            return tokens * self.steps_per_s, "tokens/s"
        if self.samples_per_step:
            return self.samples_per_step * self.steps_per_s, "samples/s"
        return None

    @property
    def gpu_memory(self) -> tuple[float, float] | None:
        """Bytes that the GPU's memory holds of this rank, and that there are."""
        held = number(self.monitor.get("gpu_reserved_bytes"))
        whole = number(self.monitor.get("gpu_total_bytes"))
        return (held, whole) if held is not None and whole else None


def from_json(value: Any) -> Progress | None:
    """The reverse of `to_json`; None for what is none of ours, and defaults for odd values."""
    if not isinstance(value, dict):
        return None
    default = Progress(step=-1)
    found: dict[str, Any] = {}
    for each in fields(Progress):
        given, usual = value.get(each.name), getattr(default, each.name)
        if isinstance(usual, (str, dict)):
            fits = isinstance(given, type(usual))
        else:
            fits = (number(given) or 0) >= 0 and number(given) is not None
            if fits and each.name in _WHOLE:
                given = int(given)  # type: ignore[arg-type]
        if fits:
            found[each.name] = given
    return Progress(**found) if "step" in found else None


_WHOLE = frozenset({"step", "total_steps", "epoch", "epochs", "step_in_epoch", "steps_per_epoch"})


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    usable = isinstance(value, (int, float)) and type(value) is not bool
    return value if usable and abs(value) < 1e18 and math.isfinite(value) else None


def progress_line(now: Progress) -> str:
    """`step 500/10000 (5%): loss 2.1234, lr 0.000300 · 12.3 steps/s · 0:12:34 left · 8.5GB/16GB`"""
    total = f"/{now.total_steps} ({percent(now.step, now.total_steps)})" if now.total_steps else ""
    values = ", ".join(
        f"{name} {metric_text(name, value)}" for name, value in shown_metrics(now.metrics)
    )
    parts = [f"step {now.step}{total}" + (f": {values}" if values else "")]
    if now.steps_per_s:
        parts.append(rate_text(now.steps_per_s, "steps/s"))
    if now.per_second is not None:
        parts.append(rate_text(*now.per_second))
    if now.left_s is not None and now.step != now.total_steps:
        parts.append(f"{clock(now.left_s)} left")
    if now.gpu_memory is not None:
        parts.append(memory_text(*now.gpu_memory))
    return " · ".join(parts)


def epoch_text(epoch: int, epochs: int | None) -> str:
    """`Epoch 1/10`"""
    return f"Epoch {epoch}/{epochs}" if epochs else f"Epoch {epoch}"


def shown_metrics(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The numbers among logged values, in the order that they were logged in."""
    return [
        (name, value)
        for name, value in metrics.items()
        if name not in _NOT_SHOWN and isinstance(value, (int, float)) and type(value) is not bool
    ]


def learning_rate(metrics: Mapping[str, Any]) -> float | None:
    """The learning rate among logged values, if there is one."""
    return next((number(metrics[name]) for name in _RATES if name in metrics), None)


def metric_text(name: str, value: float) -> str:
    """A logged number: a loss with four decimals, a learning rate with six."""
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if name in _RATES or name.endswith("_lr"):
        return f"{value:.6f}" if value == 0 or abs(value) >= _SMALL_RATE else f"{value:.2e}"
    if "loss" in name and 1e-3 <= abs(value) < 1e6:
        return f"{value:.4f}"
    return f"{value:.4g}"


def percent(done: float, total: float) -> str:
    """`15%`; 100% only where all is done."""
    return f"{min(99, int(100 * done / total)) if done < total else 100}%"


def rate_text(per_s: float, unit: str) -> str:
    """`12.3 steps/s`, `41.2k tokens/s`, and `3.1 s/step` where a step takes long."""
    if unit == "steps/s" and 0 < per_s < 0.5:
        return f"{1 / per_s:.1f} s/step"
    for limit, letter in ((1e6, "M"), (1e4, "k")):
        if per_s >= limit:
            return f"{per_s / (1e6 if letter == 'M' else 1e3):.1f}{letter} {unit}"
    return f"{per_s:.0f} {unit}" if per_s >= 100 else f"{per_s:.1f} {unit}"


def memory_text(used: float, whole: float) -> str:
    """`8.5GB/16GB`"""
    return f"{gigabytes(used)}GB/{gigabytes(whole)}GB"


def gigabytes(num_bytes: float) -> str:
    """A number of 10^9 bytes with as many digits as it takes: 0.05, 8.5, 16."""
    size = num_bytes / 1e9
    if size < 0.1:
        return f"{size:.2f}"
    return f"{size:.1f}".removesuffix(".0") if size < 100 else f"{size:.0f}"


def clock(seconds: float) -> str:
    """1:05:09"""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
