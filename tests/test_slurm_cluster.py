"""The Slurm of the other tests is real and complete."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_janitor
from slurm_cluster import SlurmCluster, SlurmClusterError, wait_until


def submit(slurm: SlurmCluster, *argv: str, user: str | None = None) -> str:
    return slurm.run("sbatch", "--parsable", "--output=/dev/null", *argv, user=user).strip()


def state(slurm: SlurmCluster, job_id: str) -> str:
    """What accounting says of the job: nothing at first, for it hears of new jobs every 5 s."""
    rows = slurm.sacct(job_id, "JobIDRaw", "State")
    return next((row["State"] for row in rows if row["JobIDRaw"] == job_id), "")


def wait_state(slurm: SlurmCluster, job_id: str, wanted: str, timeout: float = 60) -> None:
    wait_until(f"{job_id} to be {wanted}", lambda: state(slurm, job_id) == wanted, timeout)


def wait_running(slurm: SlurmCluster, job_id: str) -> None:
    def is_running() -> bool:
        return any((job["id"], job["state"]) == (job_id, "RUNNING") for job in slurm.queue())

    wait_until(f"{job_id} to run", is_running, 60)


def test_a_finished_job_and_its_batch_step_have_a_row_in_sacct(slurm: SlurmCluster) -> None:
    job_id = submit(slurm, "--wrap=exit 0")
    wait_state(slurm, job_id, "COMPLETED")
    rows = slurm.sacct(job_id, "JobIDRaw", "State", "ExitCode")
    assert rows == [
        {"JobIDRaw": job_id, "State": "COMPLETED", "ExitCode": "0:0"},
        {"JobIDRaw": f"{job_id}.batch", "State": "COMPLETED", "ExitCode": "0:0"},
    ]


def test_an_ordinary_users_job_runs_as_them_and_sacct_says_so(slurm: SlurmCluster) -> None:
    job_id = submit(slurm, "--wrap=id -u > uid", user=slurm.user)
    wait_state(slurm, job_id, "COMPLETED")
    wait_until("the user", lambda: slurm.sacct(job_id, "User")[0]["User"] == slurm.user, 60)
    uid = slurm.home.joinpath("uid").read_text().strip()
    assert uid == slurm.sacct(job_id, "UID")[0]["UID"] != "0"


def test_an_ordinary_user_sees_their_own_row_in_sacct(slurm: SlurmCluster) -> None:
    job_id = submit(slurm, "--wrap=true", user=slurm.user)

    def seen() -> list[str]:
        # By itself sacct tells of this day alone, which may have begun a moment ago.
        options = ("-n", "-X", "-P", "-S", "now-1days", "-o", "JobID")
        return slurm.run("sacct", *options, user=slurm.user).split()

    wait_until(f"{job_id} in the user's own list", lambda: job_id in seen(), 60)
    assert seen().count(job_id) == 1


def test_a_successor_starts_when_the_node_of_its_predecessor_fails(slurm: SlurmCluster) -> None:
    node = slurm.nodes[1]
    first = submit(slurm, "--no-requeue", f"--nodelist={node}", "--wrap=sleep 100")
    second = submit(slurm, f"--dependency=afterany:{first}", "--wrap=true")
    wait_running(slurm, first)
    assert [job["reason"] for job in slurm.queue() if job["id"] == second] == ["Dependency"]
    slurm.node_down(node)
    wait_state(slurm, second, "COMPLETED")
    assert state(slurm, first) == "NODE_FAIL"


def test_a_signal_to_the_batch_script_is_accepted(slurm: SlurmCluster) -> None:
    job_id = submit(slurm, "--signal=B:USR2@60", "--time=10", "--wrap=true")
    wait_state(slurm, job_id, "COMPLETED")
    assert slurm.sacct(job_id, "ExitCode")[0]["ExitCode"] == "0:0"


def test_both_partitions_have_a_time_limit_of_two_hours(slurm: SlurmCluster) -> None:
    text = slurm.run("scontrol", "--oneliner", "show", "partition")
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert set(lines) == {"PartitionName=main", "PartitionName=high"}
    assert all("MaxTime=02:00:00" in line for line in lines.values())


def test_a_step_runs_python_on_two_nodes(slurm: SlurmCluster) -> None:
    program = "import os; print(os.environ['SLURMD_NODENAME'])"
    text = slurm.run("srun", "--nodes=2", "--ntasks=2", sys.executable, "-c", program)
    assert len(set(text.split())) == 2
    assert set(text.split()) <= set(slurm.nodes)


def test_a_job_gets_the_gpus_that_it_asks_for(slurm: SlurmCluster) -> None:
    text = slurm.run("srun", "--gres=gpu:2", "env")
    assert {"SLURM_GPUS_ON_NODE=2", "CUDA_VISIBLE_DEVICES=0,1"} <= set(text.splitlines())


def test_a_step_that_fills_its_memory_is_recorded_as_such(slurm: SlurmCluster) -> None:
    if not slurm.has_cgroups:
        pytest.skip("no writable cgroups (v1) for freezer and memory: Slurm records no cause")
    fill = f"srun {sys.executable} -c 'bytearray(400_000_000)'"
    job_id = submit(slurm, "--mem=60", f"--wrap={fill}")
    wait_state(slurm, job_id, "FAILED")
    states = {row["JobIDRaw"]: row["State"] for row in slurm.sacct(job_id)}
    assert states[f"{job_id}.0"] == "OUT_OF_MEMORY"


def test_a_node_without_slurmd_stays_down_until_both_are_mended(slurm: SlurmCluster) -> None:
    node = slurm.nodes[3]
    slurm.kill_slurmd(node)
    slurm.node_down(node)
    time.sleep(0.5)
    assert slurm.node_states()[node].startswith("down")
    slurm.start_slurmd(node)
    slurm.node_resume(node)
    assert slurm.run("srun", f"--nodelist={node}", "printenv", "SLURMD_NODENAME").strip() == node


def test_a_node_without_power_has_no_tasks_and_its_job_fails(slurm: SlurmCluster) -> None:
    if not slurm.has_cgroups:
        pytest.skip("no writable cgroups (v1): the tasks of a node cannot be found")
    node = slurm.nodes[2]
    job_id = submit(slurm, "--no-requeue", f"--nodelist={node}", "--wrap=sleep 100")
    wait_until("its tasks", lambda: slurm_janitor.step_processes([node]), 60)
    slurm.power_off(node)
    assert not slurm_janitor.step_processes([node])
    slurm.node_down(node)
    wait_state(slurm, job_id, "NODE_FAIL")
    slurm.start_slurmd(node)
    slurm.node_resume(node)


def test_all_jobs_can_be_cancelled_at_once(slurm: SlurmCluster) -> None:
    running = submit(slurm, "--wrap=sleep 100")
    pending = submit(slurm, f"--dependency=afterany:{running}", "--wrap=sleep 100")
    wait_running(slurm, running)
    slurm.cancel_all()
    slurm.wait_idle()
    # Had the successor been released by the other's end, it would have a start and a node.
    assert "NodeList=" in slurm.run("scontrol", "show", "job", pending).split()


def test_a_job_outlives_the_controller(slurm: SlurmCluster, tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    job_id = submit(slurm, f"--wrap=until [ -e {go} ]; do sleep 0.1; done; touch {done}")
    wait_running(slurm, job_id)
    slurm.stop_controller()
    go.touch()
    wait_until("the job's end", done.exists, 60)
    slurm.start_controller()
    wait_state(slurm, job_id, "COMPLETED")
    assert slurm.sacct(job_id, "ExitCode")[0]["ExitCode"] == "0:0"


@pytest.mark.usefixtures("slurm")
def test_extra_conf_overrides_the_configuration() -> None:
    with SlurmCluster(accounting=False, extra_conf={"JobRequeue": "0"}) as cluster:
        job_id = submit(cluster, "--hold", "--wrap=true")
        assert "Requeue=0" in cluster.run("scontrol", "show", "job", job_id)


@pytest.mark.usefixtures("slurm")
def test_a_daemon_that_does_not_start_is_quoted() -> None:
    cluster = SlurmCluster(accounting=False, extra_conf={"SchedulerType": "sched/absent"})
    with pytest.raises(SlurmClusterError, match=r"(?s)slurmctld ended with 1.*sched/absent"):
        cluster.start()
    assert not cluster.folder.exists()


@pytest.mark.usefixtures("slurm")
def test_nothing_outlives_a_killed_test_process() -> None:
    program = """
import slurm_cluster, time
cluster = slurm_cluster.SlurmCluster(accounting=False)
cluster.start()
cluster.run("sbatch", "--output=/dev/null", "--wrap=srun env -i /bin/sleep 1000")
slurm_cluster.wait_until("a step", lambda: "1.0" in cluster.run("squeue", "-h", "-s"), 60)
print(cluster.folder, *cluster.nodes, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        folder, *nodes = owner.stdout.readline().split()
        assert slurm_janitor.processes(Path(folder), nodes)
        owner.send_signal(signal.SIGKILL)
    wait_until("the folder's removal", lambda: not Path(folder).exists(), 60)
    assert not slurm_janitor.processes(Path(folder), nodes)
    assert not list(slurm_janitor.CGROUPS.glob(f"*/*{nodes[0]}*"))


def test_the_queue_is_empty_at_the_end(slurm: SlurmCluster) -> None:
    slurm.wait_idle()
    assert slurm.queue() == []
