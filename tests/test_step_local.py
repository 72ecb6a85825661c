"""Ranks without Slurm are real processes that live and die together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcresume.config import ContainerConfig, SchedulerConfig
from hpcresume.errors import ConfigError
from hpcresume.run_dir import LinkDir
from hpcresume.scheduler.environment import Allocation, RankPlace, rank_place
from hpcresume.scheduler.step import Step, srun_command, start

LOCAL = Allocation(scheduler="local", job_id="1")
PATIENCE_S = 60.0

RANK = """
import json, os, signal, sys, time
rank = int(os.environ["HPCRESUME_RANK"])
def leave(*_):
    print("TERM", flush=True)
    sys.exit(0)
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, leave)
print(json.dumps({**os.environ, "PID": os.getpid()}), flush=True)
if rank == 1:
    while not os.path.exists("go"):
        time.sleep(0.01)
    if "fail" in sys.argv:
        sys.exit(3)
    if "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
if "end" not in sys.argv:
    time.sleep(60)
"""


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LinkDir:
    path = tmp_path / "a 'run'\nof 100%t" / "0001"
    path.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return LinkDir(path)


@contextmanager
def ranks(link: LinkDir, *how: str, num_tasks: int = 3, **environ: str) -> Iterator[Step]:
    step = start(
        LOCAL,
        SchedulerConfig(),
        [sys.executable, "-c", RANK, *how],
        environ=environ,
        log=link.rank_log,
        num_tasks=num_tasks,
        run=link.path,
    )
    try:
        yield step
    finally:
        step.kill()
        step.wait(PATIENCE_S)


def wait_for_lines(link: LinkDir, num_tasks: int = 3) -> list[dict[str, Any]]:
    """What the ranks have said first, when all have."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        texts = [link.rank_log(r).read_text() for r in range(num_tasks)]
        if all("\n" in text for text in texts):
            return [json.loads(text.splitlines()[0]) for text in texts]
        time.sleep(0.02)
    raise AssertionError("the ranks said nothing")


def test_each_rank_has_a_place_and_a_log_of_its_own(link: LinkDir) -> None:
    Path("go").touch()
    with ranks(link, "end") as step:
        assert step.wait(PATIENCE_S) == 0
        places = [rank_place(environ) for environ in wait_for_lines(link)]
    assert places == [RankPlace(rank=r, world_size=3, local_rank=r) for r in range(3)]


def test_ranks_have_this_environment_and_the_links(
    link: LinkDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", "1")
    monkeypatch.setenv("RANK", "5")
    with ranks(link, HPCRESUME_LINK="7"):
        environ = wait_for_lines(link)[0]
    assert (environ["MINE"], environ["HPCRESUME_LINK"]) == ("1", "7")
    assert "RANK" not in environ


def test_a_log_is_appended_to(link: LinkDir) -> None:
    link.rank_log(0).write_text("before\n")
    with ranks(link, "end", num_tasks=1) as step:
        assert step.wait(PATIENCE_S) == 0
    assert link.rank_log(0).read_text().startswith("before\n{")


def test_ranks_run_until_they_end(link: LinkDir) -> None:
    with ranks(link) as step:
        wait_for_lines(link)
        assert step.poll() is None
        assert step.wait(0.1) is None


def test_when_one_rank_fails_the_others_are_ended(link: LinkDir) -> None:
    with ranks(link, "fail") as step:
        wait_for_lines(link)
        Path("go").touch()
        assert step.wait(PATIENCE_S) == 3
    assert "TERM" in link.rank_log(0).read_text()


def test_when_one_rank_is_killed_the_others_are_ended(link: LinkDir) -> None:
    with ranks(link, "die") as step:
        wait_for_lines(link)
        Path("go").touch()
        assert step.wait(PATIENCE_S) == 128 + signal.SIGKILL


def test_ranks_that_do_not_hear_are_killed_two_seconds_later(link: LinkDir) -> None:
    with ranks(link, "fail", "deaf") as step:
        wait_for_lines(link)
        began = time.monotonic()
        Path("go").touch()
        assert step.wait(PATIENCE_S) == 128 + signal.SIGKILL
        assert time.monotonic() - began > 1.9


def test_a_rank_that_ends_well_does_not_end_the_others(link: LinkDir) -> None:
    with ranks(link) as step:
        os.kill(wait_for_lines(link)[0]["PID"], signal.SIGTERM)
        assert step.wait(0.5) is None


def test_a_polite_stop_reaches_every_rank(link: LinkDir) -> None:
    with ranks(link) as step:
        wait_for_lines(link)
        step.stop()
        assert step.wait(PATIENCE_S) == 0
    assert all("TERM" in link.rank_log(r).read_text() for r in range(3))


def test_a_kill_ends_ranks_that_do_not_hear(link: LinkDir) -> None:
    with ranks(link, "deaf") as step:
        wait_for_lines(link)
        step.kill()
        assert step.wait(PATIENCE_S) == 128 + signal.SIGKILL


def test_stopping_and_killing_what_has_ended_does_nothing(link: LinkDir) -> None:
    with ranks(link, "end", num_tasks=1) as step:
        assert step.wait(PATIENCE_S) == 0
        step.stop()
        step.kill()
        assert step.poll() == 0


def test_ranks_stay_in_the_group_that_the_driver_kills(link: LinkDir) -> None:
    with ranks(link, num_tasks=1):
        assert os.getpgid(wait_for_lines(link, 1)[0]["PID"]) == os.getpgid(0)


def test_pyxis_without_slurm_is_refused(link: LinkDir) -> None:
    config = SchedulerConfig(container=ContainerConfig(image="x", runtime="pyxis"))
    with pytest.raises(ConfigError, match="pyxis needs Slurm"):
        start(
            LOCAL,
            config,
            ["true"],
            environ={},
            log=link.rank_log,
            num_tasks=1,
            run=Path("/runs/toy"),
        )


def test_a_container_runs_the_rank(link: LinkDir, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Path("bin/apptainer")
    runtime.parent.mkdir()
    runtime.write_text('#!/bin/sh\necho "$@" > called\n')
    runtime.chmod(0o755)
    monkeypatch.setenv("PATH", f"{runtime.parent.absolute()}:{os.environ['PATH']}")
    step = start(
        LOCAL,
        SchedulerConfig(container=ContainerConfig(image="x.sif")),
        ["python3", "-c", "1"],
        environ={},
        log=link.rank_log,
        num_tasks=1,
        run=Path("/runs/toy"),
    )
    assert step.wait(PATIENCE_S) == 0
    assert Path("called").read_text() == (
        "exec --nv --bind /runs/toy:/runs/toy x.sif python3 -c 1\n"
    )


def test_srun_spreads_the_ranks_over_the_nodes() -> None:
    job = Allocation(scheduler="slurm", job_id="1", num_nodes=2)
    command = srun_command(job, {"SLURM_CPUS_PER_TASK": "4"}, "/x/rank-%t.log", num_tasks=8)
    assert command[0] == "srun"
    assert {"--nodes=2", "--ntasks=8", "--cpus-per-task=4"} <= set(command)
    assert {"--kill-on-bad-exit=1", "--unbuffered", "--input=none", "--export=ALL"} <= set(command)


def test_srun_takes_no_more_nodes_than_ranks() -> None:
    job = Allocation(scheduler="slurm", job_id="1", num_nodes=4)
    assert "--nodes=1" in srun_command(job, {}, "x", num_tasks=1)


def test_srun_is_told_how_many_ranks_a_node_gets_where_the_job_could_not_say() -> None:
    job = Allocation(scheduler="slurm", job_id="1", num_nodes=3)
    assert "--ntasks-per-node=2" in srun_command(job, {}, "x", num_tasks=6, each=2)
    assert not any("per-node" in word for word in srun_command(job, {}, "x", num_tasks=6))


def test_debug_mode_runs_the_link_here_and_gives_its_result(tmp_path: Path) -> None:
    text = (
        "import sys; from pathlib import Path\n"
        "from hpcresume.scheduler.launcher import run_debug\n"
        "print(run_debug(lambda run: lambda: run.name, Path('/runs/toy'), Path(sys.argv[1])))\n"
        "print('next')\n"
    )
    done = _python(text, tmp_path)
    assert done.stdout == "toy\nnext\n"


def test_an_exception_in_debug_mode_asks_nothing_where_nobody_sits(tmp_path: Path) -> None:
    text = (
        "import sys; from pathlib import Path\n"
        "from hpcresume.scheduler.launcher import run_debug\n"
        "run_debug(lambda run: lambda: 1 / 0, Path('/runs/toy'), Path(sys.argv[1]))\n"
    )
    done = _python(text, tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Pdb" not in done.stdout + done.stderr


def _python(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text, str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
