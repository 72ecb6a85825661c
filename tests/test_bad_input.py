"""Bad input: one sentence that says what, where and what to do, the right exit code, no loss."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import FakeSlurm, Said, add_link, complete, make_run, queue_job
from oracle import ENVIRON, TRAINING, assert_equivalent, fingerprint
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import hpcresume
from hpcresume import cli
from hpcresume.errors import ConfigError, HpcResumeError
from hpcresume.journal import Journal, read_chain
from hpcresume.rank import load_train
from hpcresume.resumption import ready_to_resume
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.driver_file import only_driver
from hpcresume.snapshot import freeze_code

sys.path.insert(0, str(TRAINING))
import tiny

Train = Callable[[hpcresume.Session], None]
SETTINGS: dict[str, Any] = {
    "max_steps": 12,
    "seed": 3,
    "checkpoint": {"steps": 2, "background": False},
    "scheduler": {"cluster": "local"},
}
CONFIG = "name: toy\ntrain: toy.py:train\nmax_steps: 10\n"


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
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPCRESUME_RUNS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


@pytest.fixture
def runs(project: Path) -> Path:
    return project / "runs"


@pytest.fixture
def said(project: Path, said: Said) -> Said:
    """A command line in the project."""
    return said


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute as the child processes of these tests do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(project: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """A training function in the foreground, in this process: exit code, output, errors.

    Every function counts as the same one, as if its file had been edited.
    """

    def run(train: Train, *argv: str, **settings: Any) -> tuple[int, str, str]:
        def same(session: hpcresume.Session) -> None:
            train(session)

        capsys.readouterr()
        with one_thread(), pytest.raises(SystemExit) as left:
            hpcresume.main(same, ["--name", "toy", *argv], **{**SETTINGS, **settings})
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return run


def cut(_session: hpcresume.Session) -> None:
    """Let the scheduler end the link; the step in progress is its last."""
    os.kill(os.getpid(), signal.SIGTERM)


def loop(**at: tiny.Action) -> Train:
    """The tiny training; `step_4=cut` does something before the fifth step."""
    actions = {int(name.removeprefix("step_")): action for name, action in at.items()}
    return lambda session: tiny.loop(session, actions)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fingerprint of the tiny training without a break."""
    folder = tmp_path_factory.mktemp("uncut")
    argv = ["--name", "toy", "--runs", str(folder)]
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setenv("HPCRESUME_SITE", os.devnull)
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        with pytest.raises(SystemExit, match="0"):
            hpcresume.main(tiny.train, argv, **SETTINGS)
    return fingerprint(RunDir(folder / "toy"))


def notes(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [record for link in read_chain(run) for record in link.all(kind)]


def content(folder: Path) -> dict[str, str]:
    """Digests of all files below a folder: what must not be lost."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ---- configurations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("max_stpes: 3", "toy.yaml:4: unknown key 'max_stpes'; did you mean 'max_steps'?"),
        (
            "checkpoint: {step: 3}",
            "toy.yaml:4: unknown key 'checkpoint.step'; did you mean 'steps'?",
        ),
        (
            "epochs: many",
            "toy.yaml:4: epochs is 'many'; expected a whole number of at least 1, or null.",
        ),
        ("seed: [1", "toy.yaml:4: not valid YAML"),
        ("scheduler: {time: 0}", "toy.yaml:4: scheduler.time: '0' is not a time limit"),
        ("name: other", "toy.yaml:4: 'name' is given twice, first at toy.yaml:1."),
    ],
    ids=["unknown key", "unknown key below", "wrong type", "no YAML", "time", "twice"],
)
def test_a_wrong_line_of_a_configuration_is_named_and_nothing_is_made(
    project: Path, said: Said, line: str, sentence: str
) -> None:
    (project / "toy.yaml").write_text(f"{CONFIG}{line}\n")
    before = content(project)
    code, out, err = said("submit", "toy.yaml", "--cluster", "local")
    assert (code, out) == (4, "")
    assert err.startswith(f"hpcresume: {sentence}")
    assert content(project) == before


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--time", "banana"], "command line: scheduler.time: 'banana' is not a time limit"),
        (["--time", "1:99:00"], "command line: scheduler.time: '1:99:00' is not a time limit"),
        (["--set", "tarin=x.py"], "--set tarin=x.py: unknown key 'tarin'; did you mean 'train'?"),
        (["--set", "max_steps"], "--set max_steps: expected KEY=VALUE"),
        (["--nodes", "0"], "command line: scheduler.nodes is 0; expected"),
        (["--sbatch", "time=3"], "command line: scheduler.sbatch has the key 'time'; write"),
        (["--name", "two words"], "command line: name is 'two words'; expected"),
        (["--name", "../out"], "command line: name is '../out'; expected"),
        (["--name", "two\nlines"], "command line: name is 'two\\nlines'; expected"),
        (["--name", ""], "command line: name is ''; expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_named_and_nothing_is_made(
    project: Path, said: Said, argv: list[str], sentence: str
) -> None:
    before = content(project)
    code, out, err = said("submit", "toy.yaml", "--cluster", "local", *argv)
    assert (code, out) == (4, "")
    assert err.startswith(f"hpcresume: {sentence}")
    assert content(project) == before


def test_a_configuration_without_an_end_is_named(project: Path, said: Said) -> None:
    (project / "toy.yaml").write_text("train: toy.py:train\n")
    code, _, err = said("submit", "toy.yaml")
    assert code == 4
    assert err == (
        "hpcresume: toy.yaml: 'max_steps' and 'epochs' are both missing; expected at least one of "
        "them.\n"
    )


def test_a_configuration_that_is_not_there_is_not_found(said: Said) -> None:
    code, _, err = said("submit", "other.yaml")
    assert (code, err) == (
        3,
        "hpcresume: other.yaml: no such file; expected a YAML file of settings.\n",
    )


# ---- train entries -------------------------------------------------------------------------


def refused(folder: Path, text: str, entry: str = "entry.py:train") -> str:
    """The sentence about a train entry that cannot be used."""
    (folder / "entry.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_train(entry, [folder])
    sys.modules.pop("entry", None)
    return str(error.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "import os\ndef train(:\n",
            "train: entry.py does not import: SyntaxError: invalid syntax (entry.py, line 2).",
        ),
        (
            "\nimport no_such_module\n",
            "train: entry.py does not import: ModuleNotFoundError: No module named "
            "'no_such_module' (entry.py, line 2).",
        ),
        (
            "def f():\n    raise ValueError('boom')\nf()\n",
            "train: entry.py does not import: ValueError: boom (entry.py, line 2).",
        ),
        (
            "import sys\nsys.exit(0)\n",
            "train: entry.py does not import: SystemExit: 0 (entry.py, line 2).",
        ),
        (
            "def other(session): ...\ntrain = 3\n",
            "train: entry.py has no function 'train' (it has: other).",
        ),
        (
            "def train(): ...\n",
            "train: entry.py:train cannot be called with the session alone: too many positional "
            "arguments.",
        ),
        (
            "def train(session, lr): ...\n",
            "train: entry.py:train cannot be called with the session alone: missing a required "
            "argument: 'lr'.",
        ),
        (
            "def train(session): ...\n\0",
            "train: entry.py does not import: SyntaxError: source code string cannot contain null "
            "bytes.",
        ),
    ],
    ids=[
        *("syntax", "import", "exception", "exit", "no function", "no parameter", "parameters"),
        "null byte",
    ],
)
def test_a_train_entry_that_cannot_be_used_is_told_with_its_place(
    project: Path, text: str, sentence: str
) -> None:
    assert refused(project, text) == sentence


def test_a_train_entry_of_an_absent_module_names_no_file_of_ours(project: Path) -> None:
    assert refused(project, "", "no_such.package:train") == (
        "train: no_such.package does not import: ModuleNotFoundError: No module named 'no_such'."
    )


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("../toy.py:train", "train: ../toy.py must lie below the folder that you submit from."),
        ("/toy.py:train", "train: /toy.py must lie below the folder that you submit from."),
        ("other.py:train", "train: there is no file other.py in {project}."),
        (":train", "train is ':train'; expected 'file.py:function' or 'package.module:function'."),
        ("toy.py:a:b", "train is 'toy.py:a:b'; expected"),
    ],
)
def test_a_train_entry_that_names_no_function_is_refused_before_anything_is_made(
    project: Path, said: Said, entry: str, sentence: str
) -> None:
    before = content(project)
    code, _, err = said("submit", "toy.yaml", "--cluster", "local", "--set", f"train='{entry}'")
    assert code == 4
    assert err.startswith("hpcresume: " + sentence.format(project=project))
    assert content(project) == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "print('a word of the code')\nraise ValueError('two\\nlines')\n",
            "train: toy.py does not import: ValueError: two\nlines (toy.py, line 2).",
        ),
        (
            "import os\nos._exit(0)\n",
            "train: toy.py:train does not import: the process that tried left with code 0.",
        ),
    ],
    ids=["two lines", "gone without a word"],
)
def test_submit_passes_on_why_the_code_does_not_import_and_leaves_no_run(
    project: Path, runs: Path, said: Said, text: str, sentence: str
) -> None:
    (project / "toy.py").write_text(text)
    code, out, err = said("submit", "toy.yaml", "--cluster", "local")
    assert (code, out, err) == (4, "", f"hpcresume: {sentence}\n")
    assert list(runs.iterdir()) == []


def test_a_new_module_that_git_does_not_know_yet_is_frozen_as_well(
    project: Path, tmp_path: Path
) -> None:
    git = ["git", "-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "toy.py"], check=True)
    (project / "fresh.py").write_text("x = 1\n")
    (project / "runs" / "old" / "code").mkdir(parents=True)
    (project / "runs" / "old" / "code" / "toy.py").write_text("")
    (project / "notes.txt").write_text("private\n")
    freeze_code(project, "toy.py:train", tmp_path / "code")
    assert sorted(content(tmp_path / "code")) == ["fresh.py", "toy.py"]


# ---- a name that is taken ------------------------------------------------------------------


def test_submitting_another_configuration_shows_the_difference_and_the_ways_out(
    runs: Path, said: Said
) -> None:
    make_run(runs)
    before = content(runs)
    code, _, err = said("submit", "toy.yaml", "--cluster", "local", "--set", "max_steps=20")
    assert code == 4
    for part in ("max_steps: 10 -> 20", "scheduler.cluster: auto -> local"):
        assert f"\n  {part}\n" in err
    for way in ("--force-new", "--name", "`hpcresume resume toy`"):
        assert way in err
    assert content(runs) == before


def test_submitting_an_unfinished_run_again_says_resume(runs: Path, said: Said) -> None:
    make_run(runs)
    code, _, err = said("submit", "toy.yaml")
    assert (code, err) == (
        4,
        "hpcresume: toy is not finished: go on with it by `hpcresume resume toy`, or begin a new "
        "one with --force-new or another --name.\n",
    )


@pytest.mark.parametrize("changes", [[], ["--set", "max_steps=20"]], ids=["same", "other"])
def test_nobody_is_told_to_resume_a_complete_run(
    runs: Path, said: Said, changes: list[str]
) -> None:
    complete(make_run(runs))
    code, _, err = said("submit", "toy.yaml", *changes)
    assert (code, "complete" in err, "--force-new" in err) == (4, True, True)
    assert "hpcresume resume" not in err


@pytest.mark.parametrize(
    "argv", [["submit", "toy.yaml"], ["resume", "toy"], ["resume", "toy", "--set", "seed=3"]]
)
def test_a_live_run_is_neither_submitted_nor_resumed_nor_changed(
    runs: Path, said: Said, argv: list[str]
) -> None:
    run = make_run(runs)
    queue_job(run)
    before = content(runs)
    with only_driver(run):
        code, _, err = said(*argv)
    assert (code, err) == (
        9,
        "hpcresume: toy is live: job 1 (PENDING). `hpcresume status` shows it.\n",
    )
    assert content(runs) == before


def test_resuming_a_complete_run_says_where_the_model_is(runs: Path, said: Said) -> None:
    run = complete(make_run(runs))
    code, _, err = said("resume", "toy")
    assert code == 2 and err.startswith(
        f"hpcresume: toy is complete: {run.final_model}. To train it"
    )


def test_resume_takes_jobs_that_lost_their_driver_out_of_the_queue(runs: Path) -> None:
    run = make_run(runs)
    id = queue_job(run)
    ready_to_resume(run, sets=(), environ=os.environ)
    assert (run.jobs / f"{id}.cancel").exists()


def test_force_new_takes_the_next_free_name(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(runs)
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("sbatch", "echo 4711")
    monkeypatch.setenv("PATH", slurm.path)
    code, out, _ = said("submit", "toy.yaml", "--force-new")
    assert code == 0
    assert out.startswith("run        toy-2\njob        4711\n")


def test_a_rejected_job_is_told_in_slurms_words_and_leaves_the_name_free(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "Batch job submission failed: Invalid account or account/partition combination"
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("sbatch", f"echo 'sbatch: error: {words} specified' >&2; exit 1")
    monkeypatch.setenv("PATH", slurm.path)
    code, _, err = said("submit", "toy.yaml")
    assert (code, err) == (6, f"hpcresume: Slurm refused the job: {words} specified\n")
    assert list(runs.iterdir()) == []


# ---- folders of runs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [["status"], ["status", "toy"], ["logs"], ["cancel"], ["resume"], ["submit", "toy.yaml"]],
    ids=" ".join,
)
@pytest.mark.parametrize("below", ["", "/more"])
def test_runs_that_would_lie_in_a_file_are_a_usage_error(
    project: Path, said: Said, monkeypatch: pytest.MonkeyPatch, argv: list[str], below: str
) -> None:
    monkeypatch.setenv("HPCRESUME_RUNS", f"toy.yaml{below}")
    code, _, err = said(*argv)
    assert (code, err) == (
        2,
        f"hpcresume: {project}/toy.yaml is no folder: let --runs or $HPCRESUME_RUNS name one.\n",
    )
    assert (project / "toy.yaml").read_text() == CONFIG


def powerless(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command line by somebody whom file modes stop; root needs to lay down some powers."""
    lay_down = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    if os.getuid() != 0:
        lay_down = []
    elif shutil.which("setpriv") is None:
        pytest.skip("root cannot lay down its powers without setpriv")
    return subprocess.run(
        [*lay_down, sys.executable, "-m", "hpcresume", *argv],
        cwd=cwd,
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("mode", "argv"),
    [
        (0o000, ["status"]),
        (0o000, ["logs", "toy"]),
        (0o500, ["submit", "toy.yaml", "--cluster", "local"]),
    ],
    ids=["status", "logs", "submit"],
)
def test_a_folder_of_runs_that_may_not_be_used_is_a_sentence_and_code_5(
    project: Path, runs: Path, mode: int, argv: list[str]
) -> None:
    make_run(runs, "other")
    runs.chmod(mode)
    try:
        done = powerless(*argv, cwd=project)
    finally:
        runs.chmod(0o700)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith(f"hpcresume: {runs}")
    assert done.stderr.endswith(": Permission denied. Mend it, and try again.\n")


def test_a_run_that_others_can_write_to_is_refused_with_the_cure(runs: Path, said: Said) -> None:
    run = make_run(runs)
    run.path.chmod(0o770)
    before = content(runs)
    code, _, err = said("resume", "toy")
    assert code == 1
    assert f"run `chmod go-w {run.path}`" in err
    assert content(runs) == before


# ---- damaged run directories ---------------------------------------------------------------

HUGE = (
    b'{"t": 1e308, "kind": "saved", "step": 99999999999999999999, "global_step": 1e999, '
    b'"id": "x", "total_steps": 99999999999999999999, "epoch": "x", "log_history": 3, '
    b'"pid": 1e999, "cluster": "local", "host": "here", "born": 3, "num_tasks": 1e12, '
    b'"adopted": {"journal": 9e99}}'
)
ODD = (
    b'{"t": 1, "kind": "saved", "step": "x"}\n{"t": 2, "kind": "submitted", "after_link": "x"}\n'
    b'{"t": 3, "kind": ["x"]}\n{"t": NaN, "kind": "restored", "step": 1, "segments": 5}\n'
    b'{"t": 4, "kind": "ended", "cause": ["x"], "of": {}, "failure": 3, "seconds": "x"}\n'
    b'{"t": 5, "kind": "decided", "decision": ["x"]}\n{"t": "x", "kind": "queued"}\n'
)
GARBAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "a list": b"[]",
    "a number": b"3",
    "torn": b'{"v": 1, "t": 17',
    "deep": b"[" * 100_000,
    "huge numbers": HUGE,
    "odd records": ODD,
}
DAMAGED: Mapping[str, Callable[[RunDir], Path]] = {
    "run.yaml": lambda run: run.config,
    "run.json": lambda run: run.identity,
    "submissions.jsonl": lambda run: run.submissions,
    "trainer_state.json": lambda run: run.trainer_state,
    "CANCEL": lambda run: run.cancel,
    "driver.json": lambda run: run.driver,
    "1.job.json": lambda run: run.jobs / "1.job.json",
    "claim.json": lambda run: run.link(1).claim,
    "journal.jsonl": lambda run: run.link(1).journal,
    "training.jsonl": lambda run: run.link(1).training,
    "rank-0.log": lambda run: run.link(1).rank_log(0),
    "rank-0.failure.json": lambda run: run.link(1).rank_failure(0),
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_of_a_run_brings_no_command_down(
    runs: Path, said: Said, file: str, garbage: str
) -> None:
    for argv in (["status", "toy"], ["status", "--json"], ["logs", "toy"], ["cancel", "-y", "toy"]):
        shutil.rmtree(runs, ignore_errors=True)
        run = make_run(runs)
        add_link(run)
        DAMAGED[file](run).write_bytes(GARBAGE[garbage])
        code, _, err = said(*argv)
        assert code in (0, 3, 4), err
        assert bool(err) == bool(code)
    # What `resume` and a link read before they do anything.
    with contextlib.suppress(HpcResumeError):
        ready_to_resume(run, sets=(), environ=os.environ)


# ---- checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def cut_run(runs: Path, trained: Said) -> RunDir:
    """The tiny training, ended in the middle; checkpoint-7 is the newest, checkpoint-6 before."""
    assert trained(loop(step_6=cut))[0] == 143
    return RunDir(runs / "toy")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "config.json",
        "rng.json",
        "state.json",
        "trainer_state.json",
        "training_args.json",
        "manifest.json",
    ],
)
def test_a_checkpoint_with_a_changed_bit_is_quarantined_and_the_one_before_it_gives_the_same_bytes(
    cut_run: RunDir, trained: Said, uncut: dict[str, Any], file: str
) -> None:
    flip(cut_run.checkpoint(7) / file)
    code, out, _ = trained(loop())
    (note,) = notes(cut_run, "quarantined")
    named = "its manifest" if file == "manifest.json" else file
    assert (code, note["step"], named in note["reason"]) == (0, 7, True)
    assert f"checkpoint-7 is not used: {note['reason']}; it is quarantined" in out
    assert "resuming from step 6" in out
    assert len(list(cut_run.path.glob("quarantined-7.*"))) == 1
    assert_equivalent(cut_run, uncut)


@pytest.mark.parametrize("how", ["cut short", "gone", "a folder", "a link"])
def test_a_checkpoint_with_a_file_that_is_none_is_not_used(
    cut_run: RunDir, trained: Said, uncut: dict[str, Any], how: str
) -> None:
    path = cut_run.checkpoint(7) / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if how == "cut short":
        path.write_bytes(data[:-1])
    elif how == "a folder":
        path.mkdir()
    elif how == "a link":
        (cut_run.path / "elsewhere").write_bytes(data)
        path.symlink_to(cut_run.path / "elsewhere")
    code, _, _ = trained(loop())
    (note,) = notes(cut_run, "quarantined")
    assert (code, "model.safetensors" in note["reason"]) == (0, True)
    assert_equivalent(cut_run, uncut)


def test_a_run_without_any_sound_checkpoint_does_not_begin_afresh(
    cut_run: RunDir, trained: Said
) -> None:
    steps = cut_run.checkpoint_steps()
    for step in steps:
        flip(cut_run.checkpoint(step) / "model.safetensors")
    code, out, _ = trained(loop())
    assert code == 7
    assert "knows step 7 as committed, but no usable checkpoint is left" in out
    # Somebody may still want to look at them.
    assert len(list(cut_run.path.glob("quarantined-*/model.safetensors"))) == len(steps)


def submitted_again(run: RunDir) -> None:
    """What `hpcresume resume` records before its job starts."""
    journal = Journal(run.submissions, link=0, job=None)
    journal.write("submitted", after_link=run.newest_link(), token="t", by="ada", host="login1")
    journal.close()


def remove_checkpoints(run: RunDir) -> None:
    for step in run.checkpoint_steps():
        shutil.rmtree(run.checkpoint(step))


def test_resume_of_a_run_whose_checkpoints_are_gone_says_what_is_missing(
    cut_run: RunDir, said: Said
) -> None:
    remove_checkpoints(cut_run)
    before = content(cut_run.path)
    code, _, err = said("resume", "toy")
    assert (code, err) == (
        7,
        f"hpcresume: The journal of toy knows step 7 as committed, but no checkpoint is left in "
        f"{cut_run.path}: put one back, or begin a new run.\n",
    )
    assert content(cut_run.path) == before


def test_a_link_of_a_run_whose_checkpoints_are_gone_does_not_begin_afresh(
    cut_run: RunDir,
) -> None:
    remove_checkpoints(cut_run)
    submitted_again(cut_run)
    cut_run.code.mkdir()
    (cut_run.code / "test_bad_input.py").write_text("def same(session):\n    raise SystemExit(3)\n")
    argv = [sys.executable, "-m", "hpcresume", "link", str(cut_run.path)]
    done = subprocess.run(argv, env=ENVIRON, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "knows step 7 as committed, but no usable checkpoint is left" in done.stdout
    assert notes(cut_run, "decided")[-1]["decision"] == "stop"


# ---- misuse of the session -----------------------------------------------------------------


def data(size: int = 16) -> TensorDataset:
    return TensorDataset(torch.zeros(size, 1))


def steps_twice(session: hpcresume.Session) -> None:
    for _ in range(2):
        for _ in session.steps(session.loader(data(), batch_size=4)):
            pass


def same_name_twice(session: hpcresume.Session) -> None:
    session.register(model=nn.Linear(1, 1))
    session.register(model=nn.Linear(1, 1))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())


def through(loader: Any, **options: Any) -> Train:
    def train(session: hpcresume.Session) -> None:
        for _ in session.steps(loader(session), **options):
            pass

    return train


def in_a_step(action: Train) -> Train:
    def train(session: hpcresume.Session) -> None:
        for _ in session.steps(session.loader(data(), batch_size=4)):
            action(session)

    return train


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (steps_twice, "session.steps can be gone through once in a link."),
        (same_name_twice, "'model' is registered already."),
        (lambda s: s.register(state=1), "'state' cannot be registered: choose another name."),
        (
            lambda s: s.register(x=object()),
            "'x' cannot be registered: a object has no state",
        ),
        (lambda s: s.args.lr, "reads args.lr, which the configuration does not set (args there: "),
        (lambda s: s.args["lr"], "reads args.lr, which the configuration does not set"),
        (through(lambda s: 12), "session.steps goes through a loader, a list of batches or"),
        (through(lambda s: s.loader(data(), 4), accumulate=0), "accumulate is 0, and must be 1"),
        (lambda s: s.loader({1, 2}, 4), "session.loader needs a dataset with a length"),
        (lambda s: s.loader(data(0), 4), "The dataset's 0 samples give no batch of 4"),
        (lambda s: s.loader(data(), 0), "batch_size is 0, and must be 1 or more."),
        (in_a_step(lambda s: s.best(a=1, b=2)), "session.best takes one metric"),
        (in_a_step(lambda s: s.log(x=object())), "session.log(x=…): a object cannot be logged"),
        (
            in_a_step(lambda s: s.register(late=nn.Linear(1, 1))),
            "'late' is registered after session.steps has begun",
        ),
    ],
    ids=[
        *("steps twice", "same name", "reserved name", "unsupported", "args attribute", "args key"),
        *("foreign loader", "accumulate", "stream", "empty dataset", "batch size"),
        *("two metrics", "logged object", "registered late"),
    ],
)
def test_misuse_of_the_session_is_a_sentence_with_the_place_and_code_2(
    trained: Said, train: Train, sentence: str
) -> None:
    code, out, _ = trained(train)
    (line,) = (line for line in out.splitlines() if "[rank-ERROR]" in line)
    assert sentence in line
    assert "test_bad_input.py, line " in line
    assert code == 2


@pytest.mark.parametrize(
    "train", [lambda s: None, lambda s: s.steps(s.loader(data(), 4))], ids=["none", "not begun"]
)
def test_a_training_function_that_does_no_steps_is_told_so(trained: Said, train: Train) -> None:
    code, out, _ = trained(train)
    assert code == 2
    assert "The training function returned without having gone through session.steps." in out


def resumed(
    size: int = 48,
    batch_size: int = 4,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    without: str = "",
    more: Mapping[str, Any] | None = None,
) -> Train:
    """The tiny training with something changed; it must not come to a step."""

    def train(session: hpcresume.Session) -> None:
        layers = (nn.Linear(3, width), nn.Dropout(0.3), nn.Linear(width, 1))
        model = nn.Sequential(*layers).to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        loader = session.loader(data(size), batch_size=batch_size, shuffle=True)
        objects = {"model": model, "optimizer": optimizer, "config": {"width": 8}, **(more or {})}
        objects.pop(without, None)
        session.register(**objects)
        for _ in session.steps(loader, accumulate=accumulate):
            raise AssertionError("it trains")

    return train


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (
            resumed(size=50),
            "checkpoint-7 cannot be continued: its data were others (length 48 -> 50); set it "
            "back, or accept it: hpcresume resume --set accept=[dataset].",
        ),
        (resumed(batch_size=8), "its steps had 4 samples, and would have 8 (batch_size 4 -> 8)"),
        (resumed(accumulate=2), "its steps had 4 samples, and would have 8 (accumulate 1 -> 2)"),
        (
            resumed(width=9),
            "'model.0.weight' is float32[9, 3] here, float32[8, 3] in the checkpoint.",
        ),
        (
            resumed(dtype=torch.float64),
            "'model.0.weight' is float64[8, 3] here, float32[8, 3] in the checkpoint.",
        ),
        (
            resumed(without="optimizer"),
            "checkpoint-7 holds optimizer, which the training function did not register before "
            "session.steps.",
        ),
        (
            resumed(without="config"),
            "checkpoint-7 holds config, which the training function did not register before "
            "session.steps.",
        ),
        (resumed(more={"ema": nn.Linear(1, 1)}), "checkpoint-7 holds no 'ema'"),
        (resumed(more={"vocabulary": [1]}), "checkpoint-7 holds no 'vocabulary'"),
    ],
    ids=[
        *("length", "batch size", "accumulation", "shape", "type", "forgotten", "forgotten value"),
        *("new object", "new value"),
    ],
)
def test_a_resume_with_something_changed_is_refused_and_loses_nothing(
    cut_run: RunDir, trained: Said, uncut: dict[str, Any], train: Train, sentence: str
) -> None:
    before = content(cut_run.checkpoint(7))
    code, out, _ = trained(train)
    assert (code, sentence in out) == (7, True), out
    assert content(cut_run.checkpoint(7)) == before
    # And it goes on as soon as the code is mended.
    assert trained(loop())[0] == 0
    assert_equivalent(cut_run, uncut)


# ---- in the foreground ---------------------------------------------------------------------


def test_a_script_with_another_configuration_shows_the_difference_and_the_ways_out(
    cut_run: RunDir, trained: Said
) -> None:
    before = content(cut_run.path)
    code, _, err = trained(loop(), max_steps=20)
    assert code == 4
    assert "\n  max_steps: 12 -> 20\n" in err
    assert "by --resume toy, or give the new run another name by --name." in err
    assert content(cut_run.path) == before


def test_resume_and_set_contradict_each_other(cut_run: RunDir, project: Path) -> None:
    argv = ["--resume", "toy", "--set", "max_steps=20"]
    with pytest.raises(SystemExit, match="2"):
        hpcresume.main(tiny.train, argv)


def test_a_cancelled_foreground_run_says_who_and_can_be_started_again(
    cut_run: RunDir, trained: Said, said: Said, uncut: dict[str, Any]
) -> None:
    def cancel(session: hpcresume.Session) -> None:
        with contextlib.suppress(SystemExit):
            cli.main(["cancel", "--yes", "toy"])
        time.sleep(0.6)

    code, out, _ = trained(loop(step_8=cancel))
    assert code == 0
    assert "Saved at step 9 (CANCEL)." in out
    assert "\n  cancelled by " in said("status")[1]
    assert trained(loop())[0] == 0
    assert_equivalent(cut_run, uncut)


def test_a_script_does_not_take_over_a_run_with_a_living_job(
    cut_run: RunDir, trained: Said
) -> None:
    submitted_again(cut_run)
    queue_job(cut_run)
    with only_driver(cut_run):
        code, _, err = trained(loop())
    assert (code, "toy is live: job 1 (PENDING)" in err) == (9, True)


SCRIPT = """
import sys, os
from pathlib import Path
import hpcresume, tiny

def train(session):
    tiny.loop(session, {actions})

hpcresume.main(train, ["--name", "toy", *sys.argv[1:]], **{settings!r})
"""


def script(
    project: Path, actions: str, more: str = "", errors: int = subprocess.STDOUT
) -> subprocess.Popen[str]:
    """A training script in a process of its own, with what it prints in its pipe."""
    shutil.copy(TRAINING / "tiny.py", project)
    (project / "script.py").write_text(more + SCRIPT.format(actions=actions, settings=SETTINGS))
    return subprocess.Popen(
        [sys.executable, "-u", "script.py"],
        cwd=project,
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(seen)


def test_one_ctrl_c_saves_and_running_again_ends_with_the_uncut_bytes(
    project: Path, uncut: dict[str, Any]
) -> None:
    more = "def wait(session):\n    while not Path('go').exists(): __import__('time').sleep(0.02)\n"
    first = script(project, "{4: wait}", more)
    read_until(first, "saved step 4")
    first.send_signal(signal.SIGINT)
    (project / "go").touch()
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 130, out
    assert "(SIGINT). To go on: " in out
    second = script(project, "{}")
    out, _ = second.communicate(timeout=120)
    assert (second.returncode, "resuming from step" in out) == (0, True), out
    assert_equivalent(RunDir(project / "runs" / "toy"), uncut)


def test_a_script_whose_reader_has_left_trains_to_its_end_in_peace(
    project: Path, uncut: dict[str, Any]
) -> None:
    with script(project, "{}", errors=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert_equivalent(RunDir(project / "runs" / "toy"), uncut)


@pytest.fixture
def stuck(project: Path) -> Iterator[subprocess.Popen[str]]:
    """A training script in a step that takes an hour."""
    more = "def wait(session):\n    print('stuck'); __import__('time').sleep(3600)\n"
    process = script(project, "{3: wait}", more)
    read_until(process, "stuck")
    yield process
    process.kill()
    process.communicate()


def test_a_second_ctrl_c_leaves_at_once_and_a_rival_in_between_is_refused(
    stuck: subprocess.Popen[str], project: Path
) -> None:
    rival = subprocess.run(
        [sys.executable, "script.py"],
        cwd=project,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert rival.returncode == 9
    assert f"toy is live: process {stuck.pid} on " in rival.stderr
    stuck.send_signal(signal.SIGINT)
    # Two that come at once are one: the second is sent when the first has been noted.
    while catches(stuck.pid, signal.SIGINT):
        assert stuck.poll() is None
        time.sleep(0.01)
    assert stuck.poll() is None
    stuck.send_signal(signal.SIGINT)
    assert stuck.wait(timeout=60) == -signal.SIGINT


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = re.findall(r"(?m)^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


# ---- a full disk ---------------------------------------------------------------------------

FILLING = """
from pathlib import Path

def fill(session):
    here = session.path.parent
    try:
        with (here / "filler").open("wb") as file:
            while True:
                file.write(bytes(1024))
                file.flush()
    except OSError:
        print("full:", sorted(p.name for p in session.path.glob("checkpoint-*")))

def free(session):
    print("still:", sorted(p.name for p in session.path.glob("checkpoint-*")))
    (session.path.parent / "filler").unlink()
"""


def test_a_full_disk_costs_a_checkpoint_and_neither_the_training_nor_the_ones_before(
    project: Path, uncut: dict[str, Any]
) -> None:
    mount = "mkdir disk && mount -t tmpfs -o size=3m tmpfs disk"
    probe = ["unshare", "-m", "sh", "-c", mount]
    probed = subprocess.run(probe, cwd=project, capture_output=True, check=False)
    if probed.returncode:
        pytest.skip("only root may mount a small disk")
    (project / "disk").rmdir()
    shutil.copy(TRAINING / "tiny.py", project)
    (project / "script.py").write_text(
        FILLING + SCRIPT.format(actions="{5: fill, 9: free}", settings=SETTINGS)
    )
    train = f"{sys.executable} -u script.py --runs disk"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {train}; code=$?; cp -a disk kept; exit $code"],
        cwd=project,
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "full: ['checkpoint-2', 'checkpoint-4']" in said
    assert "still: ['checkpoint-2', 'checkpoint-4']" in said
    assert "step 6 could not be saved: No space left on device" in said
    assert "Traceback" not in said
    run = RunDir(project / "kept" / "toy")
    failed = notes(run, "save_failed")
    assert [note["step"] for note in failed] == [6, 8]
    assert all("No space left on device" in note["reason"] for note in failed)
    assert [note["step"] for note in notes(run, "saved")][-2:] == [10, 12]
    assert_equivalent(run, uncut)
