"""Checkpoints that other programs have written: a run begins with them, and needs them no more.

`open_foreign` tells the layout; a module for each. Reading a pickle is torch's restricted loading
alone, but for files that the user trusts. `giving` puts the state into what is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpcresume.checkpoint.foreign import dcp, directory, hugging_face, single
from hpcresume.checkpoint.foreign.source import Source
from hpcresume.checkpoint.origin import Origin, Told, is_own, read_own, what_is_there
from hpcresume.errors import CheckpointError, NotFound

#: In order: the first that knows a directory has it.
_DIRECTORIES: tuple[Callable[[Path, bool], Source | None], ...] = (
    dcp.opened,
    directory.opened,
    hugging_face.opened,
)
KNOWN = (
    "one of our runs or checkpoints; a Hugging Face checkpoint (model.safetensors or "
    "pytorch_model.bin, …); model.pt with optimizer.pt, …; a directory of "
    "torch.distributed.checkpoint; or a file (.pt, .ckpt, .safetensors)"
)


def open_foreign(path: Path, trust: bool = False) -> Source:
    """The state that a file or a directory holds, whatever program has written it.

    Raises NotFound, CheckpointError, OSError.
    """
    if path.is_dir():
        for opened in _DIRECTORIES:
            source = opened(path, trust)
            if source is not None:
                return _with_model(source)
        raise CheckpointError(
            f"{path} holds no checkpoint that is known here: {what_is_there(path)}. Known are "
            f"{KNOWN}."
        )
    if not path.exists():
        raise NotFound(f"There is no {path}: {what_is_there(path.parent)}.")
    return _with_model(single.opened(path, trust))


def _with_model(source: Source) -> Source:
    """A source that has a model: the state of its optimizer alone is nothing to begin with."""
    if not any(found.role == "model" for found in source.objects):
        names = ", ".join(found.name for found in source.objects)
        raise CheckpointError(f"{source.path} holds {names}, and no state of a model.")
    return source


def look(origin: Origin) -> Told:
    """What a source tells without its tensors. Raises what `open_foreign` does."""
    path = Path(origin.path)
    if is_own(path):
        own = read_own(path)
        # Its place within the epoch is kept, so the epoch that it counts is not over.
        return Told(layout="a checkpoint", global_step=own.step, epoch=own.manifest.epoch)
    source = open_foreign(path, origin.trust)
    notes = (*source.notes, *_left_out(source))
    return Told(
        layout=source.layout, global_step=source.global_step, epoch=source.epoch, notes=notes
    )


def _left_out(source: Source) -> list[str]:
    return [f"left out: {', '.join(source.left_out)}"] if source.left_out else []
