"""What can be registered, seen from outside: which kind it is, and what it tells of itself."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from hpcresume import files
from hpcresume.checkpoint.tensors import fleeting_buffers, module_state


def is_stateful(value: Any) -> bool:
    """Whether a state dict goes out of it and into it."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def is_tokenizer(value: Any) -> bool:
    """Whether it writes files of its own, as the tokenizers of transformers do."""
    return callable(getattr(value, "save_pretrained", None))


def is_json(value: Any) -> bool:
    """Whether it is a value that JSON can hold."""
    try:
        files.to_json(value)
    except (TypeError, ValueError):
        return False
    return True


def as_json(value: Any) -> Any:
    """A copy as JSON would give it back."""
    return json.loads(files.to_json(value))


def state_of(name: str, value: Any) -> Any:
    """The state dict of an object that has one; `name` is for messages."""
    return module_state(value, name) if isinstance(value, torch.nn.Module) else value.state_dict()


def buffers_file(name: str) -> str:
    """The file of those buffers of a module that no state dict holds."""
    return f"{name}.buffers.safetensors"


def fleeting_of(name: str, value: Any) -> dict[str, torch.Tensor]:
    """The buffers of a module, by name, that its state dict leaves out."""
    if not isinstance(value, torch.nn.Module):
        return {}
    places = fleeting_buffers(value, name)
    return {key: getattr(part, buffer) for key, (part, buffer) in places.items()}


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All parameters, in the order in which the state dict numbers them."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What a tokenizer writes, by name relative to its folder."""
    with tempfile.TemporaryDirectory(prefix="hpcresume-tokenizer-") as name:
        tokenizer.save_pretrained(name)
        folder = Path(name)
        paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
