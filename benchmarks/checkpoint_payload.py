"""What is saved in the benchmark, and the least that saving and reading it could take."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from checkpoint_rows import Unmeasurable
from torch import nn

from hpcresume import files

#: What one call reads or writes.
_PIECE_BYTES = 8 << 20
#: The most of a file that may be in memory where it is called cold.
_COLD_SHARE = 0.01
_LIBC = ctypes.CDLL(None, use_errno=True)


class Block(nn.Module):
    """Up to four parameters: the leaves of a model are modules, not one long list."""

    def __init__(self, count: int, each: int, trained: bool) -> None:
        super().__init__()
        for name in ("query", "key", "value", "output")[:count]:
            self.register_parameter(name, nn.Parameter(torch.randn(each), requires_grad=trained))


class Training:
    """A model and its AdamW whose state is filled: so many tensors, so many bytes together.

    Three of four tensors are the optimizer's. With `frozen`, that share of the bytes is of
    parameters that are not trained, half of the tensors. `begun=False` leaves the state empty.
    """

    def __init__(
        self, num_tensors: int, size_bytes: int, *, frozen: float = 0.0, begun: bool = True
    ) -> None:
        torch.manual_seed(1)
        self.num_tensors = num_tensors
        still = num_tensors // 2 if frozen else 0
        self.num_trained = (num_tensors - still) // 4
        # A parameter and its two averages; the counts of steps are four bytes each.
        trained = _blocks(self.num_trained, int(size_bytes * (1 - frozen)) // 3, trained=True)
        self.model = nn.Sequential(*trained, *_blocks(still, int(size_bytes * frozen), False))
        self.optimizer = self.new_optimizer()
        if begun:
            self.step()
        trim()

    def new_optimizer(self) -> torch.optim.AdamW:
        """One whose state is empty, as in a new link."""
        params = [param for param in self.model.parameters() if param.requires_grad]
        return torch.optim.AdamW(params, foreach=True)

    def step(self) -> None:
        """Change all that is trained."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as other libraries are given them."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
        return found

    @property
    def changing_bytes(self) -> int:
        """Size of all that a step changes."""
        params = {f"model.{n}" for n, p in self.model.named_parameters() if not p.requires_grad}
        return sum(t.nbytes for name, t in self.tensors().items() if name not in params)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def _blocks(count: int, size_bytes: int, trained: bool) -> list[Block]:
    # As the sizes of layers are: multiples of sixteen, where there is room for it.
    each = max(1, size_bytes // 4 // max(1, count))
    each -= each % 16 if each > 16 else 0
    return [Block(min(4, count - begin), each, trained) for begin in range(0, count, 4)]


class Raw:
    """So many bytes in memory and on a disk, moved with nothing besides."""

    def __init__(self, size_bytes: int, folder: Path) -> None:
        # Random: some file systems compress.
        self._source = torch.rand(size_bytes // 4)
        self._target = torch.ones(size_bytes // 4)
        self.path = folder / "raw"

    def copy(self) -> float:
        """One copy into memory that is there."""
        return timed(lambda: self._target.copy_(self._source))

    def write(self) -> float:
        """Write and fsync."""
        content = memoryview(self._source.numpy()).cast("B")

        def write() -> None:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            for start in range(0, content.nbytes, _PIECE_BYTES):
                files.write_all(fd, content[start : start + _PIECE_BYTES])
            os.fsync(fd)
            os.close(fd)

        self.path.unlink(missing_ok=True)
        settle(self.path.parent)
        return timed(write)

    def read(self) -> float:
        """Read into memory that is there."""
        if not self.path.exists():
            self.write()
        place = memoryview(self._target.numpy()).cast("B")

        def read() -> None:
            with open(self.path, "rb", buffering=0) as file:
                for start in range(0, place.nbytes, _PIECE_BYTES):
                    file.readinto(place[start : start + _PIECE_BYTES])

        return timed(read)

    def read_cold(self) -> float:
        """The same from the disk."""
        if not self.path.exists():
            self.write()
        forget([self.path])
        return self.read()


def timed(what: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def settle(folder: Path) -> None:
    """Have what was deleted done with, so that the next fsync does not pay for it."""
    files.fsync_dir(folder)


def trim() -> None:
    """Give back what the allocator keeps: a save could hide in it from the count of memory."""
    with contextlib.suppress(AttributeError):
        _LIBC.malloc_trim(0)


def forget(paths: Iterable[Path]) -> None:
    """Take files, and those in folders, out of the page cache.

    Raises Unmeasurable where the file system keeps more than one part in a hundred.
    """
    inside = [p for path in paths for p in (path.rglob("*") if path.is_dir() else [path])]
    found = [path for path in inside if path.is_file()]
    for path in found:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    held = sum(map(_resident_bytes, found))
    share = held / max(1, sum(path.stat().st_size for path in found))
    if share >= _COLD_SHARE:
        raise Unmeasurable(f"{share:.0%} of the files stay in memory after POSIX_FADV_DONTNEED")


def _resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache, as mincore tells."""
    size = path.stat().st_size
    if not size:
        return 0
    told = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as pages:
        first = ctypes.c_char.from_buffer(pages)
        failed = _LIBC.mincore(ctypes.byref(first), ctypes.c_size_t(size), told)
        # The mapping cannot be closed while something points into it.
        del first
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(page & 1 for page in told) * mmap.PAGESIZE
