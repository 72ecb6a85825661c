"""Memory in which a save is staged: the files as they will be, byte for byte.

Training waits for one copy of its state into memory that is there already; hashing and writing
are a thread's business (`saving`). The memory is kept from save to save, because fresh memory is
slower than most disks: each of its pages must be made first.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpcresume.checkpoint import copying, writer
from hpcresume.checkpoint.images import memory

_PAGE = 4096


@dataclass(frozen=True)
class Image:
    """A file that is to be written: its name and its bytes."""

    name: str
    content: memoryview


class Arena:
    """Holds one save at a time."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._layout: list[Any] = []
        self._images: list[Image] = []
        self._order: list[int] = []
        self._targets: list[torch.Tensor] = []
        """What is copied: its place among all tensors, and where to."""
        self._shares: list[slice] = []

    def stage(
        self,
        contents: Mapping[str, Mapping[str, torch.Tensor]],
        metadata: Mapping[str, str],
        more: Mapping[str, Mapping[str, str]] | None = None,
    ) -> list[Image]:
        """Copy tensors, by file and name, into images of safetensors files.

        `metadata` goes into each of them, `more` into some. They hold until the next call. Raises
        CheckpointError for what safetensors cannot hold.
        """
        found = [tensor for tensors in contents.values() for tensor in tensors.values()]
        layout: list[Any] = [
            [(file, *tensors) for file, tensors in contents.items()],
            [tensor.dtype for tensor in found],
            [tensor.shape for tensor in found],
            {file: {**metadata, **(more or {}).get(file, {})} for file in contents},
        ]
        if layout != self._layout:
            self._lay_out(contents, layout[-1])
            self._layout = layout
        copying.copy(self._targets, [found[place] for place in self._order], self._shares)
        return self._images

    def _lay_out(
        self,
        contents: Mapping[str, Mapping[str, torch.Tensor]],
        metadata: Mapping[str, Mapping[str, str]],
    ) -> None:
        heads = {file: writer.header(own, metadata[file]) for file, own in contents.items()}
        sizes = {
            file: len(heads[file]) + sum(t.numel() * t.element_size() for t in tensors.values())
            for file, tensors in contents.items()
        }
        self._images, self._order, self._targets, self._layout = [], [], [], []
        room = self._room_for(sum(size + -size % _PAGE for size in sizes.values()))
        start = before = 0
        for file, tensors in contents.items():
            content = room[start : start + sizes[file]]
            content[: len(heads[file])] = heads[file]
            self._images.append(Image(file, content))
            offset = start + len(heads[file])
            places = {name: before + place for place, name in enumerate(tensors)}
            before += len(tensors)
            for name in writer.layout(tensors):
                tensor = tensors[name]
                count = tensor.numel()
                if count:
                    flat = torch.frombuffer(room, dtype=tensor.dtype, count=count, offset=offset)
                    self._order.append(places[name])
                    self._targets.append(flat.view(tensor.shape))
                offset += count * tensor.element_size()
            start += sizes[file] + -sizes[file] % _PAGE
        self._shares = copying.shares(self._targets)

    def _room_for(self, size: int) -> memoryview:
        """The memory, made anew where it is too small or much too large."""
        if self._memory is None or not size <= len(self._memory) <= 2 * max(size, _PAGE):
            self._memory = None
            self._memory = memory(max(size, _PAGE))
            with contextlib.suppress(AttributeError, OSError):
                # A forked child (a loader's worker) would make the next save copy each page.
                self._memory.obj.madvise(mmap.MADV_DONTFORK)  # type: ignore[attr-defined]
        return self._memory
