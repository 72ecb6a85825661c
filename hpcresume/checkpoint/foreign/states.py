"""Fits the state of a schedule, a scaler, or another object with `state_dict()`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from hpcresume.checkpoint.foreign.modules import same_bits
from hpcresume.errors import CheckpointError

#: What some versions of torch keep in a schedule, and others do not.
_OF_VERSIONS = frozenset({"verbose", "_get_lr_called_within_step", "_is_initial"})


def fitted(name: str, value: Any, state: Any, whence: str) -> dict[str, Any]:
    """The state as the live object takes it. Raises CheckpointError that names what differs."""
    live = value.state_dict()
    if not isinstance(live, Mapping) or not isinstance(state, Mapping):
        return state  # type: ignore[no-any-return]
    given = {key: item for key, item in state.items() if key in live or key not in _OF_VERSIONS}
    surplus = sorted(map(str, given.keys() - live.keys()))
    missing = sorted(map(str, live.keys() - given.keys() - _OF_VERSIONS))
    if surplus or missing:
        parts = (("it lacks", missing), ("it alone has", surplus))
        raise CheckpointError(
            f"{whence} does not fit '{name}', a {type(value).__name__}: "
            f"{'; '.join(f'{words} {_listed(keys)}' for words, keys in parts if keys)}. Make "
            f"the same object, or begin with the weights' file alone."
        )
    return given


def _listed(keys: list[str]) -> str:
    return ", ".join(keys)


def give(name: str, value: Any, state: Any) -> None:
    """Load a state that was fitted, and look whether it has arrived."""
    value.load_state_dict(copied(state))
    live = value.state_dict()
    if isinstance(state, Mapping) and isinstance(live, Mapping):
        live = {key: live.get(key) for key in state}
    check_taken(name, state, live)


def copied(state: Any) -> Any:
    """A state with memory of its own: not that of a file which may change."""
    if isinstance(state, torch.Tensor):
        return state.clone()
    if type(state) is dict:
        return {key: copied(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(copied(value) for value in state)
    return copy.deepcopy(state)


def check_taken(name: str, given: Any, live: Any) -> None:
    """Raise CheckpointError, with the place, where a live state is not what was given."""
    place = _difference(given, live, name)
    if place is not None:
        raise CheckpointError(
            f"'{name.partition('.')[0]}' did not take over what was given: {place} is another "
            f"now. Is it the object that the state was saved from?"
        )


def _difference(given: Any, live: Any, path: str) -> str | None:
    if isinstance(given, torch.Tensor) and isinstance(live, torch.Tensor):
        own, there = (t.to_local() if hasattr(t, "to_local") else t for t in (live, given))
        return None if same_bits(own, there) else path
    if isinstance(given, Mapping) and isinstance(live, Mapping):
        if given.keys() != live.keys():
            return path
        found = (_difference(given[key], live[key], f"{path}.{key}") for key in given)
        return next((place for place in found if place), None)
    if isinstance(given, (list, tuple)) and isinstance(live, (list, tuple)):
        if len(given) != len(live):
            return path
        both = enumerate(zip(given, live, strict=True))
        found = (_difference(a, b, f"{path}.{number}") for number, (a, b) in both)
        return next((place for place in found if place), None)
    # A step count was a number in older versions, and is a tensor now.
    a, b = (v.item() if isinstance(v, torch.Tensor) and not v.dim() else v for v in (given, live))
    return None if bool(a == b) or (a != a and b != b) else path  # noqa: PLR0124
