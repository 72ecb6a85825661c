"""Whether the disk has room for a checkpoint, and what may go to make room.

Asked before each save: `room_of_disk` tells one limit, whoever can start programs asks for quotas;
`preflight` decides and touches nothing; `remove` deletes a checkpoint. What is said here is a
forecast: others write to the same disk, and a write that is refused all the same is an OSError of
the save.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.checkpoint.manifest import Committed
from hpcresume.run_dir import RunDir

#: Kept free besides, for the journal, the logs and what a file system rounds up.
_SLACK_BYTES = 1 << 20
_SLACK_SHARE = 0.02
_SLACK_FILES = 8


@dataclass(frozen=True, kw_only=True)
class Room:
    """What one limit leaves. None: no limit, or one that nobody tells."""

    where: str
    """Whose limit it is, in words: "the disk of /runs/toy"."""
    free_bytes: int | None
    free_files: int | None


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a checkpoint holds on the disk."""

    step: int
    bytes: int
    files: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done before a save."""

    remove: tuple[int, ...] = ()
    """Steps of checkpoints that go first."""
    refusal: str | None = None
    """Why there will be no room even so, and what to do; then nothing is removed."""


def preflight(
    limits: Sequence[Room],
    *,
    needed_bytes: int,
    needed_files: int,
    candidates: Sequence[Held],
) -> Plan:
    """What must go so that a save has room: as few of the candidates as will do, the first first.

    `candidates` are those that `retention.to_make_room` lets go.
    """
    for number in range(len(candidates) + 1):
        going = candidates[:number]
        if not any(_lacks(room, needed_bytes, needed_files, going) for room in limits):
            return Plan(remove=tuple(held.step for held in going))
    words = (_lacks(room, needed_bytes, needed_files, candidates) for room in limits)
    return Plan(refusal=next(word for word in words if word))


def _lacks(room: Room, needed_bytes: int, needed_files: int, going: Sequence[Held]) -> str | None:
    """What a limit lacks although some checkpoints go, and what to do; None where it suffices."""
    wanted = needed_bytes + int(_SLACK_SHARE * needed_bytes) + _SLACK_BYTES
    short = f"{room.where} has {{}} left" + (
        f", even without the {len(going)} older checkpoints that may go" if going else ""
    )
    if room.free_bytes is not None:
        missing = wanted - room.free_bytes - sum(held.bytes for held in going)
        if missing > 0:
            return (
                f"a checkpoint needs {files.size_words(wanted)}, and "
                f"{short.format(files.size_words(max(room.free_bytes, 0)))}: free "
                f"{files.size_words(missing)} there, or keep fewer (checkpoint.keep_last)"
            )
    if room.free_files is not None:
        missing = needed_files + _SLACK_FILES - room.free_files - sum(h.files for h in going)
        if missing > 0:
            return (
                f"a checkpoint needs {needed_files} files, and "
                f"{short.format(f'room for {max(room.free_files, 0)}')}: remove {missing} there, "
                f"or keep fewer (checkpoint.keep_last)"
            )
    return None


def room_of_disk(path: Path) -> Room:
    """What the file system of a directory leaves to ordinary users. Raises OSError."""
    found = os.statvfs(path)
    # Btrfs and some network file systems have no fixed number of files: all their counts are 0.
    num_files = found.f_favail if found.f_files else None
    return Room(
        where=f"the disk of {path}",
        free_bytes=found.f_bavail * found.f_frsize,
        free_files=num_files,
    )


def holdings(present: Sequence[Committed], steps: Sequence[int]) -> list[Held]:
    """What would be free without the checkpoints of some steps, in that order.

    Manifest and directory are counted; a file that another checkpoint has as well is not.
    """
    found = {committed.step: committed for committed in present}
    return [
        Held(
            step=step,
            bytes=sum(size for _, size, names in _occupied(found[step]) if names == 1),
            files=len(found[step].manifest.files) + 2,
        )
        for step in steps
    ]


def occupied_bytes(present: Sequence[Committed]) -> int:
    """What checkpoints take together: a file that several of them have is there once."""
    files = {file: size for each in present for file, size, _ in _occupied(each)}
    return sum(files.values())


def _occupied(committed: Committed) -> Iterator[tuple[tuple[int, int], int, int]]:
    """For each file: which it is on the disk, its size in bytes, and how many names it has."""
    for entry in committed.manifest.files:
        try:
            status = os.stat(committed.path / entry.name)
        except OSError:
            # It has just been removed with its checkpoint.
            continue
        yield (status.st_dev, status.st_ino), status.st_size, status.st_nlink


def remove(run: RunDir, step: int) -> None:
    """Delete a checkpoint. Raises OSError; no half of it is ever taken for a checkpoint.

    It is renamed first: a removal that is cut half-way leaves no damaged checkpoint behind.
    """
    doomed = run.partial(f"removed-{step}.0000")
    os.rename(run.checkpoint(step), doomed)
    shutil.rmtree(doomed)
