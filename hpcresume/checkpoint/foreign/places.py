"""Where a training of another program stood: its step and its epoch, as far as anything tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpcresume.checkpoint.foreign.source import is_optimizer_state

_EPOCH = re.compile(r"epoch[-_=]?(\d+)", re.IGNORECASE)
_STEP = re.compile(r"(?:^|[-_])(?:checkpoint|global_?step|step|iter)[-_=]?(\d+)", re.IGNORECASE)
_STEPS = ("global_step", "step", "steps", "iteration", "iter")
_EPOCHS = ("current_epoch", "epoch")
#: The words for how far a training had come.
COUNTERS = frozenset({*_STEPS, *_EPOCHS})


@dataclass(frozen=True)
class Place:
    """How far a training had come. `notes` say what was derived, or is not known."""

    global_step: int
    epoch: int
    """Epochs that are done, or left: the next one, counted from 0."""
    notes: tuple[str, ...] = ()


def place(name: str, told: Mapping[str, Any], objects: Mapping[str, Any]) -> Place:
    """What a state's own words tell, else the name of its file or folder, else its optimizer.

    An epoch in words is the one in which it was saved, counted from 0; `epoch-118` in a name tells
    that 118 are done.
    """
    step, said_step = _step(name, told, objects)
    epoch, said_epoch = _epoch(name, told)
    return Place(step, epoch, tuple(words for words in (said_step, said_epoch) if words))


def _step(name: str, told: Mapping[str, Any], objects: Mapping[str, Any]) -> tuple[int, str]:
    own = number(told, _STEPS)
    if own is not None:
        return own, ""
    named = _STEP.search(name)
    if named:
        return int(named[1]), f"its step, {int(named[1])}, is derived from its name, {name}"
    counted = [_counted(state) for state in objects.values() if is_optimizer_state(state)]
    if max(counted, default=0):
        return max(counted), f"its step, {max(counted)}, is what its optimizer has counted"
    return 0, "its step is not known: steps are counted from 0"


def _counted(state: Mapping[str, Any]) -> int:
    """The steps that an optimizer remembers having made; 0 where it does not, or is not read."""
    each = [own.get("step", 0) for own in state["state"].values() if isinstance(own, Mapping)]
    plain = [s for s in each if not (isinstance(s, torch.Tensor) and (s.is_meta or s.dim()))]
    return int(max(plain, default=0))


def _epoch(name: str, told: Mapping[str, Any]) -> tuple[int, str]:
    own, match = number(told, _EPOCHS), _EPOCH.search(name)
    named = int(match[1]) if match else None
    if own is None and named is None:
        return 0, "its epoch is not known: epochs are counted from 0; what it holds is kept"
    if own is None:
        assert named is not None
        return named, f"its epoch is derived from its name, {name}: {named} are done"
    if named == own + 1:
        return named, ""
    if named == own:
        return named, f"its name and its own words say {own}: so many epochs are taken as done"
    return own + 1, begins_with(own + 1, f"it was saved in epoch {own}, counted from 0")


def begins_with(epoch: int, why: str) -> str:
    """A sentence about data whose place within an epoch is not known."""
    return f"{why}; where in its data is not known: training begins with epoch {epoch + 1}"


def number(told: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of some counters that is there."""
    for name in names:
        value = told.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_meta:
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
            return int(value)
    return None
