"""The bytes of a safetensors file, and a file that is hashed while it is written."""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from hpcresume.checkpoint.manifest import CHUNK_BYTES, ChunkHasher, FileEntry
from hpcresume.checkpoint.threads import how_many
from hpcresume.errors import CheckpointError

#: What a processor reads at once; torch's memory begins at a multiple of it.
LINE_BYTES = 64
#: What a disk without the page cache wants places, lengths and memory to be multiples of.
_BLOCK_BYTES = 4096
#: The names of safetensors' own specification.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: The same, the other way.
TYPES = {name: dtype for dtype, name in _DTYPES.items()}


def layout(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names in the order of the file, in which each tensor lies aligned.

    First those of whole processor lines, which thereby begin at one, as torch's own memory does;
    then the others, wide types first.
    """

    def place(name: str) -> tuple[bool, int, str]:
        width = tensors[name].element_size()
        return bool(tensors[name].numel() * width % LINE_BYTES), -width, name

    return sorted(tensors, key=place)


def header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: length, then JSON padded with spaces to a whole line."""
    content: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in layout(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"'{name}' has type {tensor.dtype}, which safetensors lacks.")
        if name in content:
            raise CheckpointError(f"A tensor cannot be named '{name}': safetensors means itself.")
        end = offset + tensor.numel() * tensor.element_size()
        content[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % LINE_BYTES)
    return len(text).to_bytes(8, "little") + text


def digests(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The digests of the file's chunks, from the tensors' own memory."""
    return digests_of(header(tensors, metadata), [tensors[name] for name in layout(tensors)])


def digests_of(head: bytes, tensors: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """The same where the file's head is there already, and the order of its tensors.

    What is not contiguous on the CPU is copied first, and given back at once.
    """
    pieces: list[bytes | torch.Tensor] = [head]
    starts, end = [0], len(head)
    for tensor in tensors:
        if tensor.numel():
            pieces.append(tensor.detach().resolve_conj().resolve_neg())
            starts.append(end)
            end += tensor.numel() * tensor.element_size()

    def digest(begin: int) -> str:
        hasher = xxhash.xxh3_128()
        place = bisect.bisect_right(starts, begin) - 1
        while place < len(pieces) and starts[place] < begin + CHUNK_BYTES:
            first = max(0, begin - starts[place])
            _hash(hasher, pieces[place], first, begin + CHUNK_BYTES - starts[place])
            place += 1
        return hasher.hexdigest()

    begins = range(0, end, CHUNK_BYTES)
    if len(begins) == 1 or any(not tensor.is_cpu for tensor in tensors):
        return tuple(map(digest, begins))
    with ThreadPoolExecutor(how_many(), "digest") as pool:
        return tuple(pool.map(digest, begins))


def _hash(hasher: xxhash.xxh3_128, piece: bytes | torch.Tensor, first: int, last: int) -> None:
    """Hash some bytes of a piece. They end where an element ends, by the order of the file."""
    if isinstance(piece, bytes):
        hasher.update(piece[first:last])
        return
    width = piece.element_size()
    whole = first == 0 and last >= piece.numel() * width
    if not (whole and piece.is_cpu and piece.is_contiguous()):
        piece = piece.reshape(-1)[first // width : last // width].to("cpu").contiguous()
    hasher.update(bytes_of(piece))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; it is the tensor's, and goes with it."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()))


def write_file(path: Path, content: bytes | memoryview) -> FileEntry:
    """Write and fsync a file, hashed on the way. Raises OSError."""
    return write_pieces(path, [content])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """The same for a content that comes in pieces, one after the other."""
    hasher = ChunkHasher()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        output = _Output(fd)
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, view.nbytes, CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                hasher.update(chunk)
                output.write(chunk)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(name=path.name, bytes=hasher.bytes, chunks=hasher.chunks())


class _Output:
    """A file that is written from its beginning; past the page cache, as far as that is possible.

    The cache costs a copy, and memory for it that may be slower than the disk, and that whoever
    reads data has better use for.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        self._can = hasattr(os, "O_DIRECT")
        self._direct = False
        self._written = 0

    def write(self, chunk: memoryview) -> None:
        """Write every byte: a write may be short where a quota or a signal cuts it."""
        whole = chunk.nbytes - chunk.nbytes % _BLOCK_BYTES
        while self._can and whole and self._lies_in_blocks(chunk):
            try:
                self._go(direct=True)
                count = os.write(self._fd, chunk[:whole])
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # This file system, or this kind of memory, does not do it.
                self._can = False
                break
            self._written += count
            chunk, whole = chunk[count:], whole - count
        while chunk.nbytes:
            self._go(direct=False)
            count = os.write(self._fd, chunk)
            self._written += count
            chunk = chunk[count:]

    def _go(self, *, direct: bool) -> None:
        if direct != self._direct:
            flags = self._flags | os.O_DIRECT if direct else self._flags
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
            self._direct = direct

    def _lies_in_blocks(self, chunk: memoryview) -> bool:
        if chunk.readonly or self._written % _BLOCK_BYTES:
            return False
        return ctypes.addressof(ctypes.c_char.from_buffer(chunk)) % _BLOCK_BYTES == 0
