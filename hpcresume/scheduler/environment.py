"""What the environment tells about the job, and about a process's place among the ranks.

Read by the supervisor (`allocation`) and by every rank (`rank_place`), always through a mapping.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: Set by whoever starts ranks. What an outer rank or torchrun left behind would win over the
#: place that srun gives, so that every rank would take itself for the same one.
PLACE_VARIABLES = frozenset(
    {
        "HPCRESUME_RANK",
        "HPCRESUME_WORLD_SIZE",
        "HPCRESUME_LOCAL_RANK",
        "HPCRESUME_NODE_RANK",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
    }
)
#: Set by the local driver for its jobs; a job of Slurm must not inherit them.
JOB_VARIABLES = frozenset({"HPCRESUME_JOB", "HPCRESUME_JOB_KEY", "HPCRESUME_JOB_END"})

#: Tells a rank on how many nodes its link has ranks.
NODES = "HPCRESUME_NODES"
#: Tells a rank the step after which its link saves and leaves.
STOP_AT = "HPCRESUME_STOP_AT"


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The job that this process belongs to."""

    scheduler: Literal["slurm", "local", "none"] = "none"
    job_id: str | None = None
    restart_count: int = 0
    """How often the scheduler has started this same job again."""
    node_list: str = ""
    """In the scheduler's own form; see `node_names`."""
    num_nodes: int = 1
    num_tasks: int | None = None
    """Tasks that the job was asked for; None where it was not said."""
    start_time: float | None = None
    """Unix seconds, by the scheduler's clock."""
    end_time: float | None = None
    """Unix seconds, as known when the job started: stale after a changed limit or preemption."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Where a rank stands among the others."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the ranks of its node: which GPU is its own."""
    node_rank: int = 0


def allocation(environ: Mapping[str, str]) -> Allocation:
    """The job that an environment belongs to. A local job inside a Slurm job is a local one."""
    if environ.get("HPCRESUME_JOB"):
        return Allocation(
            scheduler="local",
            job_id=environ["HPCRESUME_JOB"],
            end_time=_float(environ.get("HPCRESUME_JOB_END")),
        )
    if not environ.get("SLURM_JOB_ID"):
        return Allocation()
    num_tasks = environ.get("SLURM_NTASKS")
    return Allocation(
        scheduler="slurm",
        job_id=environ["SLURM_JOB_ID"],
        # Before 26.11 the variable is missing in a job's first life.
        restart_count=int(environ.get("SLURM_RESTART_COUNT", "0")),
        node_list=environ.get("SLURM_JOB_NODELIST", ""),
        num_nodes=int(environ.get("SLURM_JOB_NUM_NODES", "1")),
        num_tasks=int(num_tasks) if num_tasks else None,
        start_time=_float(environ.get("SLURM_JOB_START_TIME")),
        end_time=_float(environ.get("SLURM_JOB_END_TIME")),
    )


def rank_place(environ: Mapping[str, str]) -> RankPlace:
    """This process's place: as our own starter says, else torchrun, else srun, else 0 of 1."""
    for rank, world_size, local_rank, node_rank in (
        ("HPCRESUME_RANK", "HPCRESUME_WORLD_SIZE", "HPCRESUME_LOCAL_RANK", "HPCRESUME_NODE_RANK"),
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"),
        # A batch script has SLURM_PROCID=0 as well, but only a step has a number of tasks.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"),
    ):
        if environ.get(rank) and environ.get(world_size):
            return RankPlace(
                rank=int(environ[rank]),
                world_size=int(environ[world_size]),
                local_rank=int(environ.get(local_rank) or 0),
                node_rank=int(environ.get(node_rank) or 0),
            )
    return RankPlace()


def node_names(node_list: str) -> list[str]:
    """The nodes of a list in Slurm's form: "n[1-2,07],m" gives n1, n2, n07, m."""
    names: list[str] = []
    for group in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
        parts = re.split(r"\[([^\]]*)\]", group.strip())
        # Odd parts stood in brackets.
        choices = [_numbers(p) if i % 2 else [p] for i, p in enumerate(parts)]
        names.extend("".join(chosen) for chosen in itertools.product(*choices))
    return names


def _numbers(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash:
            numbers.extend(f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
        else:
            numbers.append(part)
    return numbers


def _float(text: str | None) -> float | None:
    return float(text) if text else None
