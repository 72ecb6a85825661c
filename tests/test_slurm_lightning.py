"""Lightning on a real Slurm: one process, and two that Lightning joins by DDP."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from test_lightning_chain import EXAMPLE, same_files, uncut_example
from test_slurm_command import Chain, chain

__all__ = ["chain"]
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(600)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_is_killed_and_stopped_on_slurm_and_ends_as_the_uncut_one(
    chain: Chain, tmp_path: Path, ranks: int
) -> None:
    shutil.copy(EXAMPLE, chain.folder)
    devices = f"--devices={ranks}"
    uncut = uncut_example(tmp_path / "uncut", devices)
    assert uncut.wait() == 0
    chain.submit(
        *("--time=00:05:00", "--mem=1800", f"--tasks-per-node={ranks}"),
        *("--set=chain.lead_s=20", "--set=chain.signal_command=none"),
        *("--", sys.executable, EXAMPLE.name, devices, "--pause=0.1"),
    )
    for number, (step, sent) in enumerate(((5, "KILL"), (15, "TERM")), start=1):
        said = f"saved step {step} "
        chain.wait(lambda number=number, said=said: said in chain.printed(number), 300)
        chain.cluster.run("scancel", f"--signal={sent}", chain.step(number))
    chain.finished()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    same_files(chain.folder, tmp_path / "uncut")
