"""Ranks that train in simulated time, and leave in a run what real ones do.

Steps take seconds, saves as well; what is committed stands in the run's own journals and metric
logs, and what may be restored is asked of the production lineage. Signs of life are told as
`training.heartbeat` tells them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster import EPOCH, Cluster, Life

from hpcresume import files
from hpcresume.journal import Journal, Segment, lineage, segments_to_json
from hpcresume.run_dir import RunDir

_SIGKILL = 137
#: How long a rank that hangs says that its step may take.
_PATIENCE_S = 4.0


class ClockedJournal(Journal):
    """A journal whose times are the simulation's; each record is a moment to be killed at."""

    def __init__(self, path: Any, *, link: int, job: str | None, cluster: Cluster) -> None:
        super().__init__(path, link=link, job=job)
        self._cluster = cluster

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._cluster.moment()
        record = super().write(kind, t=round(EPOCH + self._cluster.elapsed, 3), **fields)
        self._cluster.moment()
        return record


@dataclass(frozen=True)
class Checkpoint:
    """A committed state: which link, at which step, upon what."""

    link: int
    step: int
    segments: tuple[Segment, ...] = ()


@dataclass
class Trained:
    """What really became of one link's training, for the invariants."""

    link: int
    job: str
    began: float
    restored: int = -1
    """The step that it began with; -1 where it did not come so far."""
    step: int = 0
    how: str = ""
    failure: str = ""
    """Type of the exception that ended it."""
    failed_at: int = 0
    overtaken: bool = False
    """Whether a newer link had claimed when it failed."""
    ended: float = math.inf
    undisturbed: bool = False
    """Its supervisor lived to say how it ended, and nobody else ended the job."""


@dataclass
class Truth:
    """What really happened in a run."""

    checkpoints: list[Checkpoint] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)


class SimulatedRanks:
    """A `scheduler.step.Step` whose processes are a few numbers."""

    def __init__(self, cluster: Cluster, truth: Truth, run: RunDir, link: int, lead_s: float):
        self._cluster, self._truth, self._run = cluster, truth, run
        self._life: Life = cluster.life
        self._plan = cluster.plan
        self._link = run.link(link)
        self._lead_s = lead_s
        self._code: int | None = None
        self._event = self._restore
        self._at = cluster.elapsed + cluster.dice.uniform(2, 8)
        self._journal = ClockedJournal(
            self._link.training, link=link, job=self._life.job.id, cluster=cluster
        )
        self._metrics = files.LineWriter(self._link.metrics)
        self._unsaved: list[dict[str, Any]] = []
        self._segments: tuple[Segment, ...] = ()
        self._reason_given = ""
        self.raises = ""
        """The exception of the next step, once."""
        self.seen = Trained(link, self._life.job.id, cluster.elapsed)
        truth.trained.append(self.seen)
        self._beat("start", 0, 1e6)
        self._life.next_event = self._next

    # ---- what the supervisor does with them ------------------------------------------------

    def poll(self) -> int | None:
        self._cluster.moment()
        while self._code is None and self._due() <= self._cluster.elapsed:
            self._event()
        return self._code

    def stop(self) -> None:
        """Nobody but the supervisor's files tells these ranks anything."""

    def show_stacks(self) -> None:
        """There are no stacks."""

    def kill(self) -> None:
        if self._code is None:
            self._leave(_SIGKILL, "killed")

    def wait(self, timeout_s: float) -> int | None:
        until = self._cluster.elapsed + timeout_s
        while self.poll() is None and self._cluster.elapsed < until:
            self._cluster.sleep(0.5)
        return self._code

    def close(self) -> None:
        """Their node is gone, or they are."""
        self._journal.close()
        self._metrics.close()

    def strike(self, kind: str) -> None:
        """One of them is killed now; `memory` leaves the kernel's words in the log."""
        if kind == "memory":
            self._link.rank_log(0).write_text("slurmstepd: error: Detected 1 oom-kill event(s)\n")
            self._beat("step" if self.seen.restored >= 0 else "start", self.seen.step, 1e6)
        if self._code is None:
            self._leave(_SIGKILL, kind)

    # ---- their life ------------------------------------------------------------------------

    def _next(self) -> float:
        return math.inf if self._code is not None else self._due()

    def _due(self) -> float:
        # Time in which the node was lost has passed for nobody on it.
        return self._at + self._life.asleep

    def _after(self, seconds: float, event: Any) -> None:
        self._at += seconds
        self._event = event

    def _restore(self) -> None:
        over = lineage(self._run)
        known = [c for c in self._truth.checkpoints if over.holds(c.link, c.step)]
        found = max(known, key=lambda c: c.step, default=None)
        if self._fenced():
            self._fail("Fenced", "a newer link has taken over", 9)
            return
        self._segments = () if found is None else found.segments
        step = 0 if found is None else found.step
        self.seen.restored = self.seen.step = step
        segments = segments_to_json(self._segments)
        self._journal.write("restored", step=step, segments=segments)
        self._journal.write("started", step=step, max_steps=self._plan.max_steps)
        if self._life.fault == "broken checkpoint":
            self._fail("CheckpointError", "model.safetensors is damaged", 7)
        elif step >= self._plan.max_steps:
            self._complete()
        else:
            self._after(self._plan.step_s, self._step)

    def _step(self) -> None:
        step, plan = self.seen.step + 1, self._plan
        if step == plan.hangs_at or self._life.fault == "hang":
            self._beat("step", step - 1, _PATIENCE_S)
            self.seen.how, self.seen.failed_at = "hung", step
            self._after(math.inf, self._step)
            return
        if self.raises or step == plan.raises_at:
            words = self.raises or "it is the code"
            anew = f" {self.seen.link}" if plan.raises_anew or self.raises else ""
            self._fail("ValueError", words + anew, 1)
            return
        if step == plan.nan_at:
            self._fail("NonFinite", "loss is nan", 8)
            return
        if step == plan.memory_at:
            self._fail("OutOfMemoryError", "CUDA out of memory", 1)
            return
        self.seen.step = step
        self._unsaved.append({"step": step, "link": self.seen.link})
        reason = self._reason()
        if reason:
            self._journal.write("stop_asked", step=step, reason=reason)
            self._reason_given = reason
            self._after(plan.save_s, self._save_and_leave)
        elif step >= plan.max_steps:
            self._after(plan.save_s, self._complete)
        elif step % plan.save_steps == 0:
            self._after(plan.save_s, self._save)
        else:
            self._after(plan.step_s, self._step)

    def _reason(self) -> str:
        content = files.read_json_or_none(self._link.deadline) or {}
        end = content.get("end")
        if end is not None and EPOCH + self._cluster.elapsed >= end - self._lead_s:
            return "deadline"
        for path in (self._link.stop, self._run.stop, self._run.cancel):
            if path.exists():
                text = path.read_text().strip()
                return text if path == self._link.stop else path.name
        return ""

    def _save(self) -> None:
        if self._commit():
            self._after(self._plan.step_s, self._step)

    def _save_and_leave(self) -> None:
        if self._commit():
            self._journal.write("ended", how="stopped", reason=self._reason_given)
            self._leave(0, self._reason_given)

    def _complete(self) -> None:
        if self._commit():
            self._run.final_model.mkdir(exist_ok=True)
            self._journal.write("completed", step=self.seen.step, epoch=1)
            self._journal.write("ended", how="completed", reason="")
            self._leave(0, "completed")

    def _commit(self) -> bool:
        """Save what is trained; False where that ends the rank."""
        if self._plan.full_disk.holds(self._cluster.elapsed):
            self._fail("OSError", "[Errno 28] No space left on device", 1)
            return False
        # A link that was overtaken between its look and its rename commits all the same.
        unlucky = self._life.asleep and self._cluster.dice.random() < 0.5
        if self._fenced() and not unlucky:
            self._fail("Fenced", "a newer link has taken over", 9)
            return False
        self._metrics.append(*self._unsaved)
        self._unsaved.clear()
        step, link = self.seen.step, self.seen.link
        segments = (*self._segments, Segment(link, step, self._metrics.size_bytes()))
        self._truth.checkpoints.append(Checkpoint(link, step, segments))
        self._journal.write("saved", step=step, seconds=self._plan.save_s, step_s=1.0)
        return True

    def _fenced(self) -> bool:
        return RunDir(self._run.path).newest_link() != self.seen.link

    def _fail(self, kind: str, message: str, code: int) -> None:
        failed_at = self.seen.step + 1
        record = {"type": kind, "message": message, "step": failed_at, "exit_code": code}
        if kind == "NonFinite":
            record["metric"] = "loss"
        files.write_json(self._link.rank_failure(0), record, sync=False)
        self._journal.write("ended", how="failed", reason=f"{kind}: {message}")
        self.seen.failure, self.seen.failed_at = kind, failed_at
        self.seen.overtaken = self._fenced()
        self._leave(code, "failed")

    def _leave(self, code: int, how: str) -> None:
        self._code = code
        self.seen.how = how if self.seen.how != "hung" else "hung"
        self.seen.ended = self._cluster.elapsed
        self.close()

    def _beat(self, kind: str, step: int, limit_s: float) -> None:
        sign = {"n": step, "kind": kind, "step": step, "limit_s": limit_s}
        self._link.beat(0).write_text(json.dumps(sign))


def start(
    cluster: Cluster, truth: Truth, run: RunDir, environ: Mapping[str, str]
) -> SimulatedRanks:
    """In place of `scheduler.step.start`."""
    link, lead_s = int(environ["HPCRESUME_LINK"]), float(environ["HPCRESUME_LEAD_S"])
    return SimulatedRanks(cluster, truth, run, link, lead_s)
