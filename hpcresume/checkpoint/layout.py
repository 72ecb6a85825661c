"""How the tensors of one registered object are laid out in files.

One file, or several with Hugging Face's names where part of a module is not trained: such a file
is the same from save to save, and need not be written each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpcresume import files
from hpcresume.checkpoint.outline import Outline

_FILE = re.compile(r"(?P<object>\w+)(-\d{5}-of-\d{5})?\.safetensors")
#: Parts that are smaller are not worth a file of their own.
_WORTH_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one object go, and the text of all else in its state."""

    outline: Outline
    files: dict[str, list[str]]
    """The names in each file."""
    still: frozenset[str]
    """Files of what is not trained."""

    def text(self, numbers: Sequence[Any]) -> bytes:
        """What state.json says of the object, with the numbers of a state of this outline."""
        aliases = files.to_json(self.outline.aliases).rstrip()
        return b'{"tree":%s,"aliases":%s}' % (self.outline.tree(numbers), aliases)


def lay_out(name: str, outline: Outline, tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The layout of an object's tensors."""
    if not tensors:
        return Layout(outline, {}, frozenset())
    still = [key for key, tensor in tensors.items() if _is_still(tensor)]
    moving = [key for key, tensor in tensors.items() if not _is_still(tensor)]
    if moving and _size(tensors[key] for key in still) >= _WORTH_BYTES:
        first, second = (f"{name}-{number:05d}-of-00002.safetensors" for number in (1, 2))
        return Layout(outline, {first: moving, second: still}, frozenset({second}))
    file = f"{name}.safetensors"
    return Layout(outline, {file: list(tensors)}, frozenset(() if moving else {file}))


def index_file(name: str) -> str:
    """The name of the file that says which tensor is in which file, where there are several."""
    return f"{name}.safetensors.index.json"


def index(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of that file, in Hugging Face's words."""
    places = {key: file for file, keys in layout.files.items() for key in keys}
    total = {"total_size": _size(tensors.values())}
    return files.to_json({"metadata": total, "weight_map": places}, indent=1)


def files_of(name: str, present: Iterable[str]) -> list[str]:
    """Which of the files of a checkpoint hold an object's tensors, in order."""
    matches = {file: _FILE.fullmatch(file) for file in present}
    return sorted(file for file, match in matches.items() if match and match["object"] == name)


def _is_still(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def _size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
