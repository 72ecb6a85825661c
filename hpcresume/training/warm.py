"""Warm starts: what torch.compile and Triton have compiled is kept in the run for its later links.

The caches themselves lie on the node, in a private folder of the link: torch and Triton take file
locks in them and write many small files, which shared file systems bear badly. One rank of a node
fills the folder before any user code is imported, and copies what is new back into the run: after
the first step, and when the link ends well. A copy is one zip file, written under another name and
renamed, whose checksums are tested when it is read: one that was cut short is never used.

Both caches are addressed by content: the name of a file is a hash of the source that it comes from,
of the options and the versions of the compilers, and of the GPU. So what a link that was overtaken,
or another version of the user's code, has left there does no harm. The CPU is not in the names,
although kernels are vectorised for it and compiled with -march=native: `kind` tells apart what
must not be mixed.

What is kept is executed: torch loads its libraries, runs its Python files, and unpickles its
compiled graphs. (That no pickle is ever loaded is a promise about checkpoints.) The folders are
therefore private to the user, and one that somebody else has made is refused. Needs no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from hpcresume import files
from hpcresume.run_dir import LinkDir, RunDir

log = logging.getLogger(__name__)

#: What torch and Triton read, and the name of each one's part in the folder of the node.
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
#: Precompiled headers would lie outside of the caches (150 MB, in a folder whose name everybody
#: can guess), and a process that has nothing to compile runs the compiler to look for them.
_NO_HEADERS = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
#: No content: locks, and what was seen of shapes, which is not addressed by content.
_LEFT_OUT = frozenset({"inductor/locks", "inductor/dynamo"})
_LOCKS = "inductor/locks"
#: Triton lists the files of a kernel by their whole paths, which are others in the next link.
_LIST = "__grp__"
_FOLDER = b"[FOLDER]"
#: A folder whose name is a hash is filled by one process, and belongs together.
_HASH_LETTERS = 32
#: torch splits the compiler's command line at spaces and quotes.
_PLAIN = re.compile(r"[\w./+,=@-]+")
_PLAIN_PLACE = "/tmp"
#: How much a run may keep, in bytes.
LARGEST = 1 << 30
#: How long the other ranks of a node wait for the one that fills the folder, in seconds.
_PATIENCE_S = 60.0
_TICK_S = 0.02


class WarmStart:
    """One rank's share of the folder of its node; `keeper` is the one rank that fills it."""

    def __init__(self, run: RunDir, link: LinkDir, *, keeper: bool) -> None:
        """Raises OSError where the folder cannot be made, or is not this user's alone."""
        self._all = run.cache
        self._kept = run.cache / kind()
        self._link = link.number
        self._keeper = keeper
        self._seen: set[Path] = set()
        self._known: dict[str, tuple[int, int]] = {}
        name = f"hpcresume-{run.identify()['id']}"
        self.folder = _place() / f"{name}-{link.number:04d}"
        if keeper:
            for old in self.folder.parent.glob(f"{name}-*"):
                _remove_unused(old)
            self._sweep()
            self._held = self._fill()
            self._known = dict(_contents(self.folder))
        else:
            _wait_for(self.folder)
            self._held = _hold(self.folder)

    def settings(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables that have torch and Triton use the folder, but for those set already."""
        wanted = {name: str(self.folder / part) for name, part in _FOLDERS.items()} | _NO_HEADERS
        return {name: value for name, value in wanted.items() if name not in environ}

    def _sweep(self) -> None:
        """Remove what links before this one were writing when they were killed."""
        for part in self._kept.glob(".*.part"):
            if part.name < f".{self._link:04d}":
                part.unlink(missing_ok=True)

    # ---- from the run to the node --------------------------------------------------------

    def _fill(self) -> int:
        """Make the folder, with all that is kept in it from the first moment; the hold on it."""
        private = self.folder.with_name(f"{self.folder.name}.{secrets.token_hex(4)}")
        private.mkdir(mode=0o700)
        held = _hold(private)
        try:
            for archive in _archives(self._kept):
                self._seen.add(archive)
                try:
                    self._unpack(archive, private)
                except (zipfile.BadZipFile, EOFError) as error:
                    log.warning("%s is damaged (%s) and removed", archive, error)
                    archive.unlink(missing_ok=True)
            # Refused where there is one of this name; only an empty one would give way.
            os.rename(private, self.folder)
        except BaseException:
            os.close(held)
            shutil.rmtree(private, ignore_errors=True)
            raise
        return held

    def _unpack(self, archive: Path, into: Path) -> None:
        with _opened(archive) as content:
            for name in content.namelist():
                data = content.read(name)
                target = into / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.name.startswith(_LIST):
                    data = data.replace(_FOLDER, _in_json(self.folder))
                target.write_bytes(data)

    # ---- from the node to the run --------------------------------------------------------

    def keep(self) -> None:
        """Copy what has been compiled since into the run; only the keeper does.

        Where there is no room, or no right to, the next link compiles again: that is said, and
        nothing is raised.
        """
        if not self._keeper:
            return
        try:
            now = dict(_contents(self.folder))
            new = [name for name, state in now.items() if self._known.get(name) != state]
            copied = self._copy(self._of_nobody_else(new))
            self._known.update({name: now[name] for name in copied})
        except OSError as error:
            log.warning("what was compiled is not kept for the next link: %s", _words(error))

    def _of_nobody_else(self, new: Iterable[str]) -> list[str]:
        """What other nodes have not copied meanwhile: in the same training they compile the same.

        It is often named otherwise, by the time that it took, in a folder of the same name.
        """
        others = {
            _whole(name)
            for archive in _archives(self._kept)
            if archive not in self._seen
            for name in _names(archive)
        }
        return [name for name in new if name in self._known or _whole(name) not in others]

    def _copy(self, new: Sequence[str]) -> list[str]:
        """Write an archive; what is in it."""
        new = [name for name in new if not _being_built(self.folder, name)]
        if not new:
            return []
        self._all.mkdir(mode=0o700, exist_ok=True)
        self._kept.mkdir(mode=0o700, exist_ok=True)
        room = LARGEST - sum(files.size_or_zero(path) for path in self._all.glob("*/*.zip"))
        name = f"{self._link:04d}-{secrets.token_hex(4)}"
        part, archive = self._kept / f".{name}.part", self._kept / f"{name}.zip"
        try:
            with part.open("xb") as file, _zip(file) as content:
                for member in new:
                    content.writestr(member, self._movable(member))
                    if file.tell() > room:
                        raise OSError(
                            f"{self._all} would hold more than {files.size_words(LARGEST)}; "
                            f"remove it to begin it anew"
                        )
            os.rename(part, archive)
        finally:
            part.unlink(missing_ok=True)
        self._seen.add(archive)
        return new

    def _movable(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        if name.rpartition("/")[2].startswith(_LIST):
            data = data.replace(_in_json(self.folder), _FOLDER)
        return data

    # ---- the end -------------------------------------------------------------------------

    def leave(self) -> None:
        """Let go of the folder; the last rank of the node removes it."""
        with contextlib.suppress(OSError):
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._held)


def warm_start(
    run: RunDir, link: LinkDir, environ: Mapping[str, str], *, keeper: bool
) -> WarmStart | None:
    """The folder of this node; None where the user has chosen one, or there can be none."""
    if "TORCHINDUCTOR_CACHE_DIR" in environ:
        return None
    try:
        return WarmStart(run, link, keeper=keeper)
    except OSError as error:
        log.warning(
            "compiled code is neither taken over nor kept for the next link: %s", _words(error)
        )
        return None


def _words(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.strerror else str(error)


def kind() -> str:
    """What compiled code must have in common: the CPU, the C library, Python and torch."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    parts = [_processor(), platform.libc_ver(), platform.python_version(), torch]
    return f"{platform.machine()}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _processor() -> list[str]:
    """The model of the first CPU, and what it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [platform.processor()]
    words = ("vendor_id", "model name", "cpu family", "model", "flags", "Features", "CPU part")
    first = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return [value.strip() for name, _, value in first if name.strip() in words]


# ---- archives ------------------------------------------------------------------------------


def _archives(kept: Path) -> list[Path]:
    """What is kept, in the order of the links."""
    return sorted(kept.glob("[0-9]*.zip"))


def _opened(archive: Path) -> zipfile.ZipFile:
    """An archive for reading. Raises BadZipFile, and where the disk fails OSError.

    Read at once: zipfile would call a file damaged that the disk does not give.
    """
    return zipfile.ZipFile(io.BytesIO(archive.read_bytes()))


def _zip(file: BinaryIO) -> zipfile.ZipFile:
    return zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)


def _names(archive: Path) -> list[str]:
    try:
        with _opened(archive) as content:
            return content.namelist()
    except zipfile.BadZipFile:
        return []


def _whole(name: str) -> str:
    """What a file belongs to: itself, or a folder that is named by a hash."""
    folder = name.rpartition("/")[0]
    return folder if len(folder.rpartition("/")[2]) >= _HASH_LETTERS else name


def _in_json(folder: Path) -> bytes:
    return json.dumps(str(folder))[1:-1].encode()


# ---- the folder of the node ----------------------------------------------------------------


def _contents(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """The files, by their paths below; half-written ones have names of their own."""
    for place, folders, names in os.walk(folder):
        below = os.path.relpath(place, folder)
        folders[:] = [
            f for f in folders if os.path.join(below, f) not in _LEFT_OUT and not _is_part(f)
        ]
        for name in names:
            if not _is_part(name):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(os.path.join(place, name))
                    yield os.path.join(below, name), (status.st_mtime_ns, status.st_size)


def _is_part(name: str) -> bool:
    return name.startswith((".", "tmp.")) or ".tmp." in name


def _being_built(folder: Path, name: str) -> bool:
    """Whether a C++ compiler may be writing the file, which it does in its place.

    torch holds the lock that is named by the same hash meanwhile.
    """
    lock = folder / _LOCKS / f"{name.rpartition('/')[2].partition('.')[0]}.lock"
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _place() -> Path:
    """Where temporary files lie on this node, under a path that compilers bear."""
    place = tempfile.gettempdir()
    return Path(place if _PLAIN.fullmatch(place) else _PLAIN_PLACE)


def _wait_for(folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not os.path.lexists(folder) and time.monotonic() < deadline:
        time.sleep(_TICK_S)


def _hold(folder: Path, how: int = fcntl.LOCK_SH) -> int:
    """A descriptor that keeps others from removing the folder. Raises OSError.

    The lock lies on the node's own disk, and ends with the process.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status, above = os.fstat(fd), os.stat(folder.parent)
        exposed = above.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not above.st_mode & stat.S_ISVTX
        if status.st_uid != os.getuid() or status.st_mode & 0o077 or exposed:
            raise PermissionError(
                f"{folder} is not private to this user, and what lies in it would be executed"
            )
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a link that was killed; one that is in use, or not ours, stays."""
    with contextlib.suppress(OSError):
        held = _hold(folder, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)
