"""The manifest: what makes a directory a checkpoint. Needs no torch.

It is written last, names every file with its size and the digests of its chunks, and carries a
digest of itself. `read_committed` is the one predicate that answers "is this a checkpoint";
`latest`, retention, `status` and the chain's decision all ask it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from hpcresume import files
from hpcresume.errors import CheckpointError
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir

FORMAT = 1
NAME = "manifest.json"
CHUNK_BYTES = 8 << 20
_MAX_MANIFEST_BYTES = 256 << 20
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}"
#: A file, or one in a folder: tokenizers with several chat templates keep them in one.
_FILE_NAME = re.compile(rf"{_PART}(/{_PART})?")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    bytes: int
    chunks: tuple[str, ...]
    """XXH3-128 of each chunk of 8 MiB, hexadecimal."""
    rank: int = 0
    """Which rank wrote it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    epoch: int
    link: int
    run_id: str
    parent: str | None
    """Digest of the manifest of the checkpoint before it."""
    files: tuple[FileEntry, ...]
    created: float
    """Unix seconds; for people, never for decisions."""
    metric: dict[str, Any] | None = None
    """The watched metric when it was saved: {name, value, mode}."""
    format: int = FORMAT
    digest: str = field(default="", compare=False)
    """SHA-256 of everything else in the manifest."""

    @property
    def payload_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.bytes for entry in self.files)

    def entry(self, name: str) -> FileEntry:
        """The entry of a file. Raises CheckpointError if there is none."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise CheckpointError(f"The checkpoint of step {self.step} holds no {name}.")

    def to_bytes(self) -> bytes:
        """The text of manifest.json, with its digest."""
        content = asdict(self)
        content["digest"] = _digest(content)
        return files.to_json(content, indent=1)


def _digest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(files.to_json(rest)).hexdigest()


def parse(data: bytes) -> Manifest:
    """The manifest in `data`. Raises CheckpointError that says what is wrong with it."""
    try:
        content = json.loads(data)
        if content["digest"] != _digest(content):
            raise CheckpointError("its manifest does not match its own digest")
        if content["format"] != FORMAT:
            raise CheckpointError(f"its format {content['format']} is not {FORMAT}")
        _check_types(content, _TYPES)
        if content["metric"] is not None:
            _check_types(content["metric"], _METRIC_TYPES)
        for entry in content["files"]:
            _check_types(entry, _ENTRY_TYPES)
        entries = tuple(
            FileEntry(**{**entry, "chunks": tuple(entry["chunks"])}) for entry in content["files"]
        )
        manifest = Manifest(**{**content, "files": entries})
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"its manifest is not readable ({error})") from None
    for entry in manifest.files:
        if not _FILE_NAME.fullmatch(entry.name) or entry.name == NAME:
            raise CheckpointError(f"its manifest names an impossible file {entry.name!r}")
    return manifest


_Types = Mapping[str, tuple[type, ...]]
_TYPES: _Types = {
    "step": (int,),
    "epoch": (int,),
    "link": (int,),
    "run_id": (str,),
    "parent": (str, type(None)),
    "files": (list,),
    "created": (int, float),
    "metric": (dict, type(None)),
}
_METRIC_TYPES: _Types = {"name": (str,), "value": (int, float), "mode": (str,)}
_ENTRY_TYPES: _Types = {"name": (str,), "bytes": (int,), "chunks": (list,), "rank": (int,)}


def _check_types(content: Mapping[str, Any], types: _Types) -> None:
    for key, allowed in types.items():
        if type(content[key]) not in allowed:
            raise TypeError(f"{key} is {content[key]!r:.40}")


@dataclass(frozen=True)
class Committed:
    """A directory that is a checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Its global step."""
        return self.manifest.step


def read_committed(path: Path, lineage: Lineage) -> Committed:
    """The checkpoint in a directory.

    Raises CheckpointError with the reason where it is none: no manifest or one that does not
    parse, a file that is missing or has another size, a step that is not its name's, or a link
    that is not on the run's lineage. Digests of the files are `images.verify`'s matter. Raises
    OSError where the file system cannot tell at present.
    """
    if path.is_symlink():
        raise CheckpointError("it is not a directory of its own")
    manifest = parse(_read_manifest(path / NAME))
    if path.name != f"checkpoint-{manifest.step}":
        raise CheckpointError(f"its manifest belongs to step {manifest.step}")
    for entry in manifest.files:
        try:
            status = os.stat(path / entry.name, follow_symlinks=False)
        except OSError as error:
            raise damage_of(error, entry.name) from None
        elsewhere = "/" in entry.name and (path / entry.name).parent.is_symlink()
        if not stat.S_ISREG(status.st_mode) or elsewhere:
            raise CheckpointError(f"{entry.name} is not a file of its own")
        if status.st_size != entry.bytes:
            raise CheckpointError(f"{entry.name} has {status.st_size} bytes, not {entry.bytes}")
    if not lineage.holds(manifest.link, manifest.step):
        raise CheckpointError(f"link {manifest.link} wrote it after a newer link had taken over")
    return Committed(path, manifest)


def read_of_run(run: RunDir, run_id: str, step: int, lineage: Lineage) -> Committed:
    """`read_committed`, and of this run: what another run left here counts for nothing."""
    found = read_committed(run.checkpoint(step), lineage)
    if found.manifest.run_id != run_id:
        raise CheckpointError("it belongs to another run")
    return found


def newest_of_run(run: RunDir, run_id: str, lineage: Lineage) -> Committed | None:
    """The newest checkpoint of a run; older ones are not looked at. Raises OSError."""
    for step in reversed(run.checkpoint_steps()):
        with contextlib.suppress(CheckpointError):
            return read_of_run(run, run_id, step, lineage)
    return None


def _read_manifest(path: Path) -> bytes:
    try:
        # Without waiting: a pipe in the place of a file has nobody at its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError("its manifest is not a file of its own")
            return file.read(_MAX_MANIFEST_BYTES)
    except OSError as error:
        if isinstance(damage_of(error, NAME), OSError):
            raise
        raise CheckpointError(f"it has no readable manifest ({error.strerror})") from None


#: Errors that tell that a file is damaged or not there. Any other (no descriptor left, a server
#: that does not answer) says nothing about it, and passes.
_DAMAGE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENXIO,
        errno.EIO,
        errno.ENODATA,
        errno.EBADMSG,
        errno.EUCLEAN,
    }
)


def damage_of(error: OSError, name: str) -> CheckpointError | OSError:
    """What to raise for a file of a checkpoint that cannot be read: damage, or the error itself."""
    if error.errno not in _DAMAGE:
        return error
    if error.errno == errno.ENOENT:
        return CheckpointError(f"{name} is missing")
    return CheckpointError(f"{name} cannot be read ({error.strerror})")


def digest_of(chunk: bytes | memoryview) -> str:
    """The digest of one chunk."""
    return xxhash.xxh3_128_hexdigest(chunk)


class ChunkHasher:
    """Digests of a stream, one for each 8 MiB."""

    def __init__(self) -> None:
        self._chunks: list[str] = []
        self._hash = xxhash.xxh3_128()
        self._filled = 0
        self.bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next piece of the stream."""
        view = memoryview(data).cast("B")
        self.bytes += view.nbytes
        while view.nbytes:
            part = view[: CHUNK_BYTES - self._filled]
            self._hash.update(part)
            self._filled += part.nbytes
            view = view[part.nbytes :]
            if self._filled == CHUNK_BYTES:
                self._next()

    def chunks(self) -> tuple[str, ...]:
        """The digests; the stream is over."""
        if self._filled:
            self._next()
        return tuple(self._chunks)

    def _next(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash = xxhash.xxh3_128()
        self._filled = 0


def hash_stream(pieces: Iterable[bytes | memoryview]) -> tuple[int, tuple[str, ...]]:
    """Length and chunk digests of a stream."""
    hasher = ChunkHasher()
    for piece in pieces:
        hasher.update(piece)
    return hasher.bytes, hasher.chunks()


def read_pieces(path: Path) -> Iterator[bytes]:
    """A file in pieces of one chunk."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece
