"""How the next job of a chain gets into the queue, chosen from what is known, with the reasons.

Pure. `doctor` shows it, and `submit` freezes it in the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from hpcresume.scheduler.doctor.facts import Mode, ProbeFacts, SlurmFacts, Wishes
from hpcresume.scheduler.doctor.texts import first_number
from hpcresume.scheduler.environment import node_names


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the next job gets into the queue."""

    mode: Mode
    ahead: int
    """How many jobs wait behind the running one; 0 where none is queued before it is needed."""
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What the choice depends on; None where it is not known."""

    submit_slots: int | None = None
    """How many jobs of this user may be pending and running at a time; None: no limit."""
    sbatch_on_nodes: bool | None = None
    dependency_on_nodes: bool | None = None
    """Whether a job may wait for another one that a compute node names."""
    scontrol_on_nodes: bool | None = None
    requeue_hold_s: int | None = None
    """How long Slurm holds a requeued job."""


def choose_way(wishes: Wishes, known: Circumstances) -> Way:
    """The way that suits; what the configuration names is not argued with here."""
    if wishes.mode != "auto":
        mode = cast(Mode, wishes.mode)
        ahead = wishes.ahead if mode == "prequeue" else 0
        return Way(mode=mode, ahead=ahead, reasons=(f"chain.mode is {mode}",))
    if wishes.cluster == "local":
        return _prequeue(wishes.ahead, "the local backend queues like Slurm")
    if known.sbatch_on_nodes is False:
        return _without_sbatch(known)
    slots = known.submit_slots
    if slots is not None and slots < 2:
        limited = f"you may have {slots} job at a time, so none can wait behind the running one"
        if known.scontrol_on_nodes is False:
            return _drive(limited, "scontrol does not work on a compute node")
        return _requeue(known, limited)
    if known.dependency_on_nodes is False:
        return Way(
            mode="resubmit",
            ahead=0,
            reasons=("a job may not wait for another one here: the ending one submits the next",),
        )
    if slots is not None and slots <= wishes.ahead:
        waits = "one job waits" if slots == 2 else f"{slots - 1} jobs wait"
        return _prequeue(slots - 1, f"you may have {slots} jobs at a time, so {waits}")
    return _prequeue(wishes.ahead, "they outlive a job that is killed")


def _without_sbatch(known: Circumstances) -> Way:
    refused = "sbatch does not work on a compute node"
    if known.scontrol_on_nodes:
        return _requeue(known, refused, "scontrol does")
    return _drive(refused)


def _prequeue(ahead: int, *reasons: str) -> Way:
    return Way(mode="prequeue", ahead=ahead, reasons=reasons)


def _requeue(known: Circumstances, *reasons: str) -> Way:
    hold = known.requeue_hold_s
    cost = () if hold is None else (f"Slurm holds a requeued job for {hold} s",)
    return Way(mode="requeue", ahead=0, reasons=(*reasons, *cost))


def _drive(*reasons: str) -> Way:
    return Way(mode="drive", ahead=0, reasons=(*reasons, "each next job comes from a login node"))


def circumstances(
    slurm: SlurmFacts, probe: ProbeFacts | None, slots: int | None, wishes: Wishes
) -> Circumstances:
    """What the choice depends on, out of the facts. What a probe has tried counts most."""
    on_nodes = probe.can("sbatch") if probe else None
    if on_nodes is None and _takes_jobs_from_its_nodes(slurm, wishes) is False:
        on_nodes = False
    return Circumstances(
        submit_slots=slots,
        sbatch_on_nodes=on_nodes,
        dependency_on_nodes=probe.can("after") if probe else None,
        scontrol_on_nodes=probe.can("scontrol") if probe else None,
        requeue_hold_s=requeue_hold_s(slurm.config),
    )


def _takes_jobs_from_its_nodes(slurm: SlurmFacts, wishes: Wishes) -> bool | None:
    """Whether the partitions let their own nodes submit jobs; None where that is not known."""
    allowed: list[bool] = []
    for block in slurm.partitions:
        names = (wishes.partition or "").split(",")
        if block["PartitionName"] in names if wishes.partition else block.get("Default") == "YES":
            hosts = block.get("AllocNodes", "ALL")
            own = set(node_names(block.get("Nodes", "")))
            allowed.append(hosts == "ALL" or not own or not own.isdisjoint(node_names(hosts)))
    return any(allowed) if allowed else None


def requeue_hold_s(config: Mapping[str, str]) -> int | None:
    """How long Slurm holds a requeued job: requeue_delay, else cred_expire, by default 120 s."""
    if not config:
        return None
    for key, option in (("SchedulerParameters", "requeue_delay"), ("AuthInfo", "cred_expire")):
        for part in config.get(key, "").split(","):
            name, _, value = part.strip().partition("=")
            if name == option and (seconds := first_number(value)) is not None:
                return seconds + 1
    return 121
