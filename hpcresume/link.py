"""The supervisor: one job of a run from its start to its end, on the batch host, without torch.

In order: what became of the link before; claim; queue the links ahead; start the ranks; watch the
clock and the requests; decide what follows, and leave. Reached by `Link(path)` (submitit) and by
`hpcresume link` (sbatch files, the local driver).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpcresume import chain, files
from hpcresume.chain import Budgets, Cause, Decision, PastLink
from hpcresume.config import RunConfig, parse_time, read_frozen
from hpcresume.display.logging import logging_to
from hpcresume.errors import Fenced, RunLive, SubmissionRejected, Unavailable
from hpcresume.history import gather, past_link, past_links
from hpcresume.journal import Journal, LinkRecords
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler import hardware, step
from hpcresume.scheduler.choice import scheduler_of
from hpcresume.scheduler.environment import Allocation, allocation
from hpcresume.scheduler.hardware import Hardware
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState, Scheduler
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.signals import SignalFlags, listen
from hpcresume.story import (
    Story,
    alive_elsewhere,
    find_jobs,
    read_story,
    this_process,
    token_prefix,
)
from hpcresume.training.clock import lead_time

log = logging.getLogger(__name__)

_TICK_S = 0.05
_REREAD_END_S = 20.0
_PATIENCE_S = 60.0
_LAST_WORDS_S = 3.0


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


def job_spec(
    run: RunDir,
    config: RunConfig,
    *,
    lead_s: float,
    delay_s: int = 0,
    exclude: Sequence[str] = (),
    project: Path | None = None,
    run_id: str | None = None,
) -> JobSpec:
    """The next job of a run, as frozen at submit. Its token is new.

    `project` and `run_id` stand in for a run that is not made yet.
    """
    if run_id is None:
        identity = run.identify()
        run_id, project = str(identity["id"]), Path(identity["project"])
    environment = files.read_json_or_none(run.environment) or {}
    time_s = None if config.scheduler.time is None else parse_time(config.scheduler.time)
    options = files.read_json_or_none(run.script_options)
    signal_s = int(lead_s) + 60
    if time_s is not None:
        signal_s = max(1, min(signal_s, time_s // 2))
    return JobSpec(
        name=run.name,
        token=token_prefix(run_id) + secrets.token_hex(4),
        run=run.path,
        log=run.job_log,
        workdir=project or Path.cwd(),
        time_s=time_s,
        signal_s=signal_s,
        begin_delay_s=delay_s,
        exclude_nodes=tuple(exclude),
        hardware=_pinned_to(run, config),
        allow_requeue=config.chain.mode == "requeue",
        environment={**environment, "HPCRESUME_RUN": str(run.path)},
        script=run.script if run.script.exists() else None,
        script_options=tuple(options or ()),
    )


def _pinned_to(run: RunDir, config: RunConfig) -> Hardware:
    known = hardware.frozen(run) if config.scheduler.pin_hardware else None
    return known or Hardware()


def pin_hardware(run: RunDir, config: RunConfig, scheduler: Scheduler) -> None:
    """Freeze the kind of the first link's nodes, which every later job asks for (Slurm only)."""
    if not config.scheduler.pin_hardware or hardware.frozen(run) is not None:
        return
    claims = (files.read_json_or_none(run.link(number).claim) for number in run.link_numbers())
    nodes = next((claim["nodes"] for claim in claims if claim and claim.get("nodes")), "")
    if not nodes or not isinstance(scheduler, SlurmScheduler):
        return
    try:
        found = scheduler.hardware_of(nodes)
    except Unavailable as error:
        log.warning("the next job may run on other hardware than the first link: %s", error)
        return
    hardware.freeze(run, found)
    if found.features:
        log.info("later jobs ask for nodes like %s: %s", nodes, found.words())
    else:
        log.warning(
            "this node has no features that could be asked for; later jobs may run on other "
            "hardware than %s (scheduler.pin_hardware)%s",
            nodes,
            f", but on {found.words()}" if found.gpu_type else "",
        )


def supervise(run: RunDir, environ: Mapping[str, str]) -> LinkOutcome:
    """One link of a run, in the current process. Raises RunLive where another link is alive."""
    run.check_private()
    config = read_frozen(run.config)
    supervisor = _Supervisor(run, config, environ)
    with listen() as flags, logging_to(run.train_log, level=config.log.level):
        return supervisor.run_link(flags)


class _Supervisor:
    """One link's supervisor; the methods follow each other in the order of the module's text."""

    def __init__(self, run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
        self.run = run
        self.config = config
        self.environ = environ
        self.job: Allocation = allocation(environ)
        self.scheduler: Scheduler | None = None
        if self.job.scheduler != "none":
            self.scheduler = scheduler_of(
                run, self.job.scheduler, environ, config.scheduler, exiting_link
            )
        self.run_id = run.identify()["id"]
        self.budgets = Budgets(
            max_links=config.chain.max_links,
            max_hours=config.chain.max_hours,
            max_node_hours=config.chain.max_node_hours,
            no_progress_links=config.chain.no_progress_links,
            max_crashes=config.chain.max_crashes,
        )
        self.journal: Journal | None = None
        self.past: list[LinkRecords] = []
        self.submitted: list[str] = []
        self.avoided: list[str] = []
        self.end_time: float | None = self.job.end_time
        self.stop_reason: str | None = None

    # ---- the whole ----------------------------------------------------------------------

    def run_link(self, flags: SignalFlags) -> LinkOutcome:
        story = read_story(self.run)
        self.past = story.links
        over = self._already_over(story)
        if over is not None:
            log.info("nothing to do: %s", over.reason)
            self._drop_ahead()
            return self._outcome(over, None, 0)
        history = self._history(story)
        before = self._decision_before(story, history)
        self.avoided = self._nodes_to_avoid(story, history, before)
        link = self._claim()
        self._record_found(story, history)
        if before is not None and before.kind != "continue":
            return self._leave_early(before, history)
        self._settle_delay(before)
        # With a spare in the queue the ranks need not wait for the second one to be queued.
        spare = self._others_wait(story)
        if not spare:
            self._queue_ahead()
        began = time.monotonic()
        ranks = self._start(link, history)
        try:
            if spare:
                self._queue_ahead()
            code = self._watch(ranks, link, flags)
        finally:
            ranks.kill()
        return self._finish(link, code, flags, time.monotonic() - began)

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
        began = time.monotonic()
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
            if time.monotonic() - began > _PATIENCE_S:
                return None
            time.sleep(0.5)

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
        lost = self._cancelled_successor(story)
        if lost is not None:
            return lost
        if not history or story.decided() is not None:
            return None
        return self._decide(history)

    def _decide(self, history: Sequence[PastLink]) -> Decision:
        now, chance = time.time(), random.random()
        return chain.decide(history, self.budgets, now=now, chance=chance)

    def _nodes_to_avoid(
        self, story: Story, history: Sequence[PastLink], before: Decision | None
    ) -> list[str]:
        """For the jobs that this link queues: a node is remembered longer than a submission."""
        older = [past for past in past_links(story, {}, after=0) if past.number <= story.after_link]
        fresh = before.exclude_nodes if before is not None else ()
        return [*fresh, *chain.bad_nodes([*older, *history], time.time())]

    def _cancelled_successor(self, story: Story) -> Decision | None:
        """A job of the run that its user cancelled before it began: the wish to end the chain."""
        if self.scheduler is None:
            return None
        queued = self._queued_ids(story)
        claimed = {str(link.claim.get("job")) for link in story.links}
        missing = [id for id in queued if id not in claimed and id != self.job.job_id]
        if not missing:
            return None
        try:
            living = {job.id for job in find_jobs(self.scheduler, self.run_id)}
            missing = [id for id in missing if id not in living]
            ended = self.scheduler.state(missing) if missing else {}
        except Unavailable as error:
            log.warning("%s", error)
            return None
        for info in ended.values():
            if info.state is JobState.CANCELLED:
                who = info.cancelled_by or "unknown"
                who = "user unknown" if who == "unknown" else who
                reason = f"the waiting job {info.id} was cancelled by {who}: the chain ends here"
                return Decision(kind="stop", reason=reason, cause=Cause.CANCELLED)
        return None

    def _queued_ids(self, story: Story) -> list[str]:
        records = [r for link in story.links for r in link.all("queued")]
        newest = [r for r in story.submissions if r["kind"] == "submitted"][-1:]
        since = float(newest[0]["t"]) if newest else 0.0
        return [str(r["queued_job"]) for r in records if float(r["t"]) >= since] + self.submitted

    # ---- 2: the claim ---------------------------------------------------------------------

    def _claim(self) -> LinkDir:
        num_tasks = self.job.num_tasks if self.job.scheduler == "slurm" else None
        wanted = self.config.scheduler.nodes * self.config.scheduler.tasks_per_node
        self.num_tasks = num_tasks or wanted
        claim = {
            "job": self.job.job_id,
            "restart": self.job.restart_count,
            **this_process(),
            "nodes": self.job.node_list,
            "num_nodes": self.job.num_nodes,
            "num_tasks": self.num_tasks,
            "t": round(time.time(), 3),
        }
        link = self.run.claim_link(claim)
        self.journal = Journal(link.journal, link=link.number, job=self.job.job_id)
        self.journal.write("claimed", host=claim["host"], nodes=self.job.node_list)
        log.info(
            "link %d of %s on %s%s",
            link.number,
            self.run.name,
            self.job.node_list or claim["host"],
            f", job {self.job.job_id}" if self.job.job_id else "",
        )
        return link

    def _record_found(self, story: Story, history: Sequence[PastLink]) -> None:
        """Record the ends that the links before could not record themselves."""
        for past in history:
            records = next(link for link in story.links if link.number == past.number)
            if story.ended(records) is None:
                self._write_ended(past, of=past.number)
                log.info("link %d ended: %s", past.number, past.detail or past.cause.value)

    def _write_ended(self, past: PastLink, **more: Any) -> None:
        assert self.journal is not None
        self.journal.write(
            "ended",
            cause=past.cause.value,
            detail=past.detail,
            who=past.who,
            failure=asdict(past.failure) if past.failure else None,
            first_step=past.first_step,
            committed_step=past.committed_step,
            seconds=round(past.seconds, 3),
            nodes=list(past.nodes),
            **more,
        )

    def _leave_early(self, decision: Decision, history: Sequence[PastLink]) -> LinkOutcome:
        self._decided(decision, history)
        self._drop_ahead()
        return self._outcome(decision, history[-1] if history else None, 0)

    def _settle_delay(self, decision: Decision | None) -> None:
        """Wait as decided, where the link before could not tell the queue."""
        if decision is not None and decision.delay_s:
            log.info("waiting %d s: %s", decision.delay_s, decision.reason)
            time.sleep(decision.delay_s)

    # ---- 3: the links ahead ---------------------------------------------------------------

    def _others_wait(self, story: Story) -> bool:
        """Whether a spare is in the queue already, so that the ranks can start first."""
        claimed = {str(link.claim.get("job")) for link in story.links} | {str(self.job.job_id)}
        return any(id not in claimed for id in self._queued_ids(story))

    def _queue_ahead(self) -> None:
        """Queue what is missing of the links ahead, each behind all that are alive."""
        if self.scheduler is None or self.config.chain.mode in ("resubmit", "requeue"):
            return
        assert self.journal is not None and self.job.job_id is not None
        try:
            waiting = self._waiting()
            while len(waiting) < self.config.chain.ahead:
                waiting.append(self._submit([self.job.job_id, *waiting]))
        except (Unavailable, SubmissionRejected) as error:
            # The end of this link tries again, and the other ways.
            log.warning("no further link could be queued ahead: %s", error)

    def _waiting(self) -> list[str]:
        assert self.scheduler is not None
        jobs = find_jobs(self.scheduler, self.run_id)
        return [j.id for j in jobs if j.state is JobState.PENDING and j.id != self.job.job_id]

    def _submit(self, after: Sequence[str], decision: Decision | None = None) -> str:
        assert self.scheduler is not None and self.journal is not None
        pin_hardware(self.run, self.config, self.scheduler)
        fresh = decision.exclude_nodes if decision else ()
        spec = job_spec(
            self.run,
            self.config,
            lead_s=self._lead_s(),
            delay_s=decision.delay_s if decision else 0,
            exclude=list(dict.fromkeys([*fresh, *self.avoided]))[: chain.MOST_EXCLUDED],
        )
        job = self.scheduler.submit(spec, after)
        self.submitted.append(job)
        self.journal.write("queued", queued_job=job, after=list(after), token=spec.token)
        log.debug("queued job %s after %s", job, ", ".join(after))
        return job

    # ---- 4: the ranks ---------------------------------------------------------------------

    def _start(self, link: LinkDir, history: Sequence[PastLink]) -> step.Step:
        assert self.journal is not None
        self._publish_end(link)
        environ = {
            "HPCRESUME_RUN": str(self.run.path),
            "HPCRESUME_LINK": str(link.number),
            "HPCRESUME_STOP": str(link.stop),
            "HPCRESUME_LEAD_S": f"{self._lead_s():.1f}",
            "HPCRESUME_SAVE_GUESS_S": f"{self._save_guess_s():.3f}",
            "MASTER_ADDR": _master_address(self.job),
            "MASTER_PORT": str(_free_port()),
        }
        if self.job.job_id:
            environ["HPCRESUME_JOB_ID"] = self.job.job_id
        if self.job.scheduler != "slurm":
            environ["HPCRESUME_SUPERVISOR"] = str(os.getpid())
        if self.end_time is not None:
            environ["HPCRESUME_DEADLINE"] = f"{self.end_time - self._lead_s():.1f}"
        container = self.config.scheduler.container
        python = sys.executable if container is None else container.python
        argv = ["-m", "hpcresume", "rank", str(self.run.path), "--link", str(link.number)]
        return step.start(
            self.job,
            self.config.scheduler,
            [python, *argv],
            environ=environ,
            log=link.rank_log,
            num_tasks=self.num_tasks,
            run=self.run.path,
        )

    def _measured(self) -> tuple[list[float], list[float]]:
        """Durations of the run's saves and steps, as the journals told when this link began."""
        records = [r for link in self.past for r in link.all("saved")][-32:]
        saves, steps = ([r[name] for r in records if name in r] for name in ("seconds", "step_s"))
        return saves, steps

    def _save_guess_s(self) -> float:
        saves, _ = self._measured()
        return max(saves, default=0.0)

    def _lead_s(self) -> float:
        if self.config.chain.lead_s is not None:
            return self.config.chain.lead_s
        saves, steps = self._measured()
        return lead_time(saves, steps, guess_s=10.0)

    # ---- 5: watching ----------------------------------------------------------------------

    def _watch(self, ranks: step.Step, link: LinkDir, flags: SignalFlags) -> int:
        read_at = 0.0
        while (code := ranks.poll()) is None:
            now = time.monotonic()
            if flags.take_hint() or now - read_at >= _REREAD_END_S:
                read_at = now
                if not self.stop_reason:
                    self._reread_end(link)
            self._look_for_stop(link, flags)
            if self._fenced(link, now):
                ranks.kill()
                raise Fenced(f"A newer link than {link.number} has taken over; this one leaves.")
            time.sleep(_TICK_S)
        return code

    _fence_looked_at = 0.0

    def _fenced(self, link: LinkDir, now: float) -> bool:
        if now - self._fence_looked_at < 5.0:
            return False
        self._fence_looked_at = now
        return self.run.newest_link() != link.number

    def _look_for_stop(self, link: LinkDir, flags: SignalFlags) -> None:
        if self.stop_reason is not None:
            return
        reason = flags.stop_asked()
        for path in (self.run.cancel, self.run.stop):
            if reason is None and path.exists():
                reason = path.name
        if reason is not None:
            self.stop_reason = reason
            log.info("%s: the ranks are told to save and leave", reason)
            with contextlib.suppress(OSError):
                files.write_durably(link.stop, f"{reason}\n".encode(), sync=False)

    def _reread_end(self, link: LinkDir) -> None:
        """Ask when the job ends: its limit may have been changed."""
        if self.scheduler is None or self.job.job_id is None:
            return
        try:
            end = self.scheduler.end_time(self.job.job_id)
        except Unavailable as error:
            log.warning("%s", error)
            return
        if end is not None and end != self.end_time:
            self.end_time = end
            self._publish_end(link)

    def _publish_end(self, link: LinkDir) -> None:
        with contextlib.suppress(OSError):
            files.write_json(link.deadline, {"end": self.end_time}, sync=False)

    # ---- 6: what follows ------------------------------------------------------------------

    def _finish(self, link: LinkDir, code: int, flags: SignalFlags, seconds: float) -> LinkOutcome:
        story = read_story(self.run)
        own = next(records for records in story.links if records.number == link.number)
        info = self._own_end(own, flags)
        evidence = gather(self.run, own, info, exit_code=code, user_stop=story.cancelled)
        cause, detail = chain.cause_of(evidence)
        if cause is Cause.DEADLINE and self._was_killed(info, flags):
            # The scheduler ends this job and does not say why: the next link will know.
            log.info("the scheduler ends this job; saved, and the next link finds out why")
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
            seconds=seconds,
        )
        self._write_ended(past, exit_code=code)
        history = self._with_history(story, past)
        settled = cause in (Cause.COMPLETED, Cause.CANCELLED)
        decision = None if settled else self._cancelled_successor(story)
        decision = decision or self._decide(history)
        if decision.kind == "continue":
            decision = self._ensure_successor(decision)
        self._decided(decision, history)
        if decision.kind != "continue":
            self._drop_ahead()
        return self._outcome(decision, past, code)

    def _own_end(self, own: LinkRecords, flags: SignalFlags) -> JobInfo | None:
        """The scheduler's word on this job, where it is about to be ended from outside.

        sacct tells within a fraction of a second who or what ended a job, while scontrol and
        squeue say COMPLETING only.
        """
        if own.last("completed") or flags.stop_asked() is None or self.job.job_id is None:
            return None
        began = time.monotonic()
        while time.monotonic() - began < _LAST_WORDS_S:
            info = self._ask(self.job.job_id)
            if info is not None and info.state.ended:
                return info
            time.sleep(0.2)
        return None

    def _was_killed(self, info: JobInfo | None, flags: SignalFlags) -> bool:
        return self.scheduler is not None and info is None and flags.stop_asked() is not None

    def _with_history(self, story: Story, past: PastLink) -> list[PastLink]:
        return [p for p in past_links(story, {}) if p.number < past.number] + [past]

    def _ensure_successor(self, decision: Decision) -> Decision:
        """Leave only with a living successor in the queue, or a reason for having none."""
        if self.scheduler is None or self.job.job_id is None:
            return decision
        ways = {
            "resubmit": (self._keep_or_submit, self._requeue),
            "requeue": (self._requeue, self._keep_or_submit),
        }.get(self.config.chain.mode, (self._keep_or_submit, self._requeue))
        refusals = []
        for way in ways:
            try:
                way(decision)
                return decision
            except (SubmissionRejected, Unavailable) as error:
                refusals.append(str(error))
        reason = f"no next job could be queued: {'; '.join(refusals)}"
        return replace(decision, kind="stop", reason=reason, rule="no_successor")

    def _keep_or_submit(self, decision: Decision) -> None:
        assert self.scheduler is not None and self.job.job_id is not None
        waiting = self._waiting()
        if not waiting:
            waiting = [self._submit([self.job.job_id], decision)]
        elif decision.delay_s or decision.exclude_nodes:
            try:
                self.scheduler.update(
                    waiting[0],
                    exclude_nodes=decision.exclude_nodes or None,
                    begin_delay_s=decision.delay_s or None,
                )
            except (SubmissionRejected, Unavailable) as error:
                # It lives, and goes on as it was queued.
                log.warning("%s", error)
        log.info("next: job %s", waiting[0])

    def _requeue(self, decision: Decision) -> None:
        assert self.scheduler is not None and self.job.job_id is not None
        self.scheduler.update(self.job.job_id, requeue=True)
        log.info("next: job %s again (requeued)", self.job.job_id)

    def _decided(self, decision: Decision, history: Sequence[PastLink]) -> None:
        assert self.journal is not None
        self.journal.write(
            "decided",
            decision=decision.kind,
            reason=decision.reason,
            cause=decision.cause.value,
            rule=decision.rule,
            delay_s=decision.delay_s,
            exclude_nodes=list(decision.exclude_nodes),
            numbers=decision.numbers or chain.spent(history).to_json(),
        )
        word = {"continue": "goes on", "stop": "stops", "finished": "is finished"}[decision.kind]
        level = logging.WARNING if decision.kind == "stop" else logging.INFO
        log.log(level, "the chain %s: %s", word, decision.reason)

    def _drop_ahead(self) -> None:
        """Cancel what still waits; the reason stands in the journal already."""
        if self.scheduler is None:
            return
        try:
            waiting = self._waiting()
            if waiting:
                self.scheduler.cancel(waiting)
                log.debug("cancelled the waiting jobs %s", ", ".join(waiting))
        except Unavailable as error:
            log.warning(
                "waiting jobs could not be cancelled; they will leave by themselves: %s", error
            )

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
