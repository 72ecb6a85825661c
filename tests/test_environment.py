"""The environment tells which job this is, and which rank."""

from __future__ import annotations

import pytest

from hpcresume.scheduler.environment import (
    Allocation,
    RankPlace,
    allocation,
    node_names,
    rank_place,
)

#: What a batch script of Slurm 22.05 finds, with --nodes=2 --ntasks-per-node=1 --cpus-per-task=2.
BATCH = {
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_JOB_ID": "50",
    "SLURM_JOB_NODELIST": "k[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
}
STEP = {**BATCH, "SLURM_PROCID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "2"}


def test_a_batch_script_knows_its_job_nodes_and_tasks() -> None:
    assert allocation(BATCH) == Allocation(
        scheduler="slurm", job_id="50", node_list="k[1-2]", num_nodes=2, num_tasks=2
    )


def test_tasks_that_nobody_asked_for_are_not_counted() -> None:
    assert allocation({"SLURM_JOB_ID": "50"}).num_tasks is None


def test_a_restarted_job_knows_how_often() -> None:
    assert allocation({**BATCH, "SLURM_RESTART_COUNT": "3"}).restart_count == 3


def test_newer_versions_tell_the_start_and_the_end_of_the_job() -> None:
    told = {"SLURM_JOB_START_TIME": "1795261000", "SLURM_JOB_END_TIME": "1795261007"}
    job = allocation({**BATCH, **told})
    assert (job.start_time, job.end_time) == (1795261000.0, 1795261007.0)


def test_a_local_job_inside_a_job_of_slurm_is_local() -> None:
    local = {**BATCH, "HPCRESUME_JOB": "7", "HPCRESUME_JOB_END": "1795261007.5"}
    assert allocation(local) == Allocation(scheduler="local", job_id="7", end_time=1795261007.5)


def test_without_a_scheduler_there_is_no_job() -> None:
    assert allocation({"HOME": "/root"}) == Allocation(scheduler="none")


def test_a_batch_script_is_no_rank_of_two_although_it_has_a_procid() -> None:
    assert rank_place(BATCH) == RankPlace()


def test_a_step_is_placed_by_srun() -> None:
    assert rank_place(STEP) == RankPlace(rank=1, world_size=2, local_rank=0, node_rank=1)


def test_torchrun_inside_a_step_counts_more_than_the_step() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "2"}
    expected = RankPlace(rank=5, world_size=8, local_rank=1, node_rank=2)
    assert rank_place({**STEP, **torchrun}) == expected


def test_our_own_starter_counts_most() -> None:
    ours = {"HPCRESUME_RANK": "1", "HPCRESUME_WORLD_SIZE": "3", "HPCRESUME_LOCAL_RANK": "1"}
    environ = {**STEP, "RANK": "5", "WORLD_SIZE": "8", **ours}
    assert rank_place(environ) == RankPlace(rank=1, world_size=3, local_rank=1)


def test_a_process_of_its_own_is_rank_0_of_1() -> None:
    assert rank_place({}) == RankPlace(rank=0, world_size=1, local_rank=0, node_rank=0)


@pytest.mark.parametrize(
    ("node_list", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,m04", ["n1", "m04"]),
        ("n[1-3,7],m04", ["n1", "n2", "n3", "n7", "m04"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[1,3]-ib", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]),
        ("gpu-a100-[001-002],cpu-[1]", ["gpu-a100-001", "gpu-a100-002", "cpu-1"]),
    ],
)
def test_node_lists_are_expanded(node_list: str, names: list[str]) -> None:
    assert node_names(node_list) == names
