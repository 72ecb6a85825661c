"""The bytes of a safetensors file, and a file that is hashed while it is written."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from hpcresume import files
from hpcresume.checkpoint.manifest import CHUNK_BYTES, FileEntry, digest_of
from hpcresume.errors import CheckpointError

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


def stream(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> Iterator[memoryview]:
    """The bytes of the file, in pieces of at most one chunk, from the tensors' own memory.

    Only what is not contiguous on the CPU is copied first, one tensor at a time.
    """
    yield memoryview(header(tensors, metadata))
    for name in layout(tensors):
        tensor = tensors[name].detach()
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        tensor = tensor.to("cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        if not size:
            continue
        # The view does not own the memory; `tensor` does, and lives until the last piece is out.
        view = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
        for start in range(0, size, CHUNK_BYTES):
            yield view[start : start + CHUNK_BYTES]


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
