"""Whether a checkpoint that a training framework has written is whole: no torch, nothing unpickled.

Such a checkpoint is a folder, or one file. When the framework has saved, `vouch` brings it onto the
disk and leaves `hpcresume.json` in the folder (`NAME.hpcresume.json` beside a file), which names
every file with its size and digest: from then on a byte that changes is seen. One that a plain run
left has none of that, and is looked at as far as its formats tell. Nothing is ever removed here.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from hpcresume import files

NAME = "hpcresume.json"
_VERSION = 1
_CHUNK_BYTES = 8 << 20
#: What `torch.save` writes, and what Trainer writes last.
_ARCHIVES = frozenset({".pt", ".pth", ".bin", ".ckpt"})
_STATE = "trainer_state.json"
_INDEX = ".index.json"
#: A longer head of a safetensors file is refused by safetensors itself.
_HEAD_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Voucher:
    """What stands in hpcresume.json."""

    step: int
    entries: Mapping[str, tuple[int, str]]
    """Size in bytes and XXH3-128 of each file, by its path below the folder."""
    about: Mapping[str, Any]
    """What whoever vouched wanted to know again: JSON."""
    digest: str
    """Of hpcresume.json itself, and so of everything."""

    @property
    def num_bytes(self) -> int:
        """The size of the checkpoint."""
        return sum(size for size, _ in self.entries.values())


@dataclass(frozen=True, kw_only=True)
class Newest:
    """The newest checkpoint that is whole."""

    path: Path | None = None
    voucher: Voucher | None = None
    """None where nobody vouched for it: it looks whole, and that is all that is known."""
    passed_over: list[tuple[Path, str]] = field(default_factory=list)
    """The newer ones, each with what is wrong with it."""


def voucher_path(path: Path) -> Path:
    """Where the digests of a checkpoint stand."""
    return path / NAME if path.is_dir() else path.with_name(f"{path.name}.{NAME}")


def vouch(path: Path, step: int, about: Mapping[str, Any] | None = None) -> Voucher:
    """Bring a checkpoint onto the disk, then its digests. Raises OSError.

    It survives a power loss on return. Whoever is killed in between leaves none of our files, or
    the one of an earlier save, whose digests do not fit.
    """
    entries = {name: _settle(file) for name, file in _files(path)}
    for folder in _folders(path):
        files.fsync_dir(folder)
    content = {
        "v": _VERSION,
        "step": step,
        "about": dict(about or {}),
        "files": {name: {"bytes": s, "xxh3": d} for name, (s, d) in entries.items()},
    }
    data = files.to_json(content, indent=2)
    files.write_durably(voucher_path(path), data)
    files.fsync_dir(path.parent)
    return _voucher(json.loads(data), data)


def read_voucher(path: Path) -> Voucher | None:
    """What was vouched for; None where nothing was. Raises ValueError where that is damaged."""
    try:
        data = voucher_path(path).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return _voucher(json.loads(data), data)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{voucher_path(path).name} is damaged") from None


def voucher_or_none(path: Path) -> Voucher | None:
    """What was vouched for, as far as that can be read."""
    try:
        return read_voucher(path)
    except (ValueError, OSError):
        return None


def why_not(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None where it is whole.

    With digests every byte is read. Without, the formats tell what they can.
    """
    try:
        voucher = read_voucher(path)
        return _unlike(path, voucher) if voucher is not None else _looks_broken(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def newest(candidates: Iterable[Path]) -> Newest:
    """The first that is whole of some checkpoints, the newest first."""
    passed_over: list[tuple[Path, str]] = []
    for path in candidates:
        wrong = why_not(path)
        if wrong is None:
            return Newest(path=path, voucher=read_voucher(path), passed_over=passed_over)
        passed_over.append((path, wrong))
    return Newest(passed_over=passed_over)


def numbered(folder: Path, prefix: str = "checkpoint-") -> list[Path]:
    """The folders `checkpoint-N` in a folder, the highest number first."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(prefix)]
    except OSError:
        return []
    steps = [(int(n[len(prefix) :]), n) for n in names if n[len(prefix) :].isdecimal()]
    found = (folder / name for _, name in sorted(steps, reverse=True))
    return [path for path in found if path.is_dir()]


# ---- with digests --------------------------------------------------------------------------------


def _voucher(content: Any, data: bytes) -> Voucher:
    if content["v"] != _VERSION or type(content["step"]) is not int:
        raise ValueError
    entries = {str(n): (int(e["bytes"]), str(e["xxh3"])) for n, e in content["files"].items()}
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in entries):
        raise ValueError
    return Voucher(
        step=content["step"],
        entries=entries,
        about=dict(content["about"]),
        digest=xxhash.xxh3_128_hexdigest(data),
    )


def _unlike(path: Path, voucher: Voucher) -> str | None:
    base = path if path.is_dir() else path.parent
    # Sizes first: they are known without reading anything.
    for name, (size, _) in voucher.entries.items():
        try:
            found = (base / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    for name, (_, digest) in voucher.entries.items():
        if _digest(base / name) != digest:
            return f"{name} is not what was saved: its digest differs"
    return None


def _settle(file: Path) -> tuple[int, str]:
    """Sync a file; its size and digest."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_size, _digest(file)
    finally:
        os.close(fd)


def _digest(file: Path) -> str:
    hasher = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as source:
        while piece := source.read(_CHUNK_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a checkpoint by name, in order; those of ours are none of it."""
    if not path.is_dir():
        yield path.name, path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name != NAME and not file.name.startswith(f".{NAME}."):
            yield str(file.relative_to(path)), file


def _folders(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield path
        yield from (entry for entry in path.rglob("*") if entry.is_dir())


# ---- without -------------------------------------------------------------------------------------


def _looks_broken(path: Path) -> str | None:
    """What formats tell of a checkpoint that nobody vouched for."""
    if not path.exists():
        return "it is not there"
    found = dict(_files(path))
    for name, file in found.items():
        wrong = _malformed(file)
        if wrong is not None:
            return f"{name} {wrong}"
    if not path.is_dir():
        return None
    return _incomplete(path, found)


def _incomplete(path: Path, found: Mapping[str, Path]) -> str | None:
    """What a folder lacks. Trainer writes its state last: where it stands, all of its files do."""
    for name, file in found.items():
        if name.endswith(_INDEX):
            index = files.read_json(file)
            named = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(named, dict):
                return f"{name} names no weights"
            missing = sorted({str(n) for n in named.values()} - {Path(n).name for n in found})
            if missing:
                return f"{missing[0]} is missing"
    prefix, _, number = path.name.rpartition("-")
    if prefix != "checkpoint" or not number.isdecimal():
        return None
    if _STATE not in found:
        return f"{_STATE} is missing: its save was cut off"
    if len(found) == 1:
        return "it holds no weights"
    state = files.read_json(found[_STATE])
    step = state.get("global_step") if isinstance(state, dict) else None
    return None if step == int(number) else f"{_STATE} tells of step {step}"


def _malformed(file: Path) -> str | None:
    if file.suffix == ".safetensors":
        return _malformed_tensors(file)
    if file.suffix == ".json":
        try:
            files.read_json(file)
        except (ValueError, RecursionError):
            return "is no JSON"
        return None
    return _malformed_archive(file) if file.suffix in _ARCHIVES else None


def _malformed_tensors(file: Path) -> str | None:
    """A safetensors file says in its head where its last byte is."""
    size = file.stat().st_size
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if size < 8 or length > min(size - 8, _HEAD_BYTES):
            return "is cut off"
        try:
            head = json.loads(source.read(length))
            ends = [t["data_offsets"][1] for n, t in head.items() if n != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return "has no readable head"
    return None if size == expected else f"has {size} bytes instead of {expected}"


def _malformed_archive(file: Path) -> str | None:
    """`torch.save` writes a zip archive, whose members have a CRC; none is unpickled here."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError):
        return "is cut off, or was not written by torch.save"
    return None if damaged is None else f"is damaged: {damaged}"
