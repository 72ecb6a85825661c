"""Slurm, through its own clients: the `Scheduler` of clusters.

What cannot be reached raises Unavailable, what Slurm refuses SubmissionRejected with its words.
The clients are called in `slurm_clients`, their answers read in `slurm_text`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hpcresume.config import SchedulerConfig
from hpcresume.errors import SubmissionRejected, Unavailable
from hpcresume.scheduler import hardware, process, script, slurm_text
from hpcresume.scheduler.environment import JOB_VARIABLES, PLACE_VARIABLES, node_names
from hpcresume.scheduler.frozen_options import asked_limit, asked_nodes, frozen_options
from hpcresume.scheduler.hardware import Hardware
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState
from hpcresume.scheduler.slurm_clients import SlurmClients, is_end

log = logging.getLogger(__name__)

#: Pauses after a submission without an answer; then the queue is searched for the job.
_SUBMIT_PAUSES_S = (2.0, 5.0, 10.0)
#: How long cancelled jobs may go on, before `cancel` gives up.
_CANCEL_S = 30.0
_CANCEL_POLL_S = 0.2

#: sbatch's arguments for a job that is to start after others.
_Arguments = Callable[[JobSpec, Sequence[str]], list[str]]


class Launcher(Protocol):
    """What turns a job into a batch script that executes a link, and hands it to sbatch."""

    def launch(
        self,
        spec: JobSpec,
        text_of: Callable[[Sequence[str], Sequence[str]], str],
        sbatch: Callable[[Path], str],
    ) -> str:
        """Submit the script that `text_of(command, prepare)` gives; returns the job id."""


class SlurmScheduler:
    """The jobs of one user on a Slurm cluster; see `scheduler.job.Scheduler`.

    `environ` is the environment that the clients are called from. Without a `launcher` nothing
    but a user's own script can be submitted.
    """

    name = "slurm"

    def __init__(
        self, config: SchedulerConfig, *, environ: Mapping[str, str], launcher: Launcher | None
    ) -> None:
        self._config = config
        self._environ = environ
        self._launcher = launcher
        self._clients = SlurmClients(environ)

    # ---- submitting ----------------------------------------------------------------------

    def submit(self, spec: JobSpec, after: Sequence[str] = ()) -> str:
        """Queue a job that may start when all of `after` have ended; returns its id.

        Where sbatch got no answer, the queue is searched for the spec's token before it is called
        again. Ids in `after` that Slurm has forgotten count as ended, and nodes are excluded only
        where Slurm takes the job without them.
        """
        if spec.script is not None:
            own = str(spec.script)
            return self._submit(
                lambda job, known: [*script.script_arguments(job, self._config, known), own],
                spec,
                after,
            )
        assert self._launcher is not None, "this SlurmScheduler was made without a launcher"

        def text_of(command: Sequence[str], prepare: Sequence[str]) -> str:
            return script.render(spec, self._config, command, after, prepare)

        def arguments(job: JobSpec, known: Sequence[str]) -> list[str]:
            """What takes the place of the wishes in the script, where they are given up."""
            changed = []
            if list(known) != list(after):
                changed.append(f"--dependency={script.dependency(known)}")
            if job.exclude_nodes != spec.exclude_nodes:
                changed.append(f"--exclude={self._config.exclude or ''}")
            return changed

        def sbatch(path: Path) -> str:
            return self._submit(lambda *wishes: [*arguments(*wishes), str(path)], spec, after)

        return self._launcher.launch(spec, text_of, sbatch)

    def _submit(self, arguments: _Arguments, spec: JobSpec, after: Sequence[str]) -> str:
        """Call sbatch until it is certain whether there is a job; see `submit`."""
        complaint = ""
        for attempt, pause_s in enumerate(_SUBMIT_PAUSES_S):
            try:
                id = self._sbatch_conceding(arguments, spec, after)
                return self._only_one(id, spec.token) if attempt else id
            except Unavailable as error:
                complaint = str(error)
            # It may have been taken all the same.
            log.warning("%s Looking for the job in the queue.", complaint)
            time.sleep(pause_s)
            with contextlib.suppress(Unavailable):
                for job in self.find(spec.token):
                    return self._only_one(job.id, spec.token)
        raise Unavailable(complaint)

    def _sbatch_conceding(self, arguments: _Arguments, spec: JobSpec, after: Sequence[str]) -> str:
        """Submit; where Slurm refuses it, once more without what the chain can do without.

        That are ids whose records are gone, which Slurm refuses from 23.02 on (such jobs have
        ended), and nodes to avoid, without which there may be too few.
        """
        try:
            return self._sbatch(arguments(spec, after), spec)
        except SubmissionRejected as refusal:
            said = str(refusal).lower()
            known = self._remembered(after) if "dependency" in said else list(after)
            job = replace(spec, exclude_nodes=()) if "node" in said else spec
            if known == list(after) and job == spec:
                raise
            log.warning("%s. Trying again with fewer wishes.", refusal)
        return self._sbatch(arguments(job, known), spec)

    def _remembered(self, ids: Sequence[str]) -> list[str]:
        """Those jobs that the controller still knows, ended or not."""
        if not ids:
            return []
        jobs = self._clients.squeue("--states=all", f"--jobs={','.join(ids)}")
        return [id for id in ids if id in {job.id for job in jobs}]

    def _sbatch(self, arguments: Sequence[str], spec: JobSpec) -> str:
        environ = self._submission_environ(spec)
        done = self._clients.call("sbatch", "--parsable", *arguments, environ=environ)
        if done.code:
            raise SubmissionRejected(f"Slurm refused the job: {slurm_text.words(done.err)}")
        id = slurm_text.parse_job_id(done.out)
        if id is None:
            raise Unavailable(f"sbatch gave no job id but {done.out.strip()!r}.")
        return id

    def _submission_environ(self, spec: JobSpec) -> dict[str, str]:
        """The environment frozen at submit, which the job inherits; without any job's traces."""
        environ = process.scrubbed(spec.environment)
        # Where the clients find Slurm here may differ from where they did at submit.
        if "SLURM_CONF" in self._environ:
            environ["SLURM_CONF"] = self._environ["SLURM_CONF"]
        leftovers = JOB_VARIABLES | PLACE_VARIABLES
        return {name: value for name, value in environ.items() if name not in leftovers}

    def _only_one(self, id: str, token: str) -> str:
        """The oldest job with a token; younger ones were submitted twice and are cancelled.

        A controller that was stuck may take a job long after sbatch has given up on it.
        """
        with contextlib.suppress(Unavailable):
            twins = [job.id for job in self.find(token)]
            if len(twins) > 1:
                log.warning("Job %s was submitted more than once; the others go.", twins[0])
                self.cancel(twins[1:])
                return twins[0]
        return id

    def test_only(self, spec: JobSpec) -> slurm_text.FirstStart:
        """When a job would start, as the queue is now: what sbatch --test-only says.

        It looks neither at the partition's limit nor at the deadline. Raises SubmissionRejected.
        """
        if spec.script is not None:
            arguments = [*script.script_arguments(spec, self._config, ()), str(spec.script)]
            text = None
        else:
            arguments, text = [], script.render(spec, self._config, ["true"])
        environ = self._submission_environ(spec) | {"SLURM_TIME_FORMAT": "%s"}
        done = self._clients.call("sbatch", "--test-only", *arguments, environ=environ, text=text)
        said = slurm_text.words(done.err)
        if done.code:
            raise SubmissionRejected(f"Slurm would refuse the job: {said}")
        return slurm_text.parse_first_start(said)

    # ---- asking --------------------------------------------------------------------------

    def find(self, token_prefix: str) -> list[JobInfo]:
        """The living jobs of this user whose token begins so, oldest first."""
        return self._clients.living(token_prefix)

    def state(self, ids: Sequence[str]) -> dict[str, JobInfo]:
        """What became of jobs: of the queue, the accounting and the controller, who knows most.

        A job that completes is still in the queue, which does not say why it ends; the accounting
        does. Of a job that was requeued its newest life counts.
        """
        queue: dict[str, JobInfo] = {}
        outage: Unavailable | None = None
        try:
            if ids:
                jobs = self._clients.squeue(f"--jobs={','.join(ids)}")
                queue = {job.id: job for job in jobs if not job.state.ended}
        except Unavailable as error:
            outage = error
        going = [id for id, job in queue.items() if job.state is not JobState.COMPLETING]
        self._clients.forget(going)
        records = self._clients.newest_records([id for id in ids if id not in going])
        return {id: self._known(id, queue.get(id), records.get(id), outage) for id in ids}

    def _known(
        self, id: str, queued: JobInfo | None, record: JobInfo | None, outage: Unavailable | None
    ) -> JobInfo:
        if record is not None and is_end(record):
            return record
        if queued is not None:
            return queued
        if outage is not None:
            raise outage
        fields = self._clients.describe(id)
        if fields is not None:
            return slurm_text.job_of_fields(fields)
        return record or JobInfo(id=id, state=JobState.UNKNOWN)

    def end_time(self, id: str) -> float | None:
        """Unix time at which a RUNNING job reaches its limit, as it stands now."""
        return next((job.end_time for job in self._clients.squeue(f"--jobs={id}")), None)

    def lives(self, id: str) -> list[JobInfo]:
        """Every life of a job that was requeued, oldest first, as the accounting tells."""
        return self._clients.records([id]).get(id, [])

    def partition_limit_s(self, partition: str | None) -> tuple[str, int | None] | None:
        """Name and time limit of a partition, by default the cluster's own; None if not known.

        Of several with commas the one with the longest limit. No limit is None.
        """
        names = partition.split(",") if partition else None
        limits = [
            (block["PartitionName"], slurm_text.limit_s(block.get("MaxTime", "")))
            for block in self._partitions()
            if (block["PartitionName"] in names if names else block.get("Default") == "YES")
        ]
        return max(limits, key=lambda limit: limit[1] or float("inf"), default=None)

    def _partitions(self) -> list[dict[str, str]]:
        done = self._clients.call("scontrol", "--all", "show", "partition")
        return slurm_text.parse_partitions(done.out)

    def hardware_of(self, node_list: str) -> Hardware:
        """What the nodes of a list have in common. Raises Unavailable where they are unknown."""
        done = self._clients.call("scontrol", "show", "node", node_list)
        nodes = slurm_text.parse_nodes(done.out)
        if not nodes:
            said = slurm_text.words(done.err or done.out)
            raise Unavailable(f"Slurm does not describe {node_list}: {said}.")
        return hardware.common(nodes)

    def frozen_script(self, job_id: str) -> tuple[str, tuple[str, ...]]:
        """The batch script of a job and its real options, to submit the same job again.

        Raises SubmissionRejected where Slurm does not give them.
        """
        done = self._clients.call("scontrol", "write", "batch_script", job_id, "-")
        fields = self._clients.describe(job_id)
        if not done.out or fields is None:  # The exit code is 0 all the same.
            raise SubmissionRejected(
                f"Slurm does not give the script of job {job_id}: {slurm_text.words(done.err)}"
            )
        if "TimeMin" in fields:
            line = self._clients.submit_line(job_id)
            asked = asked_limit(line, self._environ, done.out)
            fields["TimeLimit"] = asked or fields["TimeLimit"]
        nodes = asked_nodes(done.out, lambda: self._clients.submit_line(job_id))
        if nodes is not None:
            fields["NumNodes"] = nodes
        return done.out, frozen_options(fields, self._environ)

    # ---- changing ------------------------------------------------------------------------

    def update(
        self,
        id: str,
        *,
        exclude_nodes: Sequence[str] | None = None,
        begin_delay_s: int | None = None,
        requeue: bool = False,
    ) -> None:
        """Change a pending job, or put a running one back into the queue.

        Nodes are excluded besides those that already are; but not where too few would be left
        for the job, which would wait for ever.
        """
        changes = []
        if exclude_nodes:
            fields = self._clients.describe(id) or {}
            excluded = script.joined(fields.get("ExcNodeList"), *exclude_nodes)
            if self._enough_nodes(fields, excluded):
                changes.append(f"ExcNodeList={excluded}")
            else:
                log.warning("Job %s may use %s again: other nodes are too few.", id, excluded)
        if begin_delay_s is not None:
            changes.append(f"StartTime=now+{begin_delay_s}")
        if changes:
            self._control("update", f"JobId={id}", *changes)
        if requeue:
            self._requeue(id)

    def _requeue(self, id: str) -> None:
        # A job that is pending again has what was wished for.
        pending = "pending execution"
        try:
            self._control("requeue", id, unless=pending)
        except SubmissionRejected as refusal:
            # Jobs that others follow are submitted with --no-requeue; who did may take it back.
            if "disabled" not in str(refusal):
                raise
            self._control("update", f"JobId={id}", "Requeue=1")
            self._control("requeue", id, unless=pending)

    def _enough_nodes(self, fields: Mapping[str, str], excluded: str) -> bool:
        """Whether a job's partitions have enough nodes without some; yes where that is unknown."""
        needed = int(fields.get("NumNodes", "1").partition("-")[0])
        names = fields.get("Partition", "").split(",")
        without = set(node_names(excluded))
        if "Features" in fields:
            done = self._clients.call("scontrol", "show", "node")
            nodes = hardware.having(slurm_text.parse_nodes(done.out), fields["Features"])
            left = [node for node in nodes if node["NodeName"] not in without]
            places = [node.get("Partitions", "").split(",") for node in left]
            counts = [sum(name in place for place in places) for name in names if done.out]
        else:
            blocks = [p for p in self._partitions() if p["PartitionName"] in names]
            counts = [int(block["TotalNodes"]) - len(without) for block in blocks]
        return not counts or max(counts) >= needed

    def mark(self, id: str, token: str) -> None:
        """Give a job of this user a token, so that `find` knows it. Raises SubmissionRejected."""
        self._control("update", f"JobId={id}", f"Comment={token}")

    def _control(self, *arguments: str, unless: str = "\n") -> None:
        done = self._clients.call("scontrol", *arguments)
        said = slurm_text.words(done.err)
        if done.code and unless not in said:
            raise SubmissionRejected(f"Slurm refused to {arguments[0]} a job: {said}")

    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs: pending ones first, so that none starts because another has ended.

        Returns when all have left the queue or are completing.
        """
        deadline = time.monotonic() + _CANCEL_S
        while ids:
            queue = self._clients.squeue(f"--jobs={','.join(ids)}")
            leaving = JobState.COMPLETING
            living = [j for j in queue if not j.state.ended and j.state is not leaving]
            pending = [job.id for job in living if job.state is JobState.PENDING]
            ids = [job.id for job in living]
            if not ids:
                return
            said = slurm_text.words(self._clients.call("scancel", *(pending or ids)).err)
            if "denied" in said.lower() or time.monotonic() > deadline:
                why = said or f"still alive after {_CANCEL_S:.0f} s"
                raise Unavailable(f"Jobs {', '.join(ids)} could not be cancelled: {why}.")
            time.sleep(_CANCEL_POLL_S)
