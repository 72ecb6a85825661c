"""The examples of several ranks, as chains: FSDP2, and links of different numbers of ranks."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from made_run import Said
from oracle import differing, fingerprint
from test_command import EXAMPLES, Chain

from hpcresume.journal import read_chain, read_metrics
from hpcresume.run_dir import RunDir


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return at(tmp_path / "it's a project")


def copied(folder: Path) -> Path:
    """A folder with the examples in it."""
    folder.mkdir()
    for name in ("examples", "configs"):
        shutil.copytree(EXAMPLES.parent / name, folder / name)
    return folder


def at(folder: Path) -> Chain:
    return Chain(copied(folder))


#: It stands in a step of each of the first two links until it is let go, or killed.
_STANDS = """
        at = {"1": 20, "2": 40}.get(os.environ["HPCRESUME_LINK"])
        while session.global_step == at and not (session.path / "go").exists():
            time.sleep(0.02)
"""


def standing(folder: Path) -> None:
    """Have the training in a folder of `copied` wait for whoever is to end its first two links."""
    path = folder / "examples" / "fsdp.py"
    text = path.read_text()
    loop = "    for batch in session.steps(loader):\n"
    for line in (loop, "import torch\n"):
        assert text.count(line) == 1, line
    text = text.replace(loop, loop + _STANDS)
    path.write_text(text.replace("import torch\n", "import os, time\nimport torch\n"))


def let_go(run: RunDir) -> None:
    (run.path / "go").touch()


def cut_twice(chain: Chain) -> None:
    """End link 1 with -9 after its first save, and link 2 in good order after its own."""
    for number, how in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        chain.wait(lambda number=number: [k for k in chain.links() if k.number == number])
        chain.wait(lambda number=number: chain.links()[number - 1].last("saved"))
        os.kill(chain.rank_of(number), how)
    let_go(chain.run)
    chain.completed()


FSDP = ("configs/fsdp.yaml", "--set=epochs=null", "--set=max_steps=72", "--set=checkpoint.steps=12")


@pytest.mark.long
def test_fsdp_on_two_nodes_ends_with_the_bytes_of_the_uncut_run(
    chain: Chain, tmp_path: Path
) -> None:
    uncut = at(tmp_path / "uncut")
    uncut.submit(*FSDP)
    assert uncut.ends() == ["completed"], uncut.story()
    standing(chain.folder)
    chain.submit(*FSDP, detach=True)
    cut_twice(chain)
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert not differing(fingerprint(uncut.run), fingerprint(chain.run))
    assert (chain.run.checkpoint(72) / "model-00002-of-00002.safetensors").exists()


def test_links_of_other_numbers_of_ranks_lose_and_repeat_no_sample(chain: Chain) -> None:
    standing(chain.folder)
    chain.submit(*FSDP, "--nodes=1-2", detach=True)
    cut_twice(chain)
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert_nothing_lost_or_repeated(chain.run)


def assert_nothing_lost_or_repeated(run: RunDir) -> None:
    """Two ranks, one, and two again went on where the ones before were, each step once."""
    links = read_chain(run)
    assert [link.claim["num_tasks"] for link in links] == [2, 1, 2]
    said = " | ".join(record["change"] for link in links for record in link.all("changed"))
    for words in (
        "1 rank, after 2 in link 1",
        "batch_size 48 -> 96, world_size 2 -> 1, with the same 96 samples a step: not one is lost",
        "2 ranks, after 1 in link 2",
    ):
        assert words in said, said
    steps = read_metrics(run)
    assert [line["step"] for line in steps] == list(range(1, 73))
    assert all(math.isfinite(line["loss"]) for line in steps)


CONFIGS = sorted(path.name for path in (EXAMPLES.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_can_be_submitted_as_it_stands(
    name: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", os.devnull)
    code, _, errors = said("submit", f"configs/{name}", "--dry-run", "--cluster=local")
    assert code == 0, errors
    # Slurm's script is printed before Slurm, of which there is none here, is asked.
    monkeypatch.setenv("SLURM_CONF", "/nonexistent")
    _, script, _ = said("submit", f"configs/{name}", "--dry-run", "--cluster=slurm")
    assert script.startswith("#!/bin/bash\n#SBATCH --nodes=")
