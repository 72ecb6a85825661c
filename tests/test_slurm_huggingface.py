"""The Trainer of examples/hf_trainer.py on a real Slurm, in one process and in two of torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_huggingface_chain import (
    LAUNCHERS,
    SMALL,
    TRAINERS,
    left_in,
    standing,
    uncut,
    without_the_line,
)
from test_slurm_command import Chain, chain

__all__ = ["chain"]
pytestmark = [
    pytest.mark.long,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(500),
    TRAINERS,
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_trainer_ends_with_the_bytes_of_the_uncut_run_on_slurm(
    chain: Chain, tmp_path: Path, launcher: str
) -> None:
    expected = uncut(tmp_path, *LAUNCHERS[launcher])
    steps = (12, 17) if launcher == "python" else (7, 8)
    (chain.folder / "main.py").write_text(standing(without_the_line(), *steps))
    options = ("--time=00:05:00", "--mem=1800", "--set=chain.lead_s=40", "--hf")
    chain.submit(*options, "--", *LAUNCHERS[launcher], "main.py", *SMALL)
    for number, sent in ((1, "KILL"), (2, "TERM")):
        last = f"step {steps[number - 1]}\n"
        chain.wait(lambda number=number, last=last: last in chain.printed(number))
        chain.cluster.run("scancel", f"--signal={sent}", chain.step(number))
    chain.finished()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert left_in(chain.folder / "out") == expected
