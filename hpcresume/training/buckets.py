"""Gives DDP's gradient buckets their final layout before the first step of a link.

DistributedDataParallel lays its buckets out anew after its first backward pass, in the order in
which the gradients came. All-reduce adds up the ranks' numbers in an order that depends on the
place within a bucket, so with three ranks or more the first step of every link would be rounded
differently from the same step of an uncut run. (torch 2.13, Reducer::rebuild_buckets.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class _Touch(nn.Module):
    """Stands in for a model in one pass: each parameter gets a gradient of zeros, last one first.

    That is the order in which DDP lays out its buckets to begin with.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        # Past nn.Module's own bookkeeping: they stay the model's.
        object.__setattr__(self, "touched", parameters)

    def forward(self, _: None) -> torch.Tensor:
        touched: list[nn.Parameter] = self.__dict__["touched"]
        total = torch.zeros(())
        for parameter in touched:
            total = total + (parameter.sum() * 0).cpu()
        return total


def settle(objects: Iterable[Any]) -> list[str]:
    """Settle the buckets of every DDP model among `objects`; collective, on all ranks alike.

    Nothing else changes. Returns a sentence for each model where this cannot be done.
    """
    said = []
    for model in _models(objects):
        if not _lays_out_anew(model):
            continue
        why = _obstacle(model)
        if why is None:
            _settle(model)
        else:
            said.append(
                f"DDP with {why}: with three ranks or more, the first step of a link is rounded "
                f"differently from an uncut run's"
            )
    return said


def _models(objects: Iterable[Any]) -> Iterator[DistributedDataParallel]:
    for value in objects:
        for part in value.modules() if isinstance(value, nn.Module) else ():
            if isinstance(part, DistributedDataParallel):
                yield part


def _lays_out_anew(model: DistributedDataParallel) -> bool:
    return model.static_graph or not model.find_unused_parameters


def _obstacle(model: DistributedDataParallel) -> str | None:
    """What would notice a pass that is none of the training's."""
    if model.static_graph:
        return "static_graph"
    if model.mixed_precision is not None:
        return "mixed_precision"
    if model._comm_hooks:
        return "a communication hook"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in _trained(model)):
        return "hooks on gradients"
    return None


def _settle(model: DistributedDataParallel) -> None:
    parameters = _trained(model)
    if any(parameter.grad is not None for parameter in parameters):
        return
    module, broadcasts = model.module, model.broadcast_buffers
    model.module, model.broadcast_buffers = _Touch(parameters), False
    try:
        # forward itself, past the hooks that a user may have put around it.
        model.forward(None).backward()  # type: ignore[no-untyped-call]
    finally:
        model.module, model.broadcast_buffers = module, broadcasts
    for parameter in parameters:
        parameter.grad = None


def _trained(model: DistributedDataParallel) -> list[nn.Parameter]:
    return [parameter for parameter in model.module.parameters() if parameter.requires_grad]
