"""How the tensors of one registered object are laid out in files.

One file, or several with Hugging Face's names: what is not trained lies in a file of its own, which
is the same from save to save and need not be written each time; and what all ranks hold alike may
be divided among them, so that each writes a share. Where each rank holds a part of the tensors, it
writes that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hpcresume import files
from hpcresume.checkpoint import sharded
from hpcresume.checkpoint.images import INDEX
from hpcresume.checkpoint.outline import Outline

_FILE = re.compile(r"(?P<object>\w+)(-\d{5}-of-\d{5})?\.safetensors")
#: Parts that are smaller are not worth a file of their own...
_WORTH_BYTES = 1 << 20
#: ...nor the ranks' trouble.
_DIVIDED_BYTES = 32 << 20


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one object go, and the text of all else in its state."""

    outline: Outline
    files: dict[str, list[str]]
    """The names in each file."""
    still: frozenset[str] = frozenset()
    """Files of what is not trained."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Who writes a file, where it is not rank 0."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What this rank's file says of the parts that it holds; empty where there are only wholes."""

    def names_of(self, rank: int) -> dict[str, list[str]]:
        """The names in each file that a rank writes."""
        return {f: names for f, names in self.files.items() if self.ranks.get(f, 0) == rank}

    def text(self, numbers: Sequence[Any]) -> bytes:
        """What state.json says of the object, with the numbers of a state of this outline."""
        aliases = files.to_json(self.outline.aliases).rstrip()
        return b'{"tree":%s,"aliases":%s}' % (self.outline.tree(numbers), aliases)


def lay_out(
    name: str,
    outline: Outline,
    tensors: Mapping[str, torch.Tensor],
    alike: Collection[str] = (),
    world_size: int = 1,
) -> Layout:
    """The layout of an object's tensors, the same on all ranks.

    `alike` names those which all `world_size` ranks hold bit for bit alike.
    """
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    still = [key for key, tensor in tensors.items() if _is_still(tensor)]
    if sum(sizes[key] for key in still) < _WORTH_BYTES and len(still) < len(tensors):
        still = []
    moving = [key for key in tensors if key not in set(still)]
    shares = [moving]
    divided = [key for key in moving if key in alike]
    if world_size > 1 and sum(sizes[key] for key in divided) >= _DIVIDED_BYTES:
        shares = _divide(divided, sizes, world_size)
        shares[0] += [key for key in moving if key not in alike]
    groups = [(rank, keys) for rank, keys in enumerate(shares) if keys]
    if still:
        groups.append((0, still))
    if len(groups) < 2:
        names = [f"{name}.safetensors"] * len(groups)
    else:
        total = len(groups)
        names = [_numbered(name, n, total) for n in range(total)]
    return Layout(
        outline,
        {file: keys for file, (_, keys) in zip(names, groups, strict=True)},
        still=frozenset(names[-1:] if still else ()),
        ranks={file: rank for file, (rank, _) in zip(names, groups, strict=True) if rank},
    )


def lay_out_parts(name: str, outline: Outline, rank: int, world_size: int) -> Layout:
    """The layout of an object of which each rank holds parts: a file of each, also of a replica.

    Rank 0's has besides what lies on no other rank. Only the names in this rank's own are known.
    """
    parts, own = outline.parts, _numbered(name, rank, world_size)
    ranks = {_numbered(name, other, world_size): other for other in range(1, world_size)}
    here = [key for key in parts if key not in outline.replicas]
    keys = [*here, *(key for key in outline.names if key not in parts and rank == 0)]
    return Layout(
        outline,
        {own: keys},
        ranks=ranks,
        metadata=sharded.metadata({key: parts[key] for key in here}),
    )


def _numbered(name: str, number: int, total: int) -> str:
    return f"{name}-{number + 1:05d}-of-{total:05d}.safetensors"


def _divide(keys: Sequence[str], sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Parts of about the same size: the largest first, each to the part that has least."""
    found: list[list[str]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for key in sorted(keys, key=lambda key: (-sizes[key], key)):
        least = filled.index(min(filled))
        found[least].append(key)
        filled[least] += sizes[key]
    return found


def index_file(name: str) -> str:
    """The name of the file that says which tensor is in which file, where there are several."""
    return f"{name}{INDEX}"


def index(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of that file, in Hugging Face's words."""
    places = {key: file for file, keys in layout.files.items() for key in keys}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    total = {"total_size": size}
    return files.to_json({"metadata": total, "weight_map": places}, indent=1)


def files_of(name: str, present: Iterable[str]) -> list[str]:
    """Which of the files of a checkpoint hold an object's tensors, in order."""
    matches = {file: _FILE.fullmatch(file) for file in present}
    return sorted(file for file, match in matches.items() if match and match["object"] == name)


def _is_still(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
