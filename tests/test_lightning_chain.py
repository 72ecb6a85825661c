"""The training of examples/lightning_module.py in chains of real processes, really cut."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hanging import standing_script
from oracle import ENVIRON
from test_command import Chain, chain

__all__ = ["chain"]
EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_module.py"
pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("lightning", "sklearn")),
    reason="the example needs lightning and scikit-learn",
)


def uncut_example(folder: Path, *argv: str) -> subprocess.Popen[bytes]:
    """The example, trained without a cut, from now on."""
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(EXAMPLE), *argv],
            cwd=folder,
            env=ENVIRON,
            stdout=log,
            stderr=subprocess.DEVNULL,
        )


def same_files(one: Path, other: Path) -> None:
    """Weights and optimizer, bit for bit."""
    first, second = (torch.load(path / "model.pt", weights_only=True) for path in (one, other))
    values, structure = torch.utils._pytree.tree_flatten(first)
    others, other_structure = torch.utils._pytree.tree_flatten(second)
    assert structure == other_structure
    for value, another in zip(values, others, strict=True):
        equal = torch.equal(value, another) if torch.is_tensor(value) else value == another
        assert equal, (value, another)


#: What a user's script has more than one that knows nothing of us.
LINES = (
    "\nfrom hpcresume.adapters.lightning import HpcResumeCallback\n",
    "        callbacks=[HpcResumeCallback(every_n_steps=args.save_every)],\n",
)


def without_the_line() -> str:
    """The example as somebody wrote it who has never heard of us."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for line in LINES:
        assert text.count(line) == 1
        text = text.replace(line, "")
    assert "HpcResume" not in text
    return text


def standing(text: str, *steps: int) -> str:
    """The script, which stands in a step of each of the first links until it is told to leave."""
    line = '        time.sleep(self.hparams["pause"])\n'
    return standing_script(text, line, "self.global_step", *steps)


@pytest.mark.timeout(280)
def test_a_script_that_knows_nothing_of_us_is_stopped_and_killed_and_ends_as_the_uncut_one(
    chain: Chain, tmp_path: Path
) -> None:
    # In the second epoch and in the third, of 13 steps each.
    (chain.folder / "main.py").write_text(standing(without_the_line(), 16, 30))
    uncut = uncut_example(tmp_path / "uncut")
    chain.submit("--lightning", "--", sys.executable, "main.py", detach=True)
    chain.cut_guest(1, signal.SIGTERM, after="epoch 1 ")
    chain.cut_guest(2, signal.SIGKILL, after="epoch 2 ")
    chain.completed()
    assert uncut.wait() == 0
    assert chain.ends() == ["deadline", "killed", "completed"], chain.story()
    begun = [record["step"] for record in chain.records("restored") if record.get("guest")]
    assert begun[0] == 0 < begun[1] == begun[2], chain.story()
    assert begun[1] > 13, "cut in the second epoch"
    same_files(chain.folder, tmp_path / "uncut")
    losses = [line for number in (1, 2, 3) for line in printed_losses(chain.printed(number))]
    assert list(dict.fromkeys(losses)) == printed_losses((tmp_path / "uncut" / "log").read_text())
    status = chain.status()
    assert (status["state"], status["step"]) == ("complete", 52)


def printed_losses(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("epoch ")]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_is_killed_and_stopped_and_ends_with_the_bits_of_the_uncut_run(
    chain: Chain, tmp_path: Path, ranks: int
) -> None:
    shutil.copy(EXAMPLE, chain.folder)
    devices = f"--devices={ranks}"
    uncut = uncut_example(tmp_path / "uncut", devices)
    assert uncut.wait() == 0
    command = (sys.executable, EXAMPLE.name, devices, "--pause=0.1")
    chain.submit("--set=chain.signal_command=none", "--", *command, detach=True)
    chain.cut_guest(1, signal.SIGKILL, after="saved step 5 ")
    chain.cut_guest(2, signal.SIGTERM, after="saved step 15 ")
    chain.completed()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    begun = [record["step"] for record in chain.records("restored") if record.get("guest")]
    assert begun[0] == 0 < begun[1] < begun[2], chain.story()
    same_files(chain.folder, tmp_path / "uncut")


@pytest.mark.long
@pytest.mark.skipif(find_spec("pytorch_lightning") is None, reason="needs pytorch_lightning")
def test_lightning_under_its_older_name_is_chained_as_well(chain: Chain, tmp_path: Path) -> None:
    text = without_the_line()
    older = text.replace("\nimport lightning\n", "\nimport pytorch_lightning as lightning\n")
    assert older != text
    (chain.folder / "main.py").write_text(standing(older, 16))
    uncut = uncut_example(tmp_path / "uncut")
    chain.submit("--lightning", "--", sys.executable, "main.py", detach=True)
    chain.cut_guest(1, signal.SIGTERM, after="epoch 1 ")
    chain.completed()
    assert uncut.wait() == 0
    assert chain.ends() == ["deadline", "completed"], chain.story()
    same_files(chain.folder, tmp_path / "uncut")
