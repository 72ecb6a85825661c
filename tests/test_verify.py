"""`hpcresume verify`: a cut that changes something is found and named, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import ENVIRON, TRAINING, hpcresume
from safetensors.numpy import save_file
from terminal import Terminal

from hpcresume.config import from_mapping
from hpcresume.run_dir import RunDir
from hpcresume.verify import compare
from hpcresume.verify.compare import Difference
from hpcresume.verify.links import LinkFailed, make_run, run_link
from hpcresume.verify.looks import Lost
from hpcresume.verify.verdict import outcome_of

CONFIG = "name: toy\ntrain: train.py:kept_noise\nmax_steps: 5\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a script of many training functions, and one for temporary files."""
    folder = tmp_path / "ada's project"
    folder.mkdir()
    (folder / "train.py").write_text((TRAINING / "verify_toy.py").read_text())
    (tmp_path / "temporary").mkdir()
    return folder


def verify(project: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    temporary = str(project.parent / "temporary")
    return hpcresume("verify", *argv, cwd=project, timeout=200, TMPDIR=temporary)


def left_over(project: Path) -> list[str]:
    """The temporary folders that are still there."""
    found = (project.parent / "temporary").glob("hpcresume-verify-*")
    return [str(path) for path in found]


# ---- verdicts ------------------------------------------------------------------------------


def test_a_training_that_registers_its_state_is_bit_identical(project: Path) -> None:
    done = verify(project, "train.py", "--steps", "6", "--json", "--set", "deterministic=true")
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert (said["outcome"], said["steps"], said["cut_at"]) == ("bit-identical", 6, 3)
    assert (said["tensors"], said["logged_steps"], said["differences"]) == (16, 6, [])
    assert (said["unsteady"], said["variables"][0]["name"]) == (["seconds"], "shown")
    assert "second link, of no step  at step 3" in done.stderr
    assert left_over(project) == []


def test_two_ranks_are_bit_identical_to_the_end_of_their_training(project: Path) -> None:
    (project / "toy.yaml").write_text(CONFIG)
    done = verify(project, "toy.yaml", "--ranks", "2", "--steps", "6", "--keep", "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical: 5 steps" in done.stdout and "2 ranks" in done.stdout
    states = json.loads((project / "kept/cut/checkpoint-5/rng.json").read_text())
    assert [list(state["generators"]) for state in states] == [["noise"], ["noise"]]


def test_an_average_that_is_in_no_checkpoint_is_named(project: Path) -> None:
    done = verify(project, "train.py:averaged", "--steps", "6")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "diverged: ema (AveragedModel), which is in no checkpoint" in done.stdout
    assert "never registered: ema (AveragedModel)." in done.stdout
    assert left_over(project) == []


def test_a_seeded_generator_that_is_not_registered_is_named(project: Path) -> None:
    done = verify(project, "train.py:own_noise", "--steps", "6")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "diverged: the logged loss of step 4, where the links are cut after step 3" in (
        done.stdout
    )
    assert "never registered: dataset.rng (numpy Generator)." in done.stdout
    assert "session.register(dataset_rng=dataset.rng)" in done.stdout


def test_an_unseeded_generator_is_no_fault_of_a_link(project: Path) -> None:
    done = verify(project, "train.py:unseeded", "--steps", "6")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "your training is not reproducible by itself, and no link is to blame" in done.stdout
    assert "before the first step already, these are not the same: dataset.rng" in done.stdout
    assert "first link" not in done.stdout and "never registered" not in done.stdout


def test_chance_in_a_step_is_no_fault_of_a_link(project: Path) -> None:
    done = verify(project, "train.py:by_chance", "--steps", "6")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "your training is not reproducible by itself" in done.stdout
    assert "two trainings differ in the logged loss of step 5" in done.stdout
    assert "os.urandom" in done.stdout and "first link" not in done.stdout


LOSS = Difference("logged", "loss", "0x1.0p+0", "0x1.8p+0", step=3)
EMA = Lost("ema", "AveragedModel", rank=0)


@pytest.mark.parametrize(
    ("differences", "lost", "cut_at", "outcome"),
    [
        ([], [], 3, "bit-identical"),
        ([], [EMA], 3, "diverged"),
        ([LOSS], [], 2, "diverged"),
        ([LOSS], [EMA], 3, "not reproducible"),
    ],
    ids=["nothing", "lost", "after the cut", "before the cut"],
)
def test_only_what_differs_after_a_cut_is_blamed_on_it(
    differences: list[Difference], lost: list[Lost], cut_at: int, outcome: str
) -> None:
    assert outcome_of(differences, lost, cut_at) == outcome


# ---- what cannot be verified ---------------------------------------------------------------


def test_a_training_that_fails_is_one_sentence_and_keeps_its_log(project: Path) -> None:
    done = verify(project, "train.py:fails", "--steps", "6")
    (folder,) = left_over(project)
    log = Path(folder, "uncut/links/0001/rank-0.log")
    assert (done.returncode, done.stderr) == (
        1,
        f"hpcresume: Without any cut, the training fails in step 3 (rank 0, ValueError: no such "
        f"luck): the traceback is in {log}.\n",
    )
    assert "ValueError: no such luck" in log.read_text()


def test_a_failure_after_a_cut_says_so(project: Path, tmp_path: Path) -> None:
    config = from_mapping({"name": "toy", "train": "train.py:fails", "epochs": 1}, "the test")
    run = make_run(tmp_path / "run", config, project)
    end = run_link(run, ranks=1, stop_at=2)
    assert (end.step, end.completed) == (2, False)
    with pytest.raises(LinkFailed, match="In link 2, after a cut, the training fails in step 3"):
        run_link(run, ranks=1, stop_at=6)


def test_a_killed_rank_is_told_by_its_signal(project: Path, tmp_path: Path) -> None:
    text = "import os\ndef train(session):\n    os.kill(os.getpid(), 9)\n"
    (project / "train.py").write_text(text)
    config = from_mapping({"name": "toy", "train": "train.py:train", "epochs": 1}, "the test")
    run = make_run(tmp_path / "run", config, project)
    with pytest.raises(LinkFailed, match="was ended by SIGKILL and left no exception") as raised:
        run_link(run, ranks=1, stop_at=6)
    assert raised.value.exit_code == 1


def test_a_script_that_does_not_import_is_told_as_submit_tells_it(project: Path) -> None:
    (project / "train.py").write_text("import nothing_of_this_name\n")
    done = verify(project, "train.py")
    assert done.returncode == 4
    assert done.stderr.startswith("hpcresume: train: train.py does not import: ModuleNotFound")
    assert left_over(project) == []


def test_a_training_of_one_step_has_no_place_for_a_cut(project: Path) -> None:
    done = verify(project, "train.py", "--set", "max_steps=1")
    assert done.returncode == 2
    assert "The training is complete after 1 step: there is no place for a cut" in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_the_training_and_leaves_nothing(
    project: Path, number: signal.Signals, code: int
) -> None:
    temporary = project.parent / "temporary"
    started = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "verify", "train.py:blocks"],
        cwd=project,
        env={**ENVIRON, "TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    said = temporary / "pid"
    while not (said.exists() and said.read_text().endswith("\n")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert (started.returncode, errors.strip()) == (code, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)
    assert left_over(project) == []


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["train.py", "--steps", "2"], 2, "2 is not in the range x>=3"),
        (["train.py", "--ranks", "0"], 2, "0 is not in the range x>=1"),
        ([], 2, "There is no ./hpcresume.yaml"),
        (["none.yaml"], 3, "none.yaml: no such file"),
        (["none.py:train"], 3, "none.py: no such file"),
        (["train.py", "--keep", "."], 2, "--keep . exists: name a folder that is new or empty"),
        (["train.py", "--set", "max_step=3"], 4, "did you mean 'max_steps'?"),
    ],
    ids=["few steps", "no rank", "nothing", "no config", "no script", "full folder", "misspelt"],
)
def test_a_command_that_makes_no_sense_is_refused(
    project: Path, argv: list[str], code: int, words: str
) -> None:
    done = verify(project, *argv)
    assert done.returncode == code
    assert words in done.stderr
    assert left_over(project) == []


def test_the_comparing_process_does_without_torch() -> None:
    text = "import sys, hpcresume.cli.verify; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", text], env=ENVIRON, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_long_lines_are_broken_between_words_on_a_terminal(tmp_path: Path) -> None:
    text = (
        "from hpcresume.cli.verify import _fitting; "
        "print(_fitting('  hint: never registered: ema (AveragedModel). Register it.'))"
    )
    with Terminal(["-c", text], tmp_path, width=40) as terminal:
        assert terminal.end() == 0
    assert terminal.screen.splitlines() == [
        "  hint: never registered: ema",
        "      (AveragedModel). Register it.",
    ]


# ---- comparing -----------------------------------------------------------------------------

STATE: dict[str, Any] = {
    "progress": {"global_step": 6, "position": 2, "train_seconds": 1.0, "lineage": [[1, 6, 9]]},
    "objects": {"optimizer": {"tree": {"param_groups": [{"lr": 0.1, "betas": [0.9, 0.99]}]}}},
    "values": ["config"],
}
RNG = [{"python": [3, [1, 2], None]}, {"python": [3, [1, 2], None], "generators": {"dice": [4]}}]


def checkpoint(path: Path, **changes: Any) -> Path:
    """A checkpoint's files, with some of them changed by their stem."""
    path.mkdir()
    tensors = {"weight": np.zeros((2, 3), "float32"), "bias": np.ones(3, "float32")}
    save_file({**tensors, **changes.get("model", {})}, path / "model.safetensors")
    for name, content in {"state": STATE, "rng": RNG, "config": {"width": 8}}.items():
        text = json.dumps(changes.get(name, content))
        (path / f"{name}.json").write_text(text)
    (path / "vocabulary.txt").write_text(changes.get("vocabulary", "a b"))
    (path / "manifest.json").write_text(json.dumps({"created": str(path)}))
    return path


def changed(value: Any, way: list[Any], new: Any) -> Any:
    """A copy of a JSON value with one place changed."""
    copy = json.loads(json.dumps(value))
    place = copy
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = new
    return copy


def test_equal_checkpoints_have_no_difference(tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "other")
    assert list(compare.saved(one, other)) == []
    assert compare.tensor_count(one) == 2


LR = ["objects", "optimizer", "tree", "param_groups", 0, "lr"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": {"weight": np.full((2, 3), -0.0, "float32")}},
            "model.safetensors: weight (F32[2, 3])",
        ),
        ({"model": {"bias": np.ones(3, "int32")}}, "model.safetensors: bias"),
        ({"model": {"more": np.ones(1, "int8")}}, "model.safetensors: more"),
        ({"state": changed(STATE, LR, 0.1 + 2**-56)}, "state.json: optimizer.param_groups.0.lr"),
        ({"state": changed(STATE, ["progress", "position"], 3)}, "state.json: position"),
        ({"state": changed(STATE, ["values"], [])}, "state.json: values"),
        ({"rng": changed(RNG, [1, "python", 1, 0], 7)}, "rng.json: rank 1, python"),
        (
            {"rng": changed(RNG, [1, "generators", "dice", 0], 7)},
            "rng.json: rank 1, generators.dice",
        ),
        ({"config": {"width": 8.0}}, "config.json: width"),
        ({"vocabulary": "a c"}, "vocabulary.txt: the file"),
    ],
    ids=lambda value: value.replace("/", "") if isinstance(value, str) else "",
)
def test_a_difference_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    one, other = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "other", **changes)
    assert [str(difference) for difference in compare.saved(one, other)] == [words]


@pytest.mark.parametrize("key", ["train_seconds", "lineage", "history", "machines"])
def test_what_depends_on_cuts_is_no_difference(tmp_path: Path, key: str) -> None:
    one = checkpoint(tmp_path / "one")
    other = checkpoint(tmp_path / "other", state=changed(STATE, ["progress", key], [2]))
    assert list(compare.saved(one, other)) == []


def test_a_file_that_is_in_one_checkpoint_alone_is_a_difference(tmp_path: Path) -> None:
    one, other = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "other")
    (other / "vocabulary.txt").unlink()
    assert list(compare.saved(one, other)) == [
        Difference("vocabulary.txt", "the file", "there", "(missing)")
    ]


def logging_run(path: Path, *lines: dict[str, Any]) -> RunDir:
    """A run whose only link has logged some lines."""
    run = RunDir(path)
    run.create("", cluster="local", project=path.parent, versions={})
    link = run.claim_link({})
    restored = {"v": 1, "t": 1, "kind": "restored", "step": 0, "segments": []}
    link.training.write_text(json.dumps(restored) + "\n")
    link.metrics.write_text("".join(json.dumps({"epoch": 0, **line}) + "\n" for line in lines))
    return run


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], []),
        (
            [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25 + 2**-54}],
            ["the logged loss of step 2"],
        ),
        (
            [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.25}],
            ["the logged loss of step 1"],
        ),
        (
            [{"step": 1, "loss": 0.5}],
            [f"the logged {name} of step 2" for name in ("epoch", "step", "loss")],
        ),
        (
            [{"step": 1, "loss": 0.5}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}],
            [f"the logged {name} of step 1" for name in ("step", "epoch", "loss")],
        ),
    ],
    ids=["same", "last bit", "nan", "missing step", "repeated step"],
)
def test_logged_numbers_are_compared_by_their_bits(
    tmp_path: Path, lines: list[dict[str, Any]], words: list[str]
) -> None:
    one = logging_run(tmp_path / "one", {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25})
    other = logging_run(tmp_path / "other", *lines)
    found = [str(difference) for difference in compare.logged(one, other)]
    assert sorted(found) == sorted(words)
