"""A directory of torch.distributed.checkpoint (DCP), of any number of ranks.

Its own reader unpickles whatever the files hold. So it is not used: `.metadata` may name the few
classes that it is made of, and each entry is read by torch's restricted loading.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpcresume.checkpoint.foreign import pickled
from hpcresume.checkpoint.foreign.places import COUNTERS, place
from hpcresume.checkpoint.foreign.source import Found, Source, sort_out
from hpcresume.errors import CheckpointError

_METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
#: Data classes, enumerations and values; none of them does anything when it is made.
_KNOWN = {
    (f"{_CHECKPOINT}.metadata", "Metadata"),
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "TensorProperties"),
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
    (f"{_CHECKPOINT}.metadata", "StorageMeta"),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    # Their place in Python 3.13.
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "PurePosixPath"),
}


class _Unknown(Exception):
    """A pickle names something that is not made here."""


class _Unpickler(pickle.Unpickler):
    """Makes what a `.metadata` file is made of, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return super().find_class(module.removesuffix("._local"), name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise _Unknown(f"{module}.{name}")


def opened(path: Path, trust: bool) -> Source | None:
    """The checkpoint in a directory; None where it is none of this kind."""
    if not (path / _METADATA).is_file():
        return None
    reader = _Reader(path, trust)
    objects, rest = sort_out(reader.tree)
    if not objects:
        raise CheckpointError(
            f"{path} holds {', '.join([*rest][:8]) or 'nothing'}, and no state of a model by "
            f"itself: expected a dict with model, optimizer…, as it is given to "
            f"torch.distributed.checkpoint.save."
        )
    told = place(path.name, rest, objects)
    return Source(
        path=path,
        layout="a checkpoint of torch.distributed.checkpoint",
        global_step=told.global_step,
        epoch=told.epoch,
        objects=[
            Found(name, tree, read=partial(reader.filled, tree)) for name, tree in objects.items()
        ],
        files=[path / _METADATA, *reader.files()],
        notes=told.notes,
        left_out=sorted(rest.keys() - COUNTERS),
    )


class _Reader:
    """The entries of one checkpoint. `tree` has tensors on the meta device, but for single numbers.

    Raises CheckpointError where `.metadata`, or an entry, is not as it should be.
    """

    def __init__(self, path: Path, trust: bool) -> None:
        self._path = path
        self._trust = trust
        file = path / _METADATA
        try:
            with open(file, "rb") as opened:
                metadata = _Unpickler(opened).load()
            self._entries: Mapping[str, Any] = metadata.state_dict_metadata
            self._places: dict[tuple[str, tuple[int, ...] | None], Any] = {
                (index.fqn, None if index.offset is None else tuple(index.offset)): info
                for index, info in metadata.storage_data.items()
            }
            paths = metadata.planner_data or {name: (name,) for name in self._entries}
            self._unread: dict[int, tuple[torch.Tensor, str]] = {}
            self.tree = _tree({paths[name]: self._outlined(name) for name in self._entries})
        except (OSError, CheckpointError):
            raise
        except _Unknown as error:
            raise CheckpointError(
                f"{file} holds {error}, which the metadata of torch's checkpoints never do: it is "
                f"damaged, or not to be trusted."
            ) from None
        except Exception as error:
            # Whatever a damaged pickle makes of its reader.
            raise CheckpointError(
                f"{file} cannot be read: it is damaged, or of another version of torch "
                f"({type(error).__name__}: {pickled.first_line(error)})."
            ) from None

    def files(self) -> list[Path]:
        """The files that hold the entries."""
        return sorted({self._file(info) for info in self._places.values()})

    def filled(self, tree: Any) -> Any:
        """A part of the tree with all its tensors."""
        if isinstance(tree, torch.Tensor):
            known = self._unread.get(id(tree))
            return tree if known is None else self._tensor(known[1])
        if isinstance(tree, Mapping):
            return {key: self.filled(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.filled(value) for value in tree]
        return tree

    def _outlined(self, name: str) -> Any:
        entry = self._entries[name]
        if not hasattr(entry, "chunks"):
            return self._load(name, None)
        if not len(entry.size):
            return self._tensor(name)
        hollow = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        # Kept with its name, so that its identity is nobody else's.
        self._unread[id(hollow)] = hollow, name
        return hollow

    def _tensor(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        whole, filled = torch.empty(entry.size, dtype=entry.properties.dtype), 0
        for chunk in entry.chunks:
            piece = self._load(name, tuple(chunk.offsets))
            ends = zip(chunk.offsets, chunk.sizes, strict=True)
            target = whole[tuple(slice(begin, begin + size) for begin, size in ends)]
            if not isinstance(piece, torch.Tensor) or piece.shape != target.shape:
                raise CheckpointError(f"{self._path}: '{name}' is not what its .metadata tells.")
            target.copy_(piece)
            filled += piece.numel()
        if filled != whole.numel():
            raise CheckpointError(f"{self._path} holds only some of the elements of '{name}'.")
        return whole

    def _load(self, name: str, offset: tuple[int, ...] | None) -> Any:
        info = self._places.get((name, offset))
        if info is None:
            raise CheckpointError(f"{self._path} does not tell where '{name}' lies.")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{self._path} holds '{name}' compressed, which is not read.")
        file = self._file(info)
        try:
            with open(file, "rb") as opened:
                opened.seek(info.offset)
                content = io.BytesIO(opened.read(info.length))
        except FileNotFoundError:
            raise CheckpointError(
                f"{file.name} is missing in {self._path}: copy the whole checkpoint."
            ) from None
        return pickled.load(content, self._trust, f"'{name}' in {file}")

    def _file(self, info: Any) -> Path:
        name = str(info.relative_path)
        if Path(name).name != name:
            raise CheckpointError(f"{self._path} names a file in another place, {name!r}.")
        return self._path / name


def _tree(leaves: Mapping[Sequence[Any], Any]) -> Any:
    """The nested dicts and lists whose leaves these are, by path."""
    tree: dict[Any, Any] = {}
    for path, value in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return _with_lists(tree)


def _with_lists(node: Any) -> Any:
    """Numbers as keys are places in a list; those of dicts came as texts."""
    if not isinstance(node, dict):
        return node
    inner = {key: _with_lists(value) for key, value in node.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [inner[key] for key in sorted(inner)]
    return inner
