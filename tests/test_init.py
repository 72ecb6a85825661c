"""`hpcresume init`: what it writes is loaded, rendered, read by bash, and taken by Slurm."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from made_run import FakeSlurm, Said
from oracle import ENVIRON
from slurm_cluster import SlurmCluster

from hpcresume.config import RunConfig, SchedulerConfig, load
from hpcresume.config.schema import check_complete
from hpcresume.scheduler.offers import Offers, Partition, parse_accounts, parse_partitions

SINFO = (
    "cpu|1-00:00:00|up|(null)\n"
    "gpu*|02:00:00|up|gpu:a100:4(S:0-1)\n"
    "gpu*|02:00:00|up|gpu:a100:8(S:0-1),shard:16\n"
    "old|infinite|down|gpu:k80:2\n"
    "sinfo: a warning\n"
    "mixed|infinite|up|gpu:a100:2,gpu:h100:2\n"
)
ACCOUNTS = "theory|astro\ntheory|theory\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder on a cluster that tells of itself."""
    slurm = FakeSlurm(tmp_path)
    for name, answer in (("sinfo", SINFO), ("sacctmgr", ACCOUNTS)):
        slurm.program(name, f"printf %s {shlex.quote(answer)}")
    folder = tmp_path / "ada's project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", slurm.path)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("VIRTUAL_ENV", "CONDA_DEFAULT_ENV"):
        monkeypatch.delenv(name, raising=False)
    return folder


def written() -> RunConfig:
    """What stands in the configuration; it must be one that could be submitted."""
    config = load(Path("hpcresume.yaml"), environ={"HPCRESUME_SITE": os.devnull})
    check_complete(config)
    return config


def options() -> list[str]:
    lines = Path("slurm/train.sbatch").read_text().splitlines()
    return [line.removeprefix("#SBATCH ").split("  ")[0] for line in lines if "#SBATCH" in line]


def test_what_slurm_tells_is_what_is_proposed() -> None:
    assert parse_partitions(SINFO) == (
        Partition(name="cpu", limit_s=86400),
        Partition(name="gpu", is_default=True, limit_s=7200, gpus=8),
        Partition(name="mixed", gpus=4),
    )
    assert parse_accounts(ACCOUNTS) == ("theory", "astro")
    assert Offers(partitions=parse_partitions(SINFO)).partition(None).name == "gpu"  # type: ignore[union-attr]


def test_yes_takes_the_default_partition_its_gpus_and_its_limit(folder: Path, said: Said) -> None:
    code, out, err = said("init", "--yes")
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["hpcresume.yaml", "slurm/train.sbatch"]
    config = written()
    assert (config.name, config.train) == ("ada-s-project", "train.py:train")
    assert config.scheduler == SchedulerConfig(
        time="02:00:00", tasks_per_node=8, gpus_per_node=8, partition="gpu", account="theory"
    )
    assert options()[:7] == [
        "--job-name=ada-s-project",
        "--time=02:00:00",
        "--nodes=1",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--account=theory",
    ]


def test_options_answer_beforehand(folder: Path, said: Said) -> None:
    argv = ["-p", "cpu", "-A", "astro", "--time", "90", "--name", "toy", "--train", "a.py:go"]
    assert said("init", "--yes", *argv, "--conda", "my env")[0] == 0
    config = written()
    assert (config.name, config.train) == ("toy", "a.py:go")
    assert config.scheduler == SchedulerConfig(
        time="90",
        partition="cpu",
        account="astro",
        setup=[
            "source \"$(conda info --base)/etc/profile.d/conda.sh\" && conda activate 'my env'",
        ],
    )


def test_without_slurm_everything_is_left_to_it(
    folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if not Path("/usr/bin/sinfo").exists() else "")
    assert said("init", "--yes")[0] == 0
    assert written().scheduler == SchedulerConfig(time="04:00:00")


def test_what_it_wrote_is_rendered_as_a_job(folder: Path, said: Said) -> None:
    Path("train.py").write_text("def train(session):\n    pass\n")
    said("init", "--yes", "--venv", "it's here")
    code, out, _ = said("submit", "--dry-run", "--cluster", "slurm")
    assert code == 0
    assert {"#SBATCH --partition=gpu", "#SBATCH --gpus-per-node=8"} <= set(out.splitlines())
    activate = folder / "it's here" / "bin" / "activate"
    assert f"source {shlex.quote(str(activate))}" in out.splitlines()


def test_the_batch_script_enters_the_environment_and_starts_a_link(
    folder: Path, said: Said
) -> None:
    activate = folder / "it's here" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("export ENTERED=yes\n")
    said("init", "--yes", "--venv", "it's here")
    program = folder.parent / "bin" / "hpcresume"
    program.write_text('#!/bin/sh\necho "$ENTERED" "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "slurm/train.sbatch", "--resume", "x y"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("yes link hpcresume.yaml --resume x y\n", "")


@pytest.mark.parametrize("there", ["hpcresume.yaml", "slurm/train.sbatch"])
def test_a_file_that_is_there_is_left_alone_unless_forced(
    folder: Path, said: Said, there: str
) -> None:
    Path("slurm").mkdir()
    Path(there).write_text("mine\n")
    code, out, err = said("init", "--yes")
    assert (code, out) == (2, "")
    assert err == (
        f"hpcresume: There is {there} already, left as it was: remove it, or add --force.\n"
    )
    assert Path(there).read_text() == "mine\n"
    assert [path for path in folder.rglob("*") if path.is_file()] == [folder / there]
    assert said("init", "--yes", "--force")[0] == 0
    assert "mine" not in Path(there).read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--yes", "--name", "a b"], "at most 100 letters"),
        (["--yes", "--time", "soon"], "not a time limit"),
        (["--yes", "--account", "a\n#SBATCH --uid=0"], "text on one line"),
        (["--yes", "--venv", "x", "--conda", "y"], "name --venv or --conda"),
        ([], "add --yes"),
    ],
    ids=["name", "time", "line", "both", "no-terminal"],
)
def test_nothing_is_written_where_an_answer_makes_no_sense(
    folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        code, out, err = said("init", *argv)
    assert code in (2, 4)
    assert out == "" and words in err
    assert list(folder.iterdir()) == []


def test_questions_are_answered_in_a_terminal(folder: Path) -> None:
    child = pexpect.spawn(
        sys.executable,
        ["-m", "hpcresume", "init"],
        env={**ENVIRON, "PATH": os.environ["PATH"], "TERM": "dumb", "COLUMNS": "200"},
        encoding="utf-8",
        timeout=60,
    )
    for question, answer in (
        (r"Name of the run \[ada-s-project\]: ", "toy"),
        (r"Training function \[train.py:train\]: ", ""),
        (r"Partition \(cpu, gpu, mixed\) \[gpu\]: ", "mixed"),
        (r"Account \(theory, astro\) \[theory\]: ", "-"),
        (r"GPUs on each node \[4\]: ", "2"),
        (r"Time limit of each job \[04:00:00\]: ", "01:30:00"),
        (r"Python environment: venv DIR, conda NAME or none \[none\]: ", "venv /opt/env"),
    ):
        child.expect(question)
        child.sendline(answer)
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    config = written()
    assert config.name == "toy"
    assert config.scheduler == SchedulerConfig(
        time="01:30:00",
        tasks_per_node=2,
        gpus_per_node=2,
        partition="mixed",
        setup=["source /opt/env/bin/activate"],
    )


def test_a_real_slurm_takes_what_it_wrote(slurm: SlurmCluster, tmp_path: Path) -> None:
    environ = {**ENVIRON, **slurm.env}
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "init", "--yes"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = subprocess.run(
        ["sbatch", "--test-only", "slurm/train.sbatch"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "to start at" in told.stderr
