"""The tensors of one object in a checkpoint, wherever in its files their elements lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpcresume.checkpoint import reader, sharded, writer
from hpcresume.checkpoint.images import Images, Verified, head_of
from hpcresume.checkpoint.manifest import Committed, FileEntry
from hpcresume.checkpoint.reader import Held
from hpcresume.checkpoint.sharded import Part
from hpcresume.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: Gives the part of a tensor that a file holds.
_Take = Callable[[str, str], torch.Tensor]


@dataclass
class Saved:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_split: bool
    """Whether files hold parts of it."""
    parts: list[Part] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Which file holds each of the parts."""

    def put_together(self, name: str, wanted: Part, take: _Take) -> torch.Tensor:
        """A part of the tensor, which is called `name`, in new memory. Raises CheckpointError."""
        found = torch.empty(wanted.sizes, dtype=self.dtype)
        for number, there, here in sharded.pieces(name, wanted, self.parts):
            found[here] = take(self.files[number], name)[there]
        return found


def saved_in(heads: Mapping[str, Mapping[str, Any]]) -> dict[str, Saved]:
    """The tensors of files, by name; `heads` are what the files say of them."""
    found: dict[str, Saved] = {}
    for file, head in heads.items():
        for name, (part, is_split) in sharded.parts_in(head).items():
            dtype = writer.TYPES[head[name]["dtype"]]
            saved = found.setdefault(name, Saved(dtype, part.shape, is_split))
            saved.parts.append(part)
            saved.files.append(file)
    return found


def held_in(
    images: Images,
    files: Sequence[str],
    what: str,
    live_like: Callable[[Mapping[str, Saved]], Mapping[str, DTensor]],
) -> list[Held]:
    """The tensors of some files as this rank is to have them, by the files that hold them.

    `live_like` tells which of them are to lie on several ranks, as which live tensor does.
    """
    tensors = saved_in({file: images.head(file) for file in files})
    like = live_like(tensors)
    whole: dict[str, Held] = {}

    def take(file: str, name: str) -> torch.Tensor:
        if file not in whole:
            whole[file] = reader.held_in(file, images.take(file))
        return whole[file].tensors[name]

    taken: dict[str, dict[str, torch.Tensor]] = {}
    for name, saved in tensors.items():
        wanted = Part.whole(saved.shape)
        if name in like:
            wanted = sharded.part_of(like[name])
            if wanted.shape != saved.shape:
                raise CheckpointError(
                    f"'{what}.{name}' has shape {list(wanted.shape)} here, {list(saved.shape)} in "
                    f"the checkpoint."
                )
        if wanted in saved.parts:
            file = saved.files[saved.parts.index(wanted)]
            taken.setdefault(file, {})[name] = take(file, name)
        else:
            taken.setdefault("", {})[name] = saved.put_together(name, wanted, take)
    return [
        Held(
            file,
            own,
            whole[file].metadata if file else {},
            is_whole=bool(file) and len(own) == len(whole[file].tensors),
            like={name: like[name] for name in own if name in like},
        )
        for file, own in taken.items()
    ]


def write_whole(committed: Committed, names: Sequence[str], target: Path) -> FileEntry:
    """Write one file of whole tensors, put together from the parts that some files hold.

    At most one of them is in memory, and one chunk of each file; all is verified while it is read.
    Raises OSError, CheckpointError.
    """
    with contextlib.ExitStack() as opened:
        sources = {}
        heads, starts = {}, {}
        for name in names:
            source = sources[name] = Verified(committed, name)
            opened.callback(source.close)
            length = source.read(0, 8)
            rest = source.read(8, int.from_bytes(length, "little"))
            heads[name], starts[name] = head_of(bytes(length + rest))
        tensors = saved_in(heads)

        def take(file: str, name: str) -> torch.Tensor:
            entry = heads[file][name]
            start, end = entry["data_offsets"]
            content = sources[file].read(starts[file] + start, end - start)
            return torch.frombuffer(content, dtype=tensors[name].dtype).view(entry["shape"])

        looks = {
            name: torch.empty(saved.shape, dtype=saved.dtype, device="meta")
            for name, saved in tensors.items()
        }

        def pieces() -> Iterator[bytes | memoryview]:
            yield writer.header(looks, reader.METADATA)
            for name in writer.layout(looks):
                whole = Part.whole(tensors[name].shape)
                tensor = tensors[name].put_together(name, whole, take)
                yield writer.bytes_of(tensor)
                del tensor

        return writer.write_pieces(target, pieces())
