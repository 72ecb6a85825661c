"""The supervisor: one job of a run from its start to its end, on the batch host, without torch.

In order: what became of the link before; claim; queue the links ahead (`successors`); start the
ranks; watch the clock and the requests; decide what follows, and leave. Reached by `Link(path)`
(submitit) and by `hpcresume link` (sbatch files, the local driver).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcresume import chain, files, notify
from hpcresume.chain import Cause, Decision, PastLink
from hpcresume.config import RunConfig, node_range, nodes_in_turn, read_frozen
from hpcresume.display.logging import debug_to, logging_to
from hpcresume.errors import Fenced, RunLive, Unavailable
from hpcresume.history import (
    at_step,
    budgets_of,
    end_of,
    gather,
    past_link,
    past_links,
    verdict_of,
)
from hpcresume.journal import Journal, LinkRecords, asking_about, known_step
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler import step
from hpcresume.scheduler.choice import scheduler_of
from hpcresume.scheduler.environment import NODES, Allocation, allocation
from hpcresume.scheduler.job import JobInfo, JobState, Scheduler
from hpcresume.scheduler.job_end import JobEnd
from hpcresume.signals import SignalFlags, listen
from hpcresume.story import (
    Story,
    alive_elsewhere,
    read_story,
    resized,
    this_process,
)
from hpcresume.successors import Successors, lead_s, save_durations
from hpcresume.training import start_up
from hpcresume.training.heartbeat import Hang, Watchdog
from hpcresume.training.start_up import StartUp

log = logging.getLogger(__name__)

_TICK_S = 0.05
_REREAD_END_S = 20.0
_REREAD_FENCE_S = 5.0
#: An end that moves by less is not told again, in seconds.
_SAME_END_S = 0.5
_PATIENCE_S = 60.0
_LAST_WORDS_S = 3.0
#: How long ranks that hang may take to print their stacks, and to die.
_STACKS_S = 2.0
_KILLED_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """All that a supervisor or `drive` meets besides a run's files; a simulation has its own."""

    scheduler_of: Callable[..., Scheduler] = scheduler_of
    start: Callable[..., step.Step] = step.start
    listen: Callable[[], contextlib.AbstractContextManager[SignalFlags]] = listen
    journal: Callable[..., Journal] = Journal
    now: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random


_REAL = Surroundings()


@dataclass(frozen=True, kw_only=True)
class LinkOutcome:
    """How a link ended, for whoever called it."""

    cause: str
    step: int
    committed_step: int
    exception: str | None
    exit_code: int
    decision: str = ""
    reason: str = ""


class Link:
    """The callable that a job executes; its pickle holds one path.

    With `exits`, a link that did not end well leaves by SystemExit with its exit code, so that
    the scheduler's records show it.
    """

    def __init__(self, run: str | Path, exits: bool = False) -> None:
        self.run = str(run)
        self.exits = exits

    def __call__(self) -> LinkOutcome:
        """Supervise one link of the run."""
        outcome = supervise(RunDir(Path(self.run)), os.environ)
        if self.exits and outcome.exit_code:
            raise SystemExit(outcome.exit_code)
        return outcome

    def checkpoint(self, *_args: Any, **_kwargs: Any) -> Any:
        """What submitit is to run next: this again. All state is in the run directory."""
        from hpcresume.scheduler.launcher import delayed

        return delayed(Link(self.run, self.exits))


def exiting_link(run: Path) -> Link:
    """The callable of our own submissions."""
    return Link(run, exits=True)


def supervise(run: RunDir, environ: Mapping[str, str], around: Surroundings = _REAL) -> LinkOutcome:
    """One link of a run, in the current process. Raises RunLive where another link is alive."""
    run.check_private()
    config = read_frozen(run.config)
    supervisor = _Supervisor(run, config, environ, around)
    log_lines = logging_to(run.train_log, level=config.log.level)
    with around.listen() as flags, log_lines, contextlib.closing(supervisor):
        outcome = supervisor.run_link(flags)
        notify.tell(run, config.notify, supervisor.verdict, step=outcome.committed_step)
        return outcome


class _Supervisor:
    """One link's supervisor; the methods follow each other in the order of the module's text."""

    def __init__(
        self, run: RunDir, config: RunConfig, environ: Mapping[str, str], around: Surroundings
    ) -> None:
        self.run = run
        self.config = config
        self.around = around
        self.environ = environ
        self.job: Allocation = allocation(environ)
        self.start_up = StartUp()
        if self.job.start_time is not None:
            began = around.now() - self.start_up.age_s()
            self.start_up.waited("job", began - self.job.start_time)
        self.scheduler: Scheduler | None = None
        if self.job.scheduler != "none":
            self.scheduler = around.scheduler_of(
                run, self.job.scheduler, environ, config.scheduler, exiting_link
            )
        self.successors = Successors(run, config, self.scheduler, self.job.job_id)
        self.budgets = budgets_of(config)
        self.journal: Journal | None = None
        self.past: list[LinkRecords] = []
        self.lead_s = 0.0
        self.end = JobEnd(self.job.end_time, now=around.now, monotonic=around.monotonic)
        self.published_end: float | None = None
        self.compared = False
        self.stop_reason: str | None = None
        self.verdict: Decision | None = None
        """What this link has decided."""

    def close(self) -> None:
        """Give the journal's file back: this process may go on to something else."""
        if self.journal is not None:
            self.journal.close()

    # ---- the whole ----------------------------------------------------------------------

    def run_link(self, flags: SignalFlags) -> LinkOutcome:
        link = None
        while link is None:
            story = read_story(self.run)
            self.past = list(story.links)
            over = self._already_over(story)
            if over is not None:
                log.info("nothing to do: %s", over.reason)
                self.successors.drop()
                return self._outcome(over, None, 0)
            history = self._history(story)
            before = self._decision_before(story, history)
            link = self._claim(story)
        assert self.journal is not None
        avoided = self._nodes_to_avoid(story, history, before)
        self.lead_s = lead_s(self.config, self.past)
        self.successors.begin(self.journal, lead_s=self.lead_s, avoided=avoided)
        self._record_found(story, history)
        if before is not None and before.kind != "continue":
            return self._leave_early(before, history)
        self._settle_delay(link, before, flags)
        # With a spare in the queue the ranks need not wait for the second one to be queued.
        spare = self.successors.has_spare(story)
        if not spare:
            self.successors.queue_ahead()
        began = self.around.monotonic()
        ranks = self._start(link, history)
        try:
            if spare:
                self.successors.queue_ahead()
            code = self._watch(ranks, link, flags)
        finally:
            ranks.kill()
        return self._finish(link, code, flags, self.around.monotonic() - began)

    # ---- 1: what became of the links before ----------------------------------------------

    def _already_over(self, story: Story) -> Decision | None:
        if story.completed:
            return Decision(kind="finished", reason="training is complete", cause=Cause.COMPLETED)
        decided = story.decided()
        if decided is not None and decided.get("decision") in ("stop", "finished"):
            return Decision(kind="stop", reason=str(decided["reason"]), cause=Cause.STOPPED)
        return None

    def _history(self, story: Story) -> list[PastLink]:
        """The links since the last submission; asks the scheduler about unrecorded ends."""
        jobs: dict[str, JobInfo] = {}
        for link in story.links:
            if link.number > story.after_link and story.ended(link) is None:
                info = self._patiently(link)
                if info is not None:
                    jobs[info.id] = info
        return past_links(story, jobs)

    def _patiently(self, link: LinkRecords) -> JobInfo | None:
        """The scheduler's word on a link's job, once it is final; at most a minute of patience."""
        job = str(link.claim.get("job") or "")
        began = self.around.monotonic()
        while True:
            info = self._ask(job)
            where = alive_elsewhere(link, info, self.job.job_id)
            if where:
                raise RunLive(
                    f"{self.run.name} is live elsewhere: link {link.number}, {where}. "
                    f"`hpcresume status` shows it, `hpcresume cancel {self.run.name}` ends it."
                )
            if not job or self.scheduler is None or (info is not None and info.state.ended):
                return info
            if job == self.job.job_id:
                # The scheduler started this very job again: its earlier life is over.
                return replace(info, state=JobState.REQUEUED) if info is not None else None
            if self.around.monotonic() - began > _PATIENCE_S:
                return None
            self.around.sleep(0.5)

    def _ask(self, job: str) -> JobInfo | None:
        if not job or self.scheduler is None:
            return None
        try:
            return self.scheduler.state([job]).get(job)
        except Unavailable as error:
            log.warning("%s", error)
            return None

    def _decision_before(self, story: Story, history: Sequence[PastLink]) -> Decision | None:
        """What the past demands; None where nothing has happened yet, or all is decided."""
        if story.cancelled:
            reason = f"cancelled by {story.cancelled}"
            return Decision(kind="stop", reason=reason, cause=Cause.CANCELLED)
        lost = self.successors.cancelled_one(story)
        if lost is not None:
            return lost
        newest = story.newest
        if not history or newest is None or newest.last("decided") is not None:
            return None
        return self._decide(history)

    def _decide(self, history: Sequence[PastLink]) -> Decision:
        now, chance = self.around.now(), self.around.chance()
        return chain.decide(history, self.budgets, now=now, chance=chance)

    def _nodes_to_avoid(
        self, story: Story, history: Sequence[PastLink], before: Decision | None
    ) -> list[str]:
        """For the jobs that this link queues: a node is remembered longer than a submission."""
        older = [past for past in past_links(story, {}, after=0) if past.number <= story.after_link]
        fresh = before.exclude_nodes if before is not None else ()
        return [*fresh, *chain.bad_nodes([*older, *history], self.around.now())]

    # ---- 2: the claim ---------------------------------------------------------------------

    def _claim(self, story: Story) -> LinkDir | None:
        """The next number; None where other links have begun since the story was read.

        The scheduler's answer may have taken a minute, and its host may have been lost for hours:
        what is known is old then.
        """
        newest = story.newest.number if story.newest is not None else 0
        self.num_nodes, self.num_tasks = self._size(newest + 1)
        claim = {
            "job": self.job.job_id,
            "restart": self.job.restart_count,
            **this_process(),
            "nodes": self.job.node_list,
            "num_nodes": self.job.num_nodes,
            "num_tasks": self.num_tasks,
            "t": round(self.around.now(), 3),
        }
        link = self.run.claim_after(newest, claim)
        if link is None:
            return None
        debug_to(link.supervisor_log)
        log.debug("the files of link %d are in %s", link.number, link.path)
        self.journal = self.around.journal(link.journal, link=link.number, job=self.job.job_id)
        self.journal.write("claimed", host=claim["host"], nodes=self.job.node_list)
        log.info(
            "link %d of %s on %s%s",
            link.number,
            self.run.name,
            self.job.node_list or claim["host"],
            f", job {self.job.job_id}" if self.job.job_id else "",
        )
        other = resized([*story.links, LinkRecords(link.number, claim, [])])
        if other:
            log.warning("%s", other)
            self.journal.write("changed", step=known_step(story.links), change=other)
        return link

    def _size(self, number: int) -> tuple[int, int]:
        """On how many nodes link `number` has ranks, and how many they are together."""
        asked = self.config.scheduler
        least, most = node_range(asked.nodes)
        nodes = nodes_in_turn(asked.nodes, number)
        if self.job.scheduler == "slurm" and least != most:
            nodes = self.job.num_nodes
        elif self.job.scheduler == "slurm" and self.job.num_tasks is not None:
            return min(self.job.num_nodes, self.job.num_tasks), self.job.num_tasks
        return nodes, nodes * asked.tasks_per_node

    def _record_found(self, story: Story, history: Sequence[PastLink]) -> None:
        """Record the ends that the links before could not record themselves."""
        for past in history:
            records = next(link for link in story.links if link.number == past.number)
            if story.ended(records) is None:
                self._write_ended(past, of=past.number)
                log.info("link %d ended: %s", past.number, past.detail or past.cause.value)

    def _write_ended(self, past: PastLink, **more: Any) -> None:
        assert self.journal is not None
        self.journal.write("ended", **end_of(past), **more)

    def _leave_early(self, decision: Decision, history: Sequence[PastLink]) -> LinkOutcome:
        self._decided(decision, history)
        self.successors.drop()
        return self._outcome(decision, history[-1] if history else None, 0)

    def _settle_delay(self, link: LinkDir, decision: Decision | None, flags: SignalFlags) -> None:
        """Wait as decided, where the link before could not tell the queue.

        Who asks for the link's end meanwhile gets it at once: the ranks find that they are to
        stop, and leave.
        """
        if decision is None or not decision.delay_s:
            return
        log.info("waiting %d s: %s", decision.delay_s, decision.reason)
        until = self.around.monotonic() + decision.delay_s
        while self.stop_reason is None and (left := until - self.around.monotonic()) > 0:
            self.around.sleep(min(left, _REREAD_FENCE_S))
            if self._fenced(link):
                raise _overtaken(link)
            self._look_for_stop(link, flags, hinted=False)

    # ---- 3: the ranks ---------------------------------------------------------------------

    def _start(self, link: LinkDir, history: Sequence[PastLink]) -> step.Step:
        assert self.journal is not None
        self._publish_end(link)
        if history and self._failed_at_once(history[-1]):
            # What was compiled may be to blame: the next link compiles for itself.
            shutil.rmtree(self.run.cache, ignore_errors=True)
        self.start_up.reached("supervisor")
        durations = save_durations(self.past)
        environ = {
            "HPCRESUME_RUN": str(self.run.path),
            "HPCRESUME_LINK": str(link.number),
            "HPCRESUME_STOP": str(link.stop),
            "HPCRESUME_LEAD_S": f"{self.lead_s:.1f}",
            "HPCRESUME_SAVES_S": " ".join(f"{seconds:.3f}" for seconds in durations),
            NODES: str(self.num_nodes),
            "HPCRESUME_CRASHES": str(chain.spent(history).crashes),
            "MASTER_ADDR": _master_address(self.job),
            "MASTER_PORT": str(_free_port()),
            start_up.VARIABLE: self.start_up.told(),
        }
        if self.job.job_id:
            environ["HPCRESUME_JOB_ID"] = self.job.job_id
        if self.job.scheduler != "slurm":
            environ["HPCRESUME_SUPERVISOR"] = str(os.getpid())
        if self.published_end is not None:
            environ["HPCRESUME_DEADLINE"] = f"{self.published_end - self.lead_s:.1f}"
        container = self.config.scheduler.container
        python = sys.executable if container is None else container.python
        argv = ["-m", "hpcresume", "rank", str(self.run.path), "--link", str(link.number)]
        return self.around.start(
            self.job,
            self.config.scheduler,
            [python, *argv],
            environ=environ,
            log=link.rank_log,
            num_tasks=self.num_tasks,
            run=self.run.path,
        )

    def _failed_at_once(self, past: PastLink) -> bool:
        """Whether a link broke down before its first step was done."""
        own = next((link for link in self.past if link.number == past.number), None)
        began = own is not None and own.last("started") and not own.last("stepped")
        return past.cause in chain.CRASHES and bool(began)

    # ---- 4: watching ----------------------------------------------------------------------

    def _watch(self, ranks: step.Step, link: LinkDir, flags: SignalFlags) -> int:
        read_at = fence_read_at = 0.0
        hang_s = self.config.chain.hang_s
        # How long a command may be silent is not to be learned: only a given limit counts.
        watched = bool(hang_s) if self.config.command else hang_s != 0
        dog = Watchdog(link.beat, self.num_tasks, fixed_s=hang_s) if watched else None
        while (code := ranks.poll()) is None:
            now = self.around.monotonic()
            hinted = flags.take_hint()
            if hinted or now - read_at >= _REREAD_END_S:
                read_at = now
                if not self.stop_reason:
                    self._reread_end()
            self._publish_end(link)
            self._look_for_stop(link, flags, hinted)
            if now - fence_read_at >= _REREAD_FENCE_S:
                fence_read_at = now
                if self._fenced(link):
                    ranks.kill()
                    raise _overtaken(link)
            hang = dog.look(now) if dog is not None else None
            if hang is not None:
                return self._end_hung(ranks, link, hang)
            self.around.sleep(_TICK_S)
        return code

    def _end_hung(self, ranks: step.Step, link: LinkDir, hang: Hang) -> int:
        """Have the ranks say where they stand, and end them; their exit code."""
        assert self.journal is not None
        # Recorded first: the next link must know, whatever becomes of this process meanwhile.
        record = self.journal.write(
            "ended",
            how="hung",
            reason=hang.reason,
            at=hang.kind,
            step=hang.step,
            rank=hang.rank,
            limit_s=hang.limit_s,
        )
        log.error(
            "rank %d gave %s: it hangs. All threads' stacks go to %s, and the ranks are killed%s",
            hang.rank,
            hang.reason,
            link.rank_log(hang.rank),
            asking_about(self.run, record),
        )
        ranks.show_stacks()
        ranks.wait(_STACKS_S)
        ranks.kill()
        code = ranks.wait(_KILLED_S)
        # One that waits for a dead disk cannot even be killed; the end of the job sees to it.
        return 128 + signal.SIGKILL if code is None else code

    def _fenced(self, link: LinkDir) -> bool:
        return self.run.newest_link() != link.number

    def _look_for_stop(self, link: LinkDir, flags: SignalFlags, hinted: bool) -> None:
        if self.stop_reason is not None:
            return
        reason = flags.stop_asked()
        for path in (self.run.cancel, self.run.stop):
            if reason is None and path.exists():
                reason = path.name
        if reason is None and hinted and self.published_end is None:
            reason = "warned by the scheduler, which does not tell when the job ends"
        if reason is not None:
            self.stop_reason = reason
            log.info("%s: the ranks are told to save and leave", reason)
            with contextlib.suppress(OSError):
                files.write_durably(link.stop, f"{reason}\n".encode(), sync=False)

    def _reread_end(self) -> None:
        """Ask when the job ends: its limit may have been changed."""
        if self.scheduler is None or self.job.job_id is None:
            return
        try:
            if not self.compared:
                self.end.compare(self.scheduler.state([self.job.job_id])[self.job.job_id])
                self.compared = True
            self.end.move(self.scheduler.end_time(self.job.job_id))
        except Unavailable as error:
            log.warning("%s", error)

    def _publish_end(self, link: LinkDir) -> None:
        """Tell the ranks by their own clock, and again when that has jumped."""
        end, published = self.end.on_this_clock(), self.published_end
        if end is None or (published is not None and abs(end - published) < _SAME_END_S):
            return
        self.published_end = end
        with contextlib.suppress(OSError):
            files.write_json(link.deadline, {"end": end}, sync=False)

    # ---- 5: what follows ------------------------------------------------------------------

    def _finish(self, link: LinkDir, code: int, flags: SignalFlags, seconds: float) -> LinkOutcome:
        if self._fenced(link):
            raise _overtaken(link)
        story = read_story(self.run)
        own = next(records for records in story.links if records.number == link.number)
        info = self._own_end(own, flags)
        evidence = gather(self.run, own, info, exit_code=code, user_stop=story.cancelled)
        cause, detail = chain.cause_of(evidence)
        settled = cause in (Cause.COMPLETED, Cause.CANCELLED)
        # A failure while the job is being ended may follow from that, and tells not why it is.
        open_end = cause is Cause.DEADLINE or (evidence.failure is not None and not settled)
        unsaid = open_end and self._was_killed(info, flags)
        if unsaid and self._leave_to_next():
            return LinkOutcome(
                cause=Cause.UNKNOWN.value,
                step=story.committed_step(own),
                committed_step=story.committed_step(own),
                exception=None,
                exit_code=0,
            )
        past = replace(
            past_link(story, own, info),
            cause=cause,
            detail=detail,
            failure=evidence.failure,
            at_step=at_step(self.run, own, cause),
            seconds=seconds,
        )
        self._write_ended(past, exit_code=code)
        history = self._with_history(story, past)
        decision = None if settled else self.successors.cancelled_one(story)
        decision = decision or self._decide(history)
        if decision.kind == "continue":
            late = self.successors.too_late(self.end.scheduler_now())
            decision = late or self.successors.ensure_one(decision)
        self._decided(decision, history)
        if decision.kind != "continue":
            self.successors.drop()
        return self._outcome(decision, past, code)

    def _own_end(self, own: LinkRecords, flags: SignalFlags) -> JobInfo | None:
        """The scheduler's word on this job, where it is about to be ended from outside.

        sacct tells within a fraction of a second who or what ended a job, while scontrol and
        squeue say COMPLETING only. Where a node is lost the ranks end first, and without a word.
        """
        asked = flags.stop_asked() is not None
        told = any("how" in record for record in own.all("ended"))
        if own.last("completed") or self.job.job_id is None or (told and not asked):
            return None
        began = self.around.monotonic()
        while self.around.monotonic() - began < _LAST_WORDS_S:
            info = self._ask(self.job.job_id)
            if info is not None and info.state.ended:
                return info
            if not asked and (info is None or info.state is JobState.RUNNING):
                return None
            self.around.sleep(0.2)
        return None

    def _leave_to_next(self) -> bool:
        """Whether there is a next link that will find out why the scheduler ends this job."""
        reason = "the scheduler ends this job and does not say why"
        going = Decision(kind="continue", reason=reason, cause=Cause.UNKNOWN)
        if self.successors.too_late(self.end.scheduler_now()):
            return False
        if self.successors.ensure_one(going).kind != "continue":
            return False
        log.info("%s; saved, and the next link finds out", reason)
        return True

    def _was_killed(self, info: JobInfo | None, flags: SignalFlags) -> bool:
        return self.scheduler is not None and info is None and flags.stop_asked() is not None

    def _with_history(self, story: Story, past: PastLink) -> list[PastLink]:
        return [p for p in past_links(story, {}) if p.number < past.number] + [past]

    def _decided(self, decision: Decision, history: Sequence[PastLink]) -> None:
        assert self.journal is not None
        self.journal.write("decided", **verdict_of(decision, history))
        self.verdict = decision
        word = {"continue": "goes on", "stop": "stops", "finished": "is finished"}[decision.kind]
        level = logging.WARNING if decision.kind == "stop" else logging.INFO
        log.log(level, "the chain %s: %s", word, decision.reason)

    def _outcome(self, decision: Decision, past: PastLink | None, code: int) -> LinkOutcome:
        failure = past.failure if past is not None else None
        exit_code = 0
        if past is not None and code and past.cause not in chain.PLANNED:
            exit_code = failure.exit_code if failure is not None else 1
        if decision.kind == "stop" and past is not None and past.cause is not Cause.CANCELLED:
            exit_code = exit_code or (0 if past.cause is Cause.STOPPED else 8)
        return LinkOutcome(
            cause=decision.cause.value,
            step=past.committed_step if past is not None else 0,
            committed_step=past.committed_step if past is not None else 0,
            exception=f"{failure.type}: {failure.message}" if failure is not None else None,
            exit_code=exit_code,
            decision=decision.kind,
            reason=decision.reason,
        )


def _overtaken(link: LinkDir) -> Fenced:
    return Fenced(f"A newer link than {link.number} has taken over; this one leaves.")


def _free_port() -> int:
    """A port that nobody listens on here now; rank 0 runs on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _master_address(job: Allocation) -> str:
    """Where the ranks find rank 0: this host, by the address that the other nodes know."""
    if job.num_nodes <= 1:
        return "127.0.0.1"
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    return name
