"""What a rank of a Lightning training depends on, and Lightning's checkpoints leave out: as JSON.

The random generators; the metrics that callbacks see; and, in mid-epoch, what the epoch's metrics
have added up so far, those of `self.log(on_epoch=True)` and those of torchmetrics in the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hpcresume.checkpoint import rng

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def capture(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """All of it, as it is now. Waits for a GPU that is still at work."""
    return {
        "rng": rng.capture(),
        "seen": {name: _to_json(value) for name, value in trainer.callback_metrics.items()},
        "sums": {key: _sum(result) for key, result in _results(trainer)},
        "metrics": {name: _metric(metric) for name, metric in _metrics(module)},
    }


class Restoring:
    """Puts back what was captured: most of it before the first batch, sums with their first value.

    Lightning sets a sum to zero when the epoch's first batch of a process logs it.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state
        self._sums = dict(state["sums"])

    def start(self, trainer: Trainer) -> None:
        """What callbacks see, which some ask for before the first batch."""
        seen = {name: _from_json(value) for name, value in self._state["seen"].items()}
        trainer._logger_connector._callback_metrics.update(seen)

    def begin(self, module: LightningModule) -> list[str]:
        """All else but the sums; sentences about what cannot be the same.

        The random state comes last. Raises CheckpointError where a generator does not take it.
        """
        for name, metric in _metrics(module):
            if name in self._state["metrics"]:
                _put_back_metric(metric, self._state["metrics"][name])
        return rng.restore(self._state["rng"])

    def after_batch(self, trainer: Trainer) -> None:
        """Add what was added up before to the sums that the batch has logged."""
        if not self._sums:
            return
        for key, result in _results(trainer):
            before = self._sums.pop(key, None)
            if before is not None:
                _add(result, before)

    def end_epoch(self) -> None:
        """What was not logged again in this epoch belongs to no other."""
        self._sums.clear()


def _results(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """What `self.log(on_epoch=True)` adds up in the epoch."""
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        if result.is_tensor and result.meta.on_epoch:
            yield key, result


def _sum(result: Any) -> dict[str, Any]:
    kept = {"value": _to_json(result.value)}
    if result.meta.is_mean_reduction:
        kept["weight"] = _to_json(result.cumulated_batch_size)
    return kept


def _add(result: Any, before: Mapping[str, Any]) -> None:
    value = _from_json(before["value"]).to(result.value.device)
    if result.meta.is_mean_reduction or result.meta.is_sum_reduction:
        result.value = result.value + value
    else:
        result.value = result.meta.reduce_fx(result.value, value)
    if "weight" in before:
        weight = _from_json(before["weight"]).to(result.cumulated_batch_size.device)
        result.cumulated_batch_size = result.cumulated_batch_size + weight
    result._computed = None


def _metrics(module: LightningModule) -> Iterator[tuple[str, Any]]:
    """The torchmetrics in a model; their states are in no state_dict, as a rule."""
    for name, part in module.named_modules():
        if hasattr(part, "metric_state") and hasattr(part, "_update_count"):
            yield name, part


def _metric(metric: Any) -> dict[str, Any]:
    states = {name: _to_json(value) for name, value in metric.metric_state.items()}
    return {"states": states, "updates": metric._update_count}


def _put_back_metric(metric: Any, kept: Mapping[str, Any]) -> None:
    for name, value in kept["states"].items():
        state = _from_json(value)
        parts = state if isinstance(state, list) else [state]
        moved = [part.to(metric.device) for part in parts]
        setattr(metric, name, moved if isinstance(state, list) else moved[0])
    metric._update_count = kept["updates"]
    metric._computed = None


def _to_json(value: Any) -> Any:
    """A tensor, or a list of them, as values with their type; each number is kept exactly."""
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    tensor = value.detach().cpu()
    return {"values": tensor.tolist(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
