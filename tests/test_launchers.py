"""torchrun as the command of a chain: how its nodes meet, how it is told, really cut.

On this machine each node of a link is a rank with a torchrun of its own, so that two of them meet
as they do on two nodes.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import ENVIRON
from test_command import EXAMPLES, Chain

from hpcresume.adapters.variables import command_environment, launcher_patience
from hpcresume.scheduler.environment import RankPlace

#: On one node with --standalone, or several meet at the same port of this machine.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def by_torchrun(folder: Path) -> bytes:
    """What the DDP script saves at its end, trained by two processes without a cut."""
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node=2", str(EXAMPLES / "ddp_torchrun.py")],
        cwd=folder,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (folder / "ddp.pt").read_bytes()


def test_torchrun_on_two_nodes_ends_with_the_bytes_of_the_uncut_run(tmp_path: Path) -> None:
    uncut = by_torchrun(tmp_path)
    folder = tmp_path / "it's a project"
    folder.mkdir()
    shutil.copy(EXAMPLES / "ddp_torchrun.py", folder)
    chain = Chain(folder)
    told = ("--nodes=2", "--signal-command=none", "--checkpoints=ddp.pt")
    command = (*TORCHRUN, "ddp_torchrun.py", "--pause=0.05")
    chain.submit(*told, "--", *command, detach=True)
    chain.cut(1, signal.SIGKILL, after="step 40 ")
    chain.cut(2, signal.SIGTERM, after="step 80 ")
    chain.completed()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    steps = [
        int(line.split()[1])
        for number in (1, 2, 3)
        for line in chain.printed(number).splitlines()
        if line.startswith("step")
    ]
    assert steps == sorted({*steps}), "no step was saved twice"
    assert (steps[:2], steps[-1]) == ([40, 80], 160)
    assert "after it was told: exit code 0" in chain.printed(2), "it saved, and left by itself"
    assert (chain.folder / "ddp.pt").read_bytes() == uncut


_SAVES = """
import os, signal, time
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append(True))
print("trains", flush=True)
while not (told or os.path.exists("saved")):
    time.sleep(0.02)
# Longer than torchrun would take to die.
time.sleep(0 if os.path.exists("saved") else 2)
open("saved", "w").close()
print("saved", flush=True)
"""


def test_torchrun_outlives_a_signal_to_all_processes_while_its_worker_saves(
    tmp_path: Path,
) -> None:
    (tmp_path / "saves.py").write_text(_SAVES)
    chain = Chain(tmp_path)
    told = ("--signal-command=all:USR1", "--checkpoints=saved")
    chain.submit(*told, "--", *TORCHRUN, "--standalone", "saves.py", detach=True)
    chain.cut(1, signal.SIGTERM, after="trains")
    chain.completed()
    assert "saved" in chain.printed(1), chain.story()


_WHO = """
import os
from torch import distributed
distributed.init_process_group("gloo")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
print(f"rank {rank} of {ranks}, {os.environ['GROUP_RANK']}")
distributed.barrier()
distributed.destroy_process_group()
"""


@pytest.mark.long
def test_accelerate_launch_on_two_nodes_counts_the_processes_of_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    (tmp_path / "who.py").write_text(_WHO)
    chain = Chain(tmp_path)
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu")
    chain.submit("--nodes=2", "--", *accelerate, "--num_processes=2", "who.py")
    assert chain.ends() == ["completed"], chain.story()
    said = chain.printed(1, 0) + chain.printed(1, 1)
    for rank in range(4):
        assert f"rank {rank} of 4, {rank // 2}" in said, said


JOB = {
    "HPCRESUME_LINK": "3",
    "HPCRESUME_NODES": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "4321",
}


def given(place: RankPlace, **environ: str) -> dict[str, str]:
    nothing = {"deadline": None, "left_s": None, "restarts": 0, "resume": None}
    found = command_environment({**JOB, **environ}, place, **nothing)
    assert "HPCRESUME_NODES" not in found
    return {name: value for name, value in found.items() if name.startswith("PET_")}


def test_torchrun_finds_its_meeting_place_where_a_node_has_one_of_it() -> None:
    assert given(RankPlace(rank=1, world_size=2)) == {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_RDZV_BACKEND": "static",
        "PET_RDZV_ENDPOINT": "10.0.0.1:4321",
        "PET_RDZV_ID": "hpcresume-3",
    }


@pytest.mark.parametrize(
    ("place", "nodes"),
    [
        pytest.param(RankPlace(rank=3, world_size=4, local_rank=1), "2", id="ranks-by-srun"),
        pytest.param(RankPlace(), "1", id="one-node"),
    ],
)
def test_where_ranks_are_processes_or_there_is_one_node_torchrun_is_left_alone(
    place: RankPlace, nodes: str
) -> None:
    assert given(place, HPCRESUME_NODES=nodes) == {}


def test_torchrun_takes_its_options_from_what_it_is_given() -> None:
    program = (
        "from torch.distributed.run import config_from_args, parse_args\n"
        "config, _, _ = config_from_args(parse_args(['x.py']))\n"
        "print(config.min_nodes, config.max_nodes, config.rdzv_backend, config.rdzv_endpoint,\n"
        "      config.run_id, config.rdzv_configs['rank'], config.signals_to_handle,\n"
        "      config.shutdown_timeout)\n"
    )
    environ = given(RankPlace(rank=1, world_size=2))
    environ |= launcher_patience({}, "USR1", 89.5)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**ENVIRON, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert done.stdout == f"2 2 static 10.0.0.1:4321 hpcresume-3 1 {signals} 90\n"


def test_what_the_user_has_set_for_torchrun_holds() -> None:
    own = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "PET_SIGNALS_TO_HANDLE": "SIGTERM"}
    assert launcher_patience(own, "USR1", 60) == {}
    assert launcher_patience({}, "all:TERM", 60).keys() == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
