"""The checkpoints of one run: commit, find the newest verified one, retire old ones.

The commit rule stands here alone: everything is written and fsynced under a private name, the
manifest last; then one rename makes it a checkpoint. Needs no torch: what goes into the files is
the caller's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.checkpoint import disk, images, retention
from hpcresume.checkpoint import manifest as manifests
from hpcresume.checkpoint.images import Images
from hpcresume.checkpoint.manifest import Committed, FileEntry, Manifest
from hpcresume.errors import CheckpointError, HpcResumeError
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir

log = logging.getLogger(__name__)

OnBad = Callable[[int, str], None]


class Store:
    """The checkpoint directories below a run."""

    def __init__(self, run: RunDir, run_id: str) -> None:
        self.run = run
        self.run_id = run_id
        self._may_link = True

    def committed(self, lineage: Lineage) -> list[Committed]:
        """All checkpoints, ascending by step; what is none is left out. Raises OSError."""
        found = []
        for step in self.run.checkpoint_steps():
            with contextlib.suppress(CheckpointError):
                found.append(self._read(step, lineage))
        return found

    def _read(self, step: int, lineage: Lineage) -> Committed:
        return manifests.read_of_run(self.run, self.run_id, step, lineage)

    def latest_verified(self, lineage: Lineage, on_bad: OnBad) -> Images | None:
        """The newest checkpoint of which every byte is as it was written, read into memory.

        What fails is quarantined and told to `on_bad(step, reason)`; then the next older is tried.
        Raises OSError where the file system cannot tell at present: nothing is quarantined then.
        """
        for step in reversed(self.run.checkpoint_steps()):
            try:
                return images.read(self._read(step, lineage))
            except CheckpointError as error:
                try:
                    self.quarantine(step)
                except FileNotFoundError:
                    # The retention of a link that has not ended yet was faster.
                    continue
                self._may_link = False
                on_bad(step, str(error))
        return None

    def quarantine(self, step: int) -> Path:
        """Move a directory out of the way of every `checkpoint-*` pattern; nothing is deleted."""
        target = self.run.quarantined(step)
        os.rename(self.run.checkpoint(step), target)
        files.fsync_dir(self.run.path)
        return target

    def commit(
        self,
        write: Callable[[Path], Sequence[FileEntry]],
        *,
        step: int,
        epoch: int,
        link: int,
        parent: str | None,
        metric: dict[str, Any] | None,
        lineage: Lineage,
        fence: Callable[[], None],
    ) -> Committed:
        """Make a checkpoint of what `write` puts into a directory; durable on return.

        `write` fsyncs its files and returns their entries. `fence` raises when a newer link has
        claimed the run; it is asked before the rename and after it. Raises OSError where the
        disk refuses: the partial directory is gone then, and older checkpoints are untouched.
        """
        partial = self.run.partial(f"checkpoint-{step}.{link:04d}")
        try:
            partial.mkdir(mode=0o700)
            entries = write(partial)
            files.fsync_dir(partial)
            content = Manifest(
                step=step,
                epoch=epoch,
                link=link,
                run_id=self.run_id,
                parent=parent,
                files=tuple(entries),
                created=round(time.time(), 3),
                metric=metric,
            )
            data = content.to_bytes()
            try:
                manifests.parse(data)
            except CheckpointError as error:
                raise CheckpointError(f"Step {step} cannot be saved: {error}.") from None
            files.write_new(partial / manifests.NAME, data)
            files.fsync_dir(partial)
            fence()
            self._publish(partial, step, lineage)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        fence()
        return Committed(self.run.checkpoint(step), manifests.parse(data))

    def _publish(self, partial: Path, step: int, lineage: Lineage) -> None:
        target = self.run.checkpoint(step)
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            try:
                self._read(step, lineage)
            except CheckpointError:
                self.quarantine(step)
                os.rename(partial, target)
            else:
                raise HpcResumeError(f"{target.name} is committed already.") from None
        try:
            files.fsync_dir(self.run.path)
        except OSError:
            # It is not acknowledged, and so must not be found: the caller removes it.
            os.rename(target, partial)
            raise

    def twin(self, lineage: Lineage, entry: FileEntry) -> Path | None:
        """A file with the bytes of `entry`, which may be linked to; None where it must be written.

        There must be two of them on the disk, so that one bad sector does not spoil all that is
        kept; they take turns, so that retention leaves both. Raises OSError.
        """
        if not self._may_link:
            # Bytes have changed on this disk: what is written from here on owes it nothing.
            return None
        found: dict[tuple[int, int], Path] = {}
        for committed in reversed(self.committed(lineage)):
            for other in committed.manifest.files:
                if (other.bytes, other.chunks) == (entry.bytes, entry.chunks):
                    path = committed.path / other.name
                    status = path.stat()
                    found.setdefault((status.st_dev, status.st_ino), path)
        return list(found.values())[1] if len(found) > 1 else None

    def prune(self, lineage: Lineage, policy: retention.Policy) -> list[int]:
        """Remove what the policy lets go; returns the steps. A failed removal is only logged.

        The newest is verified first: where it is not as it was written, all others stay.
        """
        present = self.committed(lineage)
        pinned = self.run.pinned_steps()
        going = retention.to_remove([found.manifest for found in present], policy, pinned=pinned)
        return self._remove_all(going, present)

    def _remove_all(self, going: Sequence[int], present: Sequence[Committed]) -> list[int]:
        if not going:
            return []
        try:
            images.verify(present[-1])
        except CheckpointError as error:
            log.error("checkpoint-%d is damaged: %s; the older ones stay", present[-1].step, error)
            self._may_link = False
            return []
        return [step for step in going if self._remove(step)]

    def _remove(self, step: int) -> bool:
        if self.run.pin(step).exists():
            return False
        try:
            disk.remove(self.run, step)
        except OSError as error:
            log.warning("could not remove checkpoint-%d: %s", step, error)
            return False
        return True

    def make_room(
        self,
        lineage: Lineage,
        policy: retention.Policy,
        *,
        num_bytes: int,
        num_files: int,
        limits: Sequence[disk.Room] = (),
    ) -> str | None:
        """Remove before a commit what the policy lets go after it, where the disk needs that.

        `limits` are those besides the disk's own. As by `prune`, the newest is verified first.
        Returns why there is not enough room all the same. Raises OSError.
        """
        found = self.committed(lineage)
        present = [each.manifest for each in found]
        going = retention.to_make_room(present, policy, pinned=self.run.pinned_steps())
        plan = disk.preflight(
            [disk.room_of_disk(self.run.path), *limits],
            needed_bytes=num_bytes,
            needed_files=num_files,
            candidates=disk.holdings(found, going),
        )
        self._remove_all(plan.remove, found)
        return plan.refusal

    def finish(
        self,
        last: Committed,
        names: Sequence[str],
        write: Callable[[Path], Sequence[FileEntry]] = lambda directory: (),
    ) -> None:
        """Make `final_model/` of some files of a checkpoint, verified while they are copied.

        `write` writes there what is made of others, as in `commit`. It stands on its own: every
        checkpoint may be deleted afterwards. Raises OSError, or CheckpointError where a file is no
        longer what was committed.
        """
        partial = self.run.partial(f"final_model.{last.manifest.link:04d}")
        partial.mkdir(mode=0o700)
        try:
            entries = [last.manifest.entry(name) for name in names]
            for entry in entries:
                copy = partial / entry.name
                if copy.parent != partial:
                    copy.parent.mkdir(mode=0o700, exist_ok=True)
                _copy_verified(last.path / entry.name, copy, entry)
                files.fsync_dir(copy.parent)
            entries += write(partial)
            content = dataclasses.replace(last.manifest, files=tuple(entries))
            files.write_new(partial / manifests.NAME, content.to_bytes())
            files.fsync_dir(partial)
            target = self.run.final_model
            doomed = self.run.partial("removed-final.0000")
            if target.exists():
                os.rename(target, doomed)
            os.rename(partial, target)
            files.fsync_dir(self.run.path)
            shutil.rmtree(doomed, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def sweep(self, link: int) -> None:
        """Remove what links before `link` left half-written."""
        for entry in self.run.path.glob(".*.partial"):
            parts = entry.name.split(".")
            if len(parts) > 3 and parts[2].isdigit() and int(parts[2]) < link:
                shutil.rmtree(entry, ignore_errors=True)


def _copy_verified(source: Path, target: Path, entry: FileEntry) -> None:
    hasher = manifests.ChunkHasher()
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for piece in manifests.read_pieces(source):
            hasher.update(piece)
            files.write_all(fd, piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    if hasher.chunks() != entry.chunks:
        raise CheckpointError(f"{source.name} of step {source.parent.name} changed on the disk.")
