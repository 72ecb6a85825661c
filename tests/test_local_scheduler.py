"""The local scheduler with real processes, which are really killed."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcresume.errors import RunLive, SubmissionRejected
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import driver
from hpcresume.scheduler.driver import drive
from hpcresume.scheduler.driver_file import driver_alive, only_driver
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState, Scheduler
from hpcresume.scheduler.local import LocalScheduler, spawn_detached
from hpcresume.scheduler.local_queue import KEY_VARIABLE, JobFiles, JobRecord, user_name
from hpcresume.scheduler.process_table import ProcessId, parse_stat

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0

DRIVER = """
import sys
from pathlib import Path
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.driver import drive
drive(RunDir(Path(sys.argv[1])), 0.5, interrupted=lambda: False)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDir]:
    """A run in an awkward place, whose processes are all ended after the test."""
    made = RunDir(tmp_path / 'it\'s a "run"\nof 100%job')
    made.jobs.mkdir(parents=True, mode=0o700)
    yield made
    LocalScheduler(made, ["true"], grace_s=0.0).cancel(_ids(made))


def _ids(run: RunDir) -> list[str]:
    if not run.jobs.exists():
        return []
    files = JobFiles(run.jobs)
    return files.ids(files.names())


def spec(run: RunDir, **changes: Any) -> JobSpec:
    values: dict[str, Any] = {
        "name": run.name,
        "token": "token",
        "run": run.path,
        "log": run.job_log,
        "workdir": run.path,
        "environment": {"PATH": os.environ["PATH"]},
    }
    return JobSpec(**{**values, **changes})


def submit(
    run: RunDir, command: str | Sequence[str], after: Sequence[str] = (), **changes: Any
) -> str:
    """Queue a job; a text is a shell script."""
    argv = ["sh", "-c", command] if isinstance(command, str) else command
    return LocalScheduler(run, argv).submit(spec(run, **changes), after)


def python(source: str) -> list[str]:
    return [sys.executable, "-S", "-c", source]


def info(run: RunDir, id: str) -> JobInfo:
    return LocalScheduler(run, []).state([id])[id]


def until(true: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def serve(run: RunDir, grace_s: float = 0.5) -> None:
    """Drive the run's jobs to their end."""
    end = time.monotonic() + PATIENCE_S
    drive(run, grace_s, interrupted=lambda: time.monotonic() > end)
    assert time.monotonic() < end, "the driver did not come to an end"


class Clock:
    """The clocks of the drivers in this process, which a test can put forward."""

    sleep = staticmethod(time.sleep)

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(driver, "time", made)
    return made


@contextmanager
def driving(
    run: RunDir, grace_s: float = 0.5, on_tick: Callable[[], None] | None = None
) -> Iterator[threading.Event]:
    """A driver beside the test; setting the event interrupts it, as the end of the block does."""
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: drive(run, grace_s, on_tick=on_tick, interrupted=stop.is_set)
    )
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextmanager
def driver_process(run: RunDir) -> Iterator[subprocess.Popen[bytes]]:
    """A driver that can be killed."""
    child = subprocess.Popen([sys.executable, "-c", DRIVER, str(run.path)], env=environ())
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def running(run: RunDir, id: str) -> bool:
    """Whether the job runs and its first process is known."""
    return JobFiles(run.jobs).read_record(id).process is not None


def pid_in(path: Path) -> int:
    """The pid that a script wrote."""
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def state_of(pid: int) -> str:
    """A letter, as the kernel names it: T for stopped."""
    return parse_stat(Path(f"/proc/{pid}/stat").read_text()).state


def gone(pid: int) -> bool:
    process = ProcessId.of(pid)
    return process is None or not process.alive()


# --- order and results


def test_it_is_a_scheduler(run: RunDir) -> None:
    scheduler: Scheduler = LocalScheduler(run, ["true"])
    assert scheduler.name == "local"


def test_a_job_that_failed_releases_the_job_after_it(run: RunDir) -> None:
    first = submit(run, "sleep 0.2; echo first >> order; exit 3")
    second = submit(run, "echo second >> order", after=[first])
    serve(run)
    assert (run.path / "order").read_text() == "first\nsecond\n"
    assert info(run, first).state is JobState.FAILED
    assert info(run, first).exit_code == 3
    assert info(run, second).state is JobState.COMPLETED
    assert info(run, second).exit_code == 0


def test_a_job_waits_for_all_that_it_comes_after(run: RunDir) -> None:
    quick, slow = submit(run, "true"), submit(run, "sleep 0.4; touch done")
    last = submit(run, "test -e done", after=[quick, slow])
    serve(run)
    assert info(run, last).state is JobState.COMPLETED


def test_jobs_that_do_not_depend_run_side_by_side(run: RunDir) -> None:
    wait = "touch %s; while ! test -e %s; do sleep 0.02; done"
    ids = [submit(run, wait % ("a", "b")), submit(run, wait % ("b", "a"))]
    serve(run)
    assert {info(run, id).state for id in ids} == {JobState.COMPLETED}


def test_a_job_after_an_unknown_one_starts(run: RunDir) -> None:
    id = submit(run, "true", after=["77"])
    serve(run)
    assert info(run, id).state is JobState.COMPLETED


def test_a_driver_without_jobs_returns(run: RunDir) -> None:
    serve(run)
    assert not run.driver.exists()


def test_a_running_job_can_queue_the_next(run: RunDir) -> None:
    source = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from hpcresume.run_dir import RunDir\n"
        "from hpcresume.scheduler.job import JobSpec\n"
        "from hpcresume.scheduler.local import LocalScheduler\n"
        "run = RunDir(Path(sys.argv[2]))\n"
        "spec = JobSpec(name='', token='', run=run.path, log=run.job_log, workdir=run.path)\n"
        "LocalScheduler(run, ['/bin/touch', 'next']).submit(spec, ['1'])\n"
    )
    submit(run, [sys.executable, "-c", source, str(ROOT), str(run.path)])
    serve(run)
    assert (run.path / "next").exists()


def test_a_job_submitted_in_the_drivers_last_moment_is_served(run: RunDir) -> None:
    submit(run, "true")
    late: list[str] = []

    def interrupted() -> bool:
        if late or not run.jobs.joinpath("1.state.json").exists() or driver_alive(run):
            return False
        late.append(submit(run, "true"))
        return False

    drive(run, 0.5, interrupted=interrupted)
    assert info(run, late[0]).state is JobState.COMPLETED


def test_twenty_submissions_at_once_get_twenty_ids(run: RunDir) -> None:
    barrier = threading.Barrier(20)

    def one(number: int) -> str:
        barrier.wait()
        return submit(run, "true", token=f"t{number}")

    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(one, range(20)))
    assert sorted(map(int, ids)) == list(range(1, 21))
    found = LocalScheduler(run, []).find("t")
    assert [job.id for job in found] == [str(number) for number in range(1, 21)]
    assert {job.id: job.token for job in found} == {id: f"t{n}" for n, id in enumerate(ids)}


def test_find_lists_living_jobs_whose_token_begins_so(run: RunDir) -> None:
    submit(run, "true", token="mine/1")
    serve(run)
    submit(run, "true", token="mine/2")
    submit(run, "true", token="other/1")
    assert [job.token for job in LocalScheduler(run, []).find("mine/")] == ["mine/2"]


def test_an_id_that_nobody_knows_is_unknown(run: RunDir) -> None:
    outside = run.path / f"{submit(run, 'true')}.job.json"
    (run.jobs / outside.name).rename(outside)
    foreign = ["1", "", "x", "../1", "1.job.json"]
    assert {info(run, id).state for id in foreign} == {JobState.UNKNOWN}
    LocalScheduler(run, []).cancel(foreign)
    assert list(run.jobs.iterdir()) == []


# --- what a job finds when it starts


def test_a_job_gets_its_environment_directory_and_log(run: RunDir) -> None:
    words = ["it's", 'a "word"', "two\nlines", "$HOME `x`"]
    source = (
        "import json, os, sys\n"
        "names = ('A', 'HPCRESUME_JOB', 'HPCRESUME_SCHEDULER', 'HPCRESUME_JOB_END')\n"
        "found = [sys.argv[1:], os.getcwd(), {name: os.environ.get(name) for name in names}]\n"
        "print(json.dumps(found))\n"
    )
    work = run.path / "a 'work'\ndirectory"
    work.mkdir()
    values = {"PATH": os.environ["PATH"], "A": "caf\udce9\n'", "HPCRESUME_JOB_END": "17"}
    id = submit(run, [*python(source), *words], workdir=work, environment=values)
    serve(run)
    log = run.jobs / f"{id}.log"
    found = json.loads(log.read_text())
    assert found[0] == words
    assert found[1] == str(work)
    assert found[2] == {
        "A": values["A"],
        "HPCRESUME_JOB": id,
        "HPCRESUME_SCHEDULER": "local",
        "HPCRESUME_JOB_END": None,
    }


def test_errors_of_a_job_are_appended_to_the_log_that_is_there(run: RunDir) -> None:
    (run.jobs / "1.log").write_text("before\n")
    submit(run, "echo out; echo err >&2")
    serve(run)
    assert (run.jobs / "1.log").read_text() == "before\nout\nerr\n"


def test_a_job_leads_a_session_of_its_own(run: RunDir) -> None:
    submit(run, python("import os; print(os.getpid() == os.getsid(0) == os.getpgrp())"))
    serve(run)
    assert (run.jobs / "1.log").read_text() == "True\n"


def test_files_that_hold_the_environment_are_private(run: RunDir) -> None:
    submit(run, "true", environment={"TOKEN": "secret"})
    serve(run)
    for path in run.jobs.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_command_that_does_not_exist_fails_and_says_so_in_the_log(run: RunDir) -> None:
    id = submit(run, ["no such 'program'"])
    after = submit(run, "true", after=[id])
    serve(run)
    assert info(run, id).state is JobState.FAILED
    assert info(run, id).exit_code == 127
    text = (run.jobs / f"{id}.log").read_text()
    assert "no such" in text
    assert "No such file or directory" in text
    assert info(run, after).state is JobState.COMPLETED


def test_a_job_whose_log_cannot_be_opened_fails(run: RunDir) -> None:
    id = submit(run, "true", log=run.path / "nowhere" / "%j.log")
    serve(run)
    assert info(run, id).state is JobState.FAILED


# --- the limit

STUBBORN = """
import os, signal, subprocess, sys, time
def note(name):
    return lambda *_: print(name, flush=True)
signal.signal(signal.SIGUSR2, note("usr2 first"))
signal.signal(signal.SIGTERM, note("term first"))
child = '''
import os, signal, sys, time
os.setpgid(0, 0)
def note(name):
    return lambda *_: print(name, flush=True)
signal.signal(signal.SIGUSR2, note("usr2 child"))
signal.signal(signal.SIGTERM, note("term child"))
open("child", "w").write(f"{os.getpid()}\\\\n")
while True: time.sleep(0.05)
'''
subprocess.Popen([sys.executable, "-S", "-c", child])
while True: time.sleep(0.05)
"""


def test_the_limit_brings_signal_then_term_then_kill_to_the_whole_job(
    run: RunDir, clock: Clock
) -> None:
    id = submit(run, python(STUBBORN), time_s=10_000, signal_s=4_000)

    def said() -> list[str]:
        return (run.jobs / f"{id}.log").read_text().splitlines()

    with driving(run, grace_s=5_000):
        child = pid_in(run.path / "child")
        assert os.getpgid(child) == child
        assert said() == []
        clock.ahead_s = 6_000
        until(said)
        assert said() == ["usr2 first"]
        assert info(run, id).state is JobState.RUNNING
        clock.ahead_s = 10_000
        until(lambda: info(run, id).state is JobState.COMPLETING)
        assert info(run, id).end_time is None
        until(lambda: len(said()) == 3)
        assert sorted(said()[1:]) == ["term child", "term first"]
        assert info(run, id).state is JobState.COMPLETING
        assert not gone(child)
        clock.ahead_s = 15_000
        until(lambda: info(run, id).state.ended)
    assert len(said()) == 3
    assert gone(child)
    found = info(run, id)
    assert (found.state, found.raw_state) == (JobState.TIMEOUT, "TIMEOUT")
    assert found.exit_signal == signal.SIGKILL


def test_a_stopped_process_is_woken_to_meet_its_end(run: RunDir, clock: Clock) -> None:
    script = "trap 'echo bye; exit 0' TERM; kill -STOP $$; while :; do sleep 0.02; done"
    id = submit(run, script, time_s=10_000)

    def stopped() -> bool:
        first = JobFiles(run.jobs).read_record(id).process
        return first is not None and state_of(first.pid) == "T"

    with driving(run, grace_s=5_000):
        until(stopped)
        clock.ahead_s = 10_000
        until(lambda: info(run, id).state.ended)
    assert (run.jobs / f"{id}.log").read_text() == "bye\n"
    assert info(run, id).state is JobState.TIMEOUT


def test_a_job_that_does_not_listen_yet_survives_the_signal(run: RunDir) -> None:
    id = submit(run, ["sleep", "0.6"], time_s=5.0, signal_s=4.9)
    serve(run)
    assert info(run, id).state is JobState.COMPLETED


def test_a_job_that_leaves_with_0_after_the_signal_is_completed(run: RunDir, clock: Clock) -> None:
    source = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))\n"
        "open('ready', 'w').close()\n"
        "while True: time.sleep(0.05)\n"
    )
    id = submit(run, python(source), time_s=10_000, signal_s=4_000)
    with driving(run):
        until((run.path / "ready").exists)
        clock.ahead_s = 6_000
        until(lambda: info(run, id).state.ended)
    assert info(run, id).state is JobState.COMPLETED


def test_the_end_of_a_limited_job_is_known_to_it_and_to_others(run: RunDir) -> None:
    before = time.time()
    id = submit(run, "echo $HPCRESUME_JOB_END > end; sleep 60", time_s=30)
    with driving(run):
        told = run.path / "end"
        until(lambda: told.exists() and told.read_text().endswith("\n"))
        until(lambda: running(run, id))
        end = LocalScheduler(run, []).end_time(id)
        assert end is not None
        assert before + 30 <= end <= time.time() + 30
        assert abs(float(told.read_text()) - end) < 0.5
        assert info(run, id).state is JobState.RUNNING


def test_the_end_of_an_unlimited_or_pending_job_is_none(run: RunDir) -> None:
    first = submit(run, "sleep 60")
    second = submit(run, "sleep 60", after=[first], time_s=30)
    with driving(run):
        until(lambda: running(run, first))
        assert LocalScheduler(run, []).end_time(first) is None
        assert LocalScheduler(run, []).end_time(second) is None


def test_the_end_of_a_job_moves_with_a_clock_that_was_set(run: RunDir) -> None:
    id = submit(run, "sleep 60", time_s=30)
    with driving(run):
        until(lambda: running(run, id))
        path = JobFiles(run.jobs).state(id)
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "end_time": record["end_time"] - 3600}))
        end = LocalScheduler(run, []).end_time(id)
        assert end is not None
        # Not an hour off, however slow this test is.
        assert abs(end - time.time() - 30) < 600


# --- the end of the first process takes the rest along


def test_kill_9_of_the_first_process_takes_the_rest_along_and_releases_the_next(
    run: RunDir, clock: Clock
) -> None:
    id = submit(run, python(STUBBORN))
    # An orphan that nobody has reaped yet is no living process.
    lives = "grep -q 'State:.[^Z]' /proc/$(cat child)/status 2> /dev/null"
    after = submit(run, f"{lives} || echo alone", after=[id])
    with driving(run, grace_s=5_000):
        child = pid_in(run.path / "child")
        first = JobFiles(run.jobs).read_record(id).process
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        until(lambda: info(run, id).state is JobState.COMPLETING)
        assert info(run, after).state is JobState.PENDING
        assert not gone(child)
        clock.ahead_s = 5_000
        until(lambda: info(run, after).state.ended)
    assert gone(child)
    found = info(run, id)
    assert (found.state, found.exit_code, found.exit_signal) == (JobState.FAILED, None, 9)
    assert (run.jobs / f"{after}.log").read_text() == "alone\n"


def test_what_a_finished_job_leaves_behind_is_ended(run: RunDir) -> None:
    id = submit(run, "sleep 60 & echo $! > child")
    serve(run)
    assert gone(pid_in(run.path / "child"))
    assert info(run, id).state is JobState.COMPLETED


def test_a_child_that_left_the_session_is_found_by_its_mark(run: RunDir) -> None:
    submit(run, "setsid sh -c 'echo $$ > child; exec sleep 60' & while ! test -s child; do :; done")
    serve(run)
    assert gone(pid_in(run.path / "child"))


def test_a_child_that_wiped_its_environment_is_found_by_its_session(run: RunDir) -> None:
    submit(run, "env -i sleep 60 & echo $! > child; sleep 0.1")
    serve(run)
    assert gone(pid_in(run.path / "child"))


def test_a_process_that_is_not_the_jobs_is_left_alone(run: RunDir) -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        submit(run, "sleep 60", time_s=0.2)
        serve(run, grace_s=0)
        assert stranger.poll() is None
        stranger.kill()


# --- cancel


def test_a_pending_job_is_cancelled_at_once_even_without_a_driver(run: RunDir) -> None:
    id = submit(run, "touch started")
    LocalScheduler(run, []).cancel([id])
    assert info(run, id).state is JobState.CANCELLED
    assert info(run, id).cancelled_by == user_name()
    assert LocalScheduler(run, []).find("") == []
    serve(run)
    assert info(run, id).state is JobState.CANCELLED
    assert info(run, id).cancelled_by == user_name()
    assert not (run.path / "started").exists()


def test_a_running_job_is_cancelled_while_it_still_dies(run: RunDir) -> None:
    saves = "until test -e go; do sleep 0.02; done; touch saved; exit 0"
    script = f"trap '{saves}' TERM; touch ready; while :; do sleep 0.02; done"
    id = submit(run, script)
    after = submit(run, "test -e saved", after=[id])
    with driving(run, grace_s=PATIENCE_S):
        until((run.path / "ready").exists)
        LocalScheduler(run, []).cancel([id])
        for _ in range(3):
            assert info(run, id).state is JobState.CANCELLED
            assert info(run, id).cancelled_by == user_name()
            assert info(run, after).state is JobState.PENDING
            time.sleep(0.06)
        assert not (run.path / "saved").exists()
        (run.path / "go").touch()
        until(lambda: info(run, after).state.ended)
    assert info(run, id).state is JobState.CANCELLED
    assert info(run, id).cancelled_by == user_name()
    assert info(run, after).state is JobState.COMPLETED


def test_cancelling_a_chain_starts_none_of_its_jobs(run: RunDir) -> None:
    ids = [submit(run, "touch ready; sleep 60")]
    for _ in range(4):
        ids.append(submit(run, "touch started", after=[ids[-1]]))
    with driving(run, grace_s=0):
        until((run.path / "ready").exists)
        LocalScheduler(run, []).cancel(ids)
        until(lambda: not run.driver.exists())
    assert {info(run, id).state for id in ids} == {JobState.CANCELLED}
    assert not (run.path / "started").exists()


def test_the_running_job_is_cancelled_last(run: RunDir) -> None:
    asked = []

    class Recorded(JobFiles):
        def ask_cancel(self, id: str, user: str) -> None:
            asked.append(id)
            super().ask_cancel(id, user)

    ids = [submit(run, "sleep 60")]
    for _ in range(2):
        ids.append(submit(run, "true", after=[ids[-1]]))
    with driving(run):
        until(lambda: running(run, ids[0]))
        scheduler = LocalScheduler(run, [])
        scheduler._jobs = Recorded(run.jobs)
        scheduler.cancel(ids)
    assert asked == ["3", "2", "1"]


def test_the_first_who_cancels_is_named(run: RunDir) -> None:
    id = submit(run, "sleep 60")
    JobFiles(run.jobs).ask_cancel(id, "ada")
    JobFiles(run.jobs).ask_cancel(id, "bob")
    serve(run)
    assert info(run, id).cancelled_by == "ada"


def test_cancel_of_an_ended_job_changes_nothing(run: RunDir) -> None:
    id = submit(run, "true")
    serve(run)
    LocalScheduler(run, []).cancel([id])
    assert info(run, id).state is JobState.COMPLETED
    assert info(run, id).cancelled_by == ""


# --- update


def test_a_pending_job_can_be_told_to_begin_later_and_sooner(run: RunDir) -> None:
    id = submit(run, "true", begin_delay_s=60)
    with driving(run):
        time.sleep(0.2)
        assert info(run, id).state is JobState.PENDING
        told = time.monotonic()
        LocalScheduler(run, []).update(id, begin_delay_s=1)
        until(lambda: info(run, id).state.ended)
        assert time.monotonic() - told > 0.9


def test_a_delay_does_not_grow_when_the_clock_is_set_back(run: RunDir) -> None:
    id = submit(run, "true", begin_delay_s=0.3)
    path = JobFiles(run.jobs).job(id)
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "submit_time": time.time() + 3600}))
    began = time.monotonic()
    serve(run)
    assert time.monotonic() - began > 0.25


def test_requeue_is_refused_and_so_is_a_change_of_a_job_that_runs(run: RunDir) -> None:
    id = submit(run, "sleep 60")
    with driving(run):
        until(lambda: running(run, id))
        with pytest.raises(SubmissionRejected, match="the local backend has no requeue"):
            LocalScheduler(run, []).update(id, requeue=True)
        with pytest.raises(SubmissionRejected, match="is running: only a pending job"):
            LocalScheduler(run, []).update(id, begin_delay_s=5)
        LocalScheduler(run, []).update(id, exclude_nodes=["n1"])


# --- drivers


def test_a_second_driver_is_refused_while_the_first_lives(run: RunDir) -> None:
    submit(run, "sleep 60")
    with driver_process(run) as child:
        until(lambda: driver_alive(run))
        with pytest.raises(RunLive, match=f"process {child.pid}"):
            drive(run, 0.5, interrupted=lambda: False)


def test_a_new_driver_adopts_the_running_job_of_a_killed_one(run: RunDir) -> None:
    id = submit(run, "echo start; echo $$ > first; while ! test -e go; do sleep 0.02; done")
    after = submit(run, "touch after", after=[id])
    with driver_process(run) as child:
        first = pid_in(run.path / "first")
        until(lambda: running(run, id))
        child.kill()
        child.wait()
        assert not driver_alive(run)
        assert info(run, id).state is JobState.RUNNING
        assert info(run, id).reason == "DriverGone"
    with driving(run):
        until(lambda: driver_alive(run))
        time.sleep(0.2)
        assert info(run, id).state is JobState.RUNNING
        assert not (run.path / "after").exists()
        assert not gone(first)
        (run.path / "go").touch()
        until(lambda: info(run, after).state is JobState.COMPLETED)
    assert (run.jobs / f"{id}.log").read_text() == "start\n"
    assert info(run, id).raw_state == "lost"
    assert not run.driver.exists()


def test_an_adopted_job_keeps_its_limit(run: RunDir) -> None:
    id = submit(run, "echo $$ > first; sleep 60", time_s=1.2)
    with driver_process(run) as child:
        first = pid_in(run.path / "first")
        until(lambda: running(run, id))
        limit = JobFiles(run.jobs).read_record(id).limit_monotonic
        child.kill()
        child.wait()
    serve(run)
    assert limit is not None and time.monotonic() > limit
    assert info(run, id).state is JobState.TIMEOUT
    assert gone(first)


def test_a_job_that_died_with_its_driver_is_lost_and_releases_the_next(run: RunDir) -> None:
    id = submit(run, "echo $$ > first; sleep 60")
    after = submit(run, "true", after=[id])
    with driver_process(run) as child:
        first = pid_in(run.path / "first")
        until(lambda: running(run, id))
        child.kill()
        child.wait()
    os.kill(first, signal.SIGKILL)
    until(lambda: gone(first))
    found = info(run, id)
    assert (found.state, found.raw_state) == (JobState.FAILED, "lost")
    assert info(run, after).state is JobState.PENDING
    assert info(run, after).reason == "DriverGone"
    serve(run)
    assert info(run, id).state is JobState.FAILED
    assert info(run, after).state is JobState.COMPLETED


def test_a_job_whose_driver_died_while_starting_it_is_not_started_twice(run: RunDir) -> None:
    script = "echo start; while ! test -e go; do sleep 0.02; done"
    id = submit(run, script)
    files = JobFiles(run.jobs)
    job = files.read_job(id)
    assert job is not None
    files.write_record(id, JobRecord(state=JobState.RUNNING, start_time=time.time()))
    marked = {**job.environment, KEY_VARIABLE: job.key}
    with (
        subprocess.Popen(["sh", "-c", script], cwd=run.path, env=marked, start_new_session=True),
        driving(run),
    ):
        until(lambda: running(run, id))
        assert info(run, id).state is JobState.RUNNING
        (run.path / "go").touch()
        until(lambda: info(run, id).state.ended)
    assert not (run.jobs / f"{id}.log").exists()


def test_a_running_job_without_a_driver_can_be_cancelled(run: RunDir) -> None:
    id = submit(run, python(STUBBORN))
    with driver_process(run) as child:
        grandchild = pid_in(run.path / "child")
        until(lambda: running(run, id))
        child.kill()
        child.wait()
    LocalScheduler(run, [], grace_s=0.3).cancel([id])
    assert gone(grandchild)
    assert info(run, id).state is JobState.CANCELLED
    log = (run.jobs / f"{id}.log").read_text().splitlines()
    assert sorted(log) == ["term child", "term first"]
    serve(run)
    assert info(run, id).state is JobState.CANCELLED
    assert info(run, id).cancelled_by == user_name()


def test_a_pending_job_without_a_driver_says_so(run: RunDir) -> None:
    id = submit(run, "true")
    assert info(run, id).state is JobState.PENDING
    assert info(run, id).reason == "DriverGone"
    assert [job.id for job in LocalScheduler(run, []).find("")] == [id]


def test_of_many_who_follow_a_killed_driver_one_wins(run: RunDir) -> None:
    for _ in range(10):
        _leave_a_dead_driver(run)
        barrier, leave = threading.Barrier(8), threading.Event()
        with ThreadPoolExecutor(8) as pool:
            tries = [pool.submit(_try_to_drive, run, barrier, leave) for _ in range(8)]
            until(lambda: sum(one.done() for one in tries) == 7)  # noqa: B023
            assert driver_alive(run)
            leave.set()
        assert sorted(one.result() for one in tries) == [False] * 7 + [True]
        assert not run.driver.exists()


def _try_to_drive(run: RunDir, barrier: threading.Barrier, leave: threading.Event) -> bool:
    barrier.wait()
    try:
        with only_driver(run):
            leave.wait(PATIENCE_S)
            return True
    except RunLive:
        return False


def _leave_a_dead_driver(run: RunDir) -> None:
    with driver_process(run) as child:
        submit(run, "sleep 60")
        until(lambda: driver_alive(run) or child.poll() is not None)
        child.kill()
        child.wait()
    ids = _ids(run)
    LocalScheduler(run, [], grace_s=0).cancel(ids)


def test_a_follower_that_died_before_it_was_named_is_followed(run: RunDir) -> None:
    _leave_a_dead_driver(run)
    dead = run.driver.read_bytes()
    with only_driver(run):
        pass
    # As if that follower had died between its link and its rename.
    follower = next(run.jobs.glob("driver.after-*.json"))
    own = json.loads(follower.read_bytes())
    follower.write_text(json.dumps({**own, "born": "another boot:1"}))
    run.driver.write_bytes(dead)
    assert not driver_alive(run)
    with only_driver(run):
        assert json.loads(run.driver.read_bytes()) == own
    assert not run.driver.exists()


def test_the_driver_of_another_machine_counts_as_alive(run: RunDir) -> None:
    run.driver.write_text('{"pid": 1, "born": "x:1", "host": "elsewhere"}')
    assert driver_alive(run)
    with pytest.raises(RunLive, match=r"on elsewhere(.|\n)*remove"):
        drive(run, 0.5, interrupted=lambda: False)


def test_a_pid_that_was_given_again_is_not_the_driver(run: RunDir) -> None:
    run.driver.write_text(
        json.dumps({"pid": os.getppid(), "born": "x:1", "host": os.uname().nodename})
    )
    assert not driver_alive(run)
    serve(run)


def test_an_interrupted_driver_leaves_nothing_behind(run: RunDir) -> None:
    id = submit(run, python(STUBBORN))
    after = submit(run, "touch started", after=[id])
    with driving(run, grace_s=0.3) as stop:
        child = pid_in(run.path / "child")
        stop.set()
    first = JobFiles(run.jobs).read_record(id).process
    assert first is not None
    assert gone(first.pid)
    assert gone(child)
    for one in (id, after):
        assert info(run, one).state is JobState.CANCELLED
        assert info(run, one).cancelled_by == user_name()
    assert not (run.path / "started").exists()
    left = {path.name for path in run.jobs.iterdir()}
    assert left == {"1.job.json", "1.state.json", "1.log", "2.job.json", "2.state.json"}


def test_a_driver_whose_run_was_removed_ends_the_jobs(run: RunDir) -> None:
    submit(run, "echo $$ > first; sleep 60")
    with driver_process(run) as child:
        first = pid_in(run.path / "first")
        until(lambda: running(run, "1"))
        shutil.rmtree(run.path)
        assert child.wait(PATIENCE_S) == 0
    assert gone(first)


def test_an_end_that_cannot_be_recorded_is_recorded_later_and_before_the_next_job_starts(
    run: RunDir,
) -> None:
    id = submit(run, "while ! test -e go; do sleep 0.02; done")
    after = submit(run, "touch after", after=[id])
    with driving(run):
        until(lambda: running(run, id))
        path = JobFiles(run.jobs).state(id)
        path.unlink()
        path.mkdir()
        (run.path / "go").touch()
        time.sleep(0.3)
        assert not (run.path / "after").exists()
        path.rmdir()
        until(lambda: info(run, after).state is JobState.COMPLETED)
    assert info(run, id).state is JobState.COMPLETED


def test_a_job_is_not_started_before_that_can_be_recorded(
    run: RunDir, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    # Else a driver that is killed at that moment is followed by one that starts it again.
    id = submit(run, "echo start", begin_delay_s=10_000)
    looked = threading.Event()
    with driving(run, on_tick=looked.set):
        assert looked.wait(PATIENCE_S)
        JobFiles(run.jobs).state(id).mkdir()
        clock.ahead_s = 10_000
        until(lambda: "cannot go on yet" in caplog.text)
        assert not (run.jobs / f"{id}.log").exists()
        JobFiles(run.jobs).state(id).rmdir()
        until(lambda: info(run, id).state is JobState.COMPLETED)
    assert (run.jobs / f"{id}.log").read_text() == "start\n"


def test_on_tick_is_called_while_jobs_run(run: RunDir) -> None:
    id = submit(run, "while ! test -e go; do sleep 0.02; done")
    seen: list[JobState] = []

    def look() -> None:
        seen.append(info(run, id).state)
        if seen.count(JobState.RUNNING) == 3:
            (run.path / "go").touch()

    drive(run, 0.5, on_tick=look, interrupted=lambda: False)
    assert seen.count(JobState.RUNNING) >= 3


def test_a_detached_driver_outlives_its_parent_and_the_terminal(run: RunDir) -> None:
    id = submit(run, "while ! test -e go; do sleep 0.02; done; echo done")
    parent = f"""
import fcntl, sys, termios, time
from pathlib import Path
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.local import spawn_detached
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
run = RunDir(Path(sys.argv[1]))
pid = spawn_detached(run, [sys.executable, "-c", {DRIVER!r}, str(run.path)])
(run.path / "pid").write_text(f"{{pid}}\\n")
time.sleep(60)
"""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", parent, str(run.path)],
        stdin=slave,
        env=environ(),
        start_new_session=True,
    )
    os.close(slave)
    driver = pid_in(run.path / "pid")
    until(lambda: running(run, id))
    os.close(master)
    assert child.wait(PATIENCE_S) == -signal.SIGHUP
    assert driver_alive(run)
    assert info(run, id).state is JobState.RUNNING
    (run.path / "go").touch()
    until(lambda: gone(driver))
    assert info(run, id).state is JobState.COMPLETED
    assert not run.driver.exists()


def test_a_detached_driver_writes_its_output_to_the_drivers_log(run: RunDir) -> None:
    pid = spawn_detached(run, ["sh", "-c", "echo out; echo err >&2"])
    until(lambda: gone(pid))
    assert run.driver_log.read_text() == "out\nerr\n"


def test_a_driver_that_a_job_started_is_no_part_of_that_job(run: RunDir) -> None:
    pid = spawn_detached(run, ["sh", "-c", f"echo ${KEY_VARIABLE}"], {KEY_VARIABLE: "a job's"})
    until(lambda: gone(pid))
    assert run.driver_log.read_text() == "\n"


# --- foreign and broken files


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff\x00", b'{"key": ""}']
)
def test_garbage_among_the_job_files_is_passed_over(run: RunDir, garbage: bytes) -> None:
    for name in ("1.job.json", "0.job.json", "x.job.json", "driver.json", ".tmp", "2.update.json"):
        (run.jobs / name).write_bytes(garbage)
    (run.jobs / "3.job.json").mkdir()
    id = submit(run, "true", after=["1"])
    assert id == "4"
    scheduler = LocalScheduler(run, [])
    assert [job.id for job in scheduler.find("")] == [id]
    assert scheduler.state(["1", "3"])["1"].state is JobState.UNKNOWN
    scheduler.cancel(["1", "3"])
    serve(run)
    assert info(run, id).state is JobState.COMPLETED


@pytest.mark.parametrize("garbage", [b"", b"[]", b'{"state": "flying"}', b'{"process": 5}'])
def test_a_job_with_a_broken_state_is_lost_but_not_started_again(
    run: RunDir, garbage: bytes
) -> None:
    id = submit(run, "touch started")
    JobFiles(run.jobs).state(id).write_bytes(garbage)
    assert info(run, id).state is JobState.FAILED
    serve(run)
    assert (info(run, id).state, info(run, id).raw_state) == (JobState.FAILED, "lost")
    assert not (run.path / "started").exists()


def test_an_empty_key_is_no_key(run: RunDir) -> None:
    # It would be found in the environment of every process there is.
    id = submit(run, "true")
    path = JobFiles(run.jobs).job(id)
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": ""}))
    assert JobFiles(run.jobs).read_job(id) is None


def test_the_name_of_a_process_may_hold_brackets_and_spaces() -> None:
    line = "7 (a) S (b) R 1 2 3 0 -1 4194304 97 0 0 0 0 0 0 0 20 0 1 0 147443 31 38"
    found = parse_stat(line)
    assert (found.state, found.group, found.session, found.ticks) == ("R", 2, 3, 147443)
