"""Tries what runs need of the file system, in a private folder that is removed afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from hpcresume import files
from hpcresume.scheduler import process
from hpcresume.scheduler.doctor.facts import FileFacts, Quota
from hpcresume.scheduler.doctor.questions import Pending
from hpcresume.scheduler.doctor.texts import mount_of, parse_quota

#: How long a file system may take for a few small files, in seconds.
PATIENCE_S = 15.0
_QUOTA_S = 10.0
_NUM_SYNCS = 5
#: Names and variables that sites give to where they remove old files.
_SCRATCH = re.compile("scratch|purge")
_SCRATCH_VARIABLES = ("SCRATCH", "PSCRATCH", "SCRATCHDIR", "TMPDIR")


def ask_files(root: Path, environ: Mapping[str, str]) -> FileFacts:
    """What the file system of a folder of runs allows; a silent one is a complaint."""
    pending = Pending(lambda: _ask(root, environ))
    facts = pending.answer(PATIENCE_S)
    if facts is None:
        words = f"the file system gave no answer in {PATIENCE_S:.0f} s"
        return FileFacts(root=root, complaint=words)
    return facts


def private_folder(base: Path) -> Path:
    """A new folder of this user alone, for whoever tries something in `base`. Raises OSError."""
    return Path(tempfile.mkdtemp(prefix=".hpcresume-doctor-", dir=base))


def _ask(root: Path, environ: Mapping[str, str]) -> FileFacts:
    facts = FileFacts(root=root)
    try:
        base = next(path for path in (root, *root.parents) if path.exists())
        facts = replace(facts, base=base)
        if not base.is_dir():
            return replace(facts, complaint=f"{base} is no folder")
        real = base.resolve()
        mount, kind = mount_of(real, Path("/proc/self/mounts").read_text(errors="replace"))
        space = os.statvfs(base)
        facts = replace(
            facts,
            mount=mount,
            file_system=kind,
            free_bytes=space.f_bavail * space.f_frsize,
            total_bytes=space.f_blocks * space.f_frsize,
            free_inodes=space.f_favail if space.f_files else None,
            open_to_others=_is_open(base.stat().st_mode),
            scratch=_scratch_of(real, environ),
            quotas=ask_quotas(real, environ),
        )
        folder = private_folder(base)
    except (OSError, StopIteration) as error:
        return replace(facts, complaint=_words(error))
    try:
        return _tried(facts, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tried(facts: FileFacts, folder: Path) -> FileFacts:
    """The facts, with what came of each operation that checkpoints and claims are made of."""
    errors: dict[str, str] = {}

    def attempt(name: str, operation: Callable[[Path], None]) -> None:
        place = folder / secrets.token_hex(4)
        try:
            place.mkdir()
            operation(place)
        except OSError as error:
            errors[name] = _words(error)

    syncs_s: list[float] = []
    skews_s: list[float] = []
    attempt("fsync", lambda place: syncs_s.extend(_sync(place)))
    attempt("atomic rename", _rename)
    attempt("exclusive names", _claim)
    attempt("permissions", _keep_mode)
    attempt("clock", lambda place: skews_s.append(clock_offset_s(place / "clock")))
    errors.pop("clock", None)  # Where no file can be made, the others have said so.
    return replace(
        facts,
        errors=errors,
        fsync_s=statistics.median(syncs_s) if syncs_s else None,
        skew_s=skews_s[0] if skews_s else None,
    )


def clock_offset_s(path: Path) -> float:
    """The clock that stamps a new file, less this machine's, in seconds."""
    before = time.time()
    path.write_bytes(b"")
    after = time.time()
    stamp = path.stat().st_mtime
    # Between the two moments the file was stamped: within them there is no difference to see.
    # File systems stamp in ticks of the kernel's clock, which may lie some milliseconds back.
    return 0.0 if before - 0.02 <= stamp <= after else stamp - (before + after) / 2


def _sync(place: Path) -> list[float]:
    """Durations of small durable writes, in seconds."""
    durations = []
    for number in range(_NUM_SYNCS):
        began = time.monotonic()
        files.write_new(place / str(number), os.urandom(4096))
        durations.append(time.monotonic() - began)
    files.fsync_dir(place)
    return durations


def _rename(place: Path) -> None:
    """A file is replaced in one step, a folder takes a free name, and never one with content."""
    target = place / "file"
    target.write_bytes(b"old")
    files.write_durably(target, b"new")
    if target.read_bytes() != b"new" or len(list(place.iterdir())) != 1:
        raise OSError(0, "a rename did not replace the file")
    for name in ("first", "second"):
        place.joinpath(name).mkdir()
        place.joinpath(name, "content").write_bytes(b"")
    place.joinpath("first").rename(place / "checkpoint")
    try:
        place.joinpath("second").rename(place / "checkpoint")
    except OSError:
        return
    raise OSError(0, "a rename replaced a folder that was not empty")


def _claim(place: Path) -> None:
    """A name is given once: a second claim of it fails."""
    place.joinpath("0001").mkdir()
    files.write_new(place / "lock", b"")
    given_twice = []
    try:
        place.joinpath("0001").mkdir()
        given_twice.append("folder")
    except FileExistsError:
        pass
    try:
        files.write_new(place / "lock", b"")
        given_twice.append("file")
    except FileExistsError:
        pass
    if given_twice:
        raise OSError(0, f"a {given_twice[0]} could be made a second time")


def _keep_mode(place: Path) -> None:
    """What is private stays private, whatever the folder's own rules say."""
    files.write_new(place / "private", b"", mode=0o600)
    place.joinpath("folder").mkdir(mode=0o700)
    for name in ("private", "folder"):
        mode = stat.S_IMODE(place.joinpath(name).stat().st_mode)
        if mode & 0o077:
            raise OSError(0, f"what is made for its owner alone gets the mode {mode:04o}")


def _is_open(mode: int) -> bool:
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _scratch_of(path: Path, environ: Mapping[str, str]) -> str:
    for name in _SCRATCH_VARIABLES:
        place = environ.get(name, "")
        if len(place) > 1 and path.is_relative_to(os.path.realpath(place)):
            return f"${name}"
    for folder in ("/tmp", "/var/tmp"):
        if path.is_relative_to(folder):
            return folder
    return next((part for part in path.parts if _SCRATCH.search(part.lower())), "")


def ask_quotas(path: Path, environ: Mapping[str, str]) -> tuple[Quota, ...] | None:
    """This user's limits on a path's file system; None where no program tells.

    Raises Unavailable where the program does not answer.
    """
    user = str(os.getuid())
    for argv in (
        ["lfs", "quota", "-q", "-u", user, str(path)],
        ["quota", "-u", "-w", "-p", "-f", str(path)],
    ):
        if process.available(argv[0], environ):
            done = process.run(argv, environ=environ, timeout_s=_QUOTA_S)
            quotas = parse_quota(done.out)
            # quota leaves with 1 where a limit is exceeded.
            if quotas or not done.code:
                return quotas
    return None


def _words(error: BaseException) -> str:
    words = ""
    with contextlib.suppress(AttributeError):
        words = error.strerror or ""  # type: ignore[attr-defined]
    return words or str(error) or "nothing of it exists"
