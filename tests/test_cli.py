"""The command line as a user meets it: what it says, with which exit code, and how soon."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_run import (
    STATES,
    FakeSlurm,
    Said,
    add_link,
    complete,
    end_link,
    make_run,
    queue_job,
    training,
)
from oracle import ENVIRON
from terminal import in_terminal

from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobState
from hpcresume.scheduler.local_queue import JobFiles, JobRecord
from hpcresume.scheduler.process_table import ProcessId
from hpcresume.story import this_process

CONFIG = "name: toy\ntrain: toy.py:train\nmax_steps: 10\n"
#: Runs a command line and says at the end, on standard error, whether torch was imported.
PROBE = (
    "import atexit, sys\n"
    "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    "from hpcresume.cli import main\n"
    "main(sys.argv[1:])\n"
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a configuration, where the commands are typed."""
    folder = tmp_path / "ada's project"
    folder.mkdir()
    (folder / "toy.yaml").write_text(CONFIG)
    (folder / "toy.py").write_text("def train(session):\n    pass\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("HPCRESUME_RUNS", raising=False)
    return folder


@pytest.fixture
def runs(project: Path) -> Path:
    return project / "runs"


def child(
    *argv: str, cwd: Path, program: str | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """A command line, run in a process of its own."""
    start = ["-m", "hpcresume"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *start, *argv],
        cwd=cwd,
        env={**ENVIRON, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---- fast ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["status"],
        ["status", "--json"],
        ["logs", "toy"],
        ["cancel", "--yes", "toy"],
        ["submit", "--dry-run", "--cluster", "local", "toy.yaml"],
        ["submit", "--help"],
        ["resume", "--help"],
    ],
    ids=" ".join,
)
def test_a_command_of_a_login_node_does_without_torch(runs: Path, argv: list[str]) -> None:
    add_link(make_run(runs))
    done = child(*argv, cwd=runs.parent, program=PROBE)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "False"), done.stderr


def test_status_says_something_before_a_slow_squeue_has_answered(
    runs: Path, tmp_path: Path
) -> None:
    run, slurm = make_run(runs, cluster="slurm"), FakeSlurm(tmp_path / "slurm")
    fifo = tmp_path / "answer"
    os.mkfifo(fifo)
    slurm.program("squeue", f"cat '{fifo}'")
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "status"],
        cwd=runs.parent,
        env={**ENVIRON, "PATH": slurm.path},
        stdout=subprocess.PIPE,
        text=True,
    ) as asked:
        assert asked.stdout is not None
        # squeue answers only after this line was read: it cannot have waited for it.
        assert asked.stdout.readline() == f"{runs}\n"
        token = f"hpcresume:{run.identify()['id']}:1"
        fifo.write_text(f"4711|RUNNING|None|gpu017|1|4000000000|{token}\n")
        rest = asked.stdout.read()
    # And the answer counts, when it comes.
    assert "running" in rest
    assert "4711 (gpu017)" in rest


def test_status_asks_slurm_once_for_all_runs(runs: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        make_run(runs, name, cluster="slurm")
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("squeue", f"echo asked >> '{tmp_path}/asked'")
    child("status", cwd=runs.parent, PATH=slurm.path)
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_status_shows_the_run_where_slurm_does_not_answer(runs: Path, tmp_path: Path) -> None:
    make_run(runs, cluster="slurm")
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("squeue", "echo 'error: Unable to contact slurm controller' >&2; exit 1")
    done = child("status", cwd=runs.parent, PATH=slurm.path)
    assert done.returncode == 0, done.stderr
    assert "toy  waiting" in done.stdout
    assert "Unable to contact slurm controller" in done.stdout


# ---- status --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("complete", 0),
        ("running", 10),
        ("waiting", 11),
        ("stopped", 12),
        ("failed", 20),
        ("stalled", 21),
    ],
)
def test_status_exit_code_is_the_state(runs: Path, said: Said, state: str, code: int) -> None:
    run = make_run(runs)
    with STATES[state](run):
        found, out, _ = said("status", "toy", "--exit-code")
    assert (found, f"toy  {state}" in out) == (code, True), out


def test_status_json_is_one_document_with_its_version_and_sorted_keys(
    runs: Path, said: Said
) -> None:
    complete(make_run(runs, "one"))
    make_run(runs, "two")
    _, out, _ = said("status", "--json")
    document = json.loads(out)
    assert document["schema_version"] == 1
    assert sorted(run["name"] for run in document["runs"]) == ["one", "two"]
    assert out == json.dumps(document, indent=2, sort_keys=True) + "\n"


def test_status_json_has_no_numbers_that_json_lacks(runs: Path, said: Said) -> None:
    run = make_run(runs)
    run.trainer_state.write_text('{"global_step": 3, "log_history": [{"loss": NaN}]}')
    _, out, _ = said("status", "--json")
    (row,) = json.loads(out, parse_constant=pytest.fail)["runs"]
    assert (row["step"], row["loss"]) == (3, None)


def test_a_save_that_failed_is_said_until_one_succeeds(runs: Path, said: Said) -> None:
    run = make_run(runs)
    link = run.claim_link({**this_process(), "job": None, "foreground": True, "num_tasks": 1})
    with training(link) as journal:
        journal.write("started", step=0, max_steps=10)
        journal.write("save_failed", step=4, reason="No space left on device (/runs/toy)")
        _, out, _ = said("status", "toy")
        assert "  in the foreground · step 4 could not be saved: No space left" in out
        journal.write("saved", step=6, epoch=0)
        _, out, _ = said("status", "toy")
        assert "could not be saved" not in out


def test_a_run_whose_jobs_have_lost_their_driver_is_stalled(runs: Path, said: Said) -> None:
    run = make_run(runs)
    queue_job(run)
    code, out, _ = said("status", "toy", "--exit-code")
    assert code == 21
    assert "  its jobs wait and nobody starts them: hpcresume resume toy" in out


def test_a_running_job_without_a_driver_says_that_none_will_follow(runs: Path, said: Said) -> None:
    run = make_run(runs)
    id = queue_job(run)
    own = ProcessId.own()
    files = JobFiles(run.jobs)
    files.write_record(id, JobRecord(state=JobState.RUNNING, process=own))
    code, out, _ = said("status", "toy", "--exit-code")
    assert code == 10
    assert "  its driver is gone, so that no job will follow this one" in out


def test_a_process_that_only_got_the_number_of_a_dead_one_keeps_no_run_alive(
    runs: Path, said: Said
) -> None:
    run = make_run(runs)
    claim = {**this_process(), "born": "another boot:1"}
    add_link(run, **claim, job=None, foreground=True)
    assert said("status", "toy", "--exit-code")[0] == 21


def test_a_foreground_run_within_an_allocation_is_seen_by_its_process(
    runs: Path, said: Said
) -> None:
    run = make_run(runs)
    add_link(run, **this_process(), job="4711", foreground=True)
    assert said("status", "toy", "--exit-code")[0] == 10


def test_a_damaged_run_does_not_hide_the_others(runs: Path, said: Said) -> None:
    make_run(runs, "good")
    make_run(runs, "bad").identity.write_text("{")
    code, out, err = said("status")
    assert (code, "good  stalled" in out) == (0, True)
    assert err == (
        f"hpcresume: {runs}/bad is not a run directory: its run.json is missing or torn.\n"
    )


def test_a_damaged_run_that_is_named_is_an_error(runs: Path, said: Said) -> None:
    make_run(runs, "bad").identity.write_text("{")
    assert said("status", "bad")[0] == 3


# ---- which run -----------------------------------------------------------------------------


def touched(run: RunDir, age_s: float) -> RunDir:
    """Let a run have shown its last sign of life so long ago."""
    then = time.time() - age_s
    for path in (run.submissions, run.links):
        os.utime(path, (then, then))
    return run


@pytest.mark.parametrize("text", ["old", "runs/old", "{runs}/old"])
def test_a_run_is_chosen_by_name_or_path(runs: Path, said: Said, text: str) -> None:
    add_link(make_run(runs, "old"))
    add_link(make_run(runs, "new"))
    code, out, _ = said("logs", text.format(runs=runs))
    assert (code, out) == (0, "── link 1 · job 1 · gpu017 ──\nline 1 of link 1\n")


def test_the_newest_unfinished_run_is_the_default(runs: Path, said: Said) -> None:
    touched(complete(make_run(runs, "finished")), 0)
    touched(make_run(runs, "newer"), 100)
    touched(make_run(runs, "older"), 200)
    assert "newer is cancelled" in said("cancel", "--yes")[1]


def test_a_damaged_run_is_nobodys_default(runs: Path, said: Said) -> None:
    touched(make_run(runs, "bad"), 0).identity.write_text("{")
    touched(make_run(runs, "good"), 100)
    assert "good is cancelled" in said("cancel", "--yes")[1]


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "resume"])
def test_without_any_run_a_command_says_how_to_begin_one(
    runs: Path, said: Said, command: str
) -> None:
    code, out, err = said(command)
    assert (code, out) == (3, "")
    assert err == f"hpcresume: There is no run in {runs}: `hpcresume submit` begins one.\n"


def test_a_run_that_is_not_there_is_answered_with_those_that_are(runs: Path, said: Said) -> None:
    make_run(runs, "one")
    code, _, err = said("status", "on")
    assert code == 3
    assert f"No run 'on', neither as a directory nor in {runs} (runs there: one)." in err


# ---- logs ----------------------------------------------------------------------------------


@pytest.fixture
def two_links(runs: Path) -> RunDir:
    run = make_run(runs)
    add_link(run, lines=2)
    add_link(run, lines=2, job="2")
    return run


def test_logs_go_through_all_links_in_order(two_links: RunDir, said: Said) -> None:
    assert said("logs")[1].splitlines() == [
        "── link 1 · job 1 · gpu017 ──",
        "line 1 of link 1",
        "line 2 of link 1",
        "── link 2 · job 2 · gpu017 ──",
        "line 1 of link 2",
        "line 2 of link 2",
    ]


def test_logs_of_one_link_and_its_last_lines(two_links: RunDir, said: Said) -> None:
    assert said("logs", "--link", "1", "-n", "1")[1] == "line 2 of link 1\n"


def test_a_link_that_is_not_there_is_answered_with_those_that_are(
    two_links: RunDir, said: Said
) -> None:
    code, _, err = said("logs", "--link", "5")
    assert (code, err) == (3, "hpcresume: toy has no link 5 (links: 1 to 2).\n")


def test_logs_of_a_foreground_link_say_where_its_lines_are(runs: Path, said: Said) -> None:
    run = make_run(runs)
    add_link(run, foreground=True).rank_log(0).unlink()
    assert str(run.train_log) in said("logs")[1]


def test_following_prints_each_line_once_and_goes_into_the_next_link(
    two_links: RunDir, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_on() -> None:
        with two_links.link(2).rank_log(0).open("a") as log:
            log.write("a later line\n")

    def end() -> None:
        end_link(add_link(two_links, job="3"), "stop", "cancelled", "enough")

    # One after the other, between its looks.
    events = iter((write_on, end))
    monkeypatch.setattr(time, "sleep", lambda _seconds: next(events)())
    _, out, _ = said("logs", "--follow", "-n", "1")
    assert out.splitlines() == [
        "line 2 of link 2",
        "a later line",
        "── link 3 · job 3 · gpu017 ──",
        "line 1 of link 3",
    ]


# ---- cancel --------------------------------------------------------------------------------


def test_cancel_of_a_complete_run_says_so(runs: Path, said: Said) -> None:
    complete(make_run(runs))
    code, _, err = said("cancel", "--yes", "toy")
    assert (code, err) == (3, "hpcresume: toy is complete: there is nothing to cancel.\n")


def test_cancel_leaves_the_request_and_names_the_jobs(runs: Path, said: Said) -> None:
    run = make_run(runs)
    queue_job(run)
    code, out, _ = said("cancel", "--yes", "toy")
    assert code == 0
    assert run.cancel.exists()
    assert out.startswith("toy is cancelled; jobs: 1 (pending).\n")


# ---- what is typed wrongly -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sumbit"], ["No command 'sumbit'.", "Did you mean 'submit'?", "Commands: submit, "]),
        (["status", "--josn"], ["No such option", "--josn", "Did you mean", "--json"]),
        (["status", "one", "two"], ["unexpected extra argument", "two"]),
        (["logs", "-n", "many"], ["'many' is not a valid integer"]),
        (
            ["submit", "toy.yaml", "--config", "other.yaml"],
            ["Two configurations are named, toy.yaml and other.yaml: name one."],
        ),
    ],
    ids=["command", "option", "argument", "number", "configuration"],
)
def test_what_makes_no_sense_is_answered_with_what_was_meant(
    project: Path, said: Said, argv: list[str], words: list[str]
) -> None:
    code, _, err = said(*argv)
    assert code == 2
    assert [word for word in words if word not in err] == []


# ---- terminals and pipes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "environ",
    [
        {"NO_COLOR": "1"},
        {"COLUMNS": "40"},
        {"COLUMNS": "wide"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb", "HOME": ""},
    ],
    ids=lambda environ: " ".join(f"{k}={v}" for k, v in environ.items()),
)
@pytest.mark.parametrize("command", ["status", "logs"])
def test_a_poor_environment_is_no_error(
    two_links: RunDir, command: str, environ: dict[str, str]
) -> None:
    done = child(command, cwd=two_links.path.parents[1], **environ)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_is_given_colours(two_links: RunDir) -> None:
    assert "\x1b[" in in_terminal("status", cwd=two_links.path.parents[1])


def test_no_color_leaves_colours_out(two_links: RunDir) -> None:
    assert "\x1b[" not in in_terminal("status", cwd=two_links.path.parents[1], NO_COLOR="1")


def test_a_narrow_terminal_gets_a_line_for_each_value(two_links: RunDir) -> None:
    shown = in_terminal("status", cwd=two_links.path.parents[1], NO_COLOR="1", COLUMNS="20")
    lines = [line.rstrip() for line in shown.splitlines()]
    assert lines[1:4] == ["toy  ▲ stalled", "  step 0", "  link 2"]


@pytest.mark.parametrize("argv", [["logs"], ["status"], ["status", "--json"], ["status", "--help"]])
def test_a_reader_who_has_seen_enough_is_no_error(two_links: RunDir, argv: list[str]) -> None:
    two_links.link(1).rank_log(0).write_text("a line\n" * 50_000)
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", *argv],
        cwd=two_links.path.parents[1],
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as left:
        assert left.stdout is not None and left.stderr is not None
        left.stdout.close()
        err = left.stderr.read()
    assert (left.returncode, err) == (0, "")


@pytest.mark.parametrize("command", ["status", "logs", "nonsense"])
def test_a_closed_standard_output_brings_no_command_down(two_links: RunDir, command: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec '{sys.executable}' -m hpcresume {command} >&-"],
        cwd=two_links.path.parents[1],
        env=ENVIRON,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == (2 if command == "nonsense" else 0)
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_does_not_end_the_driver_of_a_local_chain(two_links: RunDir) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hpcresume.display.progress import LocalProgress\n"
        "from hpcresume.run_dir import RunDir\n"
        "sys.stdin.read()\n"
        "progress = LocalProgress(RunDir(Path(sys.argv[1])))\n"
        "for _ in range(3):\n"
        "    progress.say('a line')\n"
        "    progress.finish()\n"
        "print('it goes on', file=sys.stderr)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(two_links.path)],
        env=ENVIRON,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child_:
        assert child_.stdin and child_.stdout and child_.stderr
        child_.stdout.close()
        child_.stdin.close()
        assert child_.stderr.read() == "it goes on\n"
    assert child_.returncode == 0


# ---- submit --dry-run ----------------------------------------------------------------------


def test_a_dry_run_prints_the_script_and_leaves_nothing(runs: Path, tmp_path: Path) -> None:
    done = child(*DRY, "--cluster=slurm", cwd=runs.parent, PATH=slurm_that_tells(tmp_path).path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert "#SBATCH --time=02:00:00\n" in done.stdout
    assert not runs.exists()


DRY = ("submit", "toy.yaml", "--dry-run", "--time", "02:00:00")


def slurm_that_tells(tmp_path: Path, start_s: float = 0.0, code: int = 0) -> FakeSlurm:
    """A Slurm whose sbatch tells when a job would start, and takes none."""
    slurm = FakeSlurm(tmp_path / "slurm")
    start = time.time() + start_s
    told = (
        f"sbatch: Job 5 to start at {start:.0f} using 8 processors on nodes n[1-2] in partition p"
    )
    told = told if code == 0 else "allocation failure: Invalid qos specification"
    slurm.program(
        "sbatch", f"cat > /dev/null; [ $1 = --test-only ] && echo '{told}' >&2; exit {code}"
    )
    return slurm


def test_a_dry_run_says_when_slurm_would_start_the_job_beside_the_script(
    runs: Path, tmp_path: Path
) -> None:
    path = slurm_that_tells(tmp_path, start_s=3 * 3600 + 30).path
    done = child(*DRY, "--cluster=slurm", cwd=runs.parent, PATH=path)
    when = (
        r"Slurm would start the first job in 3 h, at .*\d\d:\d\d, on n\[1-2\], as the queue is now."
    )
    assert re.fullmatch(when, done.stderr.strip())
    path = slurm_that_tells(tmp_path / "soon").path
    done = child(*DRY, "--cluster=slurm", cwd=runs.parent, PATH=path)
    assert done.stderr.startswith("Slurm would start the first job at once, on n[1-2]")


def test_a_dry_run_has_slurms_refusal_verbatim_and_its_exit_code(
    runs: Path, tmp_path: Path
) -> None:
    path = slurm_that_tells(tmp_path, code=1).path
    done = child(*DRY, "--cluster=slurm", cwd=runs.parent, PATH=path)
    assert done.returncode == 6
    assert "allocation failure: Invalid qos specification" in done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")


@pytest.mark.parametrize(
    ("cluster", "how"),
    [
        ("local", "# on this machine, for 02:00:00 at most, again and again until"),
        ("debug", "# within this very process, one link after the other"),
    ],
)
def test_a_dry_run_without_slurm_prints_what_would_run_instead_of_a_batch_script(
    runs: Path, said: Said, cluster: str, how: str
) -> None:
    code, out, err = said(*DRY, "--cluster", cluster)
    first, command = out.splitlines()
    assert (code, err) == (0, "")
    assert first.startswith(how)
    assert command == shlex.join([sys.executable, "-m", "hpcresume", "link", str(runs / "toy")])
    assert not runs.exists()
