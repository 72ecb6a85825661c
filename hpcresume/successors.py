"""The jobs that follow the running one: what they are, and that one of them lives in the queue.

Used by the supervisor for its own successors; `submit` and `drive` make their jobs with it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from hpcresume import chain, files
from hpcresume.chain import Cause, Decision
from hpcresume.config import (
    RunConfig,
    SchedulerConfig,
    format_time,
    local_moment,
    parse_moment,
    parse_time,
)
from hpcresume.errors import SubmissionRejected, Unavailable
from hpcresume.journal import Journal, LinkRecords, Record
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import hardware
from hpcresume.scheduler.doctor.way import Way
from hpcresume.scheduler.hardware import Hardware
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState, Scheduler
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.story import Story, find_jobs, read_story, token_prefix, user_name
from hpcresume.training.clock import lead_time
from hpcresume.ways import way_of

#: A supervisor's log has one voice.
log = logging.getLogger("hpcresume.link")

#: First guesses of what a save takes, and of what a command takes that is told to leave.
_SAVE_S, _COMMAND_S = 10.0, 60.0


def job_spec(
    run: RunDir,
    config: RunConfig,
    *,
    lead_s: float,
    delay_s: int = 0,
    exclude: Sequence[str] = (),
    project: Path | None = None,
    run_id: str | None = None,
    way: Way | None = None,
) -> JobSpec:
    """The next job of a run, as frozen at submit. Its token is new.

    `project`, `run_id` and `way` stand in for what is not frozen yet; the job is Slurm's then.
    """
    on_slurm = True
    if run_id is None:
        identity = run.identify()
        run_id, project = str(identity["id"]), Path(identity["project"])
        on_slurm = identity["cluster"] == "slurm"
    environment = files.read_json_or_none(run.environment) or {}
    options = files.read_json_or_none(run.script_options)
    time_s, time_min_s, deadline = _times(config.scheduler, options or ())
    signal_s = int(lead_s) + 60
    shortest = time_min_s or time_s
    if shortest is not None:
        signal_s = max(1, min(signal_s, shortest // 2))
    return JobSpec(
        name=run.name,
        token=token_prefix(run_id) + secrets.token_hex(4),
        run=run.path,
        log=run.job_log,
        workdir=project or Path.cwd(),
        time_s=time_s,
        # Nobody else knows these two.
        time_min_s=time_min_s if on_slurm else None,
        deadline=deadline if on_slurm else None,
        signal_s=signal_s,
        begin_delay_s=delay_s,
        exclude_nodes=tuple(exclude),
        hardware=_pinned_to(run, config),
        allow_requeue=(way or way_of(run, config)).mode == "requeue",
        environment={**environment, "HPCRESUME_RUN": str(run.path)},
        script=run.script if run.script.exists() else None,
        script_options=tuple(options or ()),
    )


def _times(
    config: SchedulerConfig, options: Sequence[str]
) -> tuple[int | None, int | None, float | None]:
    """Limit, least limit and deadline of a job, as configured, else as its own script was given.

    In seconds; the deadline is a Unix time.
    """
    given = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    time = config.time or given.get("time")
    least = config.time_min or given.get("time-min")
    deadline = config.deadline or given.get("deadline")
    return (
        None if time is None else parse_time(time),
        None if least is None else parse_time(least),
        None if deadline is None else parse_moment(deadline, now=0.0),
    )


def lead_s(config: RunConfig, links: Sequence[LinkRecords]) -> float:
    """How long before a job's end the last save must begin, as links have measured it; seconds."""
    if config.chain.lead_s is not None:
        return config.chain.lead_s
    steps = [record["step_s"] for record in saves(links) if "step_s" in record]
    durations, guess_s = save_durations(links), _guess_s(config)
    if not durations:
        # A framework has saved before it was ever told to leave: that takes longer still.
        told = [float(record["save_s"]) for record in saves(links) if "save_s" in record]
        guess_s = max(guess_s, 2 * max(told, default=0.0))
    return lead_time(durations, steps, guess_s=guess_s)


def save_durations(links: Sequence[LinkRecords]) -> list[float]:
    """How long the newest saves of a run took, in seconds, the newest last."""
    return [float(record["seconds"]) for record in saves(links) if "seconds" in record]


def _guess_s(config: RunConfig) -> float:
    """A first guess of a save: how soon a command leaves that is told to, nobody can know."""
    if not config.command:
        return _SAVE_S
    limit_s = parse_time(config.scheduler.time) if config.scheduler.time else None
    return _COMMAND_S if limit_s is None else min(_COMMAND_S, limit_s / 4)


def saves(links: Sequence[LinkRecords]) -> list[Record]:
    """The newest saves of a run."""
    return [record for link in links for record in link.all("saved")][-32:]


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


def note_queued(
    run: RunDir, job: str, spec: JobSpec, journal: Callable[..., Journal] = Journal
) -> None:
    """Record a job that no link has queued, but somebody on a login node."""
    about = {"after_link": run.newest_link(), "by": user_name()}
    with contextlib.closing(journal(run.submissions, link=0, job=None)) as submissions:
        submissions.write("queued", queued_job=job, **about, **_promised(spec))


def _promised(spec: JobSpec) -> dict[str, float | None]:
    """What a job may take, for its record: from it the chain's calendar is made."""
    return {"time_s": spec.time_s, "time_min_s": spec.time_min_s, "deadline": spec.deadline}


def cancelled_waiting(job: JobInfo) -> Decision:
    """What follows where a job was cancelled before it began: its user wants no further one."""
    who = "user unknown" if job.cancelled_by in ("", "unknown") else job.cancelled_by
    reason = f"the waiting job {job.id} was cancelled by {who}: the chain ends here"
    return Decision(kind="stop", reason=reason, cause=Cause.CANCELLED)


def too_late(spec: JobSpec, now: float) -> Decision | None:
    """Why no job like this may follow at `now` (Unix seconds of Slurm's clock); None: it may.

    Slurm would take it, and remove it from the queue, where nobody is left to say why.
    """
    if not spec.too_late(now):
        return None
    assert spec.deadline is not None
    least = spec.time_min_s or spec.time_s
    job = "a job" if least is None else f"a job of {format_time(least)}"
    when = local_moment(spec.deadline)
    reason = f"{job} that begins now could not end before the deadline, {when}"
    return Decision(kind="stop", reason=reason, cause=Cause.EXPIRED, rule="expired")


def expired_waiting(job: JobInfo) -> Decision:
    """What follows where Slurm removed a job before it began, for its deadline."""
    reason = f"the waiting job {job.id} could not end before its deadline, and Slurm removed it"
    return Decision(kind="stop", reason=reason, cause=Cause.EXPIRED, rule="expired")


class Successors:
    """The jobs that wait behind job `job_id` of a run; without a scheduler there are none."""

    def __init__(
        self, run: RunDir, config: RunConfig, scheduler: Scheduler | None, job_id: str | None
    ) -> None:
        self._run = run
        self._config = config
        self._scheduler = scheduler if job_id is not None else None
        self._job_id = job_id or ""
        self._run_id = str(run.identify()["id"])
        self._way = way_of(run, config)
        self._journal: Journal | None = None
        self._submitted: list[str] = []
        self._avoided: Sequence[str] = ()
        self._lead_s = 0.0

    def begin(self, journal: Journal, *, lead_s: float, avoided: Sequence[str]) -> None:
        """From here on jobs may be submitted: recorded in `journal`, on other nodes than these."""
        self._journal = journal
        self._lead_s = lead_s
        self._avoided = avoided

    # ---- what waits ----------------------------------------------------------------------

    def has_spare(self, story: Story) -> bool:
        """Whether one is in the queue already, as the journals tell; nobody is asked."""
        return bool(self._believed(story))

    def cancelled_one(self, story: Story) -> Decision | None:
        """A job of the run that its user cancelled before it began: the wish to end the chain."""
        if self._scheduler is None:
            return None
        missing = self._unclaimed(story)
        if not missing:
            return None
        try:
            living = {job.id for job in find_jobs(self._scheduler, self._run_id)}
            missing = [id for id in missing if id not in living]
            ended = self._scheduler.state(missing) if missing else {}
        except Unavailable as error:
            log.warning("%s", error)
            return None
        for info in ended.values():
            if info.state is JobState.CANCELLED:
                return cancelled_waiting(info)
        return None

    def _unclaimed(self, story: Story) -> list[str]:
        """The jobs that links since the last submission have queued, and that began none yet."""
        claimed = {str(link.claim.get("job")) for link in story.links} | {self._job_id}
        links = [link for link in story.links if link.number > story.after_link]
        queued = [str(r["queued_job"]) for link in links for r in link.all("queued")]
        return [id for id in dict.fromkeys([*queued, *self._submitted]) if id not in claimed]

    def _believed(self, story: Story) -> list[str]:
        """Those of them that should wait now, as the journals tell.

        What a job that has begun waited for is over, although it may never have come to a claim.
        """
        begun = {str(link.claim.get("job")) for link in story.links} | {self._job_id}
        queued = [record for link in story.links for record in link.all("queued")]
        begun_ones = [record for record in queued if str(record["queued_job"]) in begun]
        over = {str(id) for record in begun_ones for id in record.get("after", ())}
        return [id for id in self._unclaimed(story) if id not in over]

    def _waiting(self) -> list[str]:
        assert self._scheduler is not None
        jobs = find_jobs(self._scheduler, self._run_id)
        return [j.id for j in jobs if j.state is JobState.PENDING and j.id != self._job_id]

    def _waiting_or_believed(self) -> list[str]:
        """Where the queue cannot be read, what the journals say must do."""
        try:
            return self._waiting()
        except Unavailable as error:
            log.warning("%s", error)
            return self._believed(read_story(self._run))

    # ---- queueing ------------------------------------------------------------------------

    def queue_ahead(self) -> None:
        """Queue what is missing of the links ahead, each behind all that are alive."""
        if self._scheduler is None or self._way.mode != "prequeue":
            return
        try:
            waiting = self._waiting_or_believed()
            while len(waiting) < self._way.ahead:
                waiting.append(self._submit([self._job_id, *waiting]))
        except (Unavailable, SubmissionRejected) as error:
            # The end of this link tries again, and the other ways.
            log.warning("no further link could be queued ahead: %s", error)

    def too_late(self, now: float) -> Decision | None:
        """The end of the chain where no further job could end before the deadline; else None.

        `now` is Unix time by the scheduler's clock.
        """
        asked = self._config.scheduler.deadline or self._run.script_options.exists()
        if self._scheduler is None or not asked:
            return None
        return too_late(job_spec(self._run, self._config, lead_s=self._lead_s), now)

    def ensure_one(self, decision: Decision) -> Decision:
        """Leave only with a living successor in the queue, or a reason for having none.

        The decision that then stands: as it was, or a stop with what the scheduler said. Where a
        login node drives the run, that one looks after the successor.
        """
        if self._scheduler is None:
            return decision
        if self._way.mode == "drive":
            log.info("next: `hpcresume drive %s` on a login node submits it", self._run.name)
            return decision
        ways = [self._keep_or_submit, self._requeue]
        if self._way.mode == "requeue":
            ways.reverse()
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
        assert self._scheduler is not None
        try:
            waiting = self._waiting()
        except Unavailable as error:
            log.warning("%s", error)
            self._submit_unseen(decision)
            return
        if not waiting:
            waiting = [self._submit([self._job_id], decision)]
        elif decision.delay_s or decision.exclude_nodes:
            try:
                self._scheduler.update(
                    waiting[0],
                    exclude_nodes=decision.exclude_nodes or None,
                    begin_delay_s=decision.delay_s or None,
                )
            except (SubmissionRejected, Unavailable) as error:
                # It lives, and goes on as it was queued.
                log.warning("%s", error)
        log.info("next: job %s", waiting[0])

    def _submit_unseen(self, decision: Decision) -> None:
        """Queue one more behind those that should be there, where nobody tells whether they are.

        One too many leaves within seconds. Where none can be queued, those must do.
        """
        believed = self._believed(read_story(self._run))
        try:
            job = self._submit([self._job_id, *believed], decision)
        except (SubmissionRejected, Unavailable) as error:
            if not believed:
                raise
            log.warning("%s", error)
            job = believed[0]
        log.info("next: job %s", job)

    def _requeue(self, _decision: Decision) -> None:
        assert self._scheduler is not None
        self._scheduler.update(self._job_id, requeue=True)
        log.info("next: job %s again (requeued)", self._job_id)

    def _submit(self, after: Sequence[str], decision: Decision | None = None) -> str:
        assert self._scheduler is not None and self._journal is not None
        pin_hardware(self._run, self._config, self._scheduler)
        fresh = decision.exclude_nodes if decision else ()
        spec = job_spec(
            self._run,
            self._config,
            lead_s=self._lead_s,
            delay_s=decision.delay_s if decision else 0,
            exclude=list(dict.fromkeys([*fresh, *self._avoided]))[: chain.MOST_EXCLUDED],
        )
        job = self._scheduler.submit(spec, after)
        self._submitted.append(job)
        about = {"after": list(after), "token": spec.token, "lead_s": round(self._lead_s, 3)}
        self._journal.write("queued", queued_job=job, **about, **_promised(spec))
        log.debug("queued job %s after %s", job, ", ".join(after))
        return job

    def drop(self) -> None:
        """Cancel what still waits; the reason stands in the journal already."""
        if self._scheduler is None:
            return
        try:
            waiting = self._waiting()
            if waiting:
                self._scheduler.cancel(waiting)
                log.debug("cancelled the waiting jobs %s", ", ".join(waiting))
        except Unavailable as error:
            log.warning(
                "waiting jobs could not be cancelled; they will leave by themselves: %s", error
            )
