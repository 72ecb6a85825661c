"""Tensors that lie in parts on several ranks: DTensor, as FSDP2 makes them.

Each rank writes its parts into a file of its own, which says itself what parts they are; so any
number of ranks can put them together again. Where a part lies, and what two of them have in common,
is torch's to say (`torch.distributed.checkpoint`): none of it is worked out here.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch

from hpcresume.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: The word in a file's metadata under which it says of what tensors it holds parts.
_SHARDS = "shards"


@dataclass(frozen=True)
class Part:
    """A box of a tensor's elements."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: Sequence[int]) -> Part:
        """All elements of a tensor."""
        return Part(tuple(shape), (0,) * len(shape), tuple(shape))


def may_be() -> bool:
    """Whether there can be such tensors: somebody has imported them, which takes a second."""
    return "torch.distributed.tensor" in sys.modules


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a rank holds only a part of a tensor, or one of several replicas."""
    return may_be() and isinstance(tensor, sys.modules["torch.distributed.tensor"].DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, in the tensor's own memory."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def obstacle(tensor: DTensor) -> str:
    """Why a tensor's parts cannot be put together again; empty where they can."""
    from torch.distributed.tensor import Replicate, Shard

    for placement in tensor.placements:
        # Shard's own relatives deal out a tensor in ways that are none of a box.
        if type(placement) not in (Shard, Replicate):
            return f"spread over the ranks as {placement!r}"
    return "" if tensor.device_mesh.get_coordinate() else "spread over other ranks than this one"


def part_of(tensor: DTensor) -> Part:
    """Which part of a tensor this rank holds."""
    from torch.distributed.checkpoint.default_planner import create_default_local_save_plan

    (item,) = create_default_local_save_plan({"": tensor}, False).items
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Part(tuple(item.tensor_data.size), tuple(chunk.offsets), tuple(chunk.sizes))


def is_first(tensor: DTensor) -> bool:
    """Whether of all ranks that hold the same part of a tensor, this is the one to write it."""
    coordinate = tensor.device_mesh.get_coordinate() or ()
    places = zip(coordinate, tensor.placements, strict=True)
    return all(place == 0 for place, placement in places if placement.is_replicate())


def like(live: DTensor, part: torch.Tensor) -> DTensor:
    """A tensor of which this rank holds `part`, and that lies on the ranks as another one does."""
    from torch.distributed.tensor import DTensor

    whole = torch.empty(live.shape, device="meta")
    return DTensor.from_local(
        part,
        live.device_mesh,
        live.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def metadata(parts: Mapping[str, Part]) -> dict[str, str]:
    """What a file says of the parts that it holds, by the tensors' names."""
    shards = {
        name: {"shape": list(part.shape), "offset": list(part.offset)}
        for name, part in parts.items()
    }
    return {_SHARDS: json.dumps(shards, separators=(",", ":"), ensure_ascii=False)}


def parts_in(head: Mapping[str, Any]) -> dict[str, tuple[Part, bool]]:
    """What a file of this head holds, by name, and whether it is a part by its own words."""
    shards = json.loads(head.get("__metadata__", {}).get(_SHARDS, "{}"))
    found = {}
    for name, entry in head.items():
        if name in shards:
            shape, offset = shards[name]["shape"], shards[name]["offset"]
            found[name] = (Part(tuple(shape), tuple(offset), tuple(entry["shape"])), True)
        elif name != "__metadata__":
            found[name] = (Part.whole(entry["shape"]), False)
    return found


_Box = tuple[slice, ...]


def pieces(name: str, wanted: Part, held: Sequence[Part]) -> Iterator[tuple[int, _Box, _Box]]:
    """What `wanted` is made of: each time the number of a part, the box in it, the box in `wanted`.

    Raises CheckpointError that names the tensor where elements of it are in no part.
    """
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    def chunk(part: Part) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.sizes))

    # Replicas that several ranks have written count once, and what is empty not at all.
    numbers = {part: n for n, part in reversed(list(enumerate(held))) if math.prod(part.sizes)}
    saved = TensorStorageMetadata(
        TensorProperties(), torch.Size(wanted.shape), [chunk(part) for part in numbers]
    )
    items = create_read_items_for_chunk_list(name, saved, [chunk(wanted)])
    if sum(math.prod(item.lengths) for item in items) != math.prod(wanted.sizes):
        raise CheckpointError(
            f"The checkpoint holds only some of the elements of '{name}': a file of it is missing, "
            f"or from another number of ranks."
        )
    order = list(numbers.values())
    for item in items:
        assert item.storage_index.index is not None
        there = _box(item.storage_offsets, item.lengths)
        here = _box(item.dest_offsets, item.lengths)
        yield order[item.storage_index.index], there, here


def _box(offsets: Sequence[int], lengths: Sequence[int]) -> _Box:
    return tuple(
        slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True)
    )
