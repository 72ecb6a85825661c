"""What a training function registered, as the files of a checkpoint and back.

A module's or optimizer's tensors go to `<name>.safetensors`, what is not a tensor to state.json; a
JSON value to `<name>.json`; a tokenizer writes its own files.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hpcresume import files
from hpcresume.checkpoint import reader, rng, writer
from hpcresume.checkpoint.arena import Arena, Image
from hpcresume.checkpoint.manifest import Committed, FileEntry, hash_stream
from hpcresume.checkpoint.tensors import (
    Split,
    extra_states,
    fleeting_buffers,
    join,
    plain_state,
    split,
)
from hpcresume.errors import CheckpointError, UsageError

STATE = "state.json"
RNG = "rng.json"
_RESERVED = frozenset({"state", "rng", "manifest", "trainer_state", "training_args"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,60}")
#: transformers wants to know for which framework a file was written.
_METADATA = {"format": "pt"}
#: What a file of buffers that no state dict holds is called after the module's name.
_BUFFERS = ".buffers"


@dataclass(frozen=True)
class Staged:
    """A save that needs the live objects no more."""

    images: list[Image]
    others: dict[str, bytes]
    """What is not tensors, by the file's name."""

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        content = [image.content for image in self.images]
        return sum(map(len, content)) + sum(map(len, self.others.values()))

    @property
    def num_files(self) -> int:
        """How many files it will be."""
        return len(self.images) + len(self.others)

    def write(self, directory: Path) -> list[FileEntry]:
        """Write everything into an empty directory, fsynced. Raises OSError."""
        entries = []
        folders = set()
        contents: dict[str, bytes | memoryview] = {i.name: i.content for i in self.images}
        for name, content in {**contents, **self.others}.items():
            path = directory / name
            if path.parent != directory:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folders.add(path.parent)
            entries.append(replace(writer.write_file(path, content), name=name))
        for folder in folders:
            files.fsync_dir(folder)
        return entries


class Contents:
    """The registered objects of a session, by name."""

    def __init__(self) -> None:
        self._objects: dict[str, Any] = {}
        self._begun_with: dict[str, Any] = {}
        """JSON values as the code gave them."""
        self._buffers: dict[str, dict[str, Any]] = {}
        """Digests of fleeting buffers as the code made them, by module and name."""
        self.generators: dict[str, Any] = {}
        """Random number generators, which each rank has of its own."""

    def add(self, name: str, value: Any) -> None:
        """Register an object. Raises UsageError for a name or a thing that cannot be saved."""
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise UsageError(f"'{name}' cannot be registered: choose another name.")
        if name in self._objects or name in self.generators:
            raise UsageError(f"'{name}' is registered already.")
        if rng.is_generator(value):
            self.generators[name] = value
            return
        if not (_is_stateful(value) or _is_tokenizer(value) or _is_json(value)):
            raise UsageError(
                f"'{name}' cannot be registered: a {type(value).__name__} has no state_dict() and "
                f"load_state_dict(), is no tokenizer, no random generator and no JSON value."
            )
        self._objects[name] = value
        if isinstance(value, torch.nn.Module):
            self._buffers[name] = {k: _digest(t) for k, t in _fleeting(name, value).items()}
        elif not (_is_stateful(value) or _is_tokenizer(value)):
            self._begun_with[name] = _as_json(value)

    def names(self) -> list[str]:
        """What is registered, in order, but for generators."""
        return list(self._objects)

    def items(self) -> list[tuple[str, Any]]:
        """The registered objects by name, in order."""
        return list(self._objects.items())

    def payload_bytes(self) -> int:
        """Size of the tensors that a save would write now."""
        total = 0
        for name, value in self._objects.items():
            if _is_stateful(value):
                tensors = _take(name, value).tensors.values()
                total += sum(t.numel() * t.element_size() for t in tensors)
        return total

    def stage(
        self,
        arena: Arena,
        progress: Mapping[str, Any],
        states: Sequence[Any],
        more: Mapping[str, Any],
    ) -> Staged:
        """Take everything as it is now; what is changed afterwards is not in it.

        `states` are the random states of all ranks, `more` further JSON files by name.
        """
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        objects: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for name, value in self._objects.items():
            if _is_stateful(value):
                state = _take(name, value)
                objects[name] = {"tree": state.tree, "aliases": state.aliases}
                if state.tensors:
                    tensors[f"{name}.safetensors"] = state.tensors
                moved = self._moved_buffers(name, value)
                if moved:
                    tensors[f"{name}{_BUFFERS}.safetensors"] = moved
            elif not _is_tokenizer(value):
                values[f"{name}.json"] = value
        full = {
            "progress": dict(progress),
            "objects": objects,
            "values": [name for name in self._objects if name not in objects],
            "moved": [
                name
                for name, begun in self._begun_with.items()
                if not reader.same_tree(begun, _as_json(self._objects[name]))
            ],
        }
        # What is indented takes ten times as long, while training waits: only what people read.
        written = {STATE: files.to_json(full), RNG: files.to_json(list(states))}
        written |= {n: files.to_json(v, indent=1) for n, v in {**values, **more}.items()}
        for name, value in self._objects.items():
            if _is_tokenizer(value) and not _is_stateful(value):
                own = _tokenizer_files(value)
                for file in own.keys() & (written.keys() | tensors.keys()):
                    raise CheckpointError(
                        f"'{name}' writes {file}, which another registered object writes as well: "
                        f"register one of them only, or under another name."
                    )
                written |= own
        return Staged(arena.stage(tensors, _METADATA), written)

    def restore(self, name: str, committed: Committed, state: Mapping[str, Any]) -> list[str]:
        """Load one object from a checkpoint; returns sentences about what differs.

        Raises CheckpointError where it does not fit, or did not arrive.
        """
        if name in self.generators:
            return []
        value = self._objects[name]
        if _is_stateful(value):
            saved = state["objects"].get(name)
            if saved is None:
                raise CheckpointError(
                    f"checkpoint-{committed.step} holds no '{name}' (it holds: "
                    f"{', '.join(sorted(state['objects'])) or 'nothing'}): register what the run "
                    f"was begun with, or begin a new run."
                )
            _load(name, value, committed, saved)
            _load_buffers(name, value, committed)
            reader.check_arrived(committed, name, _take(name, value), saved["tree"], _METADATA)
        elif not _is_tokenizer(value):
            file = f"{name}.json"
            if all(entry.name != file for entry in committed.manifest.files):
                raise CheckpointError(
                    f"checkpoint-{committed.step} holds no '{name}': register what the run was "
                    f"begun with, or begin a new run."
                )
            return self._restore_value(name, files.read_json(committed.path / file), state)
        return []

    def _restore_value(self, name: str, was: Any, state: Mapping[str, Any]) -> list[str]:
        """Give a registered JSON value what the checkpoint holds; a sentence where it is told."""
        value = self._objects[name]
        if reader.same_tree(was, _as_json(value)):
            return []
        changed = f"'{name}' is not what the run was trained with"
        if isinstance(value, dict):
            value.clear()
            value.update(was)
        elif isinstance(value, list):
            value[:] = was
        else:
            return [f"{changed}; the value of the code is kept"]
        if name in state.get("moved", ()):
            # Training itself had changed it: a state, not a setting.
            return []
        self._begun_with[name] = was
        return [f"{changed}; the checkpoint's values are used"]

    def _moved_buffers(self, name: str, value: Any) -> dict[str, torch.Tensor]:
        """The fleeting buffers that are not as the code makes them."""
        if not isinstance(value, torch.nn.Module):
            return {}
        made = self._buffers[name]
        return {k: t for k, t in _fleeting(name, value).items() if made.get(k) != _digest(t)}

    def model_files(self, committed: Committed) -> list[str]:
        """The files that make up the finished model: weights, configs, tokenizer."""
        modules = [n for n, v in self._objects.items() if isinstance(v, torch.nn.Module)]
        kept = {f"{n}.safetensors" for n in (["model"] if "model" in modules else modules)}
        stateful = {f"{n}.safetensors" for n, v in self._objects.items() if _is_stateful(v)}
        ours = {STATE, RNG, "trainer_state.json", "training_args.json"}
        names = [entry.name for entry in committed.manifest.files]
        ours |= {f"{n}{_BUFFERS}.safetensors" for n in self._objects}
        return [n for n in names if n in kept or (n not in stateful and n not in ours)]


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """What a tokenizer writes, by name relative to its folder."""
    with tempfile.TemporaryDirectory(prefix="hpcresume-tokenizer-") as name:
        tokenizer.save_pretrained(name)
        folder = Path(name)
        paths = sorted(path for path in folder.rglob("*") if not path.is_dir())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _take(name: str, value: Any) -> Split:
    if isinstance(value, torch.nn.Module):
        extra = {key: part.get_extra_state() for key, part in extra_states(value, name).items()}
        return split({**plain_state(value, name), **extra}, name)
    return split(value.state_dict(), name)


def _fleeting(name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        key: getattr(part, buffer) for key, (part, buffer) in fleeting_buffers(module, name).items()
    }


def _digest(tensor: torch.Tensor) -> Any:
    return hash_stream(writer.stream({"x": tensor}, {}))


def _load_buffers(name: str, value: Any, committed: Committed) -> None:
    """Put back the buffers that the module's own state dict leaves out."""
    file = f"{name}{_BUFFERS}.safetensors"
    if all(entry.name != file for entry in committed.manifest.files):
        return
    places = fleeting_buffers(value, name)
    for key, saved in reader.read_safetensors(committed.path / file).items():
        if key not in places:
            raise CheckpointError(f"'{name}' has no buffer '{key}', which the checkpoint holds.")
        part, buffer = places[key]
        live = getattr(part, buffer)
        if live.shape == saved.shape and live.dtype == saved.dtype:
            with torch.no_grad():
                live.copy_(saved)
        else:
            # A cache that has grown.
            setattr(part, buffer, saved.clone().to(live.device))


def _load(name: str, value: Any, committed: Committed, saved: Mapping[str, Any]) -> None:
    file = f"{name}.safetensors"
    present = any(entry.name == file for entry in committed.manifest.files)
    tensors = reader.read_safetensors(committed.path / file) if present else {}
    aliases = saved["aliases"]
    if isinstance(value, torch.nn.Module):
        extra = extra_states(value, name)
        full = {**tensors, **{alias: tensors[target] for alias, target in aliases.items()}}
        named = {
            key: tensor
            for key, tensor in full.items()
            if not any(key == e or key.startswith(f"{e}.") for e in extra)
        }
        reader.copy_into(plain_state(value, name), named, name)
        for key, part in extra.items():
            copies = {k: t.clone() for k, t in tensors.items() if k.startswith(key)}
            part.set_extra_state(join(saved["tree"][key], copies, aliases))
        return
    # Copies: what is read is mapped memory of a file that retention will remove.
    state = join(saved["tree"], {key: tensor.clone() for key, tensor in tensors.items()}, aliases)
    value.load_state_dict(state)
    if isinstance(value, torch.optim.Optimizer):
        reader.keep_dtypes(value, state)


def _is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _is_tokenizer(value: Any) -> bool:
    return callable(getattr(value, "save_pretrained", None))


def _is_json(value: Any) -> bool:
    try:
        files.to_json(value)
    except (TypeError, ValueError):
        return False
    return True


def _as_json(value: Any) -> Any:
    return json.loads(files.to_json(value))
