"""Fits the state of another program's optimizer to a live one, parameter by parameter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpcresume.checkpoint import reader, registered, sharded
from hpcresume.checkpoint.foreign.modules import part_for
from hpcresume.checkpoint.foreign.states import check_taken, copied
from hpcresume.checkpoint.tensors import plain_name
from hpcresume.errors import CheckpointError

#: State that has the shape of its parameter, in torch's optimizers and most others.
_SHAPED = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta"}
    | {"grad_avg", "sum", "prev", "step_size", "exp_inf", "ax"}
)
#: What schedules leave behind in the groups of an optimizer.
_OF_SCHEDULES = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_lr", "max_momentum", "base_momentum", "swa_lr"}
)
#: How the same numbers are computed: a matter of the version and the machine.
_OF_VERSIONS = frozenset(
    {"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"}
    | {"amsgrad", "name"}
)


def fitted(
    name: str,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    modules: Mapping[str, torch.nn.Module],
    whence: str,
) -> tuple[dict[str, Any], list[str]]:
    """The state as the live optimizer numbers it, and what is told of it.

    Tensors may be on the meta device. Raises CheckpointError that names what does not fit.
    """
    live = optimizer.param_groups
    groups = [dict(group) for group in state["param_groups"]]
    numbers = _numbers(name, optimizer, groups, modules, whence)
    here, there = ([len(group["params"]) for group in some] for some in (live, groups))
    if here != there:
        raise CheckpointError(
            f"{whence} has groups of {_listed(there)} parameters, and '{name}' here of "
            f"{_listed(here)}: make the same groups, or begin with the weights' file alone."
        )
    notes: list[str] = []
    for group, own in zip(groups, live, strict=True):
        notes += _settle_options(name, group, own, whence)
        group["params"] = [numbers[key] for key in group["params"]]
    own_state = {}
    for key, values in state["state"].items():
        number = numbers.get(key, numbers.get(_as_number(key)))
        if number is None:
            raise CheckpointError(f"{whence} has state of a parameter {key!r}, which no group has.")
        own_state[number] = dict(values)
    params = registered.params_of(optimizer)
    for number, values in own_state.items():
        for key, value in values.items():
            shaped = isinstance(value, torch.Tensor) and key in _SHAPED
            if shaped and value.shape != params[number].shape:
                raise CheckpointError(
                    f"'{name}': {key} of parameter {number} has the shape {list(value.shape)} in "
                    f"{whence}, and the parameter here {list(params[number].shape)}."
                )
    return {**state, "state": own_state, "param_groups": groups}, list(dict.fromkeys(notes))


def give(name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state that was fitted, and look whether it has arrived."""
    params = registered.params_of(optimizer)
    own = {
        **state,
        "state": {
            number: {key: _own(params[number], value) for key, value in values.items()}
            for number, values in state["state"].items()
        },
    }
    own["param_groups"] = copied(own["param_groups"])
    optimizer.load_state_dict(own)
    reader.keep_dtypes(optimizer, own)
    live = optimizer.state_dict()
    check_taken(name, own["state"], live["state"])
    for number, (given, taken) in enumerate(
        zip(own["param_groups"], live["param_groups"], strict=True)
    ):
        check_taken(f"{name}.param_groups.{number}", given, {k: taken.get(k) for k in given})


def _own(param: torch.Tensor, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return copied(value)
    if sharded.is_sharded(param) and value.shape == param.shape:
        return sharded.like(param, part_for(param, value).to(param.device, copy=True))
    return copied(value)


def _numbers(
    name: str,
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    modules: Mapping[str, torch.nn.Module],
    whence: str,
) -> dict[Any, int]:
    """The live number of each of the source's parameters, which have numbers or names there.

    Where they have names, the source's groups are put into the order of the live ones.
    """
    given = [key for group in groups for key in group["params"]]
    if not any(isinstance(key, str) for key in given):
        return {key: number for number, key in enumerate(given)}
    named = {
        id(param): plain_name(key)
        for module in modules.values()
        for key, param in module.named_parameters()
    }
    unnamed = f"'{name}' has a parameter that no registered module has: register the model before."
    order = []
    for group in optimizer.param_groups:
        if any(id(param) not in named for param in group["params"]):
            raise CheckpointError(f"{whence} knows parameters by name, but {unnamed}")
        order.append([named[id(param)] for param in group["params"]])
    by_names = {frozenset(map(plain_name, group["params"])): group for group in groups}
    if by_names.keys() != {frozenset(keys) for keys in order}:
        known = {key for keys in order for key in keys}
        odd = sorted(known ^ {plain_name(key) for key in given})
        what = f": {', '.join(odd[:5])}" if odd else " in its groups"
        raise CheckpointError(f"{whence} has other parameters than '{name}' here{what}.")
    groups[:] = [{**by_names[frozenset(keys)]} for keys in order]
    for group, names in zip(groups, order, strict=True):
        full = {plain_name(key): key for key in group["params"]}
        group["params"] = [full[key] for key in names]
    count = itertools.count()
    return {key: next(count) for group in groups for key in group["params"]}


def _settle_options(
    name: str, group: dict[str, Any], own: Mapping[str, Any], whence: str
) -> list[str]:
    """Take what a group does not tell from the code; returns what is told of it.

    Raises CheckpointError where the options are those of another optimizer.
    """
    known = own.keys() | _OF_SCHEDULES | _OF_VERSIONS
    surplus = sorted(group.keys() - known)
    missing = sorted(own.keys() - group.keys() - _OF_SCHEDULES)
    if surplus or set(missing) - _OF_VERSIONS:
        raise CheckpointError(
            f"{whence} is of another optimizer than '{name}' here: "
            f"{', '.join(surplus + sorted(set(missing) - _OF_VERSIONS))} is an option of one of "
            f"them only. Make the same, or begin with the weights' file alone."
        )
    for key in missing:
        group[key] = own[key]
    # What another machine computed with need not suit this one.
    for key in ("foreach", "fused", "capturable"):
        if key in own:
            group[key] = own[key]
    return [f"{', '.join(missing)} as in the code"] if missing else []


def _as_number(key: Any) -> Any:
    """Numbers as keys come back from some layouts as texts."""
    return int(key) if isinstance(key, str) and key.isdigit() else key


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) or "no"
