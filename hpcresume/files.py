"""Durable files: the one place that creates, replaces and reads the small files of a run.

What is promised: after `write_durably` returns, the new content survives a power loss, and at no
time does a reader see half of it. What cannot be promised: a file system that lies about fsync.
An fsync that failed is never repeated on the same descriptor (a second one may report success
although the pages are gone); the error goes to the caller and the temporary file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LINES_AT_ONCE = 1000
#: More of a file is never read: it is none of ours, or damaged, and memory is finite.
_MOST_JSON_BYTES, _MOST_LINE_BYTES, _MOST_LINES_BYTES = 64 << 20, 16 << 20, 1 << 30


def unique() -> str:
    """Eight hexadecimal digits for a name that nobody else takes."""
    return os.urandom(4).hex()


def fsync_dir(path: Path) -> None:
    """Make the entries of a directory (creations, renames) survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte: a write may be short where a quota or a signal cuts it."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(fd, view) :]


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Create a file that must not exist yet, and fsync it (the directory is the caller's)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes, mode: int = 0o600, *, sync: bool = True) -> None:
    """Create or replace a file in one step.

    `sync=False` leaves out the fsyncs: for live progress, which may be lost but never torn.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{unique()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            write_all(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync:
        fsync_dir(path.parent)


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """Canonical JSON: the same value gives the same bytes in every process."""
    try:
        return (_encoder(indent, False).encode(value) + "\n").encode()
    except UnicodeEncodeError:
        # Python reads a file name that is no UTF-8 as text that UTF-8 cannot hold.
        return (_encoder(indent, True).encode(value) + "\n").encode()


@functools.cache
def _encoder(indent: int | None, ascii_only: bool) -> json.JSONEncoder:
    separators = (",", ":") if indent is None else (",", ": ")
    return json.JSONEncoder(indent=indent, ensure_ascii=ascii_only, separators=separators)


def write_json(path: Path, value: Any, *, sync: bool = True, indent: int | None = 2) -> None:
    """Replace a JSON file in one step; see `write_durably`."""
    write_durably(path, to_json(value, indent=indent), sync=sync)


def read_bytes(path: Path, most: int = 1 << 30, begin: int = 0) -> bytes:
    """A file's content from a position on, at most so many bytes of it.

    Raises OSError, also where something else than a file is in its place (and never waits for a
    pipe).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        end = min(begin + most, status.st_size)
        parts = []
        while begin < end and (part := os.pread(fd, end - begin, begin)):
            parts.append(part)
            begin += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, or ValueError where the text is not JSON."""
    return json.loads(read_bytes(path, _MOST_JSON_BYTES))


def read_json_or_none(path: Path) -> Any:
    """The value in a JSON file, or None where it is missing, unreadable or no JSON."""
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError):
        return None


class LineWriter:
    """Appends JSON lines to a file that has this one writer.

    A line is one `write`, so that a reader sees it whole or not at all but for the last line of a
    killed writer, which `read_lines` passes over. An append after such a torn line starts afresh.
    What a full disk refused is kept and written first by the next append, from where it was cut.
    Threads may share a writer.
    """

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self.path = path
        self._unwritten = bytearray()
        self._lock = threading.Lock()
        self._mode = mode
        self._doubtful = False
        """Whether an fsync has failed: the next one may say "done" although bytes are lost."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, mode)
        size = os.fstat(self._fd).st_size
        if not size:
            # A line that is synced is worth nothing while the file's name is not.
            fsync_dir(path.parent)
        elif os.pread(self._fd, 1, size - 1) != b"\n":
            self._unwritten += b"\n"

    def append(self, *records: Any, sync: bool = False) -> None:
        """Append one line for each record; with `sync` they survive a power loss on return."""
        lines = b"".join(to_json(record) for record in records)
        with self._lock:
            self._unwritten += lines
            self._write()
        if sync:
            self.sync()

    def _write(self) -> None:
        while self._unwritten:
            del self._unwritten[: os.write(self._fd, self._unwritten)]

    def flush(self) -> int:
        """Write what was refused before; the length of the file now, in bytes."""
        with self._lock:
            self._write()
            return self.size_bytes()

    def sync(self) -> None:
        """Make the lines that are written survive a power loss. Raises OSError.

        After a failure the next call writes the file anew, and syncs that.
        """
        if self._doubtful:
            with self._lock:
                self._write_anew()
            return
        try:
            os.fsync(self._fd)
        except OSError:
            self._doubtful = True
            raise

    def _write_anew(self) -> None:
        data = self.path.read_bytes()
        write_durably(self.path, data, self._mode)
        os.close(self._fd)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._doubtful = False

    def size_bytes(self) -> int:
        """Length of the file now."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


Lines = list[bytes]


def read_lines(
    path: Path, limit_bytes: int | None = None, chosen: Callable[[Lines], Lines] | None = None
) -> Iterator[Any]:
    """The JSON values of a line file, in order; a torn or foreign line is passed over.

    `limit_bytes` reads only that much from the start; `chosen` says which lines are worth
    decoding. A missing file has no lines.
    """
    most = _MOST_LINES_BYTES if limit_bytes is None else min(limit_bytes, _MOST_LINES_BYTES)
    try:
        data = read_bytes(path, most)
    except FileNotFoundError:
        return
    yield from values_of_lines(data, chosen)


def values_of_lines(data: bytes, chosen: Callable[[Lines], Lines] | None = None) -> Iterator[Any]:
    """The JSON values of lines, in order; a torn or foreign line is passed over."""
    lines = [line for line in data.split(b"\n") if 0 < len(line) <= _MOST_LINE_BYTES]
    if chosen is not None:
        lines = chosen(lines)
    for begin in range(0, len(lines), _LINES_AT_ONCE):
        some = lines[begin : begin + _LINES_AT_ONCE]
        try:
            # One text is read in a third of the time that its lines take one by one.
            values = json.loads(b"[" + b",".join(some) + b"]")
        except (ValueError, RecursionError):
            values = ()
        yield from values if len(values) == len(some) else _one_by_one(some)


def _one_by_one(lines: list[bytes]) -> Iterator[Any]:
    for line in lines:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue


def size_or_zero(path: Path) -> int:
    """Length of a file in bytes, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def size_words(num_bytes: float) -> str:
    """A size as people read it: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
