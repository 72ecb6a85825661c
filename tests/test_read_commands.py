"""Read commands on a login node: no torch, and a word at once, however slow Slurm is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from oracle import ENVIRON

from hpcresume.config import dump, from_mapping
from hpcresume.run_dir import RunDir
from hpcresume.status import read_status
from hpcresume.story import glance, read_story

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cli_runs import Folder

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with one run that has begun."""
    run = RunDir(tmp_path / "runs" / "one")
    config = from_mapping({"name": "one", "train": "x.py", "max_steps": 9}, "test")
    run.create(dump(config), cluster="slurm", project=tmp_path, versions={})
    link = run.claim_link({"host": "nowhere", "pid": 1, "num_tasks": 1})
    link.rank_log(0).write_text("a line\n")
    return tmp_path / "runs"


def fake_slurm(folder: Path) -> str:
    """A PATH whose Slurm knows of nothing."""
    folder.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scontrol", "scancel"):
        program = folder / name
        program.write_text("#!/bin/sh\nexit 0\n")
        program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("command", [["status"], ["logs", "one"], ["cancel", "--yes", "one"]])
def test_a_read_command_imports_no_torch(runs: Path, tmp_path: Path, command: list[str]) -> None:
    script = (
        "import sys\nfrom hpcresume.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--runs", str(runs)],
        env={**ENVIRON, "PATH": fake_slurm(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False False"


def test_status_json_is_one_document_with_a_schema_version(runs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "status", "--json", "--runs", str(runs)],
        env={**ENVIRON, "PATH": fake_slurm(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert document["runs"][0]["name"] == "one"


# ---- how much is read ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Twelve runs, of which most are complete."""
    folder = Folder(tmp_path_factory.mktemp("many"))
    for n in range(10):
        folder.add(f"done-{n}", "complete", links=3, saves=2)
    folder.add("died", "failed", links=5, saves=2)
    folder.add("queued", "waiting", links=5, saves=2)
    return folder


def file_calls(folder: Folder, *argv: str) -> Counter[str]:
    """How many file-system calls a command makes below each run, by the run's name."""
    trace = folder.runs.parent / "trace"
    calls = [str(shutil.which("strace")), "-f", "-o", str(trace), "-e", "trace=%file"]
    command = [sys.executable, "-m", "hpcresume", *argv]
    environ = {**folder.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        [*calls, *command], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Counter(re.findall(rf"{re.escape(str(folder.runs))}/([^/\"]+)", trace.read_text()))


@needs_strace
def test_status_makes_a_small_number_of_file_system_calls_for_each_run(many: Folder) -> None:
    calls = file_calls(many, "status")
    complete = sorted(calls[f"done-{n}"] for n in range(10))
    # The newest one is shown; of the others nothing but that they are complete is read.
    assert complete[8] <= 16
    assert complete[9] <= 26
    # A run at rest: its newest link and its newest checkpoint, however long the chain is.
    assert calls["died"] <= 24
    # One that goes on: three files a link besides, for its pace and its waits.
    assert calls["queued"] <= 24 + 3 * 4


@needs_strace
def test_a_checkpoint_more_costs_status_nothing(many: Folder, tmp_path: Path) -> None:
    few, folder = file_calls(many, "status")["died"], Folder(tmp_path)
    folder.add("died", "failed", links=5, saves=8)
    assert file_calls(folder, "status")["died"] == few


def test_a_glance_knows_what_the_whole_story_knows(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for state in ("complete", "failed", "waiting"):
        run = folder.add(state, state, links=3, saves=200)
        seen = read_status(run, [], story=glance(run)).to_json()
        known = read_status(run, [], story=read_story(run)).to_json()
        for moment in ("calendar", "checkpoint_age_s"):
            del seen[moment], known[moment]
        assert seen == known


def test_a_glance_reads_the_newest_saves_of_a_link_alone(tmp_path: Path) -> None:
    run = Folder(tmp_path).add("one", "failed", links=2, saves=200)
    seen, known = (story.links[-1] for story in (glance(run), read_story(run)))
    assert len(seen.all("saved")) == 32
    assert seen.all("saved") == known.all("saved")[-32:]
    rest = [record for record in known.records if record["kind"] != "saved"]
    assert [record for record in seen.records if record["kind"] != "saved"] == rest
