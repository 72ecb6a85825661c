"""`--resume PATH --trust`: at submit, of a training script, of a batch script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_run import Said
from oracle import ENVIRON, TRAINING, hpcresume
from torch import nn

import hpcresume as library
from hpcresume.checkpoint.manifest import NAME
from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir

sys.path.insert(0, str(TRAINING))
import tiny

REPOSITORY = Path(__file__).parents[1]
CONFIG = {
    "name": "run",
    "train": "tiny.py:train",
    "max_steps": 30,
    "checkpoint": {"steps": 10},
    "scheduler": {"cluster": "local"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a training function and its configuration; here."""
    # Paths of users hold spaces and quotes.
    folder = tmp_path / "it's a project"
    folder.mkdir()
    shutil.copy(TRAINING / "tiny.py", folder)
    (folder / "hpcresume.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    return folder


@pytest.fixture
def source(folder: Path) -> Path:
    """What another program has saved of the model of tiny.py, after 12 steps and an epoch."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    states = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    torch.save({**states, "epoch": 0, "step": 12, "loss": 0.5}, folder / "last_epoch_1.pt")
    return folder / "last_epoch_1.pt"


def began(run: RunDir, link: int = 0) -> dict[str, Any]:
    record = read_chain(run)[link].last("restored")
    assert record is not None
    return record


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.path), 0o700, True)


def test_a_submitted_run_begins_with_the_state_that_is_named(folder: Path, source: Path) -> None:
    # Its pickles are read in the link as well, and only where they are trusted.
    content = {**torch.load(source, weights_only=True), "config": Hostile(folder / "mark")}
    torch.save(content, source)
    done = hpcresume("submit", "--resume", source.name, "--trust", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"begins with {source}, a file of torch.save: step 12, in epoch 2" in done.stdout
    assert "left out: loss" in done.stderr
    run = RunDir(folder / "runs" / "run")
    assert began(run)["from"]["path"] == str(source)
    assert began(run)["step"] == 12
    assert json.loads(run.trainer_state.read_text())["global_step"] == 30
    assert run.checkpoint(20).is_dir()


def test_pickles_that_are_not_trusted_are_refused_at_submit(
    folder: Path, source: Path, said: Said
) -> None:
    torch.save({"model": {}, "config": Hostile(folder / "mark")}, source)
    code, _, err = said("submit", "--resume", source.name)
    assert (code, "add --trust" in err) == (7, True), err
    assert not (folder / "mark").exists()
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--resume", "last_epoch_2.pt"], 3, "there is hpcresume.yaml, last_epoch_1.pt, tiny.py"),
        (["--resume", "tiny.py"], 7, "cannot be read by torch"),
        (["--resume", "last_epoch_1.pt", "--set=max_steps=12"], 4, "Raise max_steps above 12"),
        (["--trust"], 2, "--resume PATH"),
    ],
    ids=["gone", "no checkpoint", "max_steps", "trust"],
)
def test_what_cannot_be_begun_with_is_refused_at_submit(
    folder: Path, source: Path, said: Said, argv: list[str], code: int, words: str
) -> None:
    found, _, err = said("submit", *argv)
    assert (found, words in err) == (code, True), err
    assert err.count("\n") == 1
    assert not (folder / "runs").exists()


@pytest.fixture
def by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """The training script of a configuration, in this process: exit code, output, errors."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            library.main(tiny.train, ["--config", "hpcresume.yaml", *argv])
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(before)


def test_a_training_script_begins_with_it_and_then_goes_on_without(
    folder: Path, source: Path, by_hand: Said
) -> None:
    code, _, err = by_hand("--resume", source.name)
    assert code == 0, err
    run = RunDir(folder / "runs" / "run")
    assert began(run)["from"]["path"] == str(source)
    source.unlink()
    # The same line again: it is the run's own that it goes on with.
    code, _, err = by_hand("--resume", source.name)
    assert code == 0, err
    assert "from" not in began(run, 1)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--resume=last_epoch_1.pt", "--set=max_steps=12"], 4, "Raise max_steps above 12"),
        (["--resume=last_epoch_1.pt", "--set=epochs=1"], 4, "Raise epochs above 1"),
        (["--resume=gone.pt"], 3, "there is hpcresume.yaml, last_epoch_1.pt, tiny.py"),
        (["--trust"], 2, "--resume PATH"),
    ],
    ids=["max_steps", "epochs", "gone", "trust"],
)
def test_a_training_script_refuses_what_cannot_be_begun_with(
    folder: Path, source: Path, by_hand: Said, argv: list[str], code: int, words: str
) -> None:
    found, _, err = by_hand(*argv)
    assert (found, words in err) == (code, True), err
    assert not (folder / "runs").exists()


def test_a_training_script_does_not_begin_a_second_time_with_something_else(
    folder: Path, source: Path, by_hand: Said
) -> None:
    assert by_hand("--resume", source.name)[0] == 0
    shutil.copy(source, folder / "other.pt")
    code, _, err = by_hand("--resume", "other.pt")
    assert (code, f"was begun with {source}, not with" in err) == (4, True), err
    code, _, err = by_hand("--resume", "gone.pt")
    assert (code, "There is no" in err) == (3, True), err


def test_a_training_script_branches_off_another_run(folder: Path, by_hand: Said) -> None:
    assert by_hand()[0] == 0
    own = RunDir(folder / "runs" / "run").checkpoint(30)
    code, _, err = by_hand("--set=max_steps=40", "--resume=run", "--name=longer")
    assert code == 0, err
    record = began(RunDir(folder / "runs" / "longer"))
    assert (record["step"], record["from"]["path"]) == (30, str(own))
    assert record["digest"] == json.loads((own / NAME).read_text())["digest"]
    # To go back within a run is no new beginning.
    code, _, err = by_hand(f"--resume={own}")
    assert (code, "was begun from scratch" in err) == (4, True), err


def test_a_batch_script_of_a_command_has_nothing_to_begin_with(
    folder: Path, source: Path, said: Said
) -> None:
    (folder / "own.yaml").write_text("name: own\ncommand: [python, main.py]\n")
    code, _, err = said("link", "--config", "own.yaml", "--resume", source.name)
    assert (code, "a command loads its own checkpoint" in err) == (2, True), err
    assert not (folder / "runs").exists()


def test_the_batch_script_takes_a_configuration_and_what_to_begin_with(
    folder: Path, source: Path
) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "hpcresume").write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m hpcresume "$@"\n'
    )
    (folder / "bin" / "hpcresume").chmod(0o755)
    script = REPOSITORY / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "--config", "hpcresume.yaml", "--resume", source.name],
        env={**ENVIRON, "PATH": f"{folder / 'bin'}:{ENVIRON['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = RunDir(folder / "runs" / "run")
    assert began(run)["from"]["path"] == str(source)
    assert json.loads(run.trainer_state.read_text())["completed"]
