"""What rank 0 of a command writes down: its progress, in the journal and for people.

A command has no checkpoints of ours. What stands in their place, as `saved` records that decide
whether a link got further: the step of the newest that it has saved; else, where a pattern was
given for it, the step that it printed; else nothing can be seen, and the seconds that it ran until
it was told to leave count. Where a callback of ours in a framework tells its steps, these count.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.adapters.ending import COMPLETED, Attempt, Verdict
from hpcresume.adapters.heard import Heard
from hpcresume.adapters.sight import Saved, Sight
from hpcresume.journal import Journal, Record, known_step, read_chain
from hpcresume.run_dir import LinkDir, RunDir

log = logging.getLogger("hpcresume.command")

#: How progress is seen.
STEPS, TIME = "steps", "time"


class Notes:
    """Progress of the command of a run, as rank 0 of one link sees and records it."""

    def __init__(
        self, run: RunDir, link: LinkDir, sight: Sight, root: Path, *, job: str | None
    ) -> None:
        self._run = run
        self._link = link
        self._sight = sight
        self._root = root
        self._journal = Journal(link.training, link=link.number, job=job)
        self.heard = Heard(link.guest)
        """What the training framework in the command tells, if there is a callback of ours."""
        links = read_chain(run)
        told = any(record.get("guest") for other in links for record in other.all("restored"))
        self.seen = TIME if sight.blind and not told else STEPS
        self.restarts = sum(len(other.all("started")) for other in links)
        """How often the command was started before."""
        before = next((r for other in reversed(links) if (r := other.last("restored"))), None)
        same = before is not None and before.get("seen") == self.seen
        marks = [r["stamp"] for other in links for r in other.records if "stamp" in r]
        self._newest = sight.newest()
        if same:
            self.known = known_step(links)
            self._stamp = str(marks[-1]) if marks else ""
        else:
            # What lies there from before the run is nobody's progress.
            self.known = (self._newest.step or 0) if self._newest else 0
            self._stamp = self._newest.stamp if self._newest else ""
        self._logged = self._logged_before() if self.restarts else None
        self._began = self.known
        self._fell_back = False
        self._started_at = time.monotonic()
        self._known_at_start = self.known
        self._told_state: dict[str, Any] = {}
        if not told:
            # Else the guest says so itself. Until then readers follow the links before this one:
            # a record without its segments would have them forget what these have logged.
            self._note("restored", step=self.known, stamp=self._stamp, segments=[])

    def _logged_before(self) -> tuple[int, int] | None:
        """The first and the last step that the command printed when it ran before."""
        state = files.read_json_or_none(self._run.trainer_state)
        logged = state.get("logged") if isinstance(state, dict) else None
        if not isinstance(logged, list) or [type(n) for n in logged] != [int, int]:
            return None
        return logged[0], logged[1]

    @property
    def newest(self) -> Saved | None:
        """The newest that the command has saved, as of the last look."""
        return self._newest

    @property
    def step(self) -> int:
        """How far the command is."""
        if self.seen == TIME:
            return self.known + int(time.monotonic() - self._started_at)
        logged = self.heard.step if self.heard.any else self._sight.last_logged
        return self.known if logged is None else logged

    def started(self) -> None:
        """The command is started."""
        self._note("started", step=self.known)
        self.restarts += 1
        self.heard.start_anew()
        self._known_at_start = self.known
        self._started_at = time.monotonic()
        self._publish()

    def look(self, **took: float) -> bool:
        """See how far it is; whether that is further than ever before.

        `took` is recorded with what it has saved, new or not.
        """
        self.hear()
        if self.heard.any:
            if took:
                self._save(self.known, self._newest, **took)
            return False
        self._newest = saved = self._sight.newest()
        step: int | None = None
        if saved is not None and saved.step is not None:
            step = saved.step
        elif saved is not None and saved.stamp != self._stamp:
            step = self.known + 1
        elif saved is None and self._sight.counts_log:
            step = self._sight.last_logged
        if saved is not None:
            self._stamp = saved.stamp
        further = step is not None and step > self.known
        if further or took:
            self._save(max(step or 0, self.known), saved, **took)
        self._look_back()
        self._publish()
        return further

    def hear(self) -> bool:
        """Record what the framework in the command has told since; whether there was anything."""
        records = self.heard.look()
        for record in records:
            if record["kind"] == "began":
                self._begun(record)
            elif record["kind"] == "saved":
                self._saved(record)
        if records:
            self._publish()
        return bool(records)

    def _begun(self, record: Record) -> None:
        self.seen = STEPS
        self.known = self._known_at_start = int(record["step"])
        told = {name: record.get(name) for name in ("path", "verified", "passed_over")}
        segments = record.get("segments", [])
        self._note("restored", step=self.known, segments=segments, guest=True, **told)

    def _saved(self, record: Record) -> None:
        path, digest = Path(str(record.get("path"))), str(record.get("digest"))
        total = self.heard.max_steps
        self._newest = Saved(path=path, stamp=digest, step=int(record["step"]), total=total)
        told = {name: record.get(name) for name in ("digest", "bytes", "save_s")}
        self._save(int(record["step"]), self._newest, guest=True, **told)

    def _save(self, step: int, saved: Saved | None, **more: Any) -> None:
        self.known = step
        where = None if saved is None else os.path.relpath(saved.path, self._root)
        stamp = {} if saved is None else {"stamp": saved.stamp}
        self._note("saved", step=step, path=where, **stamp, **more)

    def _note(self, kind: str, **fields: Any) -> None:
        """Record something. A disk that is full is no reason to end a command: it is kept, and
        written with the next record."""
        try:
            self._journal.write(kind, seen=self.seen, **fields)
        except OSError as error:
            log.warning("the journal cannot be written: %s", error)

    def told(self, reason: str) -> None:
        """The command is told to leave."""
        self._note("stop_asked", reason=reason, step=self.known)

    def ended(self, attempt: Attempt) -> bool:
        """An attempt is over; whether anything new came of it."""
        self.hear()
        # One that had to be killed may never leave by itself; but a framework does, given its time.
        left = attempt.took_s > 0 and (not attempt.killed or self.heard.any)
        # How long it takes to leave says how early the next one must be told.
        took = {"seconds": round(attempt.took_s, 3)} if left else {}
        if self.seen == TIME and attempt.told:
            self._save(self.known + max(1, int(attempt.ran_s)), None, **took)
            took = {}
        self.look(**took)
        return self.known > self._known_at_start

    def retried(self, number: int, reason: str, delay_s: float) -> None:
        """It has failed, and is started again in this job."""
        self._note("retried", attempt=number, reason=reason, delay_s=delay_s)
        first, last = self._sight.first_logged, self._sight.last_logged
        if first is not None and last is not None:
            self._logged = (first, last)

    def settle(self, verdict: Verdict) -> None:
        """Record how the link's ranks ended."""
        if verdict.how == COMPLETED:
            step = self.step if self.heard.any else self.known
            self._note("completed", step=step, judged=verdict.reason)
            self._publish(completed=True)
        self._note("ended", how=verdict.how, reason=verdict.reason)

    # ---- a step count that falls back ------------------------------------------------------

    def _look_back(self) -> None:
        first = self._sight.first_logged
        if first is None or self._fell_back or self.restarts < 2:
            return
        last = self._expected(first)
        if last is None:
            return
        self._fell_back = True
        self._note("fell_back", step=first, before=last)
        log.warning(
            "the command's steps begin at %d, although it was at %d before: did it load its "
            "checkpoint?",
            first,
            last,
        )

    def _expected(self, first: int) -> int | None:
        """The step that was reached before, where the first one now lies too far below it."""
        if self._newest is not None and self._newest.step is not None and self._began:
            return self._began if first < self._began else None
        if self._logged is None:
            return None
        first_before, last_before = self._logged
        return last_before if first <= first_before < last_before else None

    # ---- for people ------------------------------------------------------------------------

    def _publish(self, *, completed: bool = False) -> None:
        """trainer_state.json, in Hugging Face's words; the progress stands at its end."""
        sight = self._sight
        logged = [sight.first_logged, sight.last_logged]
        step = sight.last_logged
        if step is None:
            # One that had nothing left to do prints no step: the last one that was seen stands.
            step = self.known if self.seen == STEPS else (self._logged or (0, 0))[1]
        total = self._newest.total if self._newest is not None else None
        heard = self.heard
        if heard.any:
            step, total = self.step, heard.max_steps or total
        state = {
            "log_history": [],
            "seen": self.seen,
            "logged": logged if None not in logged else list(self._logged or ()),
            "link": self._link.number,
            "num_train_epochs": heard.epochs,
            "max_steps": total,
            "epoch": round(heard.epoch, 6),
            "global_step": step,
            "total_steps": total,
            "completed": completed,
        }
        if state != self._told_state:
            self._told_state = state
            with contextlib.suppress(OSError):
                files.write_json(self._run.trainer_state, state, sync=completed)
