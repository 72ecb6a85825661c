"""One link of a rehearsal: its job on this machine, its end, and what its journals tell then."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from hpcresume import files
from hpcresume.config import read_frozen
from hpcresume.history import first_failure
from hpcresume.journal import LinkRecords, Record, known_step, read_chain
from hpcresume.link import exiting_link
from hpcresume.rehearse.report import KILL, LAST, PREEMPTION, TIME_LIMIT, End, Played
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.choice import scheduler_of
from hpcresume.scheduler.driver import drive
from hpcresume.scheduler.local_queue import JobFiles
from hpcresume.scheduler.process import scrubbed
from hpcresume.scheduler.process_table import ProcessId, family, send
from hpcresume.successors import job_spec, lead_s, note_queued
from hpcresume.training.heartbeat import START

#: A link is ended when it has trained so many steps...
_STEPS = 3
_BLIND_S = 20
#: ...or, where a step takes long or none comes, after so many seconds of its job.
_PATIENCE_S = 300.0
_LOOK_S = 0.1
#: What a first guess of a start adds to the measured one.
_SLACK = 1.5
#: Rules of `chain.decide` that a rehearsal brings about itself.
_WANTED = frozenset({"stopped", "completed"})


class Stage:
    """The scratch run, of which one link after the other is played."""

    def __init__(
        self,
        run: RunDir,
        environ: Mapping[str, str],
        *,
        time_s: int | None,
        asked: Callable[[], bool],
    ) -> None:
        self._run = run
        self._config = read_frozen(run.config)
        self._scheduler = scheduler_of(
            run, "local", scrubbed(environ), self._config.scheduler, exiting_link
        )
        self._asked = asked
        self._time_s = time_s
        self._start_s = 0.0
        self._step_s = 0.0
        self._jobs: list[str] = []

    def play(self, end: End) -> Played:
        """Queue the next link, end it so, and tell what became of it."""
        before = read_chain(self._run)
        lead = lead_s(self._config, before)
        grace = self._config.scheduler.grace_s
        spec = job_spec(self._run, self._config, lead_s=lead)
        spec = replace(spec, time_s=self._limit_s(end, lead), signal_s=0)
        job = self._scheduler.submit(spec)
        self._jobs.append(job)
        note_queued(self._run, job, spec)
        scene = _Scene(self._run, job, len(before) + 1, end, grace, self._enough)
        drive(self._run, grace, on_tick=scene.look, interrupted=self._asked)
        links = read_chain(self._run)
        # A job whose supervisor did not even claim has left no link.
        own = links[-1] if len(links) > len(before) else None
        self._measure(own, scene)
        lead_now = lead if end == TIME_LIMIT else grace if end == PREEMPTION else None
        return _played(self._run, own, before, scene, lead_now)

    @property
    def _enough(self) -> int:
        """How many steps make a link long enough; seconds, where a command shows nothing else."""
        progress = self._config.progress
        blind = self._config.command and not (progress.checkpoints or progress.step_pattern)
        return _BLIND_S if blind else _STEPS

    def close(self) -> None:
        """End whatever still runs."""
        self._scheduler.cancel(self._jobs)

    def _limit_s(self, end: End, lead: float) -> int | None:
        """The time limit of a job: as asked for, else what the first link was measured to need."""
        if self._time_s is not None:
            return self._time_s
        if end != TIME_LIMIT:
            return None
        return math.ceil(_SLACK * self._start_s + max(self._enough * self._step_s, 2.0) + lead)

    def _measure(self, own: LinkRecords | None, scene: _Scene) -> None:
        started = own.last("started") if own is not None else None
        if started is not None:
            self._start_s = max(self._start_s, float(started["t"]) - scene.began)
            steps = scene.step - int(started["step"])
            if steps > 0:
                self._step_s = max(self._step_s, (scene.seen_at - float(started["t"])) / steps)


class _Scene:
    """Watches one link, and ends it when it has trained a little."""

    def __init__(
        self, run: RunDir, job: str, number: int, end: End, grace_s: float, steps: int
    ) -> None:
        self._steps = steps
        self._run = run
        self._link: LinkDir = run.link(number)
        self._files = JobFiles(run.jobs)
        self._job = job
        self.end = self._end = end
        self._grace_s = grace_s
        self._next_look = 0.0
        self._kill_at = math.inf
        self._patient_until = time.monotonic() + _PATIENCE_S
        self._began_with: int | None = None
        self._cut = False
        self.began = time.time()
        self.step = 0
        self.seen_at = time.time()

    def look(self) -> None:
        """Called all the while that the link's job is served."""
        now = time.monotonic()
        if now >= self._kill_at:
            self._kill_at = math.inf
            send(self._processes(), signal.SIGKILL)
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_S
        self._look_at_step()
        trained = self._began_with is not None and self.step >= self._began_with + self._steps
        if not self._cut and (trained or now >= self._patient_until):
            self._cut = True
            self._cut_it(now, trained=trained)

    def _look_at_step(self) -> None:
        sign = files.read_json_or_none(self._link.beat(0)) or {}
        step, kind = sign.get("step", 0), sign.get("kind", "start")
        if kind == START:
            return
        if self._began_with is None:
            self._began_with = self._restored()
            self.step = self._began_with or 0
        if step > self.step:
            self.step, self.seen_at = step, time.time()

    def _restored(self) -> int | None:
        for record in files.read_lines(self._link.training):
            if record.get("kind") == "started":
                return int(record["step"])
        return None

    def _cut_it(self, now: float, *, trained: bool) -> None:
        if self._end == LAST:
            self._run.stop.touch()
        elif self._end == KILL:
            # The supervisor has no environment of a rank, and lives to say what it saw.
            send(self._ranks(), signal.SIGKILL)
            return
        elif self._end == PREEMPTION or not trained:
            send(self._processes(), signal.SIGTERM)
        else:
            return
        self._kill_at = now + self._grace_s

    def _processes(self) -> list[ProcessId]:
        job = self._files.read_job(self._job)
        leader = self._files.read_record(self._job).process
        return [] if job is None else family(leader, job.mark)

    def _ranks(self) -> list[ProcessId]:
        claim = files.read_json_or_none(self._link.claim) or {}
        return [process for process in self._processes() if process.pid != claim.get("pid")]


def _played(
    run: RunDir,
    own: LinkRecords | None,
    before: list[LinkRecords],
    scene: _Scene,
    lead: float | None,
) -> Played:
    """What the journals tell of a link that has ended."""
    end, expected = scene.end, known_step(before)
    if own is None:
        return Played(link=len(before) + 1, end=end.name, warned=end.warned, expected=expected)
    started, asked, saved = (own.last(kind) for kind in ("started", "stop_asked", "saved"))
    decided = own.last("decided") or {}
    failure = first_failure(run, own.number, 1)
    completed = own.last("completed") is not None
    stopped = decided.get("decision") == "stop" and decided.get("rule") not in _WANTED
    fell_back = own.last("fell_back")
    return Played(
        link=own.number,
        seen=str(started.get("seen", "")) if started else "",
        fell_back=f"from {fell_back.get('before')} to {fell_back['step']}" if fell_back else "",
        end=end.name,
        warned=end.warned,
        first_step=int(started["step"]) if started else None,
        cut_at=_cut_at(scene, asked, saved),
        committed=known_step([*before, own]),
        expected=expected,
        save_s=float(saved["seconds"]) if saved and "seconds" in saved else None,
        lead_s=lead,
        completed=completed,
        failure="" if failure is None or completed else failure.words,
        rule=str(decided.get("rule", "")) if stopped else "",
        reason=str(decided.get("reason", "")) if stopped else "",
        log=run.link(own.number).rank_log(0),
    )


def _cut_at(scene: _Scene, *records: Record | None) -> int:
    """The last step that is known of: as watched, or as recorded where it stopped."""
    return max([scene.step, *(int(record["step"]) for record in records if record)])
