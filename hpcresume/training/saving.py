"""The checkpoints of one link: the one that it begins with, and those that it commits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.checkpoint import contents, writer
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.manifest import Committed, FileEntry, read_committed
from hpcresume.checkpoint.retention import Policy
from hpcresume.checkpoint.store import Store
from hpcresume.errors import CheckpointError, Fenced
from hpcresume.journal import Lineage, Segment, segments_from_json, segments_to_json
from hpcresume.training.berth import Berth
from hpcresume.training.record import MetricLog

log = logging.getLogger(__name__)


class Saver:
    """Finds, restores from and commits checkpoints, for all ranks of a link alike.

    `committed` is the newest one on the lineage, `state` the state.json of the one that the link
    began with, None in a fresh run.
    """

    def __init__(self, berth: Berth, registered: Contents, metrics: MetricLog) -> None:
        self._berth = berth
        self._store = Store(berth.run, berth.run_id)
        self._contents = registered
        self._metrics = metrics
        checkpoint = berth.config.checkpoint
        self._policy = Policy(last=checkpoint.keep_last, best=checkpoint.keep_best)
        self.saved_at = time.monotonic()
        self.committed = self._find()
        self.state: dict[str, Any] | None = None
        if self.committed is not None:
            self.state = files.read_json(self.committed.path / contents.STATE)
        self.tried_step = 0 if self.state is None else self.progress["global_step"]
        self._lineage = self._adopt()

    @property
    def progress(self) -> dict[str, Any]:
        """What the session saved about itself in the checkpoint that the link began with."""
        assert self.state is not None
        progress: dict[str, Any] = self.state["progress"]
        return progress

    # ---- the beginning ------------------------------------------------------------------

    def _find(self) -> Committed | None:
        """The newest verified checkpoint: rank 0 decides, all ranks use the same."""
        berth = self._berth
        found: Committed | None = None
        if berth.ranks.rank == 0 and not berth.begin_fresh:
            found = self._store.latest_verified(berth.lineage, self._note_bad)
            self._store.sweep(berth.link.number)
            if found is None and berth.known_step:
                raise CheckpointError(
                    f"The journal of {berth.run.name} knows step {berth.known_step} as committed, "
                    f"but no usable checkpoint is left in {berth.run.path}: put one back, or begin "
                    f"a new run."
                )
        step = berth.ranks.broadcast(None if found is None else found.step)
        if step is None or found is not None:
            return found
        return read_committed(berth.run.checkpoint(step), berth.lineage)

    def _note_bad(self, step: int, reason: str) -> None:
        log.warning("checkpoint-%d is not used: %s; it is quarantined", step, reason)
        if self._berth.journal is not None:
            self._berth.journal.write("quarantined", step=step, reason=reason)

    def _adopt(self) -> Lineage:
        """Declare what this link builds upon: from here on the rest is off the lineage."""
        segments: tuple[Segment, ...] = ()
        if self.state is not None:
            segments = segments_from_json(self.progress["lineage"])
        lineage = Lineage(segments, self._berth.link.number)
        if self._berth.journal is None:
            return lineage
        found = self.committed
        self._berth.journal.write(
            "restored",
            step=0 if found is None else found.step,
            epoch=0 if found is None else self.progress["epoch"],
            digest=None if found is None else found.manifest.digest,
            bytes=0 if found is None else found.manifest.payload_bytes,
            segments=segments_to_json(segments),
        )
        if found is None:
            log.info("starting fresh: no checkpoint in %s", self._berth.run.path)
        else:
            count = len(self._store.committed(lineage))
            log.info(
                "found %d checkpoint%s, resuming from step %d of epoch %d (verified, %s old, %s)",
                count,
                "" if count == 1 else "s",
                found.step,
                found.manifest.epoch + 1,
                _age(max(0.0, time.time() - found.manifest.created)),
                found.manifest.digest[:8],
            )
        return lineage

    # ---- saving -------------------------------------------------------------------------

    def commit(
        self,
        progress: dict[str, Any],
        rng: list[Any],
        trainer_state: Callable[[], Mapping[str, Any]],
        *,
        metric: dict[str, Any] | None,
    ) -> tuple[float, int] | None:
        """Make a checkpoint of what is registered; on rank 0.

        Returns the seconds that it took and its bytes; None where the disk refuses, which is
        journalled: the checkpoints before it stay.
        """
        step = progress["global_step"]
        began = time.monotonic()
        try:
            metrics_bytes = self._metrics.sync()
            number = self._berth.link.number
            segments = self._lineage.extended(number, step, metrics_bytes)
            self._metrics.remember()
            progress |= {
                "lineage": segments_to_json(segments),
                "history": self._metrics.history,
            }
            self.committed = self._store.commit(
                lambda directory: self._write(directory, progress, rng, trainer_state()),
                step=step,
                epoch=progress["epoch"],
                link=number,
                parent=None if self.committed is None else self.committed.manifest.digest,
                metric=metric,
                lineage=self._lineage,
                fence=self.fence,
            )
        except OSError as error:
            words = f"{error.strerror or error} ({error.filename or self._berth.run.path})"
            log.error(
                "step %d could not be saved: %s; training goes on, the checkpoints before it stay",
                step,
                words,
            )
            self.note("save_failed", step=step, reason=words)
            return None
        finally:
            self.saved_at = time.monotonic()
        return time.monotonic() - began, self.committed.manifest.payload_bytes

    def _write(
        self,
        directory: Path,
        progress: Mapping[str, Any],
        rng: list[Any],
        trainer_state: Mapping[str, Any],
    ) -> list[FileEntry]:
        entries = self._contents.write(directory, progress, rng)
        entries.append(writer.write_json(directory / "trainer_state.json", trainer_state))
        args = self._berth.config.args
        entries.append(writer.write_json(directory / "training_args.json", args))
        return entries

    def prune(self) -> None:
        """Remove what need not be kept any more."""
        removed = self._store.prune(self._lineage, self._policy)
        if removed:
            log.debug("removed the checkpoints of steps %s", ", ".join(map(str, removed)))

    def finish(self) -> None:
        """Make the finished model of the newest checkpoint. Raises OSError, CheckpointError."""
        assert self.committed is not None
        self.fence()
        self._store.finish(self.committed, self._contents.model_files(self.committed))

    def fence(self) -> None:
        """Raise Fenced where a newer link has claimed the run."""
        newest = self._berth.run.newest_link()
        if newest != self._berth.link.number:
            raise Fenced(
                f"Link {newest} has taken over from link {self._berth.link.number}, which leaves "
                f"without changing anything."
            )

    def note(self, kind: str, **fields: Any) -> None:
        """Journal what a full disk may make impossible to journal; nothing on other ranks."""
        if self._berth.journal is None:
            return
        try:
            self._berth.journal.write(kind, **fields)
        except OSError as error:
            log.error("the journal cannot be written: %s", error)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
