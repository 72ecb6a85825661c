"""Everything with a state that a training's variables lead to, by the name that its code gives it.

The search starts from the variables of the user's functions that are running and of the user's
modules, and follows references ("loader.dataset.rng"). It runs none of the user's code but
`state_dict()` of what has one: attributes are read where they lie, so that no property, no
`__getattr__` and no lazy import acts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy
import torch

from hpcresume.checkpoint import rng
from hpcresume.session import Session
from hpcresume.verify.digest import ARRAYS, CONTAINERS, NUMBERS, digest, items
from hpcresume.verify.looks import Look, Seen

_MOST_OBJECTS = 50_000
_MOST_ITEMS = 1000
#: A variable that holds more is taken for data.
_MOST_BYTES = 256 << 20

_GENERATORS = (
    torch.Generator,
    random.Random,
    numpy.random.Generator,
    numpy.random.RandomState,
)
#: These lead nowhere; a session's own state is in every checkpoint.
_CLOSED = (*NUMBERS, *ARRAYS, str, bytes, bytearray, type(None), ModuleType, Session)
#: What torch.nn.Module itself keeps: its tensors are seen at once, its parts are followed.
_OF_MODULES = vars(torch.nn.Module()).keys()


class OwnCode:
    """Tells the user's code from libraries."""

    def __init__(self, entry: str) -> None:
        target = entry.partition(":")[0]
        # A package that trains may be installed where libraries are.
        self._package = None if target.endswith(".py") else target.partition(".")[0]
        names = ("stdlib", "platstdlib", "purelib", "platlib")
        roots = [sysconfig.get_path(name) for name in names] + [str(Path(__file__).parents[1])]
        self._libraries = tuple(f"{root}{os.sep}" for root in roots)
        self._known: dict[str, bool] = {}

    def has(self, module: str) -> bool:
        """Whether a module is the user's."""
        if module not in self._known:
            self._known[module] = self._find(module)
        return self._known[module]

    def _find(self, module: str) -> bool:
        if module.partition(".")[0] == self._package:
            return True
        file = _attributes(sys.modules.get(module)).get("__file__")
        if not isinstance(file, str) or file.startswith(self._libraries):
            return False
        return not {"site-packages", "dist-packages"} & set(Path(file).parts)

    def made(self, value: Any) -> bool:
        """Whether a class, a function, a generator or an object's class is the user's."""
        # Not isinstance, here and below: it asks the object itself for its class.
        kind = type(value)
        if issubclass(kind, types.GeneratorType):
            frame = value.gi_frame
            return frame is not None and self.has(str(frame.f_globals.get("__name__")))
        maker = value if issubclass(kind, (type, types.FunctionType)) else kind
        return self.has(str(maker.__module__))


@dataclass(frozen=True)
class _Place:
    """A value, and the name that leads to it."""

    name: str
    value: Any
    variable: bool
    """Of the user's code, so that a plain number counts. A library's are its own affair."""


def search(code: OwnCode, registered: Mapping[str, Any], frame: FrameType | None) -> Look:
    """What is registered, and what the variables in `frame`, its callers and modules lead to."""
    return _Search(code, registered).search(frame)


class _Search:
    """One look: breadth first, so that each object is found by its shortest name."""

    def __init__(self, code: OwnCode, registered: Mapping[str, Any]) -> None:
        self._code = code
        self._registered = {id(value) for value in registered.values()}
        self._tensors: set[int] = set()
        """Of the modules that are noted; one around them or below holds nothing more."""
        self._look: Look = {}
        for name, value in registered.items():
            self._note(name, value, registered=True)

    def search(self, frame: FrameType | None) -> Look:
        queue = deque(self._roots(frame))
        seen: dict[int, Any] = {}  # An id is only good while its object lives.
        while queue and len(seen) < _MOST_OBJECTS:
            place = queue.popleft()
            known = id(place.value) in seen
            seen[id(place.value)] = place.value
            # Equal numbers may be one object.
            if not known or issubclass(type(place.value), NUMBERS):
                with contextlib.suppress(Exception):
                    # Foreign objects may do what they like when they are looked at.
                    queue.extend(self._visit(place))
        return self._look

    def _roots(self, frame: FrameType | None) -> Iterator[_Place]:
        """The variables of the user's functions that are running, then of their modules."""
        running: set[str] = set()
        while frame is not None:
            module = str(frame.f_globals.get("__name__"))
            if self._code.has(module):
                running.add(module)
                yield from _places("", frame.f_locals)
            frame = frame.f_back
        for name, content in list(sys.modules.items()):
            if self._code.has(name):
                yield from _places("" if name in running else f"{name}.", _attributes(content))

    def _visit(self, place: _Place) -> Iterable[_Place]:
        """Note a value if it has a state; returns where it leads."""
        name, value = place.name, place.value
        kind = type(value)
        if place.variable and issubclass(kind, (*NUMBERS, *ARRAYS, *CONTAINERS)):
            seen = Seen(
                kind=kind.__name__,
                digest=digest(value, _MOST_BYTES),
                stateful=False,
                registered=False,
            )
            self._look.setdefault(name, seen)
        if issubclass(kind, _CLOSED):
            return ()
        stateful, registered = _is_stateful(kind), id(value) in self._registered
        if stateful and not registered:
            self._note(name, value, registered=False)
        # An object saves what is below it, but for modules and what the user wrote: these may
        # hold a generator that their state_dict() leaves out.
        is_open = issubclass(kind, torch.nn.Module) or self._code.made(value)
        return () if (stateful or registered) and not is_open else list(self._below(name, value))

    def _note(self, name: str, value: Any, *, registered: bool) -> None:
        if issubclass(type(value), torch.nn.Module):
            tensors = {id(tensor) for tensor in _tensors_of(value).values()}
            if not registered and tensors <= self._tensors:
                return
            self._tensors |= tensors
        word = None
        with contextlib.suppress(Exception):
            word = digest(_state(value))
        self._look.setdefault(
            name, Seen(kind=_kind(value), digest=word, stateful=True, registered=registered)
        )

    def _below(self, name: str, value: Any) -> Iterator[_Place]:
        kind = type(value)
        if issubclass(kind, CONTAINERS):
            for key, item in islice(items(value), _MOST_ITEMS):
                yield _Place(f"{name}[{key}]", item, variable=False)
        elif issubclass(kind, types.MethodType):
            yield _Place(name, value.__self__, variable=False)
        elif issubclass(kind, functools.partial):
            yield _Place(name, (value.func, value.args, value.keywords), variable=False)
        else:
            yield from _places(f"{name}.", self._held(value), variable=self._code.made(value))

    def _held(self, value: Any) -> Mapping[str, Any]:
        """The variables of a function or a generator, the attributes of anything else."""
        kind = type(value)
        if issubclass(kind, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            return {name: _content(cell) for name, cell in cells}
        if issubclass(kind, (type, types.GeneratorType)):
            if not self._code.made(value):
                return {}
            return _attributes(value) if issubclass(kind, type) else value.gi_frame.f_locals
        held = _attributes(value)
        if issubclass(kind, torch.nn.Module):
            own = {name: item for name, item in held.items() if name not in _OF_MODULES}
            return {**held["_modules"], **own}
        return held


def _places(prefix: str, values: Mapping[str, Any], *, variable: bool = True) -> Iterator[_Place]:
    for name, value in list(values.items()):
        if not name.startswith("__"):
            yield _Place(f"{prefix}{name}", value, variable)


def _attributes(value: object) -> Mapping[str, Any]:
    """What lies in an object's `__dict__`, whatever its class says about attributes."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return held if isinstance(held, (dict, types.MappingProxyType)) else {}


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_stateful(kind: type) -> bool:
    methods = ("state_dict", "load_state_dict")
    return issubclass(kind, _GENERATORS) or all(callable(getattr(kind, m, None)) for m in methods)


def _tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors; state_dict() would be a collective call on a sharded one."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _state(value: Any) -> Any:
    kind = type(value)
    if issubclass(kind, torch.nn.Module):
        return _tensors_of(value)
    if issubclass(kind, _GENERATORS):
        return rng.capture({"it": value})["generators"]
    return value.state_dict() if _is_stateful(kind) else value


def _kind(value: Any) -> str:
    """The class as a person says it; a generator's with its library."""
    kind = type(value)
    library = kind.__module__.partition(".")[0]
    return f"{library} {kind.__name__}" if issubclass(kind, _GENERATORS) else kind.__name__
