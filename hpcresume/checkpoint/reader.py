"""Puts a checkpoint's state back into live objects, in place, and proves that it arrived.

After each load the digests of the live state are compared with the manifest: a silent cast, a
missed key or a stale reference is an error that names the tensor, never a slightly other run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hpcresume.checkpoint import writer
from hpcresume.checkpoint.manifest import Committed, hash_stream
from hpcresume.checkpoint.tensors import Split
from hpcresume.errors import CheckpointError


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


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
    with torch.no_grad():
        for name, tensor in live.items():
            source = saved[name]
            if source.shape != tensor.shape or source.dtype != tensor.dtype:
                raise CheckpointError(
                    f"'{what}.{name}' is {_kind(tensor)} here, {_kind(source)} in the checkpoint."
                )
            tensor.copy_(source)


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
    committed: Committed, name: str, live: Split, tree: Any, metadata: Mapping[str, str]
) -> None:
    """Raise CheckpointError unless a live state is byte for byte what the checkpoint holds.

    `tree` is the JSON half in the checkpoint; `name` the object, whose tensors are in
    `<name>.safetensors`.
    """
    if not same_tree(live.tree, tree):
        raise CheckpointError(
            f"'{name}' did not take over what checkpoint-{committed.step} holds: "
            f"{_first_difference(tree, live.tree, name)}."
        )
    file = f"{name}.safetensors"
    if not live.tensors:
        return
    if (
        hash_stream(writer.stream(live.tensors, metadata))[1]
        == committed.manifest.entry(file).chunks
    ):
        return
    saved = read_safetensors(committed.path / file)
    for key in sorted(live.tensors.keys() | saved.keys()):
        here, there = live.tensors.get(key), saved.get(key)
        if here is None or there is None or not _same(here, there):
            raise CheckpointError(
                f"'{name}': tensor '{key}' is not what checkpoint-{committed.step} holds after "
                f"loading it."
            )
    raise CheckpointError(f"'{name}' is laid out differently from checkpoint-{committed.step}.")


def _same(here: torch.Tensor, there: torch.Tensor) -> bool:
    if here.dtype != there.dtype or here.shape != there.shape:
        return False
    left, right = ({"x": t} for t in (here, there))
    return hash_stream(writer.stream(left, {})) == hash_stream(writer.stream(right, {}))


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
