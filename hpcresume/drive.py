"""Submits the next link of a run from a login node, where compute nodes may not submit.

Looks now and then whether a job of the run is in the queue, and if not, what follows the last link.
All that it knows stands in the run: it may be killed at any time, and started again anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from hpcresume import chain, notify
from hpcresume.chain import Cause, Decision, PastLink
from hpcresume.config import RunConfig, read_frozen
from hpcresume.errors import SubmissionRejected, Unavailable, UsageError
from hpcresume.history import budgets_of, end_of, past_links, verdict_of
from hpcresume.journal import Record, known_step
from hpcresume.link import Surroundings, exiting_link
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.choice import scheduler_of
from hpcresume.scheduler.driver_file import only_driver
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState, Scheduler
from hpcresume.scheduler.process import scrubbed
from hpcresume.story import Story, find_jobs, read_story, this_process
from hpcresume.successors import (
    cancelled_waiting,
    expired_waiting,
    job_spec,
    lead_s,
    note_queued,
    pin_hardware,
    too_late,
)

log = logging.getLogger(__name__)

#: How long the accounting may take to tell how a job has ended.
_PATIENCE_S = 60.0
#: So many jobs in a row that end before their link has begun are no bad luck.
_MOST_LOST = 3
_TICK_S = 0.1
_REAL = Surroundings()


def drive(
    run: RunDir,
    environ: Mapping[str, str],
    *,
    every_s: float,
    interrupted: Callable[[], bool],
) -> Decision | None:
    """Keep a run going until its chain has ended; why it has, or None when interrupted.

    The scheduler is asked every `every_s` seconds. Nobody else may drive the run meanwhile. Raises
    RunLive where somebody does, UsageError where the run is not on Slurm, SubmissionRejected where
    Slurm does not take the next job.
    """
    run.check_private()
    cluster = str(run.identify()["cluster"])
    if cluster != "slurm":
        raise UsageError(
            f"{run.name} runs on this machine ({cluster}) and needs nobody to drive it: "
            f"`hpcresume resume {run.name}` goes on with it."
        )
    config = read_frozen(run.config)
    scheduler = scheduler_of(run, cluster, scrubbed(environ), config.scheduler, exiting_link)
    driver = Driver(run, config, scheduler)
    with only_driver(run):
        while not interrupted():
            looked_at = time.monotonic()
            try:
                over = driver.look()
            except Unavailable as error:
                log.warning("%s", error)
                over = None
            except SubmissionRejected as error:
                step = known_step(read_story(run).links)
                notify.tell_stalled(run, config.notify, str(error), step=step)
                raise
            if over is not None:
                return over
            while not interrupted() and time.monotonic() - looked_at < every_s:
                time.sleep(_TICK_S)
    return None


class Driver:
    """Looks after a run from outside its jobs. Nobody else may do so meanwhile; see `drive`."""

    def __init__(
        self,
        run: RunDir,
        config: RunConfig,
        scheduler: Scheduler,
        around: Surroundings = _REAL,
    ) -> None:
        self._run = run
        self._config = config
        self._scheduler = scheduler
        self._around = around
        self._gone_since: float | None = None

    def look(self) -> Decision | None:
        """Submit the next job if there is none; the decision that has ended the chain, if one did.

        Raises Unavailable, and SubmissionRejected.
        """
        story = read_story(self._run)
        settled = _settled(story)
        if settled is not None:
            return settled
        if find_jobs(self._scheduler, story.run_id):
            self._gone_since = None
            return None
        # What a link wrote with its last breath was not there yet, maybe, when it was read above.
        story = read_story(self._run)
        settled = _settled(story)
        if settled is not None:
            return settled
        jobs = self._ends(story)
        if jobs is None:
            return None
        history = past_links(story, jobs)
        decision = self._lost(story, jobs) or self._decide(history)
        if decision is not None and decision.kind != "continue":
            return decision if self._recorded(story, history, decision) else None
        pin_hardware(self._run, self._config, self._scheduler)
        spec = self._next(story, history, decision)
        late = too_late(spec, self._around.now())
        if late is not None:
            return late if self._recorded(story, history, late) else None
        job = self._scheduler.submit(spec)
        self._gone_since = None
        # A driver that dies before this line leaves a job that the next one finds in the queue.
        note_queued(self._run, job, spec, self._around.journal)
        log.info("next: job %s%s", job, f": {decision.reason}" if decision is not None else "")
        return None

    # ---- what became of the last job -----------------------------------------------------

    def _ends(self, story: Story) -> dict[str, JobInfo] | None:
        """How the jobs have ended that did not say so themselves; None: ask again."""
        claims = [k for k in story.links if k.number > story.after_link and story.ended(k) is None]
        asked = [str(link.claim.get("job") or "") for link in claims] + story.unclaimed()
        ids = [id for id in dict.fromkeys(asked) if id]
        jobs = self._scheduler.state(ids) if ids else {}
        if all(job.state.ended for job in jobs.values()):
            return jobs
        now = self._around.monotonic()
        self._gone_since = now if self._gone_since is None else self._gone_since
        return jobs if now - self._gone_since > _PATIENCE_S else None

    def _lost(self, story: Story, jobs: Mapping[str, JobInfo]) -> Decision | None:
        """A reason to stop in what became of jobs whose links have never begun."""
        lost = story.unclaimed()
        for id in lost:
            job = jobs.get(id)
            if job is not None and job.state is JobState.CANCELLED:
                return cancelled_waiting(job)
            if job is not None and job.state is JobState.DEADLINE:
                return expired_waiting(job)
        if len(lost) < _MOST_LOST:
            return None
        reason = (
            f"{len(lost)} jobs in a row ended before their link began ({', '.join(lost)}): see "
            f"{self._run.jobs}"
        )
        return Decision(kind="stop", reason=reason, cause=Cause.UNKNOWN, rule="lost_jobs")

    def _decide(self, history: Sequence[PastLink]) -> Decision | None:
        """What follows the last link; None where there was none yet."""
        if not history:
            return None
        now, chance = self._around.now(), self._around.chance()
        return chain.decide(history, budgets_of(self._config), now=now, chance=chance)

    # ---- what follows --------------------------------------------------------------------

    def _next(
        self, story: Story, history: Sequence[PastLink], decision: Decision | None
    ) -> JobSpec:
        fresh = decision.exclude_nodes if decision is not None else ()
        avoided = [*fresh, *chain.bad_nodes(history, self._around.now())]
        return job_spec(
            self._run,
            self._config,
            lead_s=lead_s(self._config, story.links),
            delay_s=decision.delay_s if decision is not None else 0,
            exclude=list(dict.fromkeys(avoided))[: chain.MOST_EXCLUDED],
        )

    def _recorded(self, story: Story, history: Sequence[PastLink], decision: Decision) -> bool:
        """Leave the reason in the run, where a link would have left it: in a claim of its own.

        False where a link has begun meanwhile that was not known of.
        """
        now = round(self._around.now(), 3)
        claim: Record = {"job": None, **this_process(), "num_tasks": 0, "t": now}
        link = self._run.claim_after(story.newest.number if story.newest else 0, claim)
        if link is None:
            return False
        unsaid = {k.number for k in story.links if story.ended(k) is None}
        journal = self._around.journal(link.journal, link=link.number, job=None)
        with contextlib.closing(journal):
            for past in history:
                if past.number in unsaid:
                    journal.write("ended", **end_of(past), of=past.number)
            journal.write("decided", **verdict_of(decision, history))
        step = known_step(story.links)
        notify.tell(self._run, self._config.notify, decision, step=step)
        return True


def _settled(story: Story) -> Decision | None:
    """The end of a chain that stands in the run already."""
    if story.completed:
        return Decision(kind="finished", reason="training is complete", cause=Cause.COMPLETED)
    decided = story.decided()
    if decided is not None and decided.get("decision") in ("stop", "finished"):
        calm = decided.get("cause") in (Cause.CANCELLED.value, Cause.STOPPED.value)
        cause = Cause.STOPPED if calm else Cause.UNKNOWN
        return Decision(kind="stop", reason=str(decided.get("reason", "")), cause=cause)
    if story.cancelled:
        reason = f"cancelled by {story.cancelled}"
        return Decision(kind="stop", reason=reason, cause=Cause.CANCELLED)
    return None
