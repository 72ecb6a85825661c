"""The bytes of a safetensors file, and a file that is hashed while it is written."""

from __future__ import annotations

import bisect
import ctypes
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from hpcresume import files
from hpcresume.checkpoint.manifest import CHUNK_BYTES, FileEntry, digest_of
from hpcresume.errors import CheckpointError

_MOST_THREADS = 4
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
    """Names in the order of the file: wide types first, so that each tensor lies aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: length, then JSON padded with spaces to 8 bytes."""
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
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def digests(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The digests of the file's chunks, from the tensors' own memory.

    What is not contiguous on the CPU is copied first, and given back at once.
    """
    head = header(tensors, metadata)
    pieces: list[bytes | torch.Tensor] = [head]
    starts, end = [0], len(head)
    for name in layout(tensors):
        tensor = tensors[name].detach()
        if tensor.numel():
            pieces.append(tensor.resolve_conj().resolve_neg())
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
    if len(begins) == 1 or any(t.device.type != "cpu" for t in tensors.values()):
        return tuple(map(digest, begins))
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "digest") as pool:
        return tuple(pool.map(digest, begins))


def _hash(hasher: xxhash.xxh3_128, piece: bytes | torch.Tensor, first: int, last: int) -> None:
    """Hash some bytes of a piece. They end where an element ends: wide types come first."""
    if isinstance(piece, bytes):
        hasher.update(piece[first:last])
        return
    width = piece.element_size()
    whole = first == 0 and last >= piece.numel() * width
    if not (whole and piece.is_cpu and piece.is_contiguous()):
        piece = piece.reshape(-1)[first // width : last // width].to("cpu").contiguous()
    # The view does not own the memory; `piece` does, and lives until it is hashed.
    address = (ctypes.c_char * (piece.numel() * width)).from_address(piece.data_ptr())
    hasher.update(memoryview(address))


def write_file(path: Path, content: bytes | memoryview) -> FileEntry:
    """Write and fsync a file, hashed on the way. Raises OSError."""
    view = memoryview(content).cast("B")
    chunks = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for start in range(0, view.nbytes, CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            chunks.append(digest_of(chunk))
            files.write_all(fd, chunk)
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(name=path.name, bytes=view.nbytes, chunks=tuple(chunks))
