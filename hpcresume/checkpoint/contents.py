"""What a training function registered, as the files of a checkpoint and back.

A module's or optimizer's tensors go to `<name>.safetensors`, what is not a tensor to state.json; a
JSON value to `<name>.json`; a tokenizer writes its own files.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from hpcresume import files
from hpcresume.checkpoint import layout, loading, parts, reader, registered, rng, sharded, writer
from hpcresume.checkpoint.arena import Arena
from hpcresume.checkpoint.images import Images, in_parts
from hpcresume.checkpoint.layout import Layout
from hpcresume.checkpoint.manifest import Committed, FileEntry
from hpcresume.checkpoint.outline import Leaves, Outline
from hpcresume.checkpoint.staged import STATE, Staged
from hpcresume.checkpoint.tensors import split
from hpcresume.errors import CheckpointError, UsageError

RNG = "rng.json"
_RESERVED = frozenset({"state", "rng", "manifest", "trainer_state", "training_args"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,60}")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without looks for garbage: of tens of thousands of small objects that are made, all stay."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Contents:
    """The registered objects of a session, by name; those of one rank of several."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self._rank = rank
        self._world_size = world_size
        self._objects: dict[str, Any] = {}
        self._begun_with: dict[str, Any] = {}
        """JSON values as the code gave them."""
        self._buffers: dict[str, tuple[str, ...]] = {}
        """Digests of the files of fleeting buffers as the code made them, by module."""
        self._layouts: dict[str, Layout] = {}
        self._divided: list[str] = []
        """What several ranks write together; see `is_divided`."""
        self._arena = Arena()
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
        if not (
            registered.is_stateful(value)
            or registered.is_tokenizer(value)
            or registered.is_json(value)
        ):
            raise UsageError(
                f"'{name}' cannot be registered: a {type(value).__name__} has no state_dict() and "
                f"load_state_dict(), is no tokenizer, no random generator and no JSON value."
            )
        self._objects[name] = value
        if isinstance(value, torch.nn.Module):
            self._buffers[name] = writer.digests(
                registered.fleeting_of(name, value), reader.METADATA
            )
        elif not (registered.is_stateful(value) or registered.is_tokenizer(value)):
            self._begun_with[name] = registered.as_json(value)

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
            if registered.is_stateful(value):
                tensors = split(registered.state_of(name, value), name).tensors.values()
                total += sum(t.numel() * t.element_size() for t in tensors)
        return total

    @_uncollected()
    def stage(
        self,
        progress: Mapping[str, Any],
        states: Sequence[Any],
        more: Mapping[str, Any],
    ) -> Staged:
        """Take everything as it is now; what is changed afterwards is not in it.

        `states` are the random states of all ranks, `more` further JSON files by name.
        """
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        metadata: dict[str, Mapping[str, str]] = {}
        written = {RNG: files.to_json(list(states))}
        objects: dict[str, Callable[[], bytes]] = {}
        as_made: dict[str, tuple[str, ...]] = {}
        still: set[str] = set()
        for name, value in self._objects.items():
            if registered.is_stateful(value):
                laid, found, objects[name] = self._laid_out(name, value)
                still |= laid.still
                tensors |= _by_file(laid.names_of(0), found)
                metadata |= dict.fromkeys(laid.names_of(0), laid.metadata)
                if len(laid.files) > 1:
                    written[layout.index_file(name)] = layout.index(laid, found)
                fleeting = registered.fleeting_of(name, value)
                if fleeting:
                    tensors[registered.buffers_file(name)] = fleeting
                    as_made[registered.buffers_file(name)] = self._buffers[name]
            elif not registered.is_tokenizer(value):
                written[f"{name}.json"] = files.to_json(value, indent=1)
        rest = {
            "progress": dict(progress),
            "values": [name for name in self._objects if name not in objects],
            "moved": [
                name
                for name, begun in self._begun_with.items()
                if not reader.same_tree(begun, registered.as_json(self._objects[name]))
            ],
        }
        # What is indented takes ten times as long, while training waits: only what people read.
        written |= {n: files.to_json(v, indent=1) for n, v in more.items()}
        for name, value in self._objects.items():
            if registered.is_tokenizer(value) and not registered.is_stateful(value):
                own = registered.tokenizer_files(value)
                for file in own.keys() & (written.keys() | tensors.keys()):
                    raise CheckpointError(
                        f"'{name}' writes {file}, which another registered object writes as well: "
                        f"register one of them only, or under another name."
                    )
                written |= own
        partners = {rank for laid in self._layouts.values() for rank in laid.ranks.values()}
        return Staged(
            self._arena.stage(tensors, reader.METADATA, metadata, {*still, *as_made}),
            written,
            partial(_state_text, files.to_json(rest).rstrip(), objects),
            self._arena.arrived,
            still=frozenset(still),
            as_made=as_made,
            partners=tuple(sorted(partners)),
        )

    @_uncollected()
    def stage_share(self) -> Staged:
        """What this rank, which is not rank 0, writes of the save that rank 0 stages now.

        Only after `is_divided`.
        """
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        metadata: dict[str, Mapping[str, str]] = {}
        for name in self._divided:
            laid, found, _ = self._laid_out(name, self._objects[name])
            tensors |= _by_file(laid.names_of(self._rank), found)
            metadata |= dict.fromkeys(laid.names_of(self._rank), laid.metadata)
        images = self._arena.stage(tensors, reader.METADATA, metadata)
        return Staged(images, {}, None, self._arena.arrived)

    def is_divided(self) -> bool:
        """Whether there is anything that several ranks write together, from now on."""
        if self._world_size > 1:
            self._divided = [n for n in self._objects if self._alike(n) or self._is_sharded(n)]
        return bool(self._divided)

    def _is_sharded(self, name: str) -> bool:
        """Whether an object has tensors, or will have, that lie in parts on several ranks."""
        value = self._objects[name]
        if not sharded.may_be():
            return False
        if isinstance(value, torch.optim.Optimizer):
            # Its own state may come into being later.
            return any(map(sharded.is_sharded, registered.params_of(value)))
        return registered.is_stateful(value) and bool(
            Leaves(registered.state_of(name, value)).spread
        )

    def _alike(self, name: str) -> Collection[int]:
        """The parameters of an object, by identity, that torch itself keeps alike on all ranks.

        Those of a module that DistributedDataParallel wraps; and those of an optimizer which has
        no others: then its own state is alike too.
        """
        if self._world_size == 1:
            return ()
        value = self._objects[name]
        modules = [each for each in self._objects.values() if isinstance(each, torch.nn.Module)]
        inner = [part for module in modules for part in module.modules()]
        wrapped = [part for part in inner if isinstance(part, DistributedDataParallel)]
        kept = {id(param) for part in wrapped for param in part.parameters()}
        if isinstance(value, torch.nn.Module):
            return kept
        plain = type(value).__module__.startswith("torch.optim.")
        if not (plain and isinstance(value, torch.optim.Optimizer)):
            # Others may keep a part of their state on each rank, as ZeroRedundancyOptimizer does.
            return ()
        params = set(map(id, registered.params_of(value)))
        return () if params - kept else params

    def _laid_out(
        self, name: str, value: Any
    ) -> tuple[Layout, dict[str, torch.Tensor], Callable[[], bytes]]:
        """An object's layout, its tensors, and how to make the text of the rest of its state."""
        state = registered.state_of(name, value)
        leaves = Leaves(state)
        laid, numbers = self._layouts.get(name), leaves.numbers
        if laid is None or not laid.outline.fits(leaves):
            outline = Outline(state, leaves, name)
            laid = self._lay_out(name, value, outline, outline.tensors(leaves))
            self._layouts[name], numbers = laid, outline.numbers
        return laid, laid.outline.tensors(leaves), partial(laid.text, numbers)

    def _lay_out(
        self, name: str, value: Any, outline: Outline, tensors: Mapping[str, torch.Tensor]
    ) -> Layout:
        if outline.parts:
            if isinstance(value, torch.optim.Optimizer):
                loading.check_parts(name, value, outline.parts)
            return layout.lay_out_parts(name, outline, self._rank, self._world_size)
        alike = self._alike(name)
        # Not the buffers of a module: each rank has its own running statistics.
        whole = bool(alike) and not isinstance(value, torch.nn.Module)
        keys = {key for key, tensor in tensors.items() if whole or id(tensor) in alike}
        return layout.lay_out(name, outline, tensors, keys, self._world_size)

    @_uncollected()
    def restore(self, name: str, images: Images, state: Mapping[str, Any]) -> list[str]:
        """Load one object from a checkpoint's files; returns sentences about what differs.

        Raises CheckpointError where it does not fit, or did not arrive.
        """
        if name in self.generators:
            return []
        value, committed = self._objects[name], images.committed
        if registered.is_stateful(value):
            saved = state["objects"].get(name)
            if saved is None:
                raise CheckpointError(
                    f"checkpoint-{committed.step} holds no '{name}' (it holds: "
                    f"{', '.join(sorted(state['objects'])) or 'nothing'}): register what the run "
                    f"was begun with, or begin a new run."
                )
            # This rank's own first: of ranks that train apart, each has its own of the same part.
            ranks = {entry.name: entry.rank for entry in committed.manifest.files}
            own = sorted(
                layout.files_of(name, images.names()), key=lambda file: ranks[file] != self._rank
            )
            if self._is_sharded(name) or in_parts(images.names()) & {*own}:
                found = parts.held_in(
                    images, own, name, partial(loading.live_like, name, value, saved)
                )
            else:
                found = [reader.held_in(file, images.take(file)) for file in own]
            loading.load(name, value, found, saved)
            loading.load_buffers(name, value, images)
            live = split(registered.state_of(name, value), name)
            reader.check_arrived(committed, name, live, saved["tree"], found)
        elif not registered.is_tokenizer(value):
            file = f"{name}.json"
            if file not in images.names():
                raise CheckpointError(
                    f"checkpoint-{committed.step} holds no '{name}': register what the run was "
                    f"begun with, or begin a new run."
                )
            return self._restore_value(name, images.json(file), state)
        return []

    def _restore_value(self, name: str, was: Any, state: Mapping[str, Any]) -> list[str]:
        """Give a registered JSON value what the checkpoint holds; a sentence where it is told."""
        value = self._objects[name]
        if reader.same_tree(was, registered.as_json(value)):
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

    def model_files(self, committed: Committed) -> list[str]:
        """The files that make up the finished model, as they are: weights, configs, tokenizer."""
        names = [entry.name for entry in committed.manifest.files]
        other = {STATE, RNG, "trainer_state.json", "training_args.json", *in_parts(names)}
        for name in self._objects:
            other.add(registered.buffers_file(name))
            if name not in self._weights():
                other |= {*layout.files_of(name, names), layout.index_file(name)}
        return [name for name in names if name not in other]

    def assemble(self, committed: Committed, directory: Path) -> list[FileEntry]:
        """Write those weights of the finished model that the checkpoint holds in parts, as wholes.

        Raises OSError, CheckpointError.
        """
        names = [entry.name for entry in committed.manifest.files]
        entries = []
        for name in self._weights():
            own = [file for file in layout.files_of(name, names) if file in in_parts(names)]
            if own:
                target = directory / f"{name}.safetensors"
                entries.append(parts.write_whole(committed, own, target))
        return entries

    def _weights(self) -> list[str]:
        """What a finished model keeps of the registered modules."""
        modules = [n for n, v in self._objects.items() if isinstance(v, torch.nn.Module)]
        return ["model"] if "model" in modules else modules


def _by_file(
    names: Mapping[str, Sequence[str]], found: Mapping[str, torch.Tensor]
) -> dict[str, Mapping[str, torch.Tensor]]:
    """Tensors by file and name. Of one file there may be tens of thousands: no choice is made."""
    return {
        file: found if len(keys) == len(found) else {key: found[key] for key in keys}
        for file, keys in names.items()
    }


def _state_text(rest: bytes, objects: Mapping[str, Callable[[], bytes]]) -> bytes:
    """The text of state.json; the objects' own texts are made here, in the thread that writes."""
    texts = [b'"%s":%s' % (name.encode(), text()) for name, text in objects.items()]
    return b'{"objects":{%s},%s\n' % (b",".join(texts), rest[1:])
