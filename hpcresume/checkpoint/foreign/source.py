"""What a checkpoint of another program holds, whatever its layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

_EMA = re.compile(r"(^|[._-])ema([._-]|$)|averaged|shadow", re.IGNORECASE)
_STATE_DICT = re.compile(r"_?(state_?dict|states?)$")
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Found:
    """The state of one object in a source."""

    name: str
    """As the source calls it, without `_state_dict`."""
    tree: Any
    """As `state_dict()` gave it; tensors that are not read yet are on the meta device."""
    read: Callable[[], Any] | None = None
    """Gives the tree with all tensors, where some are not read yet."""

    @property
    def role(self) -> str:
        """Its part in a training: model, ema, optimizer, scheduler, scaler; or its name."""
        return role_of(self.name, is_module_state(self.tree), is_optimizer_state(self.tree))

    def state(self) -> Any:
        """The tree with all its tensors."""
        return self.tree if self.read is None else self.read()


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint of another program, opened: tensors are in mapped files, or not read yet."""

    path: Path
    layout: str
    """What it is, as words: "a Hugging Face checkpoint"."""
    global_step: int
    epoch: int
    """Epochs that are done, or left: the next one, counted from 0."""
    objects: Sequence[Found]
    files: Sequence[Path]
    """What is read of it."""
    notes: Sequence[str] = ()
    """What was derived, or is not known."""
    left_out: Sequence[str] = field(default=())
    """What is in it and never used."""

    def digest(self) -> tuple[str, int]:
        """XXH3-128 of all files that are read, in order, and their size in bytes."""
        whole, size = xxhash.xxh3_128(), 0
        for path in self.files:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(_PIECE_BYTES):
                    whole.update(piece)
                    size += len(piece)
        return whole.hexdigest(), size


def role_of(name: str, is_module: bool, is_optimizer: bool) -> str:
    """The part in a training that an object of this name and kind has."""
    low = name.lower()
    if is_optimizer:
        return "optimizer"
    if _EMA.search(name):
        return "ema"
    if is_module:
        return "model"
    if "sched" in low:
        return "scheduler"
    return "scaler" if "scaler" in low or "scaling" in low else name


def is_optimizer_state(value: Any) -> bool:
    """Whether it is what `torch.optim.Optimizer.state_dict()` returns."""
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()


def is_module_state(value: Any) -> bool:
    """Whether it is what `torch.nn.Module.state_dict()` returns, and holds any tensor."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    plain = [v for key, v in value.items() if not key.endswith("_extra_state")]
    return bool(plain) and all(isinstance(v, torch.Tensor) for v in plain)


def sort_out(content: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of objects in what a file held, by name, and everything else in it.

    `model_state_dict`, `model` and `state_dict` are the same name; a bare state of a module is
    the model's, a whole module (of a file that is trusted) gives its state.
    """
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if is_module_state(content):
        return {"model": content}, {}
    if is_optimizer_state(content):
        return {"optimizer": content}, {}
    if not isinstance(content, Mapping):
        return {}, {}
    if len(content) == 1 and isinstance(inner := next(iter(content.values())), Mapping):
        # An application's own wrapper around everything.
        objects, rest = sort_out(inner)
        if objects and not is_module_state(inner):
            return objects, rest
    objects, rest = {}, {}
    for key, held in content.items():
        name = _STATE_DICT.sub("", str(key)) or "model"
        value = held.state_dict() if isinstance(held, torch.nn.Module) else held
        if isinstance(value, Mapping) and value and name not in objects and _is_state(key, value):
            objects[name] = value
        elif value is not None:
            rest[str(key)] = value
    return objects, rest


def _is_state(key: Any, value: Mapping[Any, Any]) -> bool:
    if is_module_state(value) or is_optimizer_state(value):
        return True
    named = bool(_STATE_DICT.search(str(key)))
    return named or role_of(str(key), False, False) in ("ema", "scheduler", "scaler")
