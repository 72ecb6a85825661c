"""Memory in which a save is staged: the files as they will be, byte for byte.

Training waits for one copy of its state into memory that is there already; hashing and writing
are a thread's business (`saving`). The memory is kept from save to save, because fresh memory is
slower than most disks: each of its pages must be made first. So a file of what is not trained may
be there from the save before: several threads hash what is live instead of copying it, and nobody
needs to hash it afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpcresume.checkpoint import copying, writer
from hpcresume.checkpoint.images import memory
from hpcresume.checkpoint.pinned import Pinned, take

_PAGE = 4096


@dataclass
class Image:
    """A file that is to be written: its name and its bytes."""

    name: str
    content: memoryview
    digests: tuple[str, ...] | None = None
    """Of the content, where somebody has hashed it."""


class _Copies:
    """Tensors that are copied together."""

    def __init__(self) -> None:
        self._order: list[int] = []
        self.targets: list[torch.Tensor] = []
        self.shares: list[slice] = []

    def add(self, place: int, target: torch.Tensor) -> None:
        """Have a tensor copied: its place among all that are staged, and where to."""
        self._order.append(place)
        self.targets.append(target)

    def divide(self) -> None:
        """Nothing is added any more."""
        self.shares = copying.shares(self.targets)

    def sources(self, found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What goes to the targets, out of all that is staged."""
        return [found[place] for place in self._order]


def _at_once() -> None:
    """What is on the CPU has been copied when the copy returns."""


class Arena:
    """Holds one save at a time."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None
        self._layout: list[Any] = []
        self._images: list[Image] = []
        self._always = _Copies()
        self._where_changed: list[tuple[Image, bytes, _Copies]] = []
        """With the file's head: what is copied only where the live tensors are not as it is."""
        self._pinned: Pinned | None = None
        self.arrived: Callable[[], None] = _at_once
        """Waits until all that was staged last is in the images."""

    def stage(
        self,
        contents: Mapping[str, Mapping[str, torch.Tensor]],
        metadata: Mapping[str, str],
        more: Mapping[str, Mapping[str, str]] | None = None,
        still: Collection[str] = (),
    ) -> list[Image]:
        """Copy tensors, by file and name, into images of safetensors files.

        `metadata` goes into each of them, `more` into some; the `still` ones are likely to be there
        from the last call. They hold until the next call, and are whole once `arrived` has
        returned. Raises CheckpointError for what safetensors cannot hold.
        """
        found = [tensor for tensors in contents.values() for tensor in tensors.values()]
        layout: list[Any] = [
            [(file, *tensors) for file, tensors in contents.items()],
            [tensor.dtype for tensor in found],
            [tensor.shape for tensor in found],
            {file: {**metadata, **(more or {}).get(file, {})} for file in contents},
            sorted(still),
        ]
        if layout != self._layout:
            self._lay_out(contents, layout[-2], still)
            self._layout = layout
        due = [(self._always, self._always.sources(found))]
        for image, head, copies in self._where_changed:
            live = copies.sources(found)
            if not _is_there(image, head, live):
                image.digests = None
                due.append((copies, live))
        sources = [source for _, own in due for source in own]
        if self._is_pinned_for(sources):
            self.arrived = take([target for copies, _ in due for target in copies.targets], sources)
        else:
            self.arrived = _at_once
            for copies, own in due:
                copying.copy(copies.targets, own, copies.shares)
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
        still: Collection[str],
    ) -> None:
        heads = {file: writer.header(own, metadata[file]) for file, own in contents.items()}
        sizes = {
            file: len(heads[file]) + sum(t.numel() * t.element_size() for t in tensors.values())
            for file, tensors in contents.items()
        }
        self._images, self._always, self._where_changed, self._layout = [], _Copies(), [], []
        room = self._room_for(sum(size + -size % _PAGE for size in sizes.values()))
        start = before = 0
        for file, tensors in contents.items():
            content = room[start : start + sizes[file]]
            content[: len(heads[file])] = heads[file]
            image, copies = Image(file, content), self._always
            self._images.append(image)
            if file in still:
                copies = _Copies()
                self._where_changed.append((image, heads[file], copies))
            offset = start + len(heads[file])
            places = {name: before + place for place, name in enumerate(tensors)}
            before += len(tensors)
            for name in writer.layout(tensors):
                tensor = tensors[name]
                count = tensor.numel()
                if count:
                    flat = torch.frombuffer(room, dtype=tensor.dtype, count=count, offset=offset)
                    copies.add(places[name], flat.view(tensor.shape))
                offset += count * tensor.element_size()
            start += sizes[file] + -sizes[file] % _PAGE
        for copies in (self._always, *(copies for *_, copies in self._where_changed)):
            copies.divide()

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


def _is_there(image: Image, head: bytes, live: Sequence[torch.Tensor]) -> bool:
    """Whether an image of what is not trained holds what is live, byte for byte."""
    if image.digests is None or not all(tensor.is_cpu for tensor in live):
        # From a GPU, what would be hashed has to be copied all the same.
        return False
    return writer.digests_of(head, live) == image.digests
