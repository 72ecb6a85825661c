"""The layer between Python and the file system, for the tests that attack checkpoints.

`struck` tells every call that concerns a folder before and after it is made, so that a test can
count them, and at one of them kill the process, refuse the call, or cut the power. What does not go
through Python's `os` (libraries in Rust and C++) is struck by strace in the tests.
"""

from __future__ import annotations

import _pyio
import builtins
import contextlib
import ctypes
import fcntl
import io
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from bug_links import CHILDREN

from hpcresume import files
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.images import Images
from hpcresume.checkpoint.manifest import NAME, Committed
from hpcresume.checkpoint.staged import STATE
from hpcresume.checkpoint.store import Store
from hpcresume.journal import Lineage, lineage
from hpcresume.run_dir import RunDir

#: Calls that take a path or a descriptor first, by their names in `os`.
_FIRST = (
    *("open", "close", "read", "readv", "pread", "preadv", "write", "writev", "pwrite", "pwritev"),
    *("lseek", "fsync", "fdatasync", "truncate", "ftruncate", "posix_fallocate", "posix_fadvise"),
    *("link", "symlink", "readlink", "rename", "replace", "unlink", "remove", "mkdir", "rmdir"),
    *("stat", "lstat", "fstat", "access", "scandir", "listdir", "statvfs", "fstatvfs"),
    *("chmod", "fchmod", "chown", "fchown", "utime", "copy_file_range", "sendfile"),
)
#: Those that change the disk; and `open`, where it is opened for writing.
_CHANGES = frozenset(
    {"write", "writev", "pwrite", "pwritev", "fsync", "fdatasync", "truncate", "ftruncate"}
    | {"posix_fallocate", "copy_file_range", "sendfile", "link", "symlink", "rename", "replace"}
    | {"unlink", "remove", "mkdir", "rmdir"}
)
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SYNCS = frozenset({"fsync", "fdatasync"})


class Call(NamedTuple):
    """One call: its number, from 1; its name; the path that it concerns; what it is for."""

    number: int
    name: str
    path: str
    changes: bool
    """Whether it changes what is on the disk, or may."""


class Layer:
    """What `struck` puts between."""

    def __init__(
        self, below: Path, before: Callable[[Call], None], after: Callable[[Call], None]
    ) -> None:
        self._below = os.fspath(below)
        self._before = before
        self._after = after
        self._lock = threading.Lock()
        self._number = 0
        self._asking = threading.local()
        self._real = {name: getattr(os, name) for name in _FIRST if hasattr(os, name)}

    def __enter__(self) -> None:
        for name in self._real:
            setattr(os, name, self._standing_for(name))
        self._mmap = mmap.mmap
        mmap.mmap = self._mapping()  # type: ignore[misc]
        # Python's own files in Python: they ask `os` for everything.
        self._open = io.open
        io.open = builtins.open = _pyio.open

    def __exit__(self, *_exception: object) -> None:
        io.open = builtins.open = self._open
        mmap.mmap = self._mmap  # type: ignore[misc]
        for name, function in self._real.items():
            setattr(os, name, function)

    def _standing_for(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(first: Any = ".", *args: Any, **kwargs: Any) -> Any:
            path = self._path_of(first, kwargs.get("dir_fd", kwargs.get("src_dir_fd")))
            flags = args[0] if name == "open" and args else kwargs.get("flags", 0)
            made = self._counted(name, path, bool(flags & _FOR_WRITING) or name in _CHANGES)
            if made is None:
                return real(first, *args, **kwargs)
            try:
                self._tell(self._before, made)
            except OSError:
                if name == "close":
                    # A descriptor is gone even where close reports an error.
                    real(first)
                raise
            try:
                return real(first, *args, **kwargs)
            finally:
                self._tell(self._after, made)

        return call

    def _mapping(self) -> type[mmap.mmap]:
        layer = self

        class Mapping(mmap.mmap):
            def __new__(cls, fileno: int, *args: Any, **kwargs: Any) -> Mapping:
                made = layer._counted("mmap", layer._path_of(fileno, None), False)
                if made is not None:
                    layer._tell(layer._before, made)
                return super().__new__(cls, fileno, *args, **kwargs)

        return Mapping

    def _tell(self, whom: Callable[[Call], None], made: Call) -> None:
        # What is asked in there is no call of the engine's.
        self._asking.now = True
        try:
            whom(made)
        finally:
            self._asking.now = False

    def _counted(self, name: str, path: str, changes: bool) -> Call | None:
        if not path.startswith(self._below) or getattr(self._asking, "now", False):
            return None
        with self._lock:
            self._number += 1
            return Call(self._number, name, path, changes)

    def _path_of(self, first: Any, folder: int | None) -> str:
        if isinstance(first, int):
            try:
                return str(self._real["readlink"](f"/proc/self/fd/{first}"))
            except OSError:
                return ""
        path = os.fsdecode(first)
        return path if folder is None else os.path.join(self._path_of(folder, None), path)


def _nothing(_call: Call) -> None:
    pass


def struck(
    below: Path,
    before: Callable[[Call], None] = _nothing,
    after: Callable[[Call], None] = _nothing,
) -> Layer:
    """While it is entered, `before` and `after` are told each call that concerns a path below."""
    return Layer(below, before, after)


@dataclass
class States:
    """Tells the calls in front of which the disk is another than in front of the one before.

    A process that is killed leaves the disk as it is: calls between which nothing changes are one
    point to kill it at.
    """

    below: Path
    numbers: list[int] = field(default_factory=list)
    _last: object = None

    def before(self, call: Call) -> None:
        """To be told each call."""
        now = sorted(self._entries(os.fspath(self.below)))
        if now != self._last:
            self.numbers.append(call.number)
            self._last = now

    def _entries(self, folder: str) -> Iterator[tuple[str, int, int, int]]:
        for entry in os.scandir(folder):
            status = entry.stat(follow_symlinks=False)
            if entry.is_dir(follow_symlinks=False):
                yield entry.path, status.st_ino, 0, 0
                yield from self._entries(entry.path)
            else:
                yield entry.path, status.st_ino, status.st_size, status.st_mtime_ns


def kill_here() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


# A process without threads, from which to fork


def result_of(target: Callable[..., Any], *args: Any, timeout_s: float = 500) -> Any:
    """What a function of a module returns in a process of its own, which has no threads."""
    here, there = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=_tell, args=(there, target, args))
    child.start()
    there.close()
    try:
        if not here.poll(timeout_s):
            raise AssertionError(f"{target.__name__} did not come to its end in {timeout_s:.0f} s")
        how, value = here.recv()
    except EOFError:
        raise AssertionError(f"{target.__name__} died without a word") from None
    finally:
        child.kill()
        child.join()
    assert how == "returned", value
    return value


def _tell(there: Connection, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        there.send(("returned", target(*args)))
    except BaseException:
        there.send(("raised", traceback.format_exc()))


def forked(action: Callable[[], None]) -> int:
    """Do something in a fork of this process; its exit code, negative for a signal.

    70 stands for an exception, whose traceback goes to standard error.
    """
    pid = os.fork()
    if not pid:
        code = 70
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def told_by_fork(action: Callable[[], Any]) -> Any:
    """What an action returns, as JSON, that is done in a fork of this process."""
    here, there = os.pipe()
    code = forked(lambda: files.write_all(there, files.to_json(action())))
    os.close(there)
    with open(here, "rb") as file:
        data = file.read()
    assert code == 0, code
    return json.loads(data)


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder in memory where there is such a disk: what is asked there is not about speed."""
    memory = Path("/dev/shm")
    # Containers have one of 64 MB, which several of these tests at a time would fill.
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(
        prefix="hpcresume-tests-", dir=memory if roomy else None
    ) as name:
        yield Path(name).resolve()


# Checkpoints whose content follows from their step

#: The lineage of a run without links: everything counts.
ALL = Lineage()


class Held:
    """A registered thing with tensors and numbers."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


class Words:
    """A tokenizer with a folder."""

    def __init__(self, step: int) -> None:
        self.step = step

    def save_pretrained(self, directory: str) -> None:
        Path(directory, "vocab.txt").write_text(f"words of step {self.step:06d}\n" * 9)
        Path(directory, "templates").mkdir()
        Path(directory, "templates", "chat.jinja").write_text(f"chat of step {self.step:06d}\n")


def objects_at(step: int) -> dict[str, Any]:
    """What is registered at a step; `model` and `twin` have files of the same size."""
    import torch

    def noise(number: int) -> torch.Tensor:
        dice = torch.Generator().manual_seed(1000 * step + number)
        return torch.randn(37, 41, generator=dice)

    return {
        "model": Held({"weight": noise(1), "bias": noise(2)[0]}),
        "twin": Held({"weight": noise(3), "bias": noise(4)[0]}),
        "config": {"step": step},
        "tokenizer": Words(step),
    }


def contents_at(step: int) -> Contents:
    found = Contents()
    for name, value in objects_at(step).items():
        found.add(name, value)
    return found


def as_text(objects: dict[str, Any]) -> str:
    """The values of registered objects; floats by all their bits."""
    told = {name: objects[name].state for name in ("model", "twin")}
    parts = [f"{n} {k} {v.tolist()}" for n, state in told.items() for k, v in state.items()]
    return "\n".join([*parts, str(objects["config"])])


@dataclass
class Saves:
    """Commits and finds checkpoints of one run, whose bytes follow from their steps."""

    run: RunDir
    run_id: str = "run-1"
    told: dict[int, str] = field(default_factory=dict)
    """What the last `latest` found wrong, by step."""

    @property
    def store(self) -> Store:
        """A new one each time: nothing is remembered."""
        return Store(self.run, self.run_id)

    def commit(self, step: int, link: int = 1) -> Committed:
        """Commit the checkpoint of a step, as a session does."""
        rng = [{"step": step, "state": list(range(200))}]
        staged = contents_at(step).stage({"step": step}, rng, {})
        return self.store.commit(
            staged.write,
            step=step,
            epoch=0,
            link=link,
            parent=None,
            metric=None,
            lineage=ALL,
            fence=lambda: None,
        )

    def latest(self) -> Committed | None:
        """The newest verified checkpoint."""
        found = self._read()
        return None if found is None else found.committed

    def latest_step(self) -> int | None:
        """Its step."""
        found = self.latest()
        return None if found is None else found.step

    def restored(self) -> dict[str, Any]:
        """What a session gets back from the newest, after asking whether it arrived."""
        found = self._read()
        assert found is not None
        # Their values are others than those of any step; they have the same shapes.
        objects = objects_at(999)
        into = Contents()
        for name, value in objects.items():
            into.add(name, value)
            into.restore(name, found, found.json(STATE))
        return objects

    def _read(self) -> Images | None:
        self.told = {}
        return self.store.latest_verified(ALL, self.told.__setitem__)

    def finish(self, names: Sequence[str]) -> None:
        """Make the finished model of the newest checkpoint."""
        found = self.latest()
        assert found is not None
        self.store.finish(found, names)

    def hidden(self) -> list[str]:
        """What is half-written or half-removed."""
        return sorted(p.name for p in self.run.path.iterdir() if p.name.startswith("."))


def new_saves(folder: Path) -> Saves:
    """A run without checkpoints in a new folder."""
    run = RunDir(folder)
    run.create("", cluster="none", project=folder.parent, versions={})
    return Saves(run)


def newest_verified(run: RunDir) -> tuple[int, dict[int, str]]:
    """The step that the next link of a run would begin with, 0 for none; what it finds damaged."""
    bad: dict[int, str] = {}
    found = Store(run, run.identify()["id"]).latest_verified(lineage(run), bad.__setitem__)
    return 0 if found is None else found.committed.step, bad


def saved_steps(run: RunDir, *kinds: str) -> list[int]:
    """The steps that the links of a run have acknowledged, in their journals: saved, or `kinds`."""
    records = [r for n in run.link_numbers() for r in files.read_lines(run.link(n).training)]
    return [record["step"] for record in records if record["kind"] in (kinds or ("saved",))]


def payload(folder: Path) -> dict[str, bytes]:
    """All files of a checkpoint but the manifest, which holds the time."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }


# Disks


def missing_rights(system: str) -> str:
    """Why this process cannot make a disk of its own; empty where it can."""
    if os.geteuid():
        return "needs root, to mount a disk of its own"
    tools = ["mount", "umount", *(["mkfs.ext4"] if system == "ext4" else [])]
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if lacking:
        return f"needs {', '.join(lacking)}, to mount a disk of its own"
    if system == "ext4" and not Path("/dev/loop-control").exists():
        return "needs loop devices, to mount a disk of its own"
    reason: str = result_of(_try_to_mount, system)
    return reason


def _try_to_mount(system: str) -> str:
    try:
        with fast_folder() as folder, disk_of_its_own(folder, system, 4 << 20, 100):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs the right to mount a disk of its own: {error}"


@contextlib.contextmanager
def disk_of_its_own(folder: Path, system: str, size_bytes: int, num_files: int) -> Iterator[Path]:
    """A new, small disk that only this process and its children see; it goes with them."""
    leave_the_mounts_of_others()
    disk = folder / "disk"
    disk.mkdir()
    if system == "tmpfs":
        options = f"size={size_bytes},nr_inodes={num_files}"
        _do("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk))
    else:
        image = folder / "image"
        make_ext4(image, size_bytes, num_files)
        mount_ext4(image, disk)
    try:
        yield disk
    finally:
        unmount(disk)


def leave_the_mounts_of_others() -> None:
    """From here on, what this process mounts is seen by it and its children alone."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _do("mount", "--make-rprivate", "/")


def make_ext4(image: Path, size_bytes: int, num_files: int) -> None:
    with image.open("wb") as file:
        file.truncate(size_bytes)
    journal = ["-J", "size=1", "-b", "1024"] if size_bytes < 8 << 20 else []
    _do("mkfs.ext4", "-q", "-m", "0", "-N", str(num_files), *journal, str(image))


def mount_ext4(image: Path, at: Path) -> None:
    # By itself it writes nothing for ten minutes, and repairs no order that a program forgot.
    _do("mount", "-t", "ext4", "-o", "loop,commit=600,noauto_da_alloc", str(image), str(at))


def unmount(at: Path) -> None:
    _do("umount", str(at))


def cut_power(disk: Path) -> None:
    """What was not synced is lost at this moment, and every later call fails; for ext4.

    The file system is shut down without a flush of its journal (EXT4_IOC_SHUTDOWN).
    """
    place = os.open(disk, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(place, 0x8004587D, struct.pack("I", 2))
    finally:
        os.close(place)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
