"""The checkpoints of one link: the one that it begins with, and those that it commits.

A save takes the state at a step boundary; a thread hashes, writes and commits it while training
goes on. There is one at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.checkpoint.cadence import (
    PRIOR_MTBF_S,
    UNMEASURED_S,
    Measured,
    auto_interval,
    average,
    mean_time_between_failures,
)
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.images import Images
from hpcresume.checkpoint.manifest import Committed, FileEntry, read_committed
from hpcresume.checkpoint.retention import Policy, policy_of
from hpcresume.checkpoint.staged import STATE, Staged
from hpcresume.checkpoint.store import Store
from hpcresume.errors import CheckpointError, Fenced
from hpcresume.journal import (
    Lineage,
    Record,
    Segment,
    asking_about,
    read_chain,
    segments_from_json,
    segments_to_json,
)
from hpcresume.scheduler.environment import node_names
from hpcresume.training.beginning import Beginning, begin
from hpcresume.training.berth import Berth
from hpcresume.training.record import MetricLog
from hpcresume.training.room import Quotas
from hpcresume.training.shares import Shares

log = logging.getLogger(__name__)

#: Priority of the thread that writes, below that of training.
_NICE = 10


class Saver:
    """Finds, restores from and commits checkpoints, for all ranks of a link alike.

    `committed` is the newest one on the lineage; `images` are the files of the one that the link
    began with, until training begins, and `state` is its state.json; None in a fresh run. Where
    the run itself has none yet, they are those of `beginning`, if that is one of ours.
    """

    def __init__(self, berth: Berth, registered: Contents, metrics: MetricLog) -> None:
        self._berth = berth
        self._store = Store(berth.run, berth.run_id)
        self._contents = registered
        self._metrics = metrics
        checkpoint = berth.config.checkpoint
        self._policy = policy_of(checkpoint)
        self._stalls: deque[float] = deque(maxlen=32)
        self._mtbf_s = PRIOR_MTBF_S
        self.auto_s = UNMEASURED_S
        """Seconds from one save to the next, where the run's saves are to find that themselves."""
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=give_way)
        self._writing: Future[None] | None = None
        self._shares: Shares | None = None
        self._quotas = Quotas(berth.run.path)
        self.saved_at = time.monotonic()
        self.images = self._find()
        self.committed: Committed | None = None
        self.state: dict[str, Any] | None = None
        self.beginning: Beginning | None = None
        if self.images is not None:
            self.committed = self.images.committed
        else:
            self.beginning = begin(berth)
            self.images = None if self.beginning is None else self.beginning.images
        if self.images is not None:
            self.state = self.images.json(STATE)
        self.tried_step = 0 if self.state is None else self.progress["global_step"]
        if self.beginning is not None:
            # Not even the step that it begins with is saved in this run.
            self.tried_step = -1
        self._lineage = self._adopt()
        if checkpoint.minutes == "auto" and berth.ranks.rank == 0:
            self._mtbf_s = _mtbf_s(berth)

    @property
    def progress(self) -> dict[str, Any]:
        """What the session saved about itself in the checkpoint that the link began with."""
        assert self.state is not None
        progress: dict[str, Any] = self.state["progress"]
        return progress

    # ---- the beginning ------------------------------------------------------------------

    def _find(self) -> Images | None:
        """The newest verified checkpoint: rank 0 decides, all ranks use the same."""
        berth = self._berth
        found: Images | None = None
        if berth.ranks.rank == 0 and not berth.begin_fresh:
            found = self._store.latest_verified(berth.lineage, self._note_bad)
            self._store.sweep(berth.link.number)
            if found is None and berth.known_step:
                raise CheckpointError(
                    f"The journal of {berth.run.name} knows step {berth.known_step} as committed, "
                    f"but no usable checkpoint is left in {berth.run.path}: put one back, or begin "
                    f"a new run."
                )
        step = berth.ranks.broadcast(None if found is None else found.committed.step)
        if step is None or found is not None:
            return found
        # This rank may need only a part of it.
        return Images(read_committed(berth.run.checkpoint(step), berth.lineage))

    def begun(self) -> None:
        """All is restored: the memory of what was read is given back."""
        self.images = self.beginning = None
        if self._contents.is_divided():
            self._shares = Shares(self._berth.ranks)

    def _note_bad(self, step: int, reason: str) -> None:
        record = None
        if self._berth.journal is not None:
            record = self._berth.journal.write("quarantined", step=step, reason=reason)
        log.warning(
            "checkpoint-%d is not used: %s; it is quarantined, and an older one is looked for%s",
            step,
            reason,
            asking_about(self._berth.run, record),
        )

    def _adopt(self) -> Lineage:
        """Declare what this link builds upon: from here on the rest is off the lineage."""
        segments: tuple[Segment, ...] = ()
        if self.state is not None and self.beginning is None:
            segments = segments_from_json(self.progress["lineage"])
        lineage = Lineage(segments, self._berth.link.number)
        if self._berth.journal is None:
            return lineage
        found, beginning = self.committed, self.beginning
        if beginning is not None:
            self._berth.journal.write("restored", **beginning.record, segments=[])
            log.info(
                "beginning with %s, %s: step %d, in epoch %d (%s)",
                beginning.origin.path,
                beginning.layout,
                beginning.step,
                beginning.epoch + 1,
                beginning.digest[:8],
            )
            return lineage
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
            log.debug("it is %s", found.path)
        return lineage

    # ---- saving -------------------------------------------------------------------------

    def settle(self) -> bool:
        """Whether a save is still being written; raises what the last one raised."""
        if self._writing is None:
            return False
        if self._writing.done():
            self.wait()
            return False
        return True

    def wait(self) -> None:
        """Wait for the save that is being written. Raises Fenced, CheckpointError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def save_share(self) -> None:
        """Take this rank's share of what rank 0 saves now, and write it in the background."""
        if self._shares is None:
            return
        self.wait()
        number, staged = self._shares.next(), self._contents.stage_share()
        if staged.images:
            self._writing = self._thread.submit(self._shares.deliver, number, staged.write)

    def save(
        self,
        progress: dict[str, Any],
        rng: list[Any],
        trainer_state: Callable[[], Mapping[str, Any]],
        *,
        metric: dict[str, Any] | None,
        record: Mapping[str, Any],
    ) -> None:
        """Take what is registered as it is now, and write it in the background; on rank 0.

        Waits for the save before it. `record` goes into the journal. What the disk refuses is
        journalled: training goes on, and the checkpoints before it stay. Raises what `wait` does.
        """
        self.wait()
        number = 0 if self._shares is None else self._shares.next()
        began = time.monotonic()
        try:
            segments = self._lineage.extended(
                self._berth.link.number, progress["global_step"], self._metrics.written()
            )
        except OSError as error:
            self._refused(progress["global_step"], error)
            if self._shares is not None:
                self._shares.close(number)
            return
        self._metrics.remember()
        progress |= {"lineage": segments_to_json(segments), "history": self._metrics.history}
        more = {
            "trainer_state.json": trainer_state(),
            "training_args.json": self._berth.config.args,
        }
        staged = self._contents.stage(progress, rng, more)
        if staged.partners and self._shares is None:
            raise CheckpointError(
                "Tensors of what is registered lie in parts on several ranks, and did not when "
                "session.steps began: shard them before that."
            )
        self.saved_at = time.monotonic()
        self._stalls.append(self.saved_at - began)
        record = {**record, "stall": round(self._stalls[-1], 4)}
        self._writing = self._thread.submit(
            self._write, number, staged, progress, metric, record, began
        )
        if not self._berth.config.checkpoint.background:
            self.wait()

    def _write(
        self,
        number: int,
        staged: Staged,
        progress: Mapping[str, Any],
        metric: dict[str, Any] | None,
        record: Mapping[str, Any],
        began: float,
    ) -> None:
        """Commit what was taken; in the thread."""
        step, epoch = progress["global_step"], progress["epoch"]
        try:
            self._metrics.sync()
            staged = staged.beside(partial(self._store.twin, self._lineage))
            self._make_room(staged, step)
            write: Callable[[Path], Sequence[FileEntry]] = staged.write
            if self._shares is not None:
                write = self._shares.write(number, write, staged.partners)
            self.committed = self._store.commit(
                write,
                step=step,
                epoch=epoch,
                link=self._berth.link.number,
                parent=None if self.committed is None else self.committed.manifest.digest,
                metric=metric,
                lineage=self._lineage,
                fence=self.fence,
            )
        except OSError as error:
            self._refused(step, error)
            return
        finally:
            if self._shares is not None:
                self._shares.close(number)
        seconds = time.monotonic() - began
        clock = self._berth.clock
        clock.saves.append(seconds)
        size = self.committed.manifest.payload_bytes
        self.note(
            "saved",
            step=step,
            epoch=epoch,
            seconds=round(seconds, 4),
            bytes=size,
            digest=self.committed.manifest.digest,
            lead_s=round(clock.lead_s(), 2),
            **record,
        )
        running = epoch + 1 if progress["position"] else max(1, epoch)
        text = (step, running, files.size_words(size), seconds)
        log.info("saved step %d of epoch %d (%s in %.1f s)", *text)
        log.debug("it is %s", self.committed.path)
        self._prune(self._policy)
        self.auto_s = self._interval_s(record["step_s"])

    def _make_room(self, staged: Staged, step: int) -> None:
        """A forecast: where it is wrong (other people's files), the write itself tells."""
        refusal = self._store.make_room(
            self._lineage,
            self._policy,
            num_bytes=staged.size_bytes,
            num_files=staged.num_files + 2,
            limits=self._quotas.rooms(),
        )
        if refusal is not None:
            log.warning("step %d may find no room: %s", step, refusal)

    def _interval_s(self, step_s: float) -> float:
        stall_s, persist_s = average(self._stalls), average(self._berth.clock.saves)
        if stall_s is None or persist_s is None:
            return UNMEASURED_S
        clock = self._berth.clock
        left = clock.remaining_s()
        since = time.monotonic() - self.saved_at
        return auto_interval(
            Measured(stall_s=stall_s, persist_s=persist_s, step_s=step_s),
            mtbf_s=self._mtbf_s,
            overhead=self._berth.config.checkpoint.overhead,
            until_deadline_s=None if left is None else max(1.0, since + left - clock.lead_s()),
        )

    def _refused(self, step: int, error: OSError) -> None:
        words = f"{error.strerror or error} ({error.filename or self._berth.run.path})"
        self.saved_at = time.monotonic()
        record = self.note("save_failed", step=step, reason=words)
        log.error(
            "step %d could not be saved: %s; training goes on, the checkpoints before it stay. The "
            "next save tries again: make room, or mend what is named, before that%s",
            step,
            words,
            asking_about(self._berth.run, record),
        )

    def _prune(self, policy: Policy) -> None:
        """Remove what need not be kept any more."""
        try:
            removed = self._store.prune(self._lineage, policy)
        except OSError as error:
            log.warning("older checkpoints stay for now: %s", error)
            return
        if removed:
            log.debug("removed the checkpoints of steps %s", ", ".join(map(str, removed)))

    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are, ascending; on rank 0."""
        return [found.step for found in self._store.committed(self._lineage)]

    def close(self) -> None:
        """Let a save that is being written come to its end."""
        if self._shares is not None and self._berth.ranks.rank:
            self._shares.give_up()
        self._thread.shutdown()

    def finish(self) -> None:
        """Make the finished model of the newest checkpoint. Raises OSError, CheckpointError."""
        assert self.committed is not None
        self.fence()
        self._store.finish(
            self.committed,
            self._contents.model_files(self.committed),
            partial(self._contents.assemble, self.committed),
        )

    def tidy(self) -> None:
        """Remove what a complete run need not keep."""
        self._prune(policy_of(self._berth.config.checkpoint, complete=True))

    def fence(self) -> None:
        """Raise Fenced where a newer link has claimed the run."""
        newest = self._berth.run.newest_link()
        if newest != self._berth.link.number:
            raise Fenced(
                f"Link {newest} has taken over from link {self._berth.link.number}, which leaves "
                f"without changing anything."
            )

    def note(self, kind: str, **fields: Any) -> Record | None:
        """Journal what a full disk may make impossible to journal; nothing on other ranks."""
        if self._berth.journal is None:
            return None
        try:
            return self._berth.journal.write(kind, **fields)
        except OSError as error:
            log.error("the journal cannot be written: %s; its record waits in memory", error)
            return None


#: Ends that lost no work, because a save came before them.
_HARMLESS = frozenset({"completed", "deadline", "stopped", "cancelled", "time limit"})


def _mtbf_s(berth: Berth) -> float:
    """The mean time between failures, as this run's links tell."""
    ended = [link.last("ended") for link in read_chain(berth.run)]
    told = [record for record in ended if record is not None and "cause" in record]
    claim = files.read_json_or_none(berth.link.claim)
    nodes = claim.get("nodes") if isinstance(claim, dict) else None
    return mean_time_between_failures(
        num_nodes=len(node_names(str(nodes or ""))),
        failures=sum(record["cause"] not in _HARMLESS for record in told),
        observed_s=sum(float(record.get("seconds") or 0.0) for record in told),
    )


def give_way() -> None:
    """Let training have the processors: on Linux each thread has a priority of its own."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
