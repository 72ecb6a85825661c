"""Puts a checkpoint's state back into live objects, in place, and proves that it arrived.

After each load the digests of the live state are compared with the manifest: a silent cast, a
missed key or a stale reference is an error that names the tensor, never a slightly other run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hpcresume.checkpoint import copying, writer
from hpcresume.checkpoint.images import Images, head_of
from hpcresume.checkpoint.manifest import Committed
from hpcresume.checkpoint.tensors import Split
from hpcresume.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: transformers wants to know for which framework a file was written.
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Held:
    """Tensors in the memory of a checkpoint's file, or put together from several."""

    file: str
    """Empty where they are put together."""
    tensors: dict[str, torch.Tensor]
    metadata: Mapping[str, str]
    is_whole: bool = True
    """Whether these are all tensors of the file."""
    like: Mapping[str, DTensor] = field(default_factory=dict)
    """Live tensors as which some are to lie on several ranks; these are this rank's parts, then."""


def held_in(file: str, image: memoryview) -> Held:
    """The tensors of a safetensors file, in the memory of its bytes."""
    head, begin = head_of(image)
    metadata = head.pop("__metadata__", {})
    found = {}
    for name, entry in head.items():
        dtype, (start, end) = writer.TYPES[entry["dtype"]], entry["data_offsets"]
        if start == end:
            found[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        count, offset = (end - start) // dtype.itemsize, begin + start
        flat = torch.frombuffer(image, dtype=dtype, count=count, offset=offset)
        found[name] = flat.view(entry["shape"])
    return Held(file, found, metadata)


def kept(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors for good: in the file's memory where they lie aligned as any other, else copies.

    How a tensor is aligned may decide which of its kernels a library takes, and so the last bit.
    """
    odd = {n: t for n, t in tensors.items() if t.data_ptr() % writer.LINE_BYTES}
    return {**tensors, **clones(odd)}


def clones(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies, each in memory of its own: aligned as any other tensor, and as long-lived."""
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    targets = list(copies.values())
    copying.copy(targets, list(tensors.values()), copying.shares(targets))
    return copies


def copy_into(
    live: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], what: str
) -> None:
    """Copy saved tensors into live ones of the same names, shapes and types."""
    missing = sorted(live.keys() - saved.keys())
    surplus = sorted(saved.keys() - live.keys())
    if missing or surplus:
        raise CheckpointError(
            f"'{what}' does not fit the checkpoint: "
            + "; ".join(
                f"{label} {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
                for label, names in (("it lacks", missing), ("it alone has", surplus))
                if names
            )
            + "."
        )
    for name, tensor in live.items():
        source = saved[name]
        if source.shape != tensor.shape or source.dtype != tensor.dtype:
            raise CheckpointError(
                f"'{what}.{name}' is {_kind(tensor)} here, {_kind(source)} in the checkpoint."
            )
    targets = list(live.values())
    copying.copy(targets, [saved[name] for name in live], copying.shares(targets))


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def keep_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Undo the cast of `Optimizer.load_state_dict`, which forces state to the parameter's dtype.

    torch casts floating state whatever its own dtype was (pytorch issue 43706), so that fp32
    moments of bf16 parameters would lose 16 bits at each resume.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in saved["param_groups"] for i in group["params"]]
    for index, param in zip(indices, params, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            live = optimizer.state[param].get(key)
            both = isinstance(value, torch.Tensor) and isinstance(live, torch.Tensor)
            if both and live.dtype != value.dtype:
                optimizer.state[param][key] = value.to(live.device, copy=True)


def check_arrived(
    committed: Committed, name: str, live: Split, tree: Any, saved: Sequence[Held]
) -> None:
    """Raise CheckpointError unless a live state is byte for byte what the checkpoint holds.

    `tree` is the JSON half in the checkpoint, `saved` are the tensors.
    """
    if not same_tree(live.tree, tree):
        raise CheckpointError(
            f"'{name}' did not take over what checkpoint-{committed.step} holds: "
            f"{_first_difference(tree, live.tree, name)}."
        )
    left = dict(live.tensors)
    for held in saved:
        here = {key: left.pop(key) for key in held.tensors if key in left}
        tensors = held.tensors
        if held.is_whole and len(here) == len(tensors):
            digests = writer.digests(here, held.metadata)
            if digests == committed.manifest.entry(held.file).chunks:
                continue
            # What is live may lie in the file's own memory: only the disk tells what has changed.
            tensors = held_in(held.file, Images(committed).take(held.file)).tensors
        other = {k: t for k, t in tensors.items() if k not in here or not _same(here[k], t)}
        if held.is_whole and not other:
            raise CheckpointError(
                f"'{name}' is laid out differently from {held.file} of checkpoint-{committed.step}."
            )
        left |= other
    for key in sorted(left):
        raise CheckpointError(
            f"'{name}': tensor '{key}' is not what checkpoint-{committed.step} holds after "
            f"loading it."
        )


def _same(here: torch.Tensor, there: torch.Tensor) -> bool:
    if here.dtype != there.dtype or here.shape != there.shape:
        return False
    return writer.digests({"x": here}, {}) == writer.digests({"x": there}, {})


def same_tree(saved: Any, live: Any) -> bool:
    """Whether two JSON trees are the same; NaN is the same as NaN."""
    if isinstance(saved, dict) and isinstance(live, dict):
        return saved.keys() == live.keys() and all(same_tree(saved[k], live[k]) for k in saved)
    if isinstance(saved, list) and isinstance(live, list):
        return len(saved) == len(live) and all(map(same_tree, saved, live))
    return bool(saved == live or (saved != saved and live != live))  # noqa: PLR0124


def _first_difference(saved: Any, live: Any, path: str) -> str:
    if isinstance(saved, dict) and isinstance(live, dict):
        for key in sorted(saved.keys() | live.keys(), key=str):
            if not same_tree(saved.get(key), live.get(key)):
                return _first_difference(saved.get(key), live.get(key), f"{path}.{key}")
    if isinstance(saved, list) and isinstance(live, list) and len(saved) == len(live):
        for index, (a, b) in enumerate(zip(saved, live, strict=True)):
            if not same_tree(a, b):
                return _first_difference(a, b, f"{path}.{index}")
    return f"{path} is {_short(live)}, was {_short(saved)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
