"""A state as a word: tensors by their bytes, numbers and text exactly, all else by its kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from xxhash import xxh3_128

NUMBERS = (bool, int, float, complex, numpy.generic)
ARRAYS = (torch.Tensor, numpy.ndarray)
CONTAINERS = (dict, list, tuple, deque)
_MOST_VALUES = 300_000


def digest(value: Any, most_bytes: int | None = None) -> str | None:
    """A state as a word; None where it cannot be read, or is larger than it may be."""
    hasher = _Hasher(most_bytes)
    try:
        hasher.feed(value)
    except Exception:
        return None
    return hasher.hexdigest()


class _Hasher:
    """Tensors by their bytes, numbers and text exactly, other things by their kind alone."""

    def __init__(self, most_bytes: int | None) -> None:
        self._hash = xxh3_128()
        self._most_bytes = most_bytes
        self._bytes = 0
        self._values = 0
        self.hexdigest = self._hash.hexdigest

    def feed(self, value: Any) -> None:
        """Add a value. Raises OverflowError for what is too large, or contains itself."""
        self._values += 1
        kind = type(value)
        if self._values > _MOST_VALUES or issubclass(kind, numpy.memmap):
            raise OverflowError
        if issubclass(kind, ARRAYS):
            self._feed_array(value)
        elif issubclass(kind, CONTAINERS):
            self._hash.update(b"[")
            for key, item in items(value):
                self._hash.update(f"{key}:".encode(errors="replace"))
                self.feed(item)
            self._hash.update(b"]")
        elif issubclass(kind, (*NUMBERS, str, bytes, type(None))):
            self._hash.update(f"{value!r},".encode(errors="replace"))
        else:
            self._hash.update(kind.__name__.encode())

    def _feed_array(self, value: Any) -> None:
        self._hash.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if isinstance(value, numpy.ndarray) and value.dtype.hasobject:
            self.feed(value.tolist())
            return
        local = value.to_local() if hasattr(value, "to_local") else value
        self._bytes += local.nbytes
        if self._most_bytes is not None and self._bytes > self._most_bytes:
            raise OverflowError
        if isinstance(local, torch.Tensor):
            plain = local.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            local = plain.view(torch.uint8).numpy()
        self._hash.update(numpy.ascontiguousarray(local).reshape(-1).view(numpy.uint8).data)


def items(container: Any) -> Iterator[tuple[str, Any]]:
    """The items of a built-in container, with their keys as code has them.

    By the built-in's own methods: a subclass may load what it lists.
    """
    if isinstance(container, dict):
        for at, (key, item) in enumerate(dict.items(container)):
            yield repr(key) if type(key) in (str, int) and len(str(key)) <= 40 else str(at), item
    else:
        base = next(base for base in CONTAINERS if isinstance(container, base))
        for at, item in enumerate(base.__iter__(container)):
            yield str(at), item
