"""A directory with model.pt, optimizer.pt, scheduler.pt, ema_model.pt, training_state.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcresume.checkpoint.foreign import pickled
from hpcresume.checkpoint.foreign.places import place
from hpcresume.checkpoint.foreign.source import Found, Source, sort_out
from hpcresume.errors import CheckpointError

_STATE = "training_state.json"
#: Names of files; all but the first are optional.
_OBJECTS = {
    "model": "model.pt",
    "optimizer": "optimizer.pt",
    "scheduler": "scheduler.pt",
    "ema": "ema_model.pt",
    "scaler": "scaler.pt",
}


def opened(path: Path, trust: bool) -> Source | None:
    """The checkpoint in a directory; None where it is none of this kind."""
    files = {name: path / file for name, file in _OBJECTS.items() if (path / file).is_file()}
    if "model" not in files:
        return None
    found = {name: _content(name, pickled.load(file, trust), file) for name, file in files.items()}
    state, told = path / _STATE, {}
    read = list(files.values())
    if state.is_file():
        told = pickled.load_json(state)
        read.append(state)
        if not isinstance(told, dict):
            raise CheckpointError(f"{state} cannot be read: it is no JSON object.")
    stood = place(path.name, told, found)
    missing = (f"it has no {_STATE}",) if not told else ()
    names = {file.name for file in read}
    return Source(
        path=path,
        layout="a directory of state files",
        global_step=stood.global_step,
        epoch=stood.epoch,
        objects=[Found(name, tree) for name, tree in found.items()],
        files=read,
        notes=(*missing, *stood.notes),
        left_out=sorted(e.name for e in path.iterdir() if e.name not in names),
    )


def _content(name: str, content: Any, path: Path) -> Any:
    """The state of one object, also where it is wrapped: {"model_state_dict": …}."""
    objects, _ = sort_out(content)
    inner = next((objects[word] for word in (name, "model") if word in objects), None)
    if name in ("model", "optimizer") and inner is None:
        held = f"{', '.join(map(str, content))}" if isinstance(content, dict) else type(content)
        raise CheckpointError(f"{path} holds {held}, and no state of the {name}.")
    return content if inner is None else inner
