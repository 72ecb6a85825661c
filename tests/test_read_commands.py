"""Read commands on a login node: no torch, and a word at once, however slow Slurm is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import ENVIRON

from hpcresume.config import dump, from_mapping
from hpcresume.run_dir import RunDir


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
