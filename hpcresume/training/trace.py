"""Something that stays equal as long as an object is not changed, without copying its tensors.

For objects of which nothing is known but that they have a `state_dict()`: to call it may run a GPU
dry (GradScaler) or code that draws random numbers. What cannot be looked into raises Unwatchable,
because to overlook a change would be worse than to watch nothing.
"""

from __future__ import annotations

import enum
import functools
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Collection
from typing import Any

import torch

#: Arrays of NumPy up to this size are copied.
_SMALL_ARRAY_BYTES = 1 << 14
_CONSTANT = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    types.NoneType,
    torch.device,
    torch.dtype,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
    weakref.ref,
)
_SEQUENCES = (list, tuple, deque)
_MAPPINGS = frozenset({dict, OrderedDict, defaultdict, Counter})


class Unwatchable(Exception):
    """A change of an object could not be noticed; says why."""


class _Same:
    """Equal to itself alone; keeps its object alive, so that no other one takes its place."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]


def trace(value: Any, apart: Collection[int] = ()) -> Any:
    """A value that is equal to another trace of the same object, as long as nothing has changed.

    Objects whose `id` is in `apart` are watched elsewhere. Raises Unwatchable.
    """
    return _trace(value, set(apart))


def check_module(module: torch.nn.Module) -> None:
    """Raise Unwatchable where parameters and buffers that count are not all that it saves."""
    for part in module.modules():
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            raise Unwatchable(f"its {type(part).__name__} has a get_extra_state() of its own")
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_inference() or tensor.is_meta or tensor.layout is not torch.strided:
            raise Unwatchable("it holds a tensor of a kind that does not count its changes")


def _trace(value: Any, seen: set[int]) -> Any:
    if isinstance(value, _CONSTANT):
        return value
    if id(value) in seen:
        return None
    if isinstance(value, torch.Tensor):
        return _Same(value), value._version
    seen.add(id(value))
    if isinstance(value, torch.nn.Module):
        check_module(value)
        return [
            (_Same(tensor), tensor._version) for tensor in (*value.parameters(), *value.buffers())
        ]
    if isinstance(value, torch.optim.Optimizer):
        raise Unwatchable("it holds an optimizer that is not registered")
    if isinstance(value, _SEQUENCES):
        return [_trace(item, seen) for item in value]
    if type(value) in _MAPPINGS:
        return [(_trace(key, seen), _trace(item, seen)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)) and all(isinstance(v, _CONSTANT) for v in value):
        return set(value)
    if hasattr(value, "tobytes") and getattr(value, "nbytes", 1 << 62) <= _SMALL_ARRAY_BYTES:
        return _Same(value), value.tobytes()
    kind: type = type(value)
    if _is_plain(kind):
        return _trace(vars(value), seen)
    raise Unwatchable(f"it holds a {type(value).__name__}, in which a change cannot be seen")


class _Plain:
    """How large an object is that has nothing but its `__dict__`."""


@functools.cache
def _is_plain(kind: type) -> bool:
    """Whether all that objects of a class hold is in their `__dict__`."""
    same_size = kind.__basicsize__ == _Plain.__basicsize__ and not kind.__itemsize__
    return same_size and kind.__dictoffset__ != 0
