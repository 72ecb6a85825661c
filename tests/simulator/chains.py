"""One random chain from its submission to its end, with what must hold on the way and then.

The supervisor, its decisions, its queueing and the journals are the production code; the cluster,
the clock and the training are simulated. A seed gives the same chain every time.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import driver
import faults
import ranks
from cluster import EPOCH, Cluster, Job, Killed, Life, SimulatedScheduler, Violation

from hpcresume import link
from hpcresume.config import read_frozen
from hpcresume.errors import HpcResumeError
from hpcresume.journal import read_metrics
from hpcresume.link import LinkOutcome, Surroundings
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.job import JobState
from hpcresume.signals import SignalFlags
from hpcresume.story import Story, read_story, token_prefix
from hpcresume.successors import job_spec, note_queued

#: More jobs than any chain here can need.
_MOST_JOBS = 150
#: A link that was overtaken has looked by then, and left.
_LEAVES_WITHIN_S = 15.0
_LEAD_S = 12.0
#: How often a user cancels the one job that waits in a chain that is driven.
_CANCELLED_BEFORE_IT_BEGINS = 0.03


@dataclass(frozen=True)
class SimulatedRun(RunDir):
    """A run whose claims are watched, and raced for."""

    chain: Any = None

    def claim_after(self, newest: int, claim: Any) -> LinkDir | None:
        self.chain.race()
        taken = super().claim_after(newest, claim)
        if taken is not None:
            self.chain.claimed(taken.number, newest)
        return taken


@dataclass(frozen=True)
class End:
    """How a chain ended."""

    kind: str
    """completed or stopped."""
    reason: str
    steps: int
    """That the run's metric log tells, each once."""
    max_steps: int
    links: int
    faults: tuple[str, ...]
    driver_faults: tuple[str, ...] = ()


class SimulatedChain:
    """The chain of one seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.plan = faults.plan(seed)
        self.lines: list[str] = []
        self.cluster = Cluster(self.plan, self.tell)
        self.cluster.faulty = self._happen
        self.cluster.may_die = self._may_die
        self.cluster.check_queueing = self._check_queueing
        self.truth = ranks.Truth()
        self.run = SimulatedRun(folder / "chain", chain=self)
        self.owners: dict[int, str] = {}
        self.drawn: list[str] = []
        self.cancelled_at = math.inf
        """When a user's wish to end the chain could be known to every link that begins later."""
        self._ranks: dict[int, ranks.SimulatedRanks] = {}
        self.driver: driver.SimulatedDriver | None = None
        """Submits the jobs, where jobs do not."""

    def tell(self, line: str) -> None:
        self.lines.append(f"{self.cluster.elapsed:8.1f}  {line}")

    # ---- the whole -------------------------------------------------------------------------

    def play(self) -> End:
        """Let it run to its end. Raises Violation, with the seed and the story."""
        try:
            self._submit()
            while self._serve_one():
                pass
            return self._judge()
        except Violation as error:
            story = "\n".join([*self.lines, *self._records()])
            raise Violation(f"seed {self.seed}: {error}\n{self.plan}\n{story}") from error
        finally:
            for started in self._ranks.values():
                started.close()
            shutil.rmtree(self.run.path, ignore_errors=True)

    def _submit(self) -> None:
        plan = self.plan
        budgets = [
            f"no_progress_links: {plan.no_progress_links}",
            f"max_crashes: {plan.max_crashes}",
        ]
        if plan.max_links is not None:
            budgets.append(f"max_links: {plan.max_links}")
        chain = ", ".join([f"mode: {plan.mode}", f"lead_s: {_LEAD_S}", "hang_s: 4", *budgets])
        frozen = (
            f"name: chain\ntrain: toy.py:train\nmax_steps: {plan.max_steps}\n"
            f"chain: {{{chain}}}\nlog: {{level: ERROR}}\n"
        )
        self.run.create(frozen, cluster="slurm", project=self.run.path, versions={})
        journal = self._journal(self.run.submissions, link=0, job=None)
        journal.write("submitted", after_link=0, token="t", by="ada", host="login1")
        journal.close()
        run_id = str(self.run.identify()["id"])
        job = self.cluster.add(f"{token_prefix(run_id)}0", (), 0.0)
        spec = job_spec(self.run, read_frozen(self.run.config), lead_s=_LEAD_S)
        note_queued(self.run, job.id, spec, self._journal)
        if plan.mode == "drive":
            self.driver = driver.SimulatedDriver(self.run, self.cluster, self._journal)

    def _serve_one(self) -> bool:
        """The life of the next job that may start; False where none may, and none is to come."""
        job = self.cluster.next_to_start()
        while self._let_driver_look(math.inf if job is None else job.begin_at):
            job = self.cluster.next_to_start()
        if job is None:
            return False
        if len(self.cluster.jobs) > _MOST_JOBS:
            raise Violation("the chain does not end")
        self.cluster.elapsed = max(self.cluster.elapsed, job.begin_at)
        self._live(job)
        return True

    def _let_driver_look(self, by: float) -> bool:
        """Whether it was the driver's turn by that time."""
        if self.driver is None or self.driver.looks_at > by or self.driver.looks_at == math.inf:
            return False
        queued = self.driver.look()
        if self.driver.over is not None and not self._settled():
            raise Violation("the driver leaves without a recorded reason")
        if queued and self.cluster.dice.random() < _CANCELLED_BEFORE_IT_BEGINS:
            for job in self.cluster.waiting():
                self.cluster.cancel(job, "ada")
                self._wish_to_end(known_after_s=self.plan.accounting_lag_s)
        return True

    # ---- one job ---------------------------------------------------------------------------

    def _live(self, job: Job) -> None:
        cluster, dice = self.cluster, self.cluster.dice
        fault = self._fitting(faults.draw(dice))
        life = Life(job, fault, cluster.elapsed, limit=cluster.elapsed + self.plan.job_s)
        when = cluster.elapsed + dice.uniform(0, 0.9 * self.plan.job_s)
        if fault == "killed at any moment":
            life.fault_moment = dice.randint(1, 150)
        elif fault:
            life.fault_at = when
        job.state = JobState.RUNNING
        self.drawn.append(fault)
        self.tell(f"job {job.id} starts{f', and meets: {fault}' if fault else ''}")
        cluster.lives.append(life)
        try:
            state = self._supervise(life)
        finally:
            cluster.lives.pop()
        if life.flags.stop_asked() and state is not JobState.UNKNOWN:
            state = life.kill_as
        cluster.over(job, state)

    def _supervise(self, life: Life) -> JobState:
        """The production supervisor as the job's process; the state that its job ends in."""
        job = life.job
        environ = {
            "SLURM_JOB_ID": job.id,
            "SLURM_RESTART_COUNT": str(job.restarts),
            "SLURM_JOB_NODELIST": f"n{job.id}",
            "SLURM_JOB_END_TIME": str(EPOCH + life.limit),
        }
        if life.fault == "dies before its first line" and self._may_die(life):
            return JobState.FAILED
        try:
            outcome = link.supervise(self.run, environ, self._around(life))
        except Killed:
            self._gone(life)
            return life.kill_as
        except HpcResumeError as error:
            self.tell(f"job {job.id} leaves: {error}")
            self._gone(life)
            if not self._followed(job) and not self._settled():
                raise Violation(f"job {job.id} left without a successor or a reason") from error
            return JobState.FAILED
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"the supervisor failed: {type(error).__name__}: {error}") from error
        self._gone(life)
        self._check_hand_over(life, outcome)
        return JobState.FAILED if outcome.exit_code else JobState.COMPLETED

    def _gone(self, life: Life) -> None:
        started = self._ranks.pop(id(life), None)
        if started is not None:
            started.close()

    def _around(self, life: Life) -> Surroundings:
        cluster = self.cluster

        @contextlib.contextmanager
        def listen() -> Iterator[SignalFlags]:
            yield life.flags

        def start(*_args: Any, environ: dict[str, str], **_options: Any) -> Any:
            cluster.moment()
            self._check_start(life)
            started = ranks.start(cluster, self.truth, self.run, environ)
            self._ranks[id(life)] = started
            self.tell(f"job {life.job.id} trains link {started.seen.link}")
            return started

        return Surroundings(
            scheduler_of=lambda *_: SimulatedScheduler(cluster),
            start=start,
            listen=listen,
            journal=self._journal,
            now=cluster.now,
            monotonic=cluster.monotonic,
            sleep=self._sleep,
            chance=cluster.dice.random,
        )

    def _journal(self, path: Path, *, link: int, job: str | None) -> ranks.ClockedJournal:
        return ranks.ClockedJournal(path, link=link, job=job, cluster=self.cluster)

    def _sleep(self, seconds: float) -> None:
        self.cluster.sleep(seconds)
        self._let_driver_look(self.cluster.elapsed)
        life, mine = self.cluster.life, self._ranks.get(id(self.cluster.life))
        if mine is None or max(self.owners) == mine.seen.link:
            return
        if life.overtaken_at is None:
            life.overtaken_at = self.cluster.elapsed
        if self.cluster.elapsed - life.overtaken_at > _LEAVES_WITHIN_S and mine.poll() is None:
            raise Violation(f"link {mine.seen.link} trains on although a newer one has claimed")

    # ---- races for a claim -----------------------------------------------------------------

    def race(self) -> None:
        """Between a look at the links and a claim, another job may take the number."""
        life = self.cluster.life
        if life.fault == "node lost and back" and (self._others(life.job) or self._driven()):
            self._lose_node(life)

    def claimed(self, number: int, newest: int) -> None:
        job = self.cluster.life.job
        start = f"{job.id}.{job.restarts}"
        if number in self.owners:
            raise Violation(f"link {number} is claimed by jobs {self.owners[number]} and {start}")
        if number != newest + 1:
            raise Violation(f"job {start} overtakes link {number - 1}, which it does not know of")
        self.owners[number] = start
        self.tell(f"job {job.id} claims link {number}")
        self.cluster.moment()

    # ---- faults ----------------------------------------------------------------------------

    def _fitting(self, fault: str) -> str:
        """Only what the way of queueing promises to survive."""
        alone = self.plan.mode in ("resubmit", "requeue")
        deadly = fault in faults.ABRUPT or fault in (
            "node lost and back",
            "dies before its first line",
        )
        return "" if alone and deadly else fault

    def _happen(self, life: Life) -> None:
        """A life's fault is due."""
        cluster, job, dice = self.cluster, life.job, self.cluster.dice
        mine = self._ranks.get(id(life))
        match life.fault:
            case "supervisor killed" | "killed at any moment" if self._may_die(life):
                cluster.kill(life, JobState.FAILED)
            case "node failure" if self._may_die(life):
                cluster.kill(life, JobState.NODE_FAIL)
            case "node lost and back" if self._may_die(life):
                self._lose_node(life)
            case "rank killed" | "host memory" if mine is not None:
                mine.strike("memory" if life.fault == "host memory" else "killed")
            case "exception" if mine is not None:
                mine.raises = "bad luck"
            case "preempted":
                cluster.end_softly(life, JobState.PREEMPTED)
            case "preempted and requeued":
                job.requeue = True
                cluster.end_softly(life, JobState.PREEMPTED)
            case "scancel":
                cluster.cancel(job, "ada")
                self._wish_to_end(known_after_s=self.plan.accounting_lag_s)
            case "scancel of a waiting job" if self._others(job):
                cluster.cancel(dice.choice(self._others(job)), "ada")
                self._wish_to_end(known_after_s=self.plan.accounting_lag_s)
            case "cancel":
                self.run.cancel.write_text('{"by": "ada"}')
                for other in self._others(job):
                    cluster.cancel(other, "ada")
                self._wish_to_end(known_after_s=0.0)
            case "STOP":
                self.run.stop.touch()
            case driver.KILLED | driver.SLOW if self.driver is not None:
                self.driver.met.append(life.fault)
                self.tell(life.fault)
                if life.fault == driver.KILLED:
                    raise Killed(life.fault)
                self._serve_one()
                return
            case _:
                return
        self.tell(f"job {job.id}: {life.fault}")

    def _wish_to_end(self, *, known_after_s: float) -> None:
        if not self.plan.reachable and not self.run.cancel.exists():
            return
        self.cancelled_at = min(self.cancelled_at, self.cluster.elapsed + known_after_s)

    def _lose_node(self, life: Life) -> None:
        """The scheduler gives a job's node up, which only stood still for a while."""
        cluster = self.cluster
        life.fault_at, life.fault = math.inf, "node lost and back "
        life.limit = math.inf
        began = cluster.elapsed
        self.tell(f"job {life.job.id}: its node is lost")
        cluster.over(life.job, JobState.NODE_FAIL)
        for _ in range(cluster.dice.randint(1, 3)):
            self._serve_one()
        life.asleep += cluster.elapsed - began
        life.kill_at, life.kill_as = cluster.elapsed + 120, JobState.NODE_FAIL
        self.tell(f"job {life.job.id}: its node is back")

    def _may_die(self, life: Life) -> bool:
        """Whether no promise is broken by a death without a warning now.

        One that comes while the scheduler has taken no successor yet is a second fault. Where
        nothing hinders that, a job waits.
        """
        if self._followed(life.job) or self._settled():
            return True
        mine = self._ranks.get(id(life))
        calm = self.plan.mode == "prequeue" and self.plan.reachable
        if calm and mine is not None and self.cluster.elapsed - mine.seen.began > 5:
            raise Violation(f"nothing waits behind job {life.job.id}, which trains")
        return False

    def _followed(self, job: Job) -> bool:
        """Whether somebody is there to go on after a job."""
        return bool(self._others(job)) or job.requeue or self._driven()

    def _driven(self) -> bool:
        """Whether there is a driver, who sees to the next job."""
        return self.driver is not None and self.driver.over is None

    def _others(self, job: Job) -> list[Job]:
        return [other for other in self.cluster.waiting() if other is not job]

    # ---- what must hold --------------------------------------------------------------------

    def _settled(self) -> str:
        """The recorded reason for the chain's end; empty where there is none."""
        story = read_story(self.run)
        if story.completed:
            return "completed"
        return f"cancelled by {story.cancelled}" if story.cancelled else _reason(story)

    def _check_hand_over(self, life: Life, outcome: LinkOutcome) -> None:
        job = life.job
        if not life.flags.stop_asked():
            for seen in self.truth.trained[-1:]:
                seen.undisturbed = seen.job == job.id
        words = f"{outcome.decision or 'says nothing'}: {outcome.reason or outcome.cause}"
        self.tell(f"job {job.id} leaves; {words}")
        going = outcome.decision in ("continue", "")
        alone = not self._followed(job)
        # What a user cancels while nothing answers, nobody can learn of.
        unknown = self._was_cancelled() and not self.plan.reachable
        settled = (life.asleep or self.run.cancel.exists()) and self._settled()
        if going and alone and not settled and not unknown:
            raise Violation(f"job {job.id} hands over to nobody, and records no reason")
        if not going and not self._settled():
            raise Violation(f"job {job.id} ends the chain without recording why")
        if going and not life.asleep and read_story(self.run).completed:
            raise Violation("training is complete, and the chain goes on")

    def _check_queueing(self) -> None:
        """A driver knows all that there is to know; a link queues before it can."""
        if self.driver is not None and any(job.state.alive for job in self.cluster.jobs.values()):
            raise Violation("a job is queued although one lives")
        if self.driver is not None and self._settled():
            raise Violation("a job is queued although the chain has ended")

    def _check_start(self, life: Life) -> None:
        """A link is about to train."""
        if life.began > self.cancelled_at:
            raise Violation("a link trains although the user has ended the chain")
        if any(seen.how == "completed" for seen in self.truth.trained):
            raise Violation("a link trains although training is complete")

    def _judge(self) -> End:
        story = read_story(self.run)
        completed = story.completed
        reason = self._settled()
        known = self.owners and self.plan.reachable
        if not reason and not known and self._was_cancelled():
            reason = "cancelled by its user where no link could learn of it"
        if not reason:
            raise Violation("the chain has ended without completion and without a reason")
        steps = [record["step"] for record in read_metrics(self.run)]
        if steps != list(range(1, len(steps) + 1)):
            raise Violation(f"a step is counted twice, or not at all: {steps}")
        if completed and len(steps) != self.plan.max_steps:
            raise Violation(f"complete after {len(steps)} of {self.plan.max_steps} steps")
        self._check_budgets()
        return End(
            kind="completed" if completed else "stopped",
            reason=reason,
            steps=len(steps),
            max_steps=self.plan.max_steps,
            links=len(self.truth.trained),
            faults=tuple(filter(None, self.drawn)),
            driver_faults=() if self.driver is None else tuple(self.driver.met),
        )

    def _was_cancelled(self) -> bool:
        return any(job.cancelled_by == "ada" for job in self.cluster.jobs.values())

    def _check_budgets(self) -> None:
        plan, trained = self.plan, self.truth.trained
        if plan.max_links is not None and len(trained) > plan.max_links:
            raise Violation(f"{len(trained)} links trained, of at most {plan.max_links}")
        steps = [seen.restored for seen in trained if seen.restored >= 0]
        if steps != sorted(steps):
            raise Violation(f"a link restored less than one before it: {steps}")
        idle = Counter(steps)
        if max(idle.values(), default=0) > plan.no_progress_links + 1:
            raise Violation(f"links went on without progress: {idle}")
        # What the scheduler ended besides is told by its word alone.
        told = [seen for seen in trained if seen.failure and seen.undisturbed]
        crashed = [seen for seen in told if seen.failure in ("ValueError", "OutOfMemoryError")]
        in_vain = Counter(seen.restored for seen in crashed if not self._progressed(seen))
        if max(in_vain.values(), default=0) > plan.max_crashes + 1:
            raise Violation(f"more crashes than the budget: {in_vain}")
        if sum(seen.failure == "NonFinite" and not seen.overtaken for seen in trained) > 1:
            raise Violation("a link trained on after a loss that was not finite")
        if sum(seen.failure == "CheckpointError" for seen in told) > 1:
            raise Violation("a link tried again what does not fit")
        same = Counter(
            (seen.failure, seen.failed_at, seen.restored)
            for seen in crashed
            if self._is_the_same(seen)
        )
        if max(same.values(), default=0) > 2:
            raise Violation(f"the same failure at the same step, again and again: {same}")

    def _progressed(self, seen: ranks.Trained) -> bool:
        return any(c.link == seen.link for c in self.truth.checkpoints)

    def _is_the_same(self, seen: ranks.Trained) -> bool:
        """Whether it failed as the plan has it, with words that tell one failure from another."""
        plan = self.plan
        if seen.failure == "OutOfMemoryError":
            return True
        return not plan.raises_anew and seen.failed_at == plan.raises_at

    def _records(self) -> Iterator[str]:
        """What the journals say, for a failed test."""
        hidden = {"v", "t", "kind", "link", "job", "numbers", "segments"}
        for records in read_story(self.run).links:
            for record in records.records:
                told = {name: value for name, value in record.items() if name not in hidden}
                yield f"{record['t'] - EPOCH:8.1f}  link {records.number}: {record['kind']} {told}"


def _reason(story: Story) -> str:
    decided = story.decided()
    if decided is None or decided.get("decision") not in ("stop", "finished"):
        return ""
    return str(decided.get("reason", ""))
