"""One file: of `torch.save` with states by name, a bare state, a Lightning .ckpt; or weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcresume.checkpoint.foreign import pickled
from hpcresume.checkpoint.foreign.places import COUNTERS, Place, begins_with, place
from hpcresume.checkpoint.foreign.source import Found, Source, sort_out
from hpcresume.errors import CheckpointError

_LIGHTNING = "pytorch-lightning_version"


def opened(path: Path, trust: bool) -> Source:
    """The checkpoint in a file. Raises CheckpointError where it holds no state of a model."""
    if path.suffix == ".safetensors":
        weights = pickled.load_safetensors(path)
        told = place(path.stem, {}, {})
        return _source(path, "weights", {"model": weights}, told, ())
    content = pickled.load(path, trust)
    if isinstance(content, Mapping) and _LIGHTNING in content:
        try:
            return _lightning(path, content)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is a Lightning checkpoint that lacks something ({error!r})."
            ) from None
    objects, rest = sort_out(content)
    if not objects:
        kind = type(content).__name__
        keys = (
            f" with {', '.join(map(str, list(content)[:8]))}" if isinstance(content, dict) else ""
        )
        raise CheckpointError(
            f"{path} holds a {kind}{keys}, and no state of a model among it: expected what "
            f"state_dict() returned, or a dict with model_state_dict, optimizer_state_dict…"
        )
    told = place(path.stem, rest, objects)
    return _source(path, "a file of torch.save", objects, told, sorted(rest.keys() - COUNTERS))


def _lightning(path: Path, content: Mapping[str, Any]) -> Source:
    optimizers = list(content.get("optimizer_states", ()))
    schedulers = list(content.get("lr_schedulers", ()))
    objects: dict[str, Any] = {"model": content["state_dict"]}
    objects |= _numbered("optimizer", optimizers) | _numbered("scheduler", schedulers)
    if isinstance(content.get("MixedPrecision"), Mapping):
        objects["scaler"] = content["MixedPrecision"]
    used = {"state_dict", "optimizer_states", "lr_schedulers", "MixedPrecision"}
    ignored = {_LIGHTNING, "epoch", "global_step", "hparams_name"}
    rest = sorted(key for key in content.keys() - used - ignored if content[key])
    return _source(path, "a Lightning checkpoint", objects, _stood(content), rest)


def _numbered(name: str, states: list[Any]) -> dict[str, Any]:
    if len(states) == 1:
        return {name: states[0]}
    return {f"{name}_{number}": state for number, state in enumerate(states)}


def _stood(content: Mapping[str, Any]) -> Place:
    """Epochs that were begun are done, or left; Lightning counts the steps of all optimizers."""
    step, epoch = int(content["global_step"]), int(content["epoch"])
    try:
        loop = content["loops"]["fit_loop"]
        begun = int(loop["epoch_progress"]["current"]["started"])
        whole = bool(loop["epoch_loop.batch_progress"]["is_last_batch"])
    except (LookupError, TypeError, ValueError):
        begun, whole = epoch + 1, False
    why = f"it was saved in epoch {epoch}, counted from 0"
    return Place(step, begun, () if whole else (begins_with(begun, why),))


def _source(
    path: Path, layout: str, objects: Mapping[str, Any], told: Place, left_out: Any
) -> Source:
    return Source(
        path=path,
        layout=layout,
        global_step=told.global_step,
        epoch=told.epoch,
        objects=[Found(name, tree) for name, tree in objects.items()],
        files=[path],
        notes=told.notes,
        left_out=tuple(left_out),
    )
