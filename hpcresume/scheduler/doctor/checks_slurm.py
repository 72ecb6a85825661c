"""Judges what Slurm told: each check gives one finding, or none where nothing is known. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from hpcresume.config import format_time
from hpcresume.scheduler import slurm_text
from hpcresume.scheduler.doctor.facts import Finding, SlurmFacts, Wishes, failure, good, warning
from hpcresume.scheduler.doctor.texts import exit_codes, first_number, version_of
from hpcresume.scheduler.doctor.way import requeue_hold_s
from hpcresume.scheduler.doctor.words import ASK_ADMIN, counted, dotted, listed

#: What a link's batch script may leave with, but for success.
EXIT_CODES = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9, 75, 130, 143})
#: Older ones are not known to work.
OLDEST_SLURM = (20, 11)
#: A job that is told to end and has less time than this is worth a word...
SHORT_KILL_WAIT_S = 10
#: ...and so is one that is preempted.
SHORT_NOTICE_S = 30
#: The controller's memory of ended jobs is all there is without accounting.
SHORT_MEMORY_S = 60
#: Slurm looks at limits every half minute, and a link must start, train and save.
SHORTEST_LIMIT_S = 180

_Check = Callable[[SlurmFacts, Wishes], "Finding | None"]


def judge_slurm(facts: SlurmFacts, wishes: Wishes) -> Iterator[Finding]:
    """What a chain meets on this cluster."""
    if "sbatch" in facts.missing:
        yield _no_slurm(wishes)
        return
    for check in _CHECKS:
        finding = check(facts, wishes)
        if finding is not None:
            yield finding


def _no_slurm(wishes: Wishes) -> Finding:
    if wishes.cluster == "slurm":
        return failure(
            "Slurm",
            "sbatch is not on PATH, and the configuration wants Slurm",
            "load Slurm's module, go to a login node, or take --cluster local",
        )
    why = f"not asked: the cluster is {wishes.cluster}" if wishes.chosen else "not on this machine"
    return good("Slurm", f"{why}; jobs are processes here")


def clients(facts: SlurmFacts, wishes: Wishes) -> Finding:
    """Whether Slurm's programs are on PATH."""
    needed = [name for name in ("squeue", "scontrol", "scancel") if name in facts.missing]
    if needed:
        return failure("clients", f"{listed(needed)} not on PATH", "put Slurm's bin folder on PATH")
    optional = [name for name in ("sacct", "sacctmgr") if name in facts.missing]
    if optional:
        return warning(
            "clients",
            f"{listed(optional)} not on PATH: why jobs end, and what limits you, is less certain",
            "put Slurm's bin folder on PATH",
        )
    return good("clients", "sbatch squeue scontrol scancel sacct sacctmgr")


def controller(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether slurmctld answers, in words that are understood."""
    complaint = facts.complaints.get("config") or facts.complaints.get("partitions")
    if complaint is None:
        return None
    if slurm_text.says_no_answer(complaint.words):
        return failure(
            "controller", f"scontrol: {complaint.words}", "try again later: no job can be queued"
        )
    remedy = "try again later" if complaint.silent else "compare with `scontrol show config`"
    return warning("controller", f"scontrol: {complaint.words}", remedy)


def version(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Slurm's version."""
    text = facts.config.get("SLURM_VERSION")
    if text is None:
        return None
    if not version_of(text) or version_of(text) < OLDEST_SLURM:
        return warning(
            "version",
            f"Slurm {text}: chains are not known to work below {dotted(OLDEST_SLURM)}",
            "rehearse with short jobs first: submit --time 5",
        )
    return good("version", f"Slurm {text}")


def partition(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether the partitions that jobs would go to are there, up, and have the nodes."""
    if not facts.partitions:
        return None
    names = [block["PartitionName"] for block in facts.partitions]
    asked = wishes.partition.split(",") if wishes.partition else []
    unknown = [name for name in asked if name not in names]
    if unknown:
        return failure(
            "partition", f"no partition {listed(unknown)}", f"choose of {', '.join(names)} (-p)"
        )
    chosen = _chosen(facts, wishes)
    if not chosen:
        return failure(
            "partition",
            "this cluster has no default partition",
            f"choose of {', '.join(names)} (-p)",
        )
    names = [block["PartitionName"] for block in chosen]
    down = [block["PartitionName"] for block in chosen if block.get("State", "UP") != "UP"]
    if len(down) == len(chosen):
        state = chosen[0].get("State")
        return failure(
            "partition", f"{listed(names)}: {state}, no job starts", "choose another one (-p)"
        )
    sizes = [size for block in chosen if (size := _largest_job(block)) is not None]
    if sizes and wishes.nodes > max(sizes):
        return failure(
            "partition",
            f"{listed(names)} gives a job {counted(max(sizes), 'node')}, not {wishes.nodes}",
            "ask for fewer nodes (-N), or choose another one (-p)",
        )
    nodes = f", {counted(max(sizes), 'node')}" if sizes else ""
    return good("partition", f"{listed(names)}{'' if asked else ' (the default)'}{nodes}")


def _chosen(facts: SlurmFacts, wishes: Wishes) -> list[Mapping[str, str]]:
    """The partitions that jobs would go to."""
    names = wishes.partition.split(",") if wishes.partition else None
    return [
        block
        for block in facts.partitions
        if (block["PartitionName"] in names if names else block.get("Default") == "YES")
    ]


def _largest_job(block: Mapping[str, str]) -> int | None:
    counts = [first_number(block.get(name)) for name in ("TotalNodes", "MaxNodes")]
    return min((count for count in counts if count is not None), default=None)


def alloc_nodes(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether the partition takes jobs from some nodes only, of which no job's own may be one."""
    chosen = _chosen(facts, wishes)
    places = [block.get("AllocNodes", "ALL") for block in chosen]
    if not places or "ALL" in places:
        return None
    return warning(
        "AllocNodes",
        f"{', '.join(places)}: only from there the partition takes jobs",
        "see whether a job may submit the next one (--probe)",
    )


def max_time(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether the asked time fits into the partition's limit, and is enough for a link."""
    chosen = _chosen(facts, wishes)
    if not chosen:
        return None
    name, limit_s = max(
        ((block["PartitionName"], _limit_s(block.get("MaxTime"))) for block in chosen),
        key=lambda limit: limit[1] or float("inf"),
    )
    shown = f"{format_time(limit_s)} in {name}"
    if wishes.time_s is None:
        default = next((block.get("DefaultTime", "NONE") for block in chosen), "NONE")
        job_s = limit_s if default == "NONE" else _limit_s(default)
        if job_s is None:
            return warning(
                "MaxTime",
                f"{shown}, and no time is asked for: a job never makes room for the next one",
                "ask for some hours (--time 04:00:00)",
            )
        return _long_enough(job_s, f"{shown}; {format_time(job_s)} where none is asked for")
    if limit_s is not None and wishes.time_s > limit_s:
        return failure(
            "MaxTime",
            f"{shown}: a job of {format_time(wishes.time_s)} would wait for ever",
            f"--time {format_time(limit_s)} or less; the chain goes on by itself",
        )
    return _long_enough(wishes.time_s, f"{shown}, {format_time(wishes.time_s)} asked for")


def _long_enough(job_s: int, what: str) -> Finding:
    if job_s < SHORTEST_LIMIT_S:
        return warning(
            "MaxTime",
            f"{what}: Slurm looks at limits every 30 s only, which leaves little to train in",
            f"ask for more (--time {format_time(SHORTEST_LIMIT_S)} or longer)",
        )
    return good("MaxTime", what)


def submit_slots(facts: SlurmFacts, wishes: Wishes) -> tuple[int, str] | None:
    """How many jobs of this user may be pending and running, and who says so; None: no limit."""
    enforced = facts.config.get("AccountingStorageEnforce", "").lower()
    if not any(word in enforced for word in ("limits", "safe", "all")):
        return None
    rows = [
        row
        for row in facts.associations
        if (wishes.account is None or row["Account"] == wishes.account)
        and row["Partition"] in ("", *(wishes.partition or "").split(","))
    ]
    names = {wishes.qos} if wishes.qos else {row["DefaultQOS"] for row in rows}
    names |= {block.get("QoS", "N/A") for block in _chosen(facts, wishes)}
    limits: list[tuple[int, str]] = []
    for row in rows:
        limits += _limits(row, ("MaxSubmit", "GrpSubmit"), f"account {row['Account']}")
    for row in facts.qos:
        if row["Name"] in names:
            fields = ("MaxSubmitPU", "MaxSubmitPA", "GrpSubmit")
            limits += _limits(row, fields, f"QOS {row['Name']}")
    return min(limits, default=None)


def _limits(row: Mapping[str, str], fields: tuple[str, ...], who: str) -> list[tuple[int, str]]:
    numbers = ((first_number(row[name]), name) for name in fields)
    return [(number, f"{name} of {who}") for number, name in numbers if number is not None]


def max_submit_jobs(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether the links ahead fit besides the running one."""
    if not facts.config:
        return None
    complaint = facts.complaints.get("associations") or facts.complaints.get("qos")
    if _has_accounting(facts) and (complaint or "sacctmgr" in facts.missing):
        words = complaint.words if complaint else "not on PATH"
        return warning(
            "MaxSubmitJobs",
            f"what limits you is not known: sacctmgr: {words}",
            f"{ASK_ADMIN} how many jobs you may have; a chain wants {wishes.ahead + 1}",
        )
    slots = submit_slots(facts, wishes)
    if slots is None:
        return good("MaxSubmitJobs", "no limit on how many jobs you may have")
    number, who = slots
    if wishes.mode in ("resubmit", "requeue") and number >= 2:
        return good("MaxSubmitJobs", f"{number} ({who})")
    if number < 2:
        return warning(
            "MaxSubmitJobs",
            f"{number} ({who}): the next job cannot wait behind the running one",
            "submit with --set chain.mode=requeue",
        )
    if number <= wishes.ahead:
        return warning(
            "MaxSubmitJobs",
            f"{number} ({who}): fewer than the running job and {wishes.ahead} behind it",
            f"submit with --set chain.ahead={number - 1}",
        )
    return good("MaxSubmitJobs", f"{number} ({who}); a chain has {wishes.ahead + 1}")


def kill_wait(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """How long a job has from SIGTERM to SIGKILL."""
    seconds = first_number(facts.config.get("KillWait"))
    if seconds is None:
        return None
    seconds = max(seconds, 5)  # Slurm's own floor.
    what = f"{seconds} s from SIGTERM to SIGKILL"
    if seconds < SHORT_KILL_WAIT_S:
        return warning(
            "KillWait",
            f"{what}: little time to save",
            "save more often: --set checkpoint.minutes=10",
        )
    return good("KillWait", what)


def over_time_limit(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """How long jobs may run beyond their limit."""
    text = facts.config.get("OverTimeLimit")
    if text is None:
        return None
    minutes = first_number(text)
    if minutes == 0:
        return good("OverTimeLimit", "none: a job ends at its limit")
    longer = "without end" if minutes is None else f"for {minutes} min"
    return good("OverTimeLimit", f"jobs may go on {longer}; a link ends at its own limit")


def preemption(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """What becomes of a job that makes room for another one, and how much time it has."""
    if not facts.config:
        return None
    chosen = _chosen(facts, wishes)
    modes = {block.get("PreemptMode", "OFF") for block in chosen} - {"OFF"}
    if "none" in facts.config.get("PreemptType", "none") or not modes:
        return good("preemption", "off: no job is preempted")
    mode = "/".join(sorted(modes))
    if "CANCEL" in mode and wishes.mode == "requeue":
        return warning(
            "preemption",
            f"PreemptMode={mode}: a preempted job is not requeued, which would end the chain",
            "submit with --set chain.mode=prequeue",
        )
    if modes <= {"SUSPEND", "GANG", "SUSPEND,GANG", "GANG,SUSPEND"}:
        return good("preemption", f"PreemptMode={mode}: a preempted job waits where it is")
    grace_s = min((first_number(block.get("GraceTime")) or 0 for block in chosen), default=0)
    kill_s = max(first_number(facts.config.get("KillWait")) or 0, 5)
    what = f"PreemptMode={mode}, GraceTime={grace_s}: {grace_s + kill_s} s to save in"
    if grace_s + kill_s < SHORT_NOTICE_S:
        return warning(
            "preemption",
            what,
            "save more often: --set checkpoint.minutes=10",
        )
    return good("preemption", f"{what}; the next job goes on")


def job_requeue(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether Slurm may start a job a second time, where the chain wants that."""
    text = facts.config.get("JobRequeue")
    if text is None:
        return None
    hold = requeue_hold_s(facts.config)
    if wishes.mode != "requeue":
        return good("JobRequeue", f"{text}; not needed: jobs are submitted with --no-requeue")
    if text.startswith("0"):
        return warning(
            "JobRequeue",
            "0: this site does not requeue by itself, and may refuse it",
            "submit with --set chain.mode=prequeue",
        )
    return good("JobRequeue", f"{text}; a requeued job is held for {hold} s")


def requeue_exit(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether Slurm itself requeues or holds jobs by the exit codes that links leave with."""
    if not facts.config:
        return None
    for setting, does in (("RequeueExitHold", "holds"), ("RequeueExit", "requeues")):
        codes = exit_codes(facts.config.get(setting)) & EXIT_CODES
        # --no-requeue wins only since 23.11.
        exempt = wishes.mode != "requeue" and version_of(facts.config.get("SLURM_VERSION")) >= (
            23,
            11,
        )
        if codes and not exempt:
            numbers = ", ".join(map(str, sorted(codes)))
            return warning(
                "RequeueExit",
                f"{setting}={facts.config[setting]}: Slurm {does} a job that leaves with {numbers}",
                f"{ASK_ADMIN} to take {numbers} out; a link that starts twice gives way by itself",
            )
    return good("RequeueExit", "no exit code of a link makes Slurm start or hold it again")


def proctrack(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whom signals reach."""
    plugin = facts.config.get("ProctrackType")
    if plugin is None:
        return None
    children = facts.config.get("SignalChildrenProcesses", "no").lower()
    if plugin == "proctrack/cgroup" and children == "no":
        return good("proctrack", f"{plugin}: signals reach the supervisor alone")
    more = "" if plugin != "proctrack/cgroup" else ", SignalChildrenProcesses=yes"
    return warning(
        "proctrack",
        f"{plugin}{more}: SIGTERM reaches every process of a job, its own children too",
        "let the clock save in time: set chain.lead_s well above the duration of a save",
    )


def accounting(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """Whether sacct tells why jobs ended."""
    if not facts.config:
        return None
    if not _has_accounting(facts):
        return warning(
            "accounting",
            "none on this cluster: why a job ended is less certain",
            "nothing to do; `hpcresume cancel` rather than scancel ends a chain for sure",
        )
    complaint = facts.complaints.get("records")
    if complaint:
        return warning(
            "accounting",
            f"sacct: {complaint.words}",
            "try again later; meanwhile why a job ended is less certain",
        )
    return good("accounting", "sacct answers: why a job ended is known")


def min_job_age(facts: SlurmFacts, wishes: Wishes) -> Finding | None:
    """How long the controller remembers an ended job, which matters without accounting."""
    seconds = first_number(facts.config.get("MinJobAge"))
    if seconds is None:
        return None
    if seconds < SHORT_MEMORY_S and not _has_accounting(facts):
        return warning(
            "MinJobAge",
            f"{seconds} s, and no accounting: the next link may not learn why its job ended",
            f"{ASK_ADMIN} for MinJobAge=300",
        )
    return good("MinJobAge", f"{seconds} s: so long an ended job is remembered")


def _has_accounting(facts: SlurmFacts) -> bool:
    return "slurmdbd" in facts.config.get("AccountingStorageType", "")


def _limit_s(text: str | None) -> int | None:
    return slurm_text.limit_s(text or "UNLIMITED")


_CHECKS: tuple[_Check, ...] = (
    *(clients, controller, version, partition, alloc_nodes, max_time, max_submit_jobs, kill_wait),
    *(over_time_limit, preemption, job_requeue, requeue_exit, proctrack, accounting, min_job_age),
)
