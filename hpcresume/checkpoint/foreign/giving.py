"""Gives what is registered the state of a source: which object gets what, never a part of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from hpcresume.checkpoint import registered, rng
from hpcresume.checkpoint.foreign import modules, optimizers, states
from hpcresume.checkpoint.foreign.source import Found, Source, role_of
from hpcresume.errors import CheckpointError

_BETTER_WORDS = re.compile(r"[^a-z0-9]")


class Giver:
    """The objects of one source, as they are asked for by name and kind."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.left = list(source.objects)
        self.given: dict[str, str] = {}
        """Names in the source, by registered name."""
        self.fresh: list[str] = []
        """What is registered, and begins as the code makes it."""

    def give(self, name: str, value: Any, others: Mapping[str, Any]) -> list[str]:
        """Give an object its state, where the source has one; returns sentences about it.

        `others` are the registered objects by name, this one among them. Raises CheckpointError.
        """
        if rng.is_generator(value) or not registered.is_stateful(value):
            return []
        role = _role(name, value)
        candidates = [found for found in self.left if found.role == role]
        chosen, said = self._choose(name, value, candidates, others), []
        if chosen is None and role == "ema" and isinstance(value, torch.nn.Module):
            chosen = self._model_for(name, value)
            said += (
                [
                    f"'{name}' begins with the weights of the model: {self.source.path} has no "
                    f"average of them"
                ]
                if chosen
                else []
            )
        elif chosen is not None:
            self.left.remove(chosen)
        if chosen is None:
            self.fresh.append(name)
            return [f"'{name}' begins as the code makes it: {self.source.path} has none"]
        self.given[name] = chosen.name
        notes = _load(name, value, chosen, others, self._whence(chosen))
        if role == "scheduler":
            notes += self._settle_rates(value, others)
        return [*said, *(f"'{name}': {words}" for words in notes)]

    def unused(self) -> list[str]:
        """What of the source nobody asked for."""
        return [*(found.name for found in self.left), *self.source.left_out]

    def _choose(
        self, name: str, value: Any, candidates: list[Found], others: Mapping[str, Any]
    ) -> Found | None:
        same = [found for found in candidates if _plain(found.name) == _plain(name)]
        if same or len(candidates) < 2:
            return next(iter([*same, *candidates]), None)
        fitting = [found for found in candidates if self._fits(name, value, found, others)]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(found.name for found in candidates)
        why = "none of them fits" if not fitting else "more than one of them fits"
        raise CheckpointError(
            f"{self.source.path} holds {names}, and {why} '{name}': register it under the name "
            f"that it has there."
        )

    def _fits(self, name: str, value: Any, found: Found, others: Mapping[str, Any]) -> bool:
        try:
            _plan(name, value, found.tree, others, self._whence(found))
        except CheckpointError:
            return False
        return True

    def _model_for(self, name: str, value: torch.nn.Module) -> Found | None:
        """The one model of the source, where it fits an average of which there is no state."""
        found = [each for each in self.source.objects if each.role == "model"]
        return found[0] if len(found) == 1 and self._fits(name, value, found[0], {}) else None

    def _whence(self, found: Found) -> str:
        return f"'{found.name}' of {self.source.path}"

    def _settle_rates(self, schedule: Any, others: Mapping[str, Any]) -> list[str]:
        """Let an optimizer that had no state go on with its schedule's rates."""
        optimizer, rates = getattr(schedule, "optimizer", None), schedule.state_dict()
        without = [others[name] for name in self.fresh if name in others]
        if not any(optimizer is each for each in without) or "_last_lr" not in rates:
            return []
        assert optimizer is not None
        for group, rate in zip(optimizer.param_groups, rates["_last_lr"], strict=False):
            group["lr"] = rate
        return ["its optimizer, which has no state, begins with the rate of the schedule"]


def _role(name: str, value: Any) -> str:
    if isinstance(value, torch.optim.swa_utils.AveragedModel):
        return "ema"
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return "scheduler"
    if isinstance(value, torch.amp.GradScaler):
        return "scaler"
    is_module = isinstance(value, torch.nn.Module)
    return role_of(name, is_module, isinstance(value, torch.optim.Optimizer))


def _plan(name: str, value: Any, tree: Any, others: Mapping[str, Any], whence: str) -> Any:
    if isinstance(value, torch.nn.Module):
        return modules.fitted(name, value, tree, whence)
    if isinstance(value, torch.optim.Optimizer):
        named = {key: each for key, each in others.items() if isinstance(each, torch.nn.Module)}
        return optimizers.fitted(name, value, tree, named, whence)
    return states.fitted(name, value, tree, whence)


def _load(name: str, value: Any, found: Found, others: Mapping[str, Any], whence: str) -> list[str]:
    """Fit first, so that nothing is changed where it does not; then read, and give."""
    if found.read is not None:
        _plan(name, value, found.tree, others, whence)
    plan = _plan(name, value, found.state(), others, whence)
    if isinstance(value, torch.nn.Module):
        modules.give(name, value, plan)
        return list(plan.notes)
    if isinstance(value, torch.optim.Optimizer):
        state, notes = plan
        optimizers.give(name, value, state)
        return list(notes)
    states.give(name, value, plan)
    return []


def _plain(name: str) -> str:
    """A name without what different habits of writing put into it."""
    return _BETTER_WORDS.sub("", name.lower()).replace("lrsched", "sched")
