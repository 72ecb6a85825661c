"""Whatever ends a link on a real Slurm: the chain completes with the uncut run's bytes, or stops
for a recorded reason, and no job stays in the queue.

All scenarios run at once; see `scenarios`. SCENARIOS says which test proves which of them.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenarios import AT, SAVED, Scene, Stage, selected, side_by_side
from slurm_cluster import missing, wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.xdist_group("slurm-scenarios"),
    pytest.mark.timeout(400),
]

HERE, CHAIN = "test_slurm_scenarios.py", "test_slurm_chain.py"
#: What may happen to a chain -> the test that proves what becomes of it.
SCENARIOS = {
    "time limit with the signal blocked": (
        HERE,
        "test_a_step_that_no_signal_ends_reaches_the_time_limit_and_is_trained_again",
    ),
    "preemption, PreemptMode=REQUEUE": (
        HERE,
        "test_a_preempted_link_is_followed_at_once_where_slurm_would_requeue_it",
    ),
    "preemption, PreemptMode=CANCEL": (
        HERE,
        "test_a_preempted_link_is_followed_at_once_where_slurm_cancels_it",
    ),
    "node DOWN with --no-requeue": (
        CHAIN,
        "test_a_chain_goes_on_by_itself_and_ends_with_the_same_bytes_after",
    ),
    "node DOWN without --no-requeue": (
        HERE,
        "test_a_job_that_slurm_requeues_from_a_dead_node_is_the_next_link",
    ),
    "slurmd killed": (HERE, "test_a_link_that_lives_on_after_its_slurmd_is_fenced"),
    "slurmctld restarted in mid-link": (
        HERE,
        "test_a_link_outlives_the_controller_and_is_followed_as_ever",
    ),
    "step out of memory": (HERE, "test_out_of_memory_at_the_same_step_twice_ends_the_chain"),
    "exception every time": (HERE, "test_the_same_exception_twice_ends_the_chain_and_why_shows_it"),
    "exception once": (HERE, "test_an_exception_that_does_not_come_again_costs_one_link"),
    "NaN": (HERE, "test_a_loss_that_is_not_finite_ends_the_chain_before_it_is_saved"),
    "hang, once": (CHAIN, "test_ranks_that_hang_print_their_stacks_and_the_chain_goes_on"),
    "hang, every time": (HERE, "test_a_hang_in_the_same_step_twice_ends_the_chain"),
    "one link dies before its first line": (
        CHAIN,
        "test_a_link_that_dies_before_its_first_line_is_survived_by_the_spare_one",
    ),
    "two links in a row die before their first line": (
        HERE,
        "test_two_jobs_in_a_row_that_die_before_their_first_line_are_survived",
    ),
    "all that wait die before their first line": (
        HERE,
        "test_a_chain_whose_waiting_jobs_all_died_is_stalled_and_resumes",
    ),
    "scancel by the user": (
        CHAIN,
        "test_scancel_of_the_running_link_ends_the_chain_and_status_says_who",
    ),
    "scancel of the successor alone": (
        CHAIN,
        "test_scancel_of_the_successor_alone_ends_the_chain_after_this_link",
    ),
    "two links at once": (HERE, "test_a_link_that_wakes_up_beside_its_successor_changes_nothing"),
    "requeue disabled": (
        HERE,
        "test_where_slurm_refuses_to_requeue_a_job_the_next_link_is_a_new_one",
    ),
    "sbatch failing on compute nodes, scontrol not": (
        HERE,
        "test_where_nodes_may_not_submit_the_job_itself_is_requeued",
    ),
    "sbatch and scontrol failing on compute nodes": (
        HERE,
        "test_where_nodes_may_do_nothing_the_chain_stops_and_says_what_slurm_said",
    ),
    "sbatch failing on compute nodes, driven from a login node": (
        CHAIN,
        "test_a_driver_on_the_login_node_chains_jobs_that_may_not_submit",
    ),
    "sbatch that times out but was heard": (
        HERE,
        "test_an_sbatch_that_times_out_but_was_heard_queues_each_job_once",
    ),
    "squeue that hangs": (HERE, "test_a_squeue_that_hangs_costs_no_link_its_successors"),
    "squeue that hangs, at the end of the job": (
        HERE,
        "test_a_link_that_cannot_ask_when_it_ends_saves_at_slurms_warning",
    ),
    "hostile environment": (
        HERE,
        "test_the_next_link_gets_nothing_of_the_environment_of_the_one_before",
    ),
    "no accounting, killed": (HERE, "test_without_accounting_a_killed_link_is_followed"),
    "no accounting, cancelled": (
        CHAIN,
        "test_without_accounting_a_cancelled_chain_ends_with_user_unknown",
    ),
    "journal with a torn last line": (HERE, "test_torn_last_lines_of_the_journals_are_passed_over"),
    "clock jumped ten years, in mid-link": (
        HERE,
        "test_a_clock_that_jumps_by_ten_years_ends_no_link",
    ),
    "clock jumped ten years, between two links": (
        HERE,
        "test_a_link_on_a_node_whose_clock_is_wrong_by_ten_years_trains_to_its_end",
    ),
    "behind bash -c that swallows signals": (
        HERE,
        "test_ranks_behind_a_shell_that_swallows_signals_save_and_leave",
    ),
    "behind torchrun that swallows signals": (
        HERE,
        "test_ranks_behind_torchrun_save_and_leave",
    ),
}


@pytest.fixture(scope="module")
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    """All scenarios that were chosen, under way."""
    if reason := missing():
        pytest.skip(reason)
    with Stage(tmp_path_factory.mktemp("scenarios"), selected(request.session.items)) as stage:
        yield stage


def test_every_scenario_of_the_table_has_its_test() -> None:
    folder = Path(__file__).parent
    functions = {
        file: {
            node.name
            for node in ast.parse((folder / file).read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for file in (HERE, CHAIN)
    }
    assert not [name for file, name in SCENARIOS.values() if name not in functions[file]]
    own = {name for file, name in SCENARIOS.values() if file == HERE}
    assert functions[HERE] - own == {"test_every_scenario_of_the_table_has_its_test"}


# ---- the longest ---------------------------------------------------------------------------------


@side_by_side()
def test_a_step_that_no_signal_ends_reaches_the_time_limit_and_is_trained_again(
    scene: Scene,
) -> None:
    limit = {"scheduler": {"time": "00:01:00"}, "chain": {"lead_s": 0}}
    scene.begin(at_once=True, args={"fault": "block"}, **limit)
    links = scene.ends_like_the_uncut_run(links=2)
    assert scene.causes()[0] == "time limit"
    assert links[1].last("restored")["step"] == SAVED


# ---- two at once -------------------------------------------------------------------------------


@contextlib.contextmanager
def lost(scene: Scene, node: str) -> Iterator[None]:
    """Slurm has lost a node, where all goes on as it was; it comes back at the end of the block."""
    scene.cluster.kill_slurmd(node)
    scene.cluster.node_down(node)
    try:
        yield
    finally:
        scene.cluster.start_slurmd(node)
        scene.cluster.node_resume(node)


def end_of(pids: list[int]) -> None:
    """Wait until none of these processes is left."""
    left = f"the end of the old link's processes {pids}"
    wait_until(left, lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 90)


@side_by_side("bare")
def test_a_link_that_wakes_up_beside_its_successor_changes_nothing(scene: Scene) -> None:
    with scene.breaking_a_node() as excluded:
        first = scene.begin(at_once=True, scheduler={"exclude": excluded})
        node, pids = str(first.claim["nodes"]), scene.processes(first)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        with lost(scene, node):
            scene.has_restored(2)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            scene.go()
            scene.ends_like_the_uncut_run(links=2)
            end_of(pids)
    assert scene.causes()[0] == "node failure"
    assert scene.links()[1].last("restored")["step"] == SAVED


@side_by_side("bare")
def test_a_link_that_lives_on_after_its_slurmd_is_fenced(scene: Scene) -> None:
    with scene.breaking_a_node() as excluded:
        first = scene.begin(at_once=True, scheduler={"exclude": excluded})
        node, pids = str(first.claim["nodes"]), scene.processes(first)
        with lost(scene, node):
            scene.has_restored(2)
            scene.go()
            scene.ends_like_the_uncut_run(links=2)
            end_of(pids)
    assert scene.causes()[0] == "node failure"


# ---- nodes, and the controller -----------------------------------------------------------------


@side_by_side("bare")
def test_a_job_that_slurm_requeues_from_a_dead_node_is_the_next_link(scene: Scene) -> None:
    with scene.breaking_a_node() as excluded:
        first = scene.begin(
            at_once=True, scheduler={"exclude": excluded}, chain={"mode": "requeue"}
        )
        with lost(scene, str(first.claim["nodes"])):
            scene.has_restored(2)
    links = scene.ends_like_the_uncut_run(links=2)
    assert links[0].claim["job"] == links[1].claim["job"]
    assert links[1].claim["restart"] == 1


@side_by_side("bare")
def test_a_link_outlives_the_controller_and_is_followed_as_ever(scene: Scene) -> None:
    first = scene.begin(args={"pause_s": 0.05})
    with scene.breaking_the_controller():
        scene.cluster.stop_controller()
        scene.cluster.start_controller()
    scene.hears_the_supervisor(first)
    assert scene.causes()[0] == "deadline"


# ---- the queue does not answer -------------------------------------------------------------------


def shim(scene: Scene, program: str, text: str) -> str:
    """A program of the nodes that stands before Slurm's own; the setup line that puts it there."""
    folder = scene.folder / "a site's bin"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / program
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f'export PATH="{folder}:$PATH"'


def refusal(program: str) -> str:
    return f"echo '{program}: error: Access/permission denied' >&2; exit 1"


@side_by_side()
def test_an_sbatch_that_times_out_but_was_heard_queues_each_job_once(scene: Scene) -> None:
    said = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    heard = '/usr/bin/sbatch "$@" >/dev/null 2>&1'
    setup = shim(scene, "sbatch", f"{heard}; echo '{said}' >&2; exit 1")
    first = scene.begin(scheduler={"setup": [setup]})
    scene.wait(lambda links: len(links[0].all("queued")) == 2)
    queued = [str(record["queued_job"]) for record in scene.links()[0].all("queued")]
    waiting = [job["id"] for job in scene.cluster.queue() if job["name"] == scene.run.name]
    assert sorted(waiting) == sorted([str(first.claim["job"]), *queued])
    scene.kill_ranks(first)
    scene.ends_like_the_uncut_run(links=2)


@side_by_side()
def test_a_squeue_that_hangs_costs_no_link_its_successors(scene: Scene) -> None:
    setup = shim(scene, "squeue", "sleep 3600")
    first = scene.begin(at_once=True, scheduler={"setup": [setup]})
    scene.wait(lambda links: len(links[0].all("queued")) == 2)
    scene.kill_ranks(first)
    links = scene.ends_like_the_uncut_run(links=2)
    assert links[0].claim["job"] != links[1].claim["job"]


@pytest.mark.long
@side_by_side()
def test_a_link_that_cannot_ask_when_it_ends_saves_at_slurms_warning(scene: Scene) -> None:
    setup = shim(scene, "squeue", "sleep 3600")
    scene.begin(scheduler={"setup": [setup], "time": "00:02:00"}, args={"pause_s": 0.05})
    first, second = scene.ends_like_the_uncut_run(links=2)
    assert first.last("stop_asked")["reason"].startswith("warned by the scheduler")
    assert second.last("restored")["step"] >= AT


# ---- jobs that die before their first line -------------------------------------------------------


def doomed(scene: Scene) -> tuple[Path, list[str]]:
    """A file with a line for each job that is to die as soon as it starts, and who looks at it."""
    path = scene.folder / "doomed"
    path.parent.mkdir(parents=True)
    path.touch()
    return path, [f"[ -s '{path}' ] && sed -i 1d '{path}' && exit 3", "true"]


@side_by_side()
def test_two_jobs_in_a_row_that_die_before_their_first_line_are_survived(scene: Scene) -> None:
    file, setup = doomed(scene)
    first = scene.begin(chain={"ahead": 3}, scheduler={"setup": setup})
    scene.wait(lambda links: len(links[0].all("queued")) == 3)
    file.write_text("one\ntwo\n")
    scene.kill_ranks(first)
    links = scene.ends_like_the_uncut_run(links=2)
    assert not file.read_text()
    assert int(links[1].claim["job"]) - int(links[0].claim["job"]) >= 3


@side_by_side()
def test_a_chain_whose_waiting_jobs_all_died_is_stalled_and_resumes(scene: Scene) -> None:
    file, setup = doomed(scene)
    first = scene.begin(chain={"ahead": 3}, scheduler={"setup": setup})
    scene.wait(lambda links: len(links[0].all("queued")) == 3)
    file.write_text("one\ntwo\nthree\n")
    scene.kill_ranks(first)
    wait_until("three deaths", lambda: not file.read_text(), 200)
    scene.nothing_queued()
    assert scene.status()["state"] == "stalled"
    waited = ", ".join(str(record["queued_job"]) for record in scene.links()[0].all("queued"))
    told = scene.why()
    assert "link 1 ended (killed" in told
    assert f"jobs {waited} ended before their links began (FAILED, exit code 3)" in told
    assert scene.command("resume", scene.run.name).returncode == 0
    scene.ends_like_the_uncut_run(links=2)


# ---- other ways out ------------------------------------------------------------------------------


@side_by_side("bare")
def test_where_slurm_refuses_to_requeue_a_job_the_next_link_is_a_new_one(scene: Scene) -> None:
    setup = shim(
        scene,
        "scontrol",
        "case $1 in requeue) echo 'Requested operation is presently disabled' >&2; exit 1;; esac\n"
        'exec /usr/bin/scontrol "$@"',
    )
    first = scene.begin(chain={"mode": "requeue"}, scheduler={"setup": [setup]})
    scene.kill_ranks(first)
    links = scene.ends_like_the_uncut_run(links=2)
    assert links[0].claim["job"] != links[1].claim["job"]


@side_by_side("bare")
def test_where_nodes_may_not_submit_the_job_itself_is_requeued(scene: Scene) -> None:
    setup = shim(scene, "sbatch", refusal("sbatch"))
    first = scene.begin(scheduler={"setup": [setup]})
    scene.kill_ranks(first)
    links = scene.ends_like_the_uncut_run(links=2)
    assert links[0].claim["job"] == links[1].claim["job"]


@side_by_side()
def test_where_nodes_may_do_nothing_the_chain_stops_and_says_what_slurm_said(
    scene: Scene,
) -> None:
    shim(scene, "scontrol", refusal("scontrol"))
    setup = shim(scene, "sbatch", refusal("sbatch"))
    first = scene.begin(scheduler={"setup": [setup]})
    scene.kill_ranks(first)
    reason = scene.stops()["reason"]
    assert "no next job could be queued" in reason
    assert reason.count("Access/permission denied") == 2
    assert "Access/permission denied" in scene.why()


# ---- what the code does --------------------------------------------------------------------------


@side_by_side()
def test_the_same_exception_twice_ends_the_chain_and_why_shows_it(scene: Scene) -> None:
    scene.begin(args={"fault": "fail", "at": 40, "always": True})
    decision = scene.stops()
    assert decision["rule"] == "same_exception"
    assert scene.causes() == ["user code", "user code"]
    assert "ValueError: this step fails in step 40, in links 1 and 2" in scene.why()


@pytest.mark.long
@side_by_side()
def test_an_exception_that_does_not_come_again_costs_one_link(scene: Scene) -> None:
    scene.begin(args={"fault": "fail"})
    links = scene.ends_like_the_uncut_run(links=2)
    # Of a step that was long enough the boundary behind it is saved when the next one fails.
    saved = links[0].last("saved")["step"]
    assert links[1].last("restored")["step"] == saved in (SAVED, AT - 1)
    assert scene.causes() == ["user code", "completed"]


@side_by_side()
def test_a_loss_that_is_not_finite_ends_the_chain_before_it_is_saved(scene: Scene) -> None:
    scene.begin(args={"fault": "not_a_number", "at": 30})
    decision = scene.stops()
    assert decision["rule"] == "non_finite"
    assert "step 30" in decision["reason"]
    assert scene.run.checkpoint_steps()[-1] == 27


@pytest.mark.long
@side_by_side()
def test_a_hang_in_the_same_step_twice_ends_the_chain(scene: Scene) -> None:
    scene.begin(args={"fault": "hang", "always": True}, chain={"hang_s": 10})
    decision = scene.stops()
    assert scene.causes() == ["hang", "hang"], decision
    assert f"step {AT}" in decision["reason"]


@side_by_side()
def test_out_of_memory_at_the_same_step_twice_ends_the_chain(scene: Scene) -> None:
    if not scene.cluster.has_cgroups:
        pytest.skip("no writable cgroups (v1) for freezer and memory: Slurm records no cause")
    # The kernel ends a rank without a word: its last sign of life, one a second, tells the step.
    slow = {"fault": "fill_memory", "always": True, "pause_s": 1.2}
    scene.begin(args=slow, chain={"hang_s": 600})
    decision = scene.stops()
    assert decision["rule"] == "same_memory"
    assert f"in step {AT} twice" in decision["reason"]
    assert scene.causes() == ["out of host memory"] * 2
    assert "scheduler.mem" in scene.why()


# ---- time, and those who are more important ------------------------------------------------------


def preempted(scene: Scene, partition: str) -> float:
    """A chain whose first link makes way for another job; seconds until the second had begun."""
    changes = {"partition": partition, "gpus_per_node": 2}
    first = scene.begin(scheduler=changes)
    node = str(first.claim["nodes"])
    high = scene.cluster.run(
        *("sbatch", "--parsable", "-p", "high", f"--nodelist={node}", "--gres=gpu:2"),
        *("--mem=100", "--output=/dev/null", "--wrap=sleep 600"),
    ).strip()
    second = scene.has_restored(2)
    scene.cluster.run("scancel", high)
    gap_s = second.records[0]["t"] - scene.links()[0].records[-1]["t"]
    links = scene.ends_like_the_uncut_run(links=2)
    assert links[0].claim["job"] != links[1].claim["job"]
    return float(gap_s)


#: In seconds. Slurm holds a job that it requeues for two minutes.
AT_ONCE_S = 110


@side_by_side()
def test_a_preempted_link_is_followed_at_once_where_slurm_would_requeue_it(scene: Scene) -> None:
    assert preempted(scene, "main") < AT_ONCE_S
    assert scene.causes()[0] == "preempted"


@side_by_side()
def test_a_preempted_link_is_followed_at_once_where_slurm_cancels_it(scene: Scene) -> None:
    assert preempted(scene, "low") < AT_ONCE_S
    assert scene.causes()[0] == "preempted"


FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
needs_faketime = pytest.mark.skipif(
    not FAKETIME, reason="no libfaketime: apt-get install -y libfaketime"
)
#: libfaketime 0.9.10 has no answer for the call by which Python sleeps.
SLEEP = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


def clock_of(scene: Scene) -> tuple[Path, list[str]]:
    """The clock of a chain's jobs: a file that says by how much it is wrong; and who reads it."""
    file, folder = scene.folder / "clock", scene.folder / "no sleep"
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SLEEP)
    file.write_text("+0\n")
    return file, [
        f"export FAKETIME_TIMESTAMP_FILE='{file}' FAKETIME_NO_CACHE=1",
        f"export FAKETIME_DONT_FAKE_MONOTONIC=1 PYTHONPATH='{folder}':$PYTHONPATH",
        f"export LD_PRELOAD={FAKETIME[0]}",
    ]


@needs_faketime
@side_by_side()
def test_a_clock_that_jumps_by_ten_years_ends_no_link(scene: Scene) -> None:
    clock, setup = clock_of(scene)
    scene.begin(scheduler={"setup": setup})
    clock.write_text("+10y\n")
    told, later = scene.run.link(1).deadline, time.time() + 9 * 365 * 86400
    wait_until("the end by the new clock", lambda: json.loads(told.read_text())["end"] > later, 60)
    scene.go()
    assert scene.ends_like_the_uncut_run(links=1)[0].last("completed")


@needs_faketime
@side_by_side()
def test_a_link_on_a_node_whose_clock_is_wrong_by_ten_years_trains_to_its_end(
    scene: Scene,
) -> None:
    clock, setup = clock_of(scene)
    first = scene.begin(scheduler={"setup": setup}, chain={"max_hours": 100})
    clock.write_text("+10y\n")
    os.kill(int(first.claim["pid"]), signal.SIGKILL)
    assert scene.ends_like_the_uncut_run(links=2)[1].last("completed")


# ---- what links inherit --------------------------------------------------------------------------

HOSTILE = {
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_FORMAT": "%j",
    "SLURM_TIME_FORMAT": "relative",
    "SACCT_FORMAT": "User",
    "SCANCEL_STATE": "SUSPENDED",
}


@side_by_side()
def test_the_next_link_gets_nothing_of_the_environment_of_the_one_before(scene: Scene) -> None:
    scene.environ = HOSTILE
    seen = scene.folder / "seen"
    settings = [f"export {name}={value}" for name, value in HOSTILE.items()]
    setup = [
        f"echo \"$TMPDIR\" >>'{seen}'",
        f'export TMPDIR="{scene.folder}/tmp of $SLURM_JOB_ID"; mkdir "$TMPDIR"',
        *settings,
    ]
    first = scene.begin(scheduler={"setup": setup})
    scene.wait(lambda links: len(links[0].all("queued")) == 2)
    assert len(scene.status()["queued"]) == 2
    shutil.rmtree(scene.folder / f"tmp of {first.claim['job']}")
    scene.kill_ranks(first)
    scene.ends_like_the_uncut_run(links=2)
    first_tmp, *later = seen.read_text().splitlines()
    assert later == [first_tmp] * len(later) != []


@side_by_side("bare")
def test_without_accounting_a_killed_link_is_followed(scene: Scene) -> None:
    first = scene.begin()
    os.kill(int(first.claim["pid"]), signal.SIGKILL)
    links = scene.ends_like_the_uncut_run(links=2)
    assert links[1].last("restored")["step"] in (SAVED, AT)
    assert scene.causes()[0] == "killed"


@side_by_side()
def test_torn_last_lines_of_the_journals_are_passed_over(scene: Scene) -> None:
    tear = scene.folder / "tear"
    link = scene.run.link(1)
    torn = f"'{link.journal}' '{link.training}'"
    setup = [f"rm '{tear}' 2>/dev/null && truncate -s -9 {torn}", "true"]
    first = scene.begin(scheduler={"setup": setup})
    tear.touch()
    os.kill(int(first.claim["pid"]), signal.SIGKILL)
    links = scene.ends_like_the_uncut_run(links=2)
    assert not tear.exists()
    assert links[1].last("restored")["step"] in (SAVED, AT)


# ---- what stands between srun and a rank ---------------------------------------------------------


def behind(scene: Scene, wrapper: str) -> None:
    """A chain whose ranks stand behind a program that keeps signals to itself."""
    words = f'while [ "$1" != image ]; do shift; done; shift\n{wrapper}'
    setup = shim(scene, "apptainer", words)
    container = {"image": "image", "runtime": "apptainer", "python": sys.executable}
    changes = {"setup": [setup], "container": container}
    scene.hears_the_supervisor(scene.begin(scheduler=changes, args={"pause_s": 0.05}))


@side_by_side()
def test_ranks_behind_a_shell_that_swallows_signals_save_and_leave(scene: Scene) -> None:
    trap = "trap : TERM INT USR1 USR2"
    behind(scene, f'exec bash -c \'{trap}; "$@" & wait; wait; exit $?\' - "$@"')
    assert scene.causes()[0] == "deadline"


@pytest.mark.long
@side_by_side()
def test_ranks_behind_torchrun_save_and_leave(scene: Scene) -> None:
    run = f"{sys.executable} -m torch.distributed.run --nproc-per-node=1 --master-port=0"
    behind(scene, f'exec {run} --no-python "$@"')
    assert scene.causes()[0] == "deadline"
