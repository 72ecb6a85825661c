"""Memory in which a save is staged: the files as they will be, byte for byte.

Training waits for one copy of its state into memory that is there already; hashing and writing
are a thread's business (`saving`). The memory is kept from save to save, because fresh memory is
slower than most disks: each of its pages must be made first.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpcresume.checkpoint import copying, writer
from hpcresume.checkpoint.images import memory
from hpcresume.checkpoint.pinned import Pinned, take

_PAGE = 4096


@dataclass(frozen=True)
class Image:
    """A file that is to be written: its name and its bytes."""

    name: str
    content: memoryview


def _at_once() -> None:
    """What is on the CPU has been copied when the copy returns."""


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
        self._pinned: Pinned | None = None
        self.arrived: Callable[[], None] = _at_once
        """Waits until all that was staged last is in the images."""

    def stage(
        self,
        contents: Mapping[str, Mapping[str, torch.Tensor]],
        metadata: Mapping[str, str],
        more: Mapping[str, Mapping[str, str]] | None = None,
    ) -> list[Image]:
        """Copy tensors, by file and name, into images of safetensors files.

        `metadata` goes into each of them, `more` into some. They hold until the next call, and are
        whole once `arrived` has returned. Raises CheckpointError for what safetensors cannot hold.
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
        sources = [found[place] for place in self._order]
        if self._is_pinned_for(sources):
            self.arrived = take(self._targets, sources)
        else:
            self.arrived = _at_once
            copying.copy(self._targets, sources, self._shares)
        return self._images

    def _is_pinned_for(self, sources: list[torch.Tensor]) -> bool:
        """Whether GPUs can copy by themselves, where some of the sources are on one."""
        if self._memory is None or not any(source.is_cuda for source in sources):
            return False
        if self._pinned is None:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
            self._pinned = Pinned(address, len(self._memory))
        return self._pinned.holds

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
            if self._pinned is not None:
                self._pinned.release()
            self._pinned = self._memory = None
            self._memory = memory(max(size, _PAGE))
            with contextlib.suppress(AttributeError, OSError):
                # A forked child (a loader's worker) would make the next save copy each page.
                self._memory.obj.madvise(mmap.MADV_DONTFORK)  # type: ignore[attr-defined]
        return self._memory
