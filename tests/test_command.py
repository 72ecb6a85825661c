"""A command behind `--` as the ranks of a chain: real processes, really cut."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_run import Said
from oracle import ENVIRON, hpcresume

from hpcresume.adapters.ending import Attempt, judge
from hpcresume.adapters.output import BAR_S, Output
from hpcresume.adapters.sight import Sight
from hpcresume.adapters.variables import command_environment
from hpcresume.chain import COMMAND, Budgets, Cause, Evidence, Failure, PastLink, cause_of, decide
from hpcresume.commands import check_command, name_of
from hpcresume.config import ProgressConfig, from_mapping
from hpcresume.errors import ConfigError
from hpcresume.journal import LinkRecords, read_chain
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.scheduler.process import pid_alive
from hpcresume.successors import lead_s
from hpcresume.training.clock import MARGIN_S

EXAMPLES = Path(__file__).parent.parent / "examples"
#: What a chain of these tests is submitted with: its jobs end when the tests end them.
LOCAL = ("--cluster=local", "--name=run", "--set=chain.lead_s=10", "--set=scheduler.grace_s=5")


class Chain:
    """A run of a command, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDir(folder / "runs" / "run")

    def submit(self, *argv: str, detach: bool = False, **environ: str) -> str:
        """Submit; without `detach` until the chain has ended. What it said."""
        more = ["--detach"] if detach else []
        done = hpcresume("submit", *LOCAL, *more, *argv, cwd=self.folder, **environ)
        self.code = done.returncode
        assert not detach or self.code == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def links(self) -> list[LinkRecords]:
        return read_chain(self.run)

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for link in self.links() for record in link.all(kind)]

    def ends(self) -> list[str]:
        """The cause of each link's end."""
        return [r["cause"] for r in self.records("ended") if "cause" in r]

    def wait(self, what: Callable[[], Any], timeout: float = 90) -> Any:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"timed out; {self.story()}")

    def printed(self, link: int, rank: int = 0) -> str:
        log = self.run.link(link).rank_log(rank)
        return log.read_text() if log.exists() else ""

    def rank_of(self, number: int) -> int:
        """The process of rank 0 of a link."""
        claim = self.wait(lambda: next((k for k in self.links() if k.number == number), None)).claim
        children = Path(f"/proc/{claim['pid']}/task/{claim['pid']}/children")
        return int(self.wait(lambda: children.read_text().split())[0])

    def cut(self, number: int, how: signal.Signals, *, after: str) -> None:
        """Signal the rank of a link when that has printed something."""
        self.wait(lambda: after in self.printed(number))
        os.kill(self.rank_of(number), how)

    def cut_guest(self, number: int, how: signal.Signals, *, after: str) -> None:
        """The same where a framework tells the rank where it has begun, once that has heard it."""

        def begun() -> bool:
            told = [
                r for link in self.links() if link.number == number for r in link.all("restored")
            ]
            return any(record.get("guest") for record in told)

        self.wait(begun)
        self.cut(number, how, after=after)

    def completed(self) -> None:
        self.wait(lambda: self.records("decided") and self.records("completed"))
        self.wait(lambda: not self.run.driver.exists())

    def status(self) -> dict[str, Any]:
        done = hpcresume("status", "run", "--json", cwd=self.folder)
        return dict(json.loads(done.stdout)["runs"][0])

    def story(self) -> str:
        log = self.run.train_log.read_text()[-3000:] if self.run.train_log.exists() else ""
        lines = [f"{k.number}: {r}" for k in self.links() for r in k.records]
        return "\n".join([*lines, log])


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    # Paths of users hold spaces and quotes.
    folder = tmp_path / "it's a project"
    folder.mkdir()
    for name in ("count.sh", "command.py"):
        shutil.copy(EXAMPLES / name, folder)
    return Chain(folder)


@pytest.fixture
def here(chain: Chain, said: Said, monkeypatch: pytest.MonkeyPatch) -> Said:
    """A command line in this process, typed in the chain's folder."""
    monkeypatch.chdir(chain.folder)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", os.devnull)
    return said


def script(chain: Chain, text: str) -> str:
    (chain.folder / "job.sh").write_text(text)
    return "job.sh"


# ---- chains that are cut ---------------------------------------------------------------------


def test_a_script_that_counts_is_killed_and_preempted_and_comes_to_its_last_number(
    chain: Chain,
) -> None:
    chain.submit(
        "--checkpoints=count.txt", "--", "bash", "count.sh", "90", detach=True, PAUSE="0.1"
    )
    chain.cut(1, signal.SIGKILL, after="step 12\n")
    chain.cut(2, signal.SIGTERM, after="step 31\n")
    chain.completed()
    assert (chain.folder / "count.txt").read_text() == "90\n"
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    begun = [record["step"] for record in chain.records("restored")]
    assert begun[0] == 0
    assert begun[2] > 30
    printed = "".join(chain.printed(number) for number in (1, 2, 3))
    steps = [int(line.split()[1]) for line in printed.splitlines() if line.startswith("step")]
    # Who is killed between saving a number and printing it prints nothing; nothing comes twice.
    assert steps == sorted({*steps}), chain.story()
    assert len(steps) > 80
    assert chain.status()["state"] == "complete"
    assert chain.status()["step"] == 90


def test_links_end_before_the_time_limit_of_their_jobs_and_the_command_does_not_notice(
    chain: Chain,
) -> None:
    limits = ("--time=00:00:10", "--set=chain.lead_s=2")
    chain.submit(*limits, "--", "bash", "count.sh", "100", PAUSE="0.1")
    assert chain.code == 0, chain.story()
    assert (chain.folder / "count.txt").read_text() == "100\n"
    causes = chain.ends()
    assert {*causes[:-1]} == {"deadline"}, chain.story()
    assert len(causes) >= 2
    # Nothing but its output was seen, which decides nothing: its time counts.
    assert all(record["seen"] == "time" for record in chain.records("saved"))
    said = hpcresume("why", "run", cwd=chain.folder).stdout
    assert "STEPS" not in said, "seconds are no steps"
    assert "run is complete at step 100: " in said
    said = hpcresume("checkpoints", "run", cwd=chain.folder).stdout
    assert "runs a command, which saves by itself" in said


def digits(folder: Path) -> bytes:
    """What the classifier saves at its end, trained without a cut."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "command.py"), "--epochs=4"],
        cwd=folder,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "out.pt").read_bytes()


def test_a_plain_script_ends_with_the_bytes_of_the_uncut_run(chain: Chain, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    uncut = digits(tmp_path)
    command = (sys.executable, "command.py", "--epochs=4", "--pause=1.5")
    chain.submit("--checkpoints=out.pt", "--", *command, detach=True)
    chain.cut(1, signal.SIGKILL, after="epoch 1")
    chain.cut(2, signal.SIGTERM, after="epoch 2")
    chain.completed()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert "epoch 1 " not in chain.printed(2)
    assert (chain.folder / "out.pt").read_bytes() == uncut


def test_nothing_of_a_command_outlives_its_parent_or_its_link(chain: Chain) -> None:
    name = script(
        chain,
        "echo $$ >> pids; setsid sleep 1000 & echo $! >> pids; echo ready; wait",
    )
    chain.submit("--", "bash", name, detach=True)
    chain.cut(1, signal.SIGKILL, after="ready")
    chain.cut(2, signal.SIGTERM, after="ready")
    chain.wait(lambda: "ready" in chain.printed(3))
    hpcresume("cancel", "--yes", "run", cwd=chain.folder)
    pids = [int(pid) for pid in (chain.folder / "pids").read_text().split()]
    assert len(pids) == 6
    chain.wait(lambda: not any(pid_alive(pid) for pid in pids))


_PARENT = """
import os, sys, time
from pathlib import Path
from hpcresume.adapters.child import Child
child = Child(["sleep", "1000"], os.environ, Path.cwd())
print(child.processes()[0].pid, flush=True)
time.sleep(1000)
"""


def test_a_command_dies_with_its_parent_before_anybody_else_looks() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert pid_alive(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while pid_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not pid_alive(pid)


_SIZES = """
echo "ready $RANK of $WORLD_SIZE,"
[ "$HPCRESUME_LINK" = 3 ] && exit 0
sleep 1000
"""


def test_of_a_range_of_nodes_each_link_has_the_ranks_that_it_is_given(chain: Chain) -> None:
    job = script(chain, _SIZES)
    chain.submit("--nodes=1-2", "--", "bash", job, detach=True)
    chain.cut(1, signal.SIGTERM, after="ready 0 of 2,")
    chain.wait(lambda: "ready  of ," in chain.printed(2))
    state = chain.status()
    assert (state["state"], state["why"]) == ("running", "1 rank, after 2 in link 1")
    chain.cut(2, signal.SIGTERM, after="ready")
    chain.completed()
    assert "ready 1 of 2," in chain.printed(3, rank=1)
    said = [record["change"] for record in chain.records("changed")]
    assert said == ["1 rank, after 2 in link 1", "2 ranks, after 1 in link 2"]
    assert "1 rank, after 2 in link 1" in chain.run.train_log.read_text()


# ---- how it is told, and what it finds ---------------------------------------------------------

_TOLD = """
trap 'echo "told by the signal"; sleep 0.5; echo saved > saved.txt; kill %1; exit 3' {signal}
env | grep ^HPCRESUME_ | grep -v KEY
echo ready
sleep 1000 & wait
"""


@pytest.mark.parametrize("name", ["TERM", "all:USR2"])
def test_a_command_is_told_by_the_configured_signal_and_has_its_time_to_save(
    chain: Chain, name: str
) -> None:
    job = script(chain, _TOLD.format(signal=name.rpartition(":")[2]))
    argv = ("--time=01:00:00", f"--signal-command={name}", "--", "bash", job)
    chain.submit(*argv, detach=True)
    chain.wait(lambda: "ready" in chain.printed(1))
    began = time.time()
    chain.run.stop.touch()
    chain.wait(lambda: chain.records("decided"))
    assert (chain.folder / "saved.txt").exists(), chain.story()
    assert chain.ends() == ["stopped"], "whatever it leaves with, it was asked to"
    (saved,) = chain.records("saved")
    assert 0.5 <= saved["seconds"] < 8, "the next links know how long it takes to leave"
    found = dict(
        line.split("=", 1) for line in chain.printed(1).splitlines() if line.startswith("HPCRESUME")
    )
    assert Path(found["HPCRESUME_RUN"]) == chain.run.path
    assert (found["HPCRESUME_LINK"], found["HPCRESUME_RESTARTS"]) == ("1", "0")
    assert found["HPCRESUME_STOP"] == str(chain.run.link(1).stop)
    assert 3000 < int(found["HPCRESUME_DEADLINE"]) - began < 3600
    assert 3000 < int(found["HPCRESUME_LEFT_S"]) < 3600
    assert found["HPCRESUME_DEADLINE_TIME"].endswith("Z")
    assert "HPCRESUME_RESUME" not in found


def test_a_command_may_watch_a_file_instead_of_signals(chain: Chain) -> None:
    job = script(
        chain,
        'trap "" TERM; echo ready\nuntil [ -e "$HPCRESUME_STOP" ]; do sleep 0.1; done\n'
        "touch saw.it; exit 0",
    )
    chain.submit("--signal-command=none", "--", "bash", job, detach=True)
    chain.cut(1, signal.SIGTERM, after="ready")
    chain.wait(chain.ends)
    assert (chain.folder / "saw.it").exists()
    assert chain.ends()[0] == "deadline", "exit code 0 after it was told is no completion"
    hpcresume("cancel", "--yes", "run", cwd=chain.folder)


def test_a_command_that_leaves_as_soon_as_the_file_is_there_is_not_taken_for_done(
    chain: Chain,
) -> None:
    job = script(
        chain, 'trap "" TERM; echo "I am $$."; until [ -e "$HPCRESUME_STOP" ]; do sleep 0.01; done'
    )
    chain.submit("--signal-command=none", "--", "bash", job, detach=True)
    (pid,) = chain.wait(lambda: re.findall(r"I am (\d+)\.", chain.printed(1)))
    # The supervisor makes the file, and the command sees it before its parent looks again.
    parent = chain.rank_of(1)
    os.kill(parent, signal.SIGSTOP)
    chain.run.stop.touch()
    chain.wait(lambda: not pid_alive(int(pid)))
    os.kill(parent, signal.SIGCONT)
    chain.wait(lambda: chain.records("decided"))
    assert chain.ends() == ["stopped"], chain.story()
    assert all("seconds" not in record for record in chain.records("saved"))


def test_a_command_that_will_not_leave_is_killed_within_the_lead_time(chain: Chain) -> None:
    job = script(chain, 'trap "" TERM; echo ready; while :; do sleep 0.1; done')
    limits = ("--set=chain.lead_s=2", "--set=chain.max_links=1")
    chain.submit(*limits, "--", "bash", job, detach=True)
    chain.cut(1, signal.SIGTERM, after="ready")
    chain.wait(lambda: chain.records("decided"))
    assert chain.ends() == ["deadline"], chain.story()
    assert "killed because it did not leave by itself" in chain.printed(1)
    assert all("seconds" not in record for record in chain.records("saved"))


def test_the_newest_checkpoint_is_named_to_the_next_start(chain: Chain) -> None:
    job = script(
        chain,
        'if [ -n "$HPCRESUME_RESUME" ]; then echo "from $HPCRESUME_RESUME"; exit 0; fi\n'
        "mkdir -p out/checkpoint-9 out/checkpoint-10 out/checkpoint-11.tmp\n"
        "touch out/checkpoint-{9,10}/x; exit 1",
    )
    chain.submit("--checkpoints=out/checkpoint-*", "--", "bash", job)
    assert chain.ends() == ["user code", "completed"], chain.story()
    assert f"from {chain.folder}/out/checkpoint-10\n" in chain.printed(2)


# ---- attempts --------------------------------------------------------------------------------

_FAILS = (
    "echo x >> tries; [ $(wc -l < tries) -gt {times} ] && exit 0; echo 'ValueError: no'; exit 4"
)


def test_a_command_that_fails_is_started_again_in_the_same_job(chain: Chain) -> None:
    job = script(chain, _FAILS.format(times=2))
    chain.submit("--max-attempts=5", "--retry-delay=0.1", "--", "bash", job)
    assert (chain.code, len(chain.links())) == (0, 1), chain.story()
    assert [record["attempt"] for record in chain.records("retried")] == [1, 2]
    assert "attempt 2 of 5 follows in 0.1 s" in chain.printed(1)


def test_attempts_that_get_no_further_are_counted_over_all_jobs(chain: Chain) -> None:
    job = script(chain, _FAILS.format(times=1000))
    chain.submit("--max-attempts=4", "--retry-delay=0.1", "--", "bash", job)
    assert (chain.folder / "tries").read_text().count("x") == 4
    assert len(chain.links()) == 1
    (decided,) = chain.records("decided")
    assert (decided["rule"], decided["numbers"]["crashes"]) == ("max_crashes", 4)
    said = hpcresume("why", "run", cwd=chain.folder).stdout
    assert "exit code 4: ValueError: no" in said
    assert chain.status()["state"] == "failed"


def test_without_a_delay_the_next_job_tries_again(chain: Chain) -> None:
    job = script(chain, _FAILS.format(times=2))
    chain.submit("--", "bash", job)
    assert chain.ends() == ["user code", "user code", "completed"], chain.story()


def test_what_lay_there_before_the_run_is_no_progress_of_any_of_its_links(chain: Chain) -> None:
    (chain.folder / "out.pt").write_text("of an earlier training")
    job = script(chain, _FAILS.format(times=1))
    chain.submit("--checkpoints=out.pt", "--", "bash", job)
    assert chain.ends() == ["user code", "completed"], chain.story()
    assert not chain.records("saved")


# ---- whether it is done ------------------------------------------------------------------------


def test_exit_code_0_is_no_completion_until_one_of_the_files_is_there(chain: Chain) -> None:
    job = script(
        chain, "echo x >> tries; [ $(wc -l < tries) = 2 ] && echo w > model.safetensors; :"
    )
    done = ("--done-when=pytorch_model.bin", "--done-when=model.safetensors")
    chain.submit(*done, "--", "bash", job)
    assert chain.ends() == ["handed over", "completed"], chain.story()
    assert "model.safetensors is there" in chain.records("completed")[0]["judged"]


def test_a_command_that_is_never_done_and_gets_no_further_is_stopped(chain: Chain) -> None:
    job = script(chain, "exit 0")
    said = chain.submit("--done-when=log:finished", "--", "bash", job)
    assert chain.code == 8
    assert "no newly committed step in 3 links" in said
    assert "none of these is true yet: log:finished" in said


def test_a_command_that_leaves_with_0_and_got_further_goes_on_in_the_same_job(
    chain: Chain,
) -> None:
    job = script(
        chain,
        "n=$(cat n.txt 2>/dev/null || echo 0); echo $((n + 1)) > n.txt\n"
        "[ $n = 3 ] && echo 'all done'; :",
    )
    chain.submit("--done-when=log:^all done$", "--checkpoints=n.txt", "--", "bash", job)
    assert (chain.code, len(chain.links())) == (0, 1), chain.story()
    assert [record["step"] for record in chain.records("started")] == [0, 1, 2, 3]


# ---- several ranks -----------------------------------------------------------------------------


def test_every_rank_runs_the_command_and_all_of_them_must_be_done(chain: Chain) -> None:
    job = script(
        chain, 'echo "rank $RANK of $WORLD_SIZE"; sleep $RANK; [ $RANK = 0 ] || exit $CODE'
    )
    tasks = ("--tasks-per-node=2", "--set=chain.max_links=1")
    chain.submit(*tasks, "--", "bash", job, CODE="0")
    assert chain.code == 0, chain.story()
    assert [chain.printed(1, rank).splitlines()[0] for rank in (0, 1)] == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]
    chain.submit(*tasks, "--force-new", "--", "bash", job, CODE="3")
    chain.run = RunDir(chain.folder / "runs" / "run-2")
    assert chain.ends() == ["user code"], chain.story()
    assert "rank 1" in hpcresume("why", "run-2", cwd=chain.folder).stdout


def test_of_several_ranks_the_first_one_tells_that_all_are_done(chain: Chain) -> None:
    job = script(chain, '[ $RANK = 1 ] || echo "all done"')
    chain.submit("--tasks-per-node=2", "--done-when=log:^all done$", "--", "bash", job)
    assert (chain.code, chain.ends()) == (0, ["completed"]), chain.story()


def test_a_command_that_is_silent_for_longer_than_it_may_be_is_ended_as_hung(
    chain: Chain,
) -> None:
    job = script(chain, "[ -e twice ] && exit 0; touch twice; echo ready; sleep 1000")
    chain.submit("--set=chain.hang_s=2", "--", "bash", job)
    assert chain.ends() == ["hang", "completed"], chain.story()


# ---- what people read --------------------------------------------------------------------------


def test_steps_that_begin_again_are_reported(chain: Chain) -> None:
    job = script(
        chain, "for n in 1 2 3; do echo step $n; done; [ -e twice ]; e=$?; touch twice; exit $e"
    )
    chain.submit("--", "bash", job)
    assert chain.code == 0, chain.story()
    (record,) = chain.records("fell_back")
    assert (record["link"], record["step"], record["before"]) == (2, 1, 3)
    assert "did it load its checkpoint?" in chain.printed(2)
    assert "its steps begin at 1, after 3 before" in chain.status()["why"]
    assert "did it load its checkpoint?" in hpcresume("why", "run", cwd=chain.folder).stdout


def test_what_it_prints_is_in_all_logs_with_progress_bars_collapsed(chain: Chain) -> None:
    bar = 'for n in $(seq 200); do printf "\\r%d%%" $n; done; echo; echo end'
    chain.submit("--", "bash", "-c", bar)
    told = [line for line in chain.printed(1).splitlines() if not line.startswith(tuple("01"))]
    assert told == ["1%", "200%", "end"] or told == ["200%", "end"]
    assert "200%\nend\n" in chain.run.train_log.read_text()
    assert "end" in hpcresume("logs", "run", cwd=chain.folder).stdout.splitlines()


def test_a_rehearsal_tells_whether_a_command_survives_its_ends(chain: Chain) -> None:
    (chain.folder / "hpcresume.yaml").write_text("scheduler: {grace_s: 3}\nchain: {lead_s: 2}\n")
    argv = ("--links=1", "--checkpoints=count.txt", "--", "bash", "count.sh", "100000")
    done = hpcresume("rehearse", *argv, cwd=chain.folder, PAUSE="0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this chain would survive" in done.stdout
    again = "for n in 1 2 3 4 5 6 7 8; do echo step $n; sleep 0.2; done; sleep 1000"
    argv = ("--links=1", "--checkpoints=none-*", "--", "bash", "-c", again)
    done = hpcresume("rehearse", *argv, cwd=chain.folder)
    assert done.returncode == 7
    assert "fell back from" in done.stdout


# ---- what is wrong with it is said at submit ----------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        pytest.param(("--",), "A command must follow `--`", id="nothing"),
        pytest.param(("--", "pyhton", "main.py"), "no program pyhton on the PATH", id="program"),
        pytest.param(("--", "python", "mian.py"), "there is no file mian.py", id="script"),
        pytest.param(("--", "./count.txt"), "is it executable?", id="path"),
        pytest.param(
            ("--done-when=log:(", "--", "true"),
            "holds the pattern '(', which is none",
            id="pattern",
        ),
        pytest.param(("--signal-command=KILL", "--", "true"), "expected one of TERM", id="signal"),
    ],
)
def test_a_command_that_cannot_run_is_refused_before_it_queues(
    chain: Chain, here: Said, argv: tuple[str, ...], expected: str
) -> None:
    code, _, answer = here("submit", *LOCAL, *argv)
    assert code in (2, 4)
    assert expected in answer
    assert not chain.run.path.exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python main.py --lr 1", "main"),
        ("python -m my.train", "train"),
        ("torchrun --nproc-per-node 2 tools/run_it.py", "run_it"),
        ("./fine tune.sh", "fine"),
        ("bash -c true", "bash"),
    ],
)
def test_a_run_is_called_after_its_script(command: str, name: str) -> None:
    assert name_of(command.split()) == name


def test_what_setup_lines_provide_is_not_looked_for(tmp_path: Path) -> None:
    plain = from_mapping({"command": ["nowhere-to-be-found"]}, "test")
    with pytest.raises(ConfigError):
        check_command(plain, tmp_path, os.environ)
    setup = {"command": ["nowhere-to-be-found"], "scheduler": {"setup": ["module load it"]}}
    check_command(from_mapping(setup, "test"), tmp_path, os.environ)


def test_the_parent_of_a_command_does_without_torch() -> None:
    program = "import sys, hpcresume.adapters.command; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRON, check=False)
    assert done.returncode == 0


# ---- pure parts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempt", "done", "missing", "how"),
    [
        pytest.param(Attempt(code=0), "", "", "completed", id="exit-0"),
        pytest.param(Attempt(code=0), "", "no model", "handed over", id="exit-0-not-done"),
        pytest.param(Attempt(code=0, told="deadline"), "", "", "stopped", id="told"),
        pytest.param(Attempt(code=0, told="x"), "model", "x", "completed", id="told-and-done"),
        pytest.param(Attempt(code=1, told="x"), "model", "x", "stopped", id="told-failed"),
        pytest.param(Attempt(code=-15, told="x"), "", "", "stopped", id="told-died-of-it"),
        pytest.param(Attempt(code=1), "model", "x", "failed", id="failed-though-done"),
        pytest.param(Attempt(code=-9), "", "", "failed", id="killed"),
    ],
)
def test_an_end_is_judged_by_code_request_and_what_says_done(
    attempt: Attempt, done: str, missing: str, how: str
) -> None:
    assert judge(attempt, done=done, missing=missing).how == how


def collapsed(*parts: tuple[bytes, float], limit_bytes: int = 1000) -> bytes:
    kept = bytearray()
    output = Output(kept.extend, limit_bytes=limit_bytes)
    for data, now in parts:
        output.feed(data, now)
    output.close()
    return bytes(kept)


def test_of_a_bar_the_first_the_last_and_one_state_in_half_a_minute_are_kept() -> None:
    states = [(b"\r%d%%" % n, float(n)) for n in range(101)]
    lines = collapsed(*states, (b"\nend\n", 101.0)).split()
    assert lines == [b"0%", b"31%", b"62%", b"93%", b"100%", b"end"] or lines == [
        *(b"%d%%" % n for n in range(0, 100, int(BAR_S))),
        b"100%",
        b"end",
    ]


@pytest.mark.parametrize("cut", range(1, 14))
def test_lines_are_whole_wherever_the_pipe_cuts_them(cut: int) -> None:
    text = b"one\r\ntwo\n\nthr\xc3\xa9\n"
    assert collapsed((text[:cut], 0.0), (text[cut:], 0.1)) == b"one\ntwo\n\nthr\xc3\xa9\n"


def test_beyond_its_limit_only_the_last_lines_of_an_output_are_kept() -> None:
    kept = collapsed((b"".join(b"line %d\n" % n for n in range(1000)), 0.0), limit_bytes=100)
    assert len(kept) < 4000
    assert kept.startswith(b"line 0\n")
    assert kept.endswith(b"line 999\n")
    assert b"lines are left out" in kept


def sight(folder: Path, **config: Any) -> Sight:
    return Sight(ProgressConfig(**config), folder)


def test_the_step_of_a_checkpoint_is_where_the_pattern_has_its_wildcard(tmp_path: Path) -> None:
    for name in ("resnet50-epoch=3-step=90.ckpt", "resnet50-epoch=12-step=80.ckpt"):
        (tmp_path / name).write_text("x" * 100)
    newest = sight(tmp_path, checkpoints="resnet50-epoch=*-step=*.ckpt").newest()
    assert newest is not None
    assert newest.step == 90


def test_a_file_without_a_number_has_no_step_and_another_stamp_when_it_is_saved_anew(
    tmp_path: Path,
) -> None:
    (tmp_path / "model2.pt").write_text("one")
    eyes = sight(tmp_path, checkpoints="model2.pt")
    first = eyes.newest()
    os.utime(tmp_path / "model2.pt", ns=(1, 1))
    second = eyes.newest()
    assert first is not None
    assert second is not None
    assert (first.step, second.step) == (None, None)
    assert first.stamp != second.stamp


def test_a_trainer_state_says_itself_whether_it_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    eyes = sight(tmp_path, done_when=["out/checkpoint-*/trainer_state.json"])
    for state, done in (
        ({"global_step": 7, "max_steps": 9}, False),
        ({"global_step": 9, "max_steps": 9}, True),
        ({"global_step": 9, "max_steps": 9, "completed": False}, False),
        ({"global_step": 9, "max_steps": 0}, False),
    ):
        (folder / "trainer_state.json").write_text(json.dumps(state))
        assert bool(eyes.done()) == done, state
    newest = eyes.newest()
    assert newest is not None
    assert newest.step == 9
    (folder / "trainer_state.json").write_text('{"global_st')
    assert not eyes.done()


@pytest.mark.parametrize(
    ("line", "step"),
    [("step 12", 12), ("global_step=7 loss=3", 7), ("Step: 12/100", 12), ("2 steps ago", None)],
)
def test_a_step_is_found_in_a_line_without_being_told_how(
    tmp_path: Path, line: str, step: int | None
) -> None:
    eyes = sight(tmp_path)
    eyes.look_at(line)
    assert eyes.last_logged == step
    assert eyes.blind


def test_a_command_gets_the_place_that_torch_asks_for_and_none_of_ours() -> None:
    environ = {"HPCRESUME_RANK": "1", "HPCRESUME_SUPERVISOR": "7", "HOME": "/root"}
    place = RankPlace(rank=1, world_size=2, local_rank=1)
    found = command_environment(
        environ, place, deadline=1.9e9, left_s=-3.0, restarts=2, resume=Path("/x")
    )
    assert "HPCRESUME_RANK" not in found
    assert "HPCRESUME_SUPERVISOR" not in found
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")
    assert (found["HPCRESUME_LEFT_S"], found["HPCRESUME_RESUME"]) == ("0", "/x")
    alone = command_environment(
        environ, RankPlace(), deadline=None, left_s=None, restarts=0, resume=None
    )
    assert not {"RANK", "HPCRESUME_DEADLINE", "HPCRESUME_RESUME"} & alone.keys()


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("exit code 1: ValueError: no", Cause.USER_CODE),
        ("exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried", Cause.GPU_MEMORY),
        ("exit code 1: MemoryError", Cause.HOST_MEMORY),
        ("exit code 1: OSError: [Errno 28] No space left on device: 'x'", Cause.STORAGE),
        # Codes that have a meaning of ours have none here.
        ("exit code 9", Cause.USER_CODE),
    ],
)
def test_the_last_words_of_a_command_tell_why_it_failed(message: str, cause: Cause) -> None:
    code = int(message.split(":", maxsplit=1)[0].rsplit(maxsplit=1)[-1])
    failure = Failure(type=COMMAND, message=message, step=0, exit_code=code)
    evidence = Evidence(how="failed", failure=failure, exit_code=code, last_words=message)
    assert cause_of(evidence)[0] is cause


def test_the_same_exit_code_twice_proves_nothing_and_the_budget_decides() -> None:
    failure = Failure(type=COMMAND, message="exit code 1", step=0)

    def past(number: int, **more: Any) -> PastLink:
        values = {"cause": Cause.USER_CODE, "first_step": 5, "committed_step": 5, **more}
        return PastLink(number=number, failure=failure, **values)

    budgets = Budgets(max_crashes=3, no_progress_links=9)
    assert decide([past(1), past(2)], budgets).kind == "continue"
    assert decide([past(1), past(2, retries=2)], budgets).rule == "max_crashes"
    further = past(1, committed_step=9)
    assert decide([further], budgets).kind == "continue"
    assert decide([past(1, committed_step=9, retries=3)], budgets).rule == "max_crashes"


def test_how_early_a_command_is_told_is_learned_from_how_long_it_took_to_leave() -> None:
    config = from_mapping({"command": ["true"], "scheduler": {"time": "02:00:00"}}, "test")
    short = from_mapping({"command": ["true"], "scheduler": {"time": "00:02:00"}}, "test")
    assert lead_s(config, []) == 60 + MARGIN_S
    assert lead_s(short, []) == 30 + MARGIN_S
    saved = {"v": 1, "t": 0.0, "kind": "saved", "step": 1, "seconds": 12.0}
    assert lead_s(config, [LinkRecords(1, {}, [saved])]) == 12 + MARGIN_S


# ---- the page about it -------------------------------------------------------------------------

PAGE = (EXAMPLES.parent / "docs" / "integrations" / "command.md").read_text()
LINES = [
    line.removeprefix("+")
    for line in PAGE.splitlines()
    if line.removeprefix("+").startswith("hpcresume submit")
]


@pytest.mark.parametrize("line", LINES, ids=[str(n) for n, _ in enumerate(LINES)])
def test_the_lines_of_the_page_can_be_typed_as_they_stand(
    chain: Chain, here: Said, line: str
) -> None:
    (chain.folder / "main.py").touch()
    words = shlex.split(line)[1:]
    code, script, errors = here(words[0], "--dry-run", "--cluster=local", *words[1:])
    assert code == 0, errors
    assert script.startswith("# on this machine, for ")


def test_the_file_on_the_page_is_a_configuration(chain: Chain, here: Said) -> None:
    (chain.folder / "main.py").touch()
    text = PAGE.split("```yaml\n")[1].split("```")[0]
    (chain.folder / "hpcresume.yaml").write_text(text)
    code, _, errors = here("submit", "--dry-run", "--cluster=local", "--name=x")
    assert code == 0, errors


def test_the_page_tells_every_variable_that_a_command_is_given() -> None:
    told = set(re.findall(r"^\| `(HPCRESUME_\w+)`", PAGE, re.MULTILINE))
    environ = {"HPCRESUME_RUN": "", "HPCRESUME_LINK": "", "HPCRESUME_STOP": ""}
    environ["HPCRESUME_LEAD_S"] = ""
    given = command_environment(
        environ, RankPlace(), deadline=1.0, left_s=1.0, restarts=0, resume=Path("/x")
    )
    assert told == {name for name in given if name.startswith("HPCRESUME_")}
