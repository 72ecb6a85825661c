"""What two trainings do not have in common: checkpoints by tensors and values, numbers by bits.

Reads files alone, without torch: a tensor is a name, a type, a shape and bytes.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.journal import read_metrics
from hpcresume.run_dir import RunDir

#: Files of a checkpoint that describe it, and repeat what stands elsewhere.
_DESCRIPTIONS = frozenset({"manifest.json", "trainer_state.json"})
#: What state.json says about the link that wrote it: time, machine, and how it was cut.
_OF_THE_LINK = frozenset({"train_seconds", "lineage", "history", "machines"})
#: What the JSON form of a state adds to the state's own names.
_WRAPPING = frozenset({"objects", "tree", "progress"})
#: The random state of all ranks.
_RANDOM = "rng.json"
_PIECE_BYTES = 16 << 20
_MISSING = "(missing)"


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same: where, which, and what it is in the one and in the other."""

    component: str
    """A file of the checkpoint, or "logged"."""
    name: str
    one: str
    other: str
    step: int | None = None
    """Of a logged number: where it differs first."""

    def __str__(self) -> str:
        """The component by name: "model.safetensors: 0.weight"."""
        if self.step is None:
            return f"{self.component}: {self.name}"
        return f"the logged {self.name} of step {self.step}"


# ---- what was logged -----------------------------------------------------------------------


def logged(one: RunDir, other: RunDir) -> list[Difference]:
    """Every logged name whose values differ, at its first such step, the earliest first."""
    left, right = (_lines(run) for run in (one, other))
    found: dict[str, Difference] = {}
    for step in sorted(left.keys() | right.keys()):
        here, there = left.get(step, {}), right.get(step, {})
        for name in [*here, *(name for name in there if name not in here)]:
            values = here.get(name, _MISSING), there.get(name, _MISSING)
            if name not in found and values[0] != values[1]:
                found[name] = Difference("logged", name, *values, step)
    return list(found.values())


def logged_steps(run: RunDir) -> int:
    """How many steps have logged something."""
    return len(_lines(run))


def _lines(run: RunDir) -> dict[int, dict[str, str]]:
    """Step -> name -> value. A step that stands twice in the log has the values of both."""
    lines: dict[int, dict[str, str]] = {}
    for line in read_metrics(run):
        values = lines.setdefault(line["step"], {})
        for name, value in line.items():
            text = _text(value)
            values[name] = f"{values[name]}, again {text}" if name in values else text
    return lines


def _text(value: Any) -> str:
    """Canonical JSON. Equal texts, equal bits: a float has all the digits that it needs."""
    return json.dumps(value, sort_keys=True)


# ---- what was saved ------------------------------------------------------------------------


def saved(here: Path, there: Path) -> Iterator[Difference]:
    """What differs between two checkpoints: the model's files first, then by name."""
    for name in sorted({*_names(here), *_names(there)}, key=_model_first):
        left, right = here / name, there / name
        if not (left.is_file() and right.is_file()):
            one, other = ("there" if path.is_file() else _MISSING for path in (left, right))
            yield Difference(name, "the file", one, other)
        elif name.endswith(".safetensors"):
            yield from _tensors(name, left, right)
        elif name.endswith(".json"):
            yield from _values(name, files.read_json(left), files.read_json(right))
        elif left.read_bytes() != right.read_bytes():
            sizes = [path.stat().st_size for path in (left, right)]
            yield Difference(name, "the file", f"{sizes[0]} bytes", f"{sizes[1]} bytes")


def tensor_count(checkpoint: Path) -> int:
    """How many tensors a checkpoint holds."""
    return sum(len(_Tensors(path).names) for path in checkpoint.rglob("*.safetensors"))


def _names(checkpoint: Path) -> Iterator[str]:
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name not in _DESCRIPTIONS:
            yield str(path.relative_to(checkpoint))


def _model_first(name: str) -> tuple[bool, str]:
    return not name.startswith("model"), name


def _tensors(file: str, left: Path, right: Path) -> Iterator[Difference]:
    one, other = _Tensors(left), _Tensors(right)
    for name in sorted(one.names | other.names):
        kinds = one.kind(name), other.kind(name)
        if kinds[0] != kinds[1]:
            yield Difference(file, name, *kinds)
        elif not one.same(name, other):
            yield Difference(file, f"{name} ({kinds[0]})", "other bytes", "other bytes")


class _Tensors:
    """The tensors of a safetensors file: an 8-byte length, a JSON header, then their bytes."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        self._header = header
        self._start = 8 + length
        self.names = header.keys()

    def kind(self, name: str) -> str:
        """Type and shape: "F32[8, 3]"."""
        entry = self._header.get(name)
        return _MISSING if entry is None else f"{entry['dtype']}{entry['shape']}"

    def same(self, name: str, other: _Tensors) -> bool:
        """Whether a tensor's bytes are those of the other file; of one kind they must be."""
        pairs = zip(self._pieces(name), other._pieces(name), strict=True)
        return all(here == there for here, there in pairs)

    def _pieces(self, name: str) -> Iterator[bytes]:
        begin, end = (self._start + offset for offset in self._header[name]["data_offsets"])
        for at in range(begin, end, _PIECE_BYTES):
            yield self._data[at : min(at + _PIECE_BYTES, end)]


def _values(file: str, left: Any, right: Any) -> Iterator[Difference]:
    """The JSON values that differ, one for each place that has a name."""
    one, other = dict(_leaves(left, ())), dict(_leaves(right, ()))
    said = set()
    for path in [*one, *(path for path in other if path not in one)]:
        values = one.get(path, _MISSING), other.get(path, _MISSING)
        name = _rank_place(path) if file == _RANDOM else _place(path)
        if values[0] != values[1] and name not in said:
            said.add(name)
            yield Difference(file, name, *values)


def _leaves(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Each value with nothing below it, by its path."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            if not (key in _OF_THE_LINK and path in ((), ("progress",))):
                yield from _leaves(below, (*path, key))
    elif isinstance(value, list) and value:
        for index, below in enumerate(value):
            yield from _leaves(below, (*path, index))
    else:
        yield path, _text(value)


def _rank_place(path: tuple[str | int, ...]) -> str:
    """A path of rng.json, which is a list of ranks: "rank 1, numpy"."""
    return f"rank {path[0]}, {_place(path[1:])}" if path else _place(path)


def _place(path: tuple[str | int, ...]) -> str:
    """A path as one says it: "optimizer.param_groups.0.lr".

    The last numbers of a list are no names: one generator's state has hundreds.
    """
    parts = list(path)
    while parts and isinstance(parts[-1], int):
        parts.pop()
    words = [str(part) for part in parts]
    return ".".join(w for w in words if w not in _WRAPPING and not w.startswith("$")) or "all of it"
