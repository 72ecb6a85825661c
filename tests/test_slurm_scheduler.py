"""The Slurm scheduler on a real Slurm: what it submits runs, and what became of it is told."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from oracle import hpcresume, project
from slurm_cluster import SlurmCluster, outside, wait_until

from hpcresume.config import SchedulerConfig
from hpcresume.errors import SubmissionRejected
from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import node_names
from hpcresume.scheduler.hardware import Hardware
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState
from hpcresume.scheduler.launcher import SubmititLauncher
from hpcresume.scheduler.script import render
from hpcresume.scheduler.slurm import SlurmScheduler

PATIENCE_S = 90.0

#: A job that does not end by SIGTERM, so that it is COMPLETING for KillWait seconds.
DEAF = "trap '' TERM; touch deaf; sleep 60 & wait; wait"

#: The supervisor of a link in miniature: starts the ranks, does as told, notes how they ended.
SUPERVISOR = """
import json, os, sys, time
from pathlib import Path
from hpcresume.config import SchedulerConfig
from hpcresume.run_dir import LinkDir
from hpcresume.scheduler.environment import allocation
from hpcresume.scheduler.step import start

link, act = LinkDir(Path(sys.argv[1])), sys.argv[2]
job = allocation(os.environ)
rank = [sys.executable, str(link.path / "rank.py"), act]
step = start(job, SchedulerConfig(), rank, environ={"MINE": "1", "RANK": "7"},
             log=link.rank_log, num_tasks=job.num_tasks, run=link.path)
if act in ("stop", "kill"):
    while not all((link.path / f"ready-{r}").exists() for r in range(2)):
        time.sleep(0.05)
    getattr(step, act)()
code = step.wait(40)
link.path.joinpath("code").write_text(json.dumps([code, job.num_nodes, job.num_tasks]))
"""
RANK = """
import os, signal, sys, time
from hpcresume.scheduler.environment import rank_place
act, place = sys.argv[1], rank_place(os.environ)
def leave(*_):
    print("TERM", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print(place, os.environ["MINE"], os.environ["SLURMD_NODENAME"], flush=True)
open(os.path.join(os.path.dirname(__file__), f"ready-{place.rank}"), "w").close()
if act == "end":
    sys.exit(0)
if act == "fail" and place.rank == 1:
    # The other rank must be able to tell that it was ended.
    while not os.path.exists(os.path.join(os.path.dirname(__file__), "ready-0")):
        time.sleep(0.02)
    sys.exit(3)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run in a place with a blank, a quote and a percent sign."""
    made = RunDir(tmp_path / "it's a 100%run")
    made.jobs.mkdir(parents=True)
    return made


@pytest.fixture(autouse=True)
def _empty_queue(slurm: SlurmCluster) -> Iterator[None]:
    yield
    slurm.cancel_all()


def environ(slurm: SlurmCluster) -> dict[str, str]:
    return {**outside(os.environ), **slurm.env}


def scheduler(
    slurm: SlurmCluster,
    make_callable: Callable[[Path], Any] = lambda run: functools.partial(time.sleep, 60),
    **config: Any,
) -> SlurmScheduler:
    config = {"mem": "200", **config}
    launcher = SubmititLauncher(make_callable)
    return SlurmScheduler(SchedulerConfig(**config), environ=environ(slurm), launcher=launcher)


def spec(slurm: SlurmCluster, run: RunDir, token: str = "hpcresume:t|y:1", **more: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "name": "na|me of it",
        "token": token,
        "run": run.path,
        "log": run.job_log,
        "workdir": run.path,
        "environment": environ(slurm),
    }
    return JobSpec(**{**fields, **more})


def batch(slurm: SlurmCluster, body: str, *options: str, user: str | None = None) -> str:
    """A job without submitit, which starts faster."""
    argv = ("sbatch", "--parsable", "--output=/dev/null", "--mem=100", *options, f"--wrap={body}")
    return slurm.run(*argv, user=user).strip()


def wait_state(one: SlurmScheduler, id: str, *wanted: JobState) -> JobInfo:
    found: list[JobInfo] = []

    def reached() -> bool:
        found[:] = [one.state([id])[id]]
        return found[0].state in wanted

    wait_until(f"job {id} to be {wanted}", reached, PATIENCE_S)
    return found[0]


def row(slurm: SlurmCluster, id: str) -> dict[str, str]:
    return next((job for job in slurm.queue() if job["id"] == id), {})


def described(slurm: SlurmCluster, id: str) -> dict[str, str]:
    words = slurm.run("scontrol", "show", "job", id).split()
    return dict(word.partition("=")[::2] for word in words)


# ---- submitting


def test_a_job_runs_its_callable_whatever_the_path(slurm: SlurmCluster, run: RunDir) -> None:
    one = scheduler(slurm, lambda path: functools.partial(os.mkdir, str(path / "was here")))
    id = one.submit(spec(slurm, run))
    job = wait_state(one, id, JobState.COMPLETED, JobState.FAILED)
    assert (job.state, job.exit_code) == (JobState.COMPLETED, 0)
    assert run.path.joinpath("was here").is_dir()
    assert "Job completed successfully" in run.jobs.joinpath(f"{id}.log").read_text()
    names = sorted(path.name for path in run.jobs.iterdir())
    ours = ["_0_result.pkl", "_submission.sh", "_submitted.pkl", ".log"]
    assert names == sorted(f"{id}{ending}" for ending in ours)


def test_a_job_runs_although_its_submitter_died_with_sbatchs_answer(
    slurm: SlurmCluster, run: RunDir
) -> None:
    wanted = spec(slurm, run)
    ids = []

    def sbatch(path: Path) -> str:
        ids.append(slurm.run("sbatch", "--parsable", str(path)).strip())
        raise KeyboardInterrupt

    def text_of(command: Sequence[str], prepare: Sequence[str]) -> str:
        return render(wanted, SchedulerConfig(mem="200"), command, prepare=prepare)

    launcher = SubmititLauncher(lambda path: functools.partial(os.mkdir, str(path / "was here")))
    with pytest.raises(KeyboardInterrupt):
        launcher.launch(wanted, text_of, sbatch)
    wait_state(scheduler(slurm), ids[0], JobState.COMPLETED)
    assert run.path.joinpath("was here").is_dir()


def test_a_job_is_found_by_its_token(slurm: SlurmCluster, run: RunDir) -> None:
    one = scheduler(slurm)
    id = one.submit(spec(slurm, run, begin_delay_s=600))
    (job,) = one.find("hpcresume:t|y:")
    assert (job.id, job.token, job.state) == (id, "hpcresume:t|y:1", JobState.PENDING)
    assert job.reason == "BeginTime"
    assert one.find("hpcresume:t|z:") == []


def test_a_job_waits_for_the_ones_before_it(slurm: SlurmCluster, run: RunDir) -> None:
    one = scheduler(slurm, lambda path: functools.partial(os.getpid))
    first = batch(slurm, "sleep 60")
    second = one.submit(spec(slurm, run), after=[first])
    assert row(slurm, second)["dependency"] == f"afterany:{first}(unfulfilled)"
    slurm.run("scancel", first)
    assert wait_state(one, second, JobState.COMPLETED).state is JobState.COMPLETED


def test_a_dependency_on_a_forgotten_job_does_not_hinder(slurm: SlurmCluster, run: RunDir) -> None:
    one = scheduler(slurm)
    id = one.submit(spec(slurm, run), after=["999999"])
    assert wait_state(one, id, JobState.RUNNING).nodes


def test_nodes_to_avoid_do_not_hinder_where_there_are_no_others(
    slurm: SlurmCluster, run: RunDir
) -> None:
    one = scheduler(slurm)
    id = one.submit(spec(slurm, run, exclude_nodes=tuple(slurm.nodes)))
    assert wait_state(one, id, JobState.RUNNING).nodes in slurm.nodes


def test_a_refusal_has_slurms_own_words(slurm: SlurmCluster, run: RunDir) -> None:
    with pytest.raises(SubmissionRejected, match="Invalid partition name specified"):
        scheduler(slurm, partition="nope").submit(spec(slurm, run))
    assert list(run.jobs.iterdir()) == []


def test_slurm_says_whether_it_would_take_a_job(slurm: SlurmCluster, run: RunDir) -> None:
    found = scheduler(slurm).test_only(spec(slurm, run))
    assert found.at is not None
    assert abs(found.at - time.time()) < 60
    assert found.nodes in slurm.nodes
    with pytest.raises(SubmissionRejected, match="Invalid partition name specified"):
        scheduler(slurm, partition="nope").test_only(spec(slurm, run))


def test_the_default_partition_and_its_limit_are_known(slurm: SlurmCluster) -> None:
    assert scheduler(slurm).partition_limit_s(None) == ("main", 7200)
    assert scheduler(slurm).partition_limit_s("nope") is None


# ---- asking


def test_a_running_job_has_an_end_that_follows_its_limit(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    id = batch(slurm, "sleep 60", "--time=30")
    job = wait_state(one, id, JobState.RUNNING)
    assert job.start_time is not None
    assert one.end_time(id) == job.start_time + 1800
    slurm.run("scontrol", "update", f"JobId={id}", "TimeLimit=20")
    assert one.end_time(id) == job.start_time + 1200


def test_a_waiting_or_unlimited_job_has_no_end(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    waiting = batch(slurm, "sleep 60", "--begin=now+600", "--time=30")
    assert one.end_time(waiting) is None
    slurm.run("scontrol", "update", "PartitionName=high", "MaxTime=UNLIMITED")
    try:
        unlimited = batch(slurm, "sleep 60", "--partition=high", "--time=UNLIMITED")
        wait_state(one, unlimited, JobState.RUNNING)
    finally:
        slurm.run("scontrol", "update", "PartitionName=high", "MaxTime=02:00:00")
    assert one.end_time(unlimited) is None


def test_who_cancelled_a_job_is_told_while_it_is_still_completing(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    deaf = slurm.home / "deaf"
    deaf.unlink(missing_ok=True)
    id = batch(slurm, DEAF, user=slurm.user)
    wait_until("the shell's trap", deaf.exists, PATIENCE_S)
    slurm.run("scancel", id, user=slurm.user)
    job = wait_state(one, id, JobState.CANCELLED)
    assert job.cancelled_by == slurm.user
    assert row(slurm, id)["state"] == "COMPLETING"


def test_a_failed_job_has_its_exit_code(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    id = batch(slurm, "exit 3")
    job = wait_state(one, id, JobState.FAILED)
    assert (job.exit_code, job.exit_signal) == (3, None)


def test_memory_that_ran_out_is_told(slurm: SlurmCluster) -> None:
    if not slurm.has_cgroups:
        pytest.skip("memory is limited by cgroups")
    one = scheduler(slurm)
    id = batch(slurm, "srun /usr/bin/python3 -c 'bytearray(400_000_000)'", "--mem=60")
    assert wait_state(one, id, JobState.OUT_OF_MEMORY).state.ended


def test_a_failed_node_is_told_and_named(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    node = slurm.nodes[3]
    id = batch(slurm, "sleep 60", "--no-requeue", f"--nodelist={node}")
    wait_state(one, id, JobState.RUNNING)
    slurm.node_down(node)
    assert wait_state(one, id, JobState.NODE_FAIL).nodes == node
    slurm.node_resume(node)


def test_what_was_never_submitted_is_unknown(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    assert one.state(["999999"])["999999"].state is JobState.UNKNOWN
    assert one.end_time("999999") is None
    assert one.lives("999999") == []


# ---- changing


def test_pending_and_running_jobs_are_cancelled_together(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    running = batch(slurm, "sleep 60")
    wait_state(one, running, JobState.RUNNING)
    waiting = batch(slurm, "sleep 60", f"--dependency=afterany:{running}")
    one.cancel([running, waiting, "999999"])
    ends = one.state([running, waiting])
    assert {job.state for job in ends.values()} <= {JobState.CANCELLED, JobState.COMPLETING}

    def by_whom() -> set[str]:
        ends.update(one.state([running, waiting]))
        return {job.cancelled_by for job in ends.values()}

    # The accounting hears of it a moment after the controller.
    wait_until("who has cancelled them", lambda: by_whom() == {"root"}, PATIENCE_S)
    assert {job.state for job in ends.values()} == {JobState.CANCELLED}
    assert ends[waiting].nodes == ""
    one.cancel([running, waiting])


def test_a_waiting_job_is_put_off_and_kept_away_from_nodes(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    first, second, third = slurm.nodes[:3]
    id = batch(slurm, "sleep 60", "--begin=now+60", f"--exclude={first}")
    one.update(id, exclude_nodes=[second, third], begin_delay_s=1000)
    fields = described(slurm, id)
    assert set(node_names(fields["ExcNodeList"])) == {first, second, third}
    one.update(id, exclude_nodes=[slurm.nodes[3]])
    assert described(slurm, id)["ExcNodeList"] == fields["ExcNodeList"]
    begins = time.mktime(time.strptime(fields["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert 900 < begins - time.time() <= 1001


def test_a_running_job_cannot_be_put_off(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    id = batch(slurm, "sleep 60")
    wait_state(one, id, JobState.RUNNING)
    with pytest.raises(SubmissionRejected, match="no longer pending"):
        one.update(id, begin_delay_s=60)


def test_a_requeued_job_waits_again_and_its_first_life_is_recorded(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    id = batch(slurm, "sleep 60", "--requeue")
    wait_state(one, id, JobState.RUNNING)
    one.update(id, requeue=True)
    wait_state(one, id, JobState.PENDING)
    lives: list[JobInfo] = []

    def recorded() -> bool:
        lives[:] = one.lives(id)
        return bool(lives) and lives[0].state.ended

    wait_until("the record of its first life", recorded, PATIENCE_S)
    assert lives[0].state is JobState.REQUEUED
    one.update(id, requeue=True)
    assert one.state([id])[id].state is JobState.PENDING


def test_a_job_that_forbids_it_is_requeued_all_the_same(slurm: SlurmCluster) -> None:
    one = scheduler(slurm)
    id = batch(slurm, "sleep 60", "--no-requeue")
    wait_state(one, id, JobState.RUNNING)
    one.update(id, requeue=True)
    assert wait_state(one, id, JobState.PENDING).id == id
    one.cancel([id])


# ---- a user's own script


def test_the_next_job_of_a_users_script_is_the_same_as_the_first(
    slurm: SlurmCluster, run: RunDir
) -> None:
    one = scheduler(slurm)
    own = run.path / "train.sbatch"
    own.write_text("#!/bin/bash\n#SBATCH --time=10 --nodes=1 --mem=50\nsleep 60\n")
    asked = ("--partition=high", "--time=20", "--nodes=2", "--ntasks-per-node=2", "--mem=300")
    asked += ("--gres=gpu:1", f"--exclude={slurm.nodes[3]}", "--cpus-per-task=2")
    first = slurm.run("sbatch", "--parsable", "--output=/dev/null", *asked, str(own)).strip()
    wait_state(one, first, JobState.RUNNING)
    text, options = one.frozen_script(first)
    assert text == own.read_text()
    run.script.write_text(text)
    second = one.submit(
        spec(
            slurm,
            run,
            script=run.script,
            script_options=options,
            exclude_nodes=(slurm.nodes[2],),
            signal_s=60,
        )
    )
    slurm.run("scancel", first)
    wait_state(one, second, JobState.RUNNING)
    before, after = (described(slurm, id) for id in (first, second))
    for field in ("Partition", "TimeLimit", "NumNodes", "NumTasks", "CPUs/Task", "TresPerNode"):
        assert after[field] == before[field], field
    assert (after["TRES"], after["MinMemoryNode"]) == (before["TRES"], "300M")
    assert set(node_names(after["ExcNodeList"])) == set(slurm.nodes[2:])
    assert after["Requeue"] == "0"


# ---- pinned to a kind of node


@pytest.fixture
def kinds(slurm: SlurmCluster) -> Iterator[list[str]]:
    """The nodes: two old ones and two new ones, of each kind one with b."""
    for node, features in zip(
        slurm.nodes, ("cpu,old", "cpu,old,b", "cpu,new", "cpu,new,b"), strict=True
    ):
        set_features(slurm, node, features)
    yield slurm.nodes
    slurm.cancel_all()
    for node in slurm.nodes:
        set_features(slurm, node, "")


def set_features(slurm: SlurmCluster, node: str, features: str) -> None:
    both = (f"availablefeatures={features}", f"activefeatures={features}")
    slurm.run("scontrol", "update", f"nodename={node}", *both)


@pytest.mark.parametrize(
    "own", [None, "cpu", "old|b", "b|old", "(cpu&b)|old", "[old|b]", "[b|old]"]
)
def test_a_pinned_job_runs_on_a_node_of_that_kind_whatever_else_the_user_asked_for(
    slurm: SlurmCluster, run: RunDir, kinds: list[str], own: str | None
) -> None:
    one = scheduler(slurm, constraint=own)
    kind = one.hardware_of(kinds[3])
    assert kind == Hardware(features=("cpu", "new", "b"))
    assert one.hardware_of(",".join(kinds[2:])) == Hardware(features=("cpu", "new"))
    id = one.submit(spec(slurm, run, hardware=kind))
    assert wait_state(one, id, JobState.RUNNING).nodes == kinds[3]


def test_later_jobs_of_a_chain_run_on_the_first_links_kind_of_node(
    slurm: SlurmCluster, kinds: list[str], tmp_path: Path
) -> None:
    # Slurm takes the first free node, which would be an old one for all but the first job.
    blocker = batch(slurm, "sleep 300", "--exclusive", "--nodes=2", f"-w{kinds[0]},{kinds[1]}")
    wait_state(scheduler(slurm), blocker, JobState.RUNNING)
    asked = {"time": "00:01:00", "cluster": "slurm", "pin_hardware": True, "constraint": "cpu"}
    chain = {"lead_s": 50, "no_progress_links": 10}
    folder = project(tmp_path / "it's pinned", scheduler=asked, chain=chain, args={"pause_s": 0.2})
    done = hpcresume("submit", cwd=folder, **slurm.env)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(folder / "runs" / "run")
    wait_until("two jobs ahead", lambda: len(queued_by(run)) == 2, 60)
    (first,) = read_chain(run)
    assert (first.claim["nodes"], described(slurm, first.claim["job"])["Features"]) == (
        kinds[2],
        "cpu",
    )
    assert [described(slurm, job)["Features"] for job in queued_by(run)] == ["cpu&new"] * 2
    assert f"nodes like {kinds[2]}: features cpu&new" in run.train_log.read_text()
    slurm.run("scancel", blocker)
    wait_until("the next link", lambda: run.newest_link() > 1, 90)
    assert read_chain(run)[1].claim["nodes"] in kinds[2:]
    assert hpcresume("cancel", "--yes", "run", cwd=folder, **slurm.env).returncode == 0


def queued_by(run: RunDir) -> list[str]:
    """The jobs that the first link has queued."""
    return [str(r["queued_job"]) for link in read_chain(run)[:1] for r in link.all("queued")]


# ---- ranks


def supervise(slurm: SlurmCluster, run: RunDir, act: str) -> tuple[list[int], list[str]]:
    """A job over two nodes whose supervisor starts two ranks: how it ended, and their logs."""
    link = run.link(1)
    link.path.mkdir(parents=True)
    link.path.joinpath("rank.py").write_text(RANK)
    script = run.path / "supervisor.py"
    script.write_text(SUPERVISOR)
    body = f'exec "{sys.executable}" "{script}" "{link.path}" {act}'
    asked = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--mem=500")
    environment = f"--export=ALL,PYTHONPATH={Path(__file__).parents[1]}"
    output = f"--output={str(run.jobs).replace('%', '%%')}/%j.log"
    id = batch(slurm, body, *asked, environment, output)
    code = link.path / "code"
    wait_state(scheduler(slurm), id, JobState.COMPLETED, JobState.FAILED)
    assert code.exists(), run.jobs.joinpath(f"{id}.log").read_text()
    return json.loads(code.read_text()), [link.rank_log(rank).read_text() for rank in range(2)]


def test_ranks_run_on_both_nodes_with_the_cpus_that_were_asked_for(
    slurm: SlurmCluster, run: RunDir
) -> None:
    ended, logs = supervise(slurm, run, "end")
    assert ended == [0, 2, 2]
    for rank, log in enumerate(logs):
        place = f"RankPlace(rank={rank}, world_size=2, local_rank=0, node_rank={rank})"
        assert log.startswith(f"{place} 1 ")
    assert {log.split()[-1] for log in logs} <= set(slurm.nodes)
    assert logs[0].split()[-1] != logs[1].split()[-1]
    ranks = {"JobName": "hpcresume", "AllocCPUS": "4", "NTasks": "2"}
    job = _only_job(run)
    wait_until("the ranks' record", lambda: ranks in slurm.sacct(job, *ranks), PATIENCE_S)


def _only_job(run: RunDir) -> str:
    (log,) = run.jobs.glob("*.log")
    return log.stem


def test_a_rank_that_fails_ends_the_other_one(slurm: SlurmCluster, run: RunDir) -> None:
    ended, logs = supervise(slurm, run, "fail")
    assert ended[0] == 3
    assert "TERM" in logs[0]


def test_a_polite_stop_reaches_the_ranks_and_not_srun(slurm: SlurmCluster, run: RunDir) -> None:
    ended, logs = supervise(slurm, run, "stop")
    assert ended[0] == 0
    assert all("TERM" in log for log in logs)


def test_a_kill_ends_the_ranks_at_once(slurm: SlurmCluster, run: RunDir) -> None:
    ended, logs = supervise(slurm, run, "kill")
    assert ended[0] == 128 + 9
    assert not any("TERM\n" in log for log in logs)
