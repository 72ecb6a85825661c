"""Checkpoints of Hugging Face: of Trainer, of accelerate's `save_state`, of `save_pretrained`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hpcresume.checkpoint.foreign import pickled
from hpcresume.checkpoint.foreign.places import Place, begins_with, place
from hpcresume.checkpoint.foreign.source import Found, Source
from hpcresume.errors import CheckpointError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OBJECTS = {
    "optimizer": ("optimizer.pt", "optimizer.bin"),
    "scheduler": ("scheduler.pt", "scheduler.bin"),
    "scaler": ("scaler.pt",),
}
_STATE = "trainer_state.json"
#: What is never read: random states (the order of the data is another one here), pickled
#: arguments; and how torch is told of it.
_LEFT_OUT = ("rng_state", "random_states", "training_args.bin", "sampler.bin")
#: What Trainer's floating epoch may lack of a whole number.
_ROUNDING = 1e-6


def opened(path: Path, trust: bool) -> Source | None:
    """The checkpoint in a directory; None where it is none of this kind."""
    weights = _weights(path)
    if not weights:
        return None
    found = {"model": pickled.load_weights(weights, trust)}
    read = list(weights)
    for name, candidates in _OBJECTS.items():
        file = next((path / c for c in candidates if (path / c).is_file()), None)
        if file is not None:
            found[name] = pickled.load(file, trust)
            read.append(file)
    state = path / _STATE
    if state.is_file():
        read.append(state)
        told = _place(pickled.load_json(state), state)
    else:
        told = place(path.name, {}, found)
    return Source(
        path=path,
        layout="a Hugging Face checkpoint" if len(found) > 1 else "a Hugging Face model",
        global_step=told.global_step,
        epoch=told.epoch,
        objects=[Found(name, tree) for name, tree in found.items()],
        files=read,
        notes=told.notes,
        left_out=sorted(e.name for e in path.iterdir() if e.name.startswith(_LEFT_OUT)),
    )


def _weights(path: Path) -> list[Path]:
    """The files of the weights: one, or those that an index names."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            return [path / name]
        index = path / f"{name}.index.json"
        if index.is_file():
            content = pickled.load_json(index)
            named = content.get("weight_map", {}) if isinstance(content, dict) else {}
            files = sorted({str(file) for file in named.values()})
            missing = [f for f in files if Path(f).name != f or not (path / f).is_file()]
            if missing or not files:
                raise CheckpointError(
                    f"{index} names {', '.join(missing) or 'no file'}, which is not there: copy "
                    f"the whole checkpoint."
                )
            return [path / file for file in files]
    return []


def _place(state: Any, path: Path) -> Place:
    try:
        step, epoch = int(state["global_step"]), float(state.get("epoch") or 0.0)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} cannot be read: it names no global_step.") from None
    begin = math.ceil(epoch - _ROUNDING)
    mid = begin - epoch > _ROUNDING
    why = f"it was saved at epoch {epoch:g}"
    return Place(step, begin, (begins_with(begin, why),) if mid else ())
