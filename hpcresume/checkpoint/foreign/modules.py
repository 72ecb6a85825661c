"""Fits the state of another program's model to a live one, whatever wrapped either of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpcresume.checkpoint import copying, sharded
from hpcresume.checkpoint.foreign.source import is_module_state
from hpcresume.checkpoint.tensors import (
    extra_states,
    module_state,
    plain_name,
    plain_state,
    split,
)
from hpcresume.errors import CheckpointError

_NAMED = 5


@dataclass(frozen=True)
class Plan:
    """Which tensor goes where, whole tensors on the CPU; and what is told of it."""

    tensors: dict[str, torch.Tensor]
    """By the live names without wrappers."""
    extra: dict[str, Any]
    notes: tuple[str, ...]


def fitted(name: str, module: torch.nn.Module, state: Any, whence: str) -> Plan:
    """How a state fits a module; its tensors may be on the meta device.

    Raises CheckpointError that names what is missing, left over, of another shape, or what would
    be rounded.
    """
    notes: list[str] = []
    if not is_module_state(state):
        inner = _only_module_in(state)
        if inner is None:
            raise CheckpointError(f"{whence} is no state of a module, and '{name}' is one here.")
        state = state[inner]
        notes.append(f"it is given '{inner}' of {whence}")
    live, extra = plain_state(module, name), extra_states(module, name)
    given = _plainly(state, whence)
    own = {key: given.pop(key) for key in extra if key in given}
    tensors, prefix = _aligned(given, live)
    notes += [prefix] if prefix else []
    if any(key != plain_name(key) for key in state):
        notes.append("prefixes of wrappers are taken off")
    tensors = _tied(name, module, tensors, live)
    missing = [*(live.keys() - tensors.keys()), *(extra.keys() - own.keys())]
    _check_names(name, missing, [*(tensors.keys() - live.keys())], whence)
    widened = [_check_fits(name, key, tensors[key], live[key], whence) for key in live]
    if any(widened):
        kinds = ", ".join(sorted({words for words in widened if words}))
        notes.append(f"{sum(map(bool, widened))} tensors are widened without loss, {kinds}")
    return Plan(tensors, own, tuple(notes))


def give(name: str, module: torch.nn.Module, plan: Plan) -> None:
    """Copy a plan's tensors into a module, in place, and look whether all have arrived."""
    live = plain_state(module, name)
    targets = {key: sharded.local(tensor) for key, tensor in live.items()}
    sources = {key: part_for(live[key], plan.tensors[key]).to(live[key].dtype) for key in live}
    own = list(targets.values())
    copying.copy(own, [sources[key] for key in live], copying.shares(own))
    for key, value in plan.extra.items():
        extra_states(module, name)[key].set_extra_state(value)
    for key, tensor in targets.items():
        if not same_bits(tensor, sources[key]):
            raise CheckpointError(f"'{name}': tensor '{key}' did not take over what was given.")


def part_for(live: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What of a whole tensor this rank holds, where the live one lies on several ranks."""
    if not sharded.is_sharded(live):
        return whole
    part = sharded.part_of(live)
    ends = zip(part.offset, part.sizes, strict=True)
    return whole[tuple(slice(begin, begin + size) for begin, size in ends)]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


def _only_module_in(state: Any) -> str | None:
    """The key of the one state of a module in it: an average, beside its decay."""
    if not isinstance(state, Mapping):
        return None
    keys = [key for key, value in state.items() if is_module_state(value)]
    return keys[0] if len(keys) == 1 else None


def _plainly(state: Mapping[str, Any], whence: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if plain_name(key) in plain:
            raise CheckpointError(
                f"{whence} has two tensors named '{plain_name(key)}' once wrappers are off."
            )
        plain[plain_name(key)] = value
    return plain


def _aligned(
    given: Mapping[str, torch.Tensor], live: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], str]:
    """The given tensors without, or with, the prefix that all names of one side have.

    A Lightning module keeps its model under a name, which the model by itself has not.
    """
    if given.keys() & live.keys():
        return dict(given), ""
    for prefix in _prefixes(given):
        shorter = {key[len(prefix) :]: tensor for key, tensor in given.items()}
        if shorter.keys() & live.keys():
            return shorter, f"the prefix '{prefix}' is taken off"
    for prefix in _prefixes(live):
        longer = {f"{prefix}{key}": tensor for key, tensor in given.items()}
        if longer.keys() & live.keys():
            return longer, f"the prefix '{prefix}' is put before its names"
    return dict(given), ""


def _prefixes(names: Mapping[str, Any]) -> Iterator[str]:
    """The modules that all names begin with, the outermost first: "model.", "model.net."…"""
    first, *others = names or [""]
    ends = (place + 1 for place, letter in enumerate(first) if letter == ".")
    prefixes = (first[:end] for end in ends)
    return (prefix for prefix in prefixes if all(other.startswith(prefix) for other in others))


def _tied(
    name: str,
    module: torch.nn.Module,
    given: dict[str, torch.Tensor],
    live: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """With the tensors that are others by a second name, which many programs save once."""
    groups: dict[str, list[str]] = {}
    for alias, first in split(module_state(module, name), name).aliases.items():
        groups.setdefault(first, [first]).append(alias)
    found = dict(given)
    for group in groups.values():
        there = [key for key in group if key in given]
        for key in group:
            if there and key in live:
                found.setdefault(key, given[there[0]])
        for key in there[1:]:
            one, other = given[there[0]], given[key]
            if not (one.is_meta or other.is_meta) and not same_bits(one, other):
                raise CheckpointError(
                    f"'{name}' has one tensor by the names '{there[0]}' and '{key}', which are "
                    f"two different ones in what it is to begin with: untie them."
                )
    return found


def _check_names(name: str, missing: list[str], surplus: list[str], whence: str) -> None:
    if not missing and not surplus:
        return
    parts = [
        f"{words} {', '.join(sorted(keys)[:_NAMED])}{' …' if len(keys) > _NAMED else ''}"
        for words, keys in (("it lacks", missing), ("it alone has", surplus))
        if keys
    ]
    raise CheckpointError(
        f"{whence} does not fit '{name}': {'; '.join(parts)}. Register the model that it was saved "
        f"from."
    )


def _check_fits(
    name: str, key: str, given: torch.Tensor, live: torch.Tensor, whence: str
) -> str | None:
    """Raise CheckpointError where a tensor does not fit; how it is widened, or None."""
    if given.shape != live.shape:
        raise CheckpointError(f"'{name}.{key}' is {_kind(live)} here, {_kind(given)} in {whence}.")
    if given.dtype == live.dtype:
        return None
    floating = given.dtype.is_floating_point and live.dtype.is_floating_point
    if floating and torch.promote_types(given.dtype, live.dtype) == live.dtype:
        return f"{_word(given)} to {_word(live)}"
    raise CheckpointError(
        f"'{name}.{key}' is {_kind(live)} here, {_kind(given)} in {whence}: its values would be "
        f"rounded. Build '{name}' in {_word(given)}, or convert the file."
    )


def _kind(tensor: torch.Tensor) -> str:
    return f"{_word(tensor)}{list(tensor.shape)}"


def _word(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
