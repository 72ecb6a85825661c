"""The files of a checkpoint in memory, each byte as it was written. Needs no torch.

Several threads read, each into its own place, and check every chunk against the manifest while it
is in the processor's cache: a verified read takes little longer than a read.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hpcresume.checkpoint.manifest import CHUNK_BYTES, Committed, FileEntry, damage_of, digest_of
from hpcresume.checkpoint.threads import how_many
from hpcresume.errors import CheckpointError

#: How a file's name ends that says which tensor of an object is in which of its other files.
INDEX = ".safetensors.index.json"
_NUMBERED = re.compile(r"(?P<object>\w+)-\d{5}-of-\d{5}\.safetensors")


def in_parts(names: Collection[str]) -> set[str]:
    """Those of a checkpoint's files between which tensors are split: no index tells of them."""
    numbered = {name: _NUMBERED.fullmatch(name) for name in names}
    return {name for name, m in numbered.items() if m and f"{m['object']}{INDEX}" not in names}


class Images:
    """The files of one checkpoint, by name. What is taken out is its taker's alone.

    What is not in memory is read, and verified, when it is asked for.
    """

    def __init__(self, committed: Committed, content: dict[str, memoryview] | None = None) -> None:
        self.committed = committed
        self._content = content or {}

    def names(self) -> Collection[str]:
        """The files that the checkpoint holds."""
        return [entry.name for entry in self.committed.manifest.files]

    def take(self, name: str) -> memoryview:
        """A file's bytes, which may be written to. Raises what `verify` does."""
        entry = self.committed.manifest.entry(name)
        if name not in self._content:
            content = {name: memory(entry.bytes)}
            _check(self.committed, [entry], content)
            return content[name]
        return self._content.pop(name)

    def head(self, name: str) -> dict[str, Any]:
        """What a safetensors file says of its tensors; not verified where it is not in memory.

        Raises CheckpointError.
        """
        if name in self._content:
            return head_of(self._content[name])[0]
        try:
            with open(self.committed.path / name, "rb") as file:
                length = file.read(8)
                most = self.committed.manifest.entry(name).bytes
                return head_of(length + file.read(min(most, int.from_bytes(length, "little"))))[0]
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} has no readable head ({error})") from None

    def json(self, name: str) -> Any:
        """The value in a JSON file. Raises CheckpointError where it is not there, or no JSON."""
        if name not in self._content:
            self._content[name] = self.take(name)
        try:
            return json.loads(bytes(self._content[name]))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} is no JSON ({error}).") from None


def head_of(image: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The head of a safetensors file as JSON, and where the tensors' bytes begin."""
    end = 8 + int.from_bytes(image[:8], "little")
    head: dict[str, Any] = json.loads(bytes(image[8:end]))
    return head, end


def read(committed: Committed) -> Images:
    """All files of a checkpoint, verified. Raises what `verify` does.

    Of tensors that are split between files, the parts that other ranks wrote are not kept.
    """
    entries = committed.manifest.files
    split = in_parts([entry.name for entry in entries])
    kept = [entry for entry in entries if not (entry.rank and entry.name in split)]
    content = {entry.name: memory(entry.bytes) for entry in kept}
    _check(committed, entries, content)
    return Images(committed, content)


def verify(committed: Committed) -> None:
    """Check every byte.

    Raises CheckpointError that names the file and the place of the damage; OSError where the file
    system cannot tell at present.
    """
    _check(committed, committed.manifest.files, {})


def memory(size: int) -> memoryview:
    """Fresh memory of so many bytes, in large pages where the system has them."""
    if not size:
        return memoryview(bytearray())
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        # Many times faster to make than small ones.
        pages.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(pages)


class Verified:
    """A file of a checkpoint, read a little at a time; each chunk is verified when it is read."""

    def __init__(self, committed: Committed, name: str) -> None:
        self._entry = committed.manifest.entry(name)
        self._fd = _open(committed.path / name, self._entry)
        self._chunk = memoryview(bytearray(min(CHUNK_BYTES, self._entry.bytes)))
        self._index = -1

    def read(self, start: int, size: int) -> bytearray:
        """Some bytes. Raises what `verify` does."""
        found = bytearray()
        while len(found) < size:
            index, begin = divmod(start + len(found), CHUNK_BYTES)
            if index != self._index:
                # A chunk that fails is none that the next call may rely on.
                self._index = -1
                _read_chunk(self._entry, self._fd, index, self._chunk)
                self._index = index
            end = min(begin + size - len(found), _size_of(self._entry, index))
            found += self._chunk[begin:end]
        return found

    def close(self) -> None:
        """Nothing is read any more."""
        os.close(self._fd)


def _check(
    committed: Committed, entries: Sequence[FileEntry], content: Mapping[str, memoryview]
) -> None:
    with contextlib.ExitStack() as opened:
        work = _Work()
        for entry in entries:
            fd = _open(committed.path / entry.name, entry)
            opened.callback(os.close, fd)
            work.add(entry, fd, content.get(entry.name))
        threads = min(how_many(), len(work))
        if threads <= 1:
            work.do()
            return
        with ThreadPoolExecutor(threads, "reader") as pool:
            for done in [pool.submit(work.do) for _ in range(threads)]:
                done.result()


def _open(path: Path, entry: FileEntry) -> int:
    try:
        # Without waiting: a pipe in the place of a file has nobody at its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(fd)
    except OSError as error:
        raise damage_of(error, entry.name) from None
    size = status.st_size
    if stat.S_ISREG(status.st_mode) and size == entry.bytes == _covered(entry):
        return fd
    os.close(fd)
    raise CheckpointError(f"{entry.name} has {size} bytes, not {entry.bytes}")


def _covered(entry: FileEntry) -> int:
    """The size that the number of digests allows for."""
    most = len(entry.chunks) * CHUNK_BYTES
    return entry.bytes if most - CHUNK_BYTES < entry.bytes <= most or not entry.bytes else -1


class _Work:
    """The chunks that are still to be read; several threads take them in turn."""

    def __init__(self) -> None:
        self._chunks: list[tuple[FileEntry, int, memoryview | None, int]] = []
        self._turn: Iterator[tuple[FileEntry, int, memoryview | None, int]] = iter(self._chunks)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, entry: FileEntry, fd: int, target: memoryview | None) -> None:
        """Have a file read, into a place of its own or only to be checked."""
        self._chunks += [(entry, fd, target, index) for index in range(len(entry.chunks))]

    def do(self) -> None:
        """Read and check until nothing is left. Raises what `verify` does."""
        spare: memoryview | None = None
        try:
            while (chunk := self._next()) is not None:
                entry, fd, target, index = chunk
                if target is None:
                    spare = spare or memoryview(bytearray(min(CHUNK_BYTES, entry.bytes)))
                    if len(spare) < _size_of(entry, index):
                        spare = memoryview(bytearray(CHUNK_BYTES))
                    _read_chunk(entry, fd, index, spare)
                else:
                    _read_chunk(entry, fd, index, target[index * CHUNK_BYTES :])
        except BaseException:
            # The others need not go on.
            self._turn = iter(())
            raise

    def _next(self) -> tuple[FileEntry, int, memoryview | None, int] | None:
        with self._lock:
            return next(self._turn, None)


def _size_of(entry: FileEntry, index: int) -> int:
    return min(CHUNK_BYTES, entry.bytes - index * CHUNK_BYTES)


def _read_chunk(entry: FileEntry, fd: int, index: int, target: memoryview) -> None:
    """Read a chunk to where `target` begins, and check it."""
    start, size = index * CHUNK_BYTES, _size_of(entry, index)
    _fill(target[:size], fd, start, entry.name)
    if digest_of(target[:size]) != entry.chunks[index]:
        raise CheckpointError(
            f"{entry.name} has changed between byte {start:,} and {start + size:,}"
        )


def _fill(piece: memoryview, fd: int, start: int, name: str) -> None:
    """Read a whole piece: a read may be short."""
    filled = 0
    while filled < len(piece):
        try:
            count = os.preadv(fd, [piece[filled:]], start + filled)
        except OSError as error:
            raise damage_of(error, name) from None
        if not count:
            raise CheckpointError(f"{name} ends after {start + filled} bytes")
        filled += count
