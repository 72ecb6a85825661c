"""What the code gives an optimizer or a schedule, against what the checkpoint holds.

The checkpoint's values win, or a resumed run would not be the uncut one. But what the code gives
is remembered with each checkpoint, so that a later change of the code is noticed (a scheduler has
moved the learning rate itself; comparing with that would tell nothing), and can be asked to win.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: What a schedule counts itself, and is no setting.
_COUNTED = frozenset({"last_epoch", "_last_lr", "num_bad_epochs", "best", "cooldown_counter"})
#: Settings that scale with the learning rate (of OneCycleLR, CyclicLR and the base class).
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "base_lr")
#: The words by which schedules call their horizon, in steps.
_HORIZONS = ("T_max", "total_steps", "total_iters", "_total_steps")


@dataclass(frozen=True)
class Change:
    """One value that the code gives differently from before. `group`: of an optimizer, or None."""

    key: str
    was: Any
    now: Any
    group: int | None = None

    def __str__(self) -> str:
        where = f" of group {self.group}" if self.group else ""
        return f"{self.key}{where} {_short(self.was)} -> {_short(self.now)}"


def given(value: Any) -> dict[str, Any] | None:
    """The settings in a fresh optimizer or schedule, as JSON; None for anything else."""
    if isinstance(value, torch.optim.Optimizer):
        return {
            "groups": [
                {k: _plain(v) for k, v in group.items() if k != "params" and _is_setting(v)}
                for group in value.param_groups
            ]
        }
    if hasattr(value, "base_lrs") and hasattr(value, "optimizer"):
        state = value.state_dict()
        return {
            "settings": {
                k: _plain(v)
                for k, v in state.items()
                if k not in _COUNTED and not k.startswith("_") and _is_setting(v)
            }
        }
    return None


def laid_out(value: Any) -> dict[str, Any] | None:
    """The same of one that another program's state was put into.

    A rate that a schedule has moved counts as it was laid out.
    """
    found = given(value)
    for group in [] if found is None else found.get("groups", []):
        group["lr"] = group.get("initial_lr", group["lr"])
    return found


def overridden(code: Mapping[str, Any], override: Mapping[str, float]) -> dict[str, Any]:
    """What the code gives, with values that the run's configuration gives instead."""
    if "groups" in code:
        return {"groups": [{k: override.get(k, v) for k, v in g.items()} for g in code["groups"]]}
    settings = dict(code["settings"])
    if "lr" in override:
        settings["base_lrs"] = [override["lr"]] * len(settings["base_lrs"])
    return {"settings": settings}


def changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What the code gives differently; settings that only one of them knows are left out."""
    if "settings" in now:
        before, after = was.get("settings", {}), now["settings"]
        return [
            Change(key, before[key], after[key])
            for key in after
            if key in before and before[key] != after[key]
        ]
    return [
        Change(key, before[key], after[key], number)
        for number, (before, after) in enumerate(
            zip(was.get("groups", []), now["groups"], strict=False)
        )
        for key in after
        if key in before and before[key] != after[key]
    ]


def wanted(change: Change, keep: Collection[str]) -> bool:
    """Whether the code's value is to win; who keeps "lr" means the schedule's base_lrs as well."""
    return change.key in keep or (change.key in ("base_lrs", "initial_lr") and "lr" in keep)


def without(now: Mapping[str, Any], unwanted: Collection[Change]) -> dict[str, Any]:
    """What is remembered as given: `now`, but for changes that were not taken over."""
    remembered: dict[str, Any] = copy.deepcopy(dict(now))
    for change in unwanted:
        values = remembered["settings"] if change.group is None else remembered["groups"]
        (values if change.group is None else values[change.group])[change.key] = change.was
    return remembered


def apply(value: Any, change: Change) -> None:
    """Make the code's value win in a restored optimizer or schedule.

    A learning rate that a schedule has moved since is scaled: the schedule goes on from where it
    is, in the new size.
    """
    if change.group is None:
        setattr(value, change.key, _like(getattr(value, change.key, None), change.now))
        value._last_lr = [group["lr"] for group in value.optimizer.param_groups]
        return
    group = value.param_groups[change.group]
    if change.key != "lr":
        group[change.key] = _like(group.get(change.key), change.now)
        return
    for key in _RATES:
        if isinstance(group.get(key), (int, float)):
            live = group[key]
            scaled = change.now if not change.was else live * (change.now / change.was)
            group[key] = change.now if live == change.was else scaled


def horizon(value: Any) -> str | None:
    """The number of steps that a schedule was laid out for, as "T_max=100"; None without one."""
    if not hasattr(value, "base_lrs"):
        return None
    for key in _HORIZONS:
        steps = getattr(value, key, None)
        if isinstance(steps, int):
            return f"{key}={steps}"
    return None


def _is_setting(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_setting(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _like(live: Any, now: Any) -> Any:
    return tuple(now) if isinstance(live, tuple) else now


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
