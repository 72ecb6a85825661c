"""The Trainer of examples/hf_trainer.py in chains of real processes, really cut."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hanging import standing_script
from made_run import Said
from oracle import ENVIRON
from test_command import Chain, chain, here, script

from hpcresume.adapters import inject
from hpcresume.config import read_frozen
from hpcresume.journal import read_metrics

__all__ = ["chain", "here"]
EXAMPLE = Path(__file__).parent.parent / "examples" / "hf_trainer.py"
#: Ten steps an epoch, each a group of two batches but for the ragged last one.
SMALL = ("--samples=150", "--epochs=3", "--save-steps=5")
#: What a user's script has more than one that knows nothing of us.
LINES = {
    "\nfrom hpcresume.adapters.huggingface import HpcResumeCallback\n": "",
    "Pause(args.pause), HpcResumeCallback()": "Pause(args.pause)",
}
LAUNCHERS = {
    "python": (sys.executable,),
    "torchrun": (
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc-per-node=2"),
    ),
}
TRAINERS = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("accelerate", "sklearn", "transformers")),
    reason="the example needs transformers, accelerate and scikit-learn",
)


def without_the_line() -> str:
    """The example as somebody wrote it who has never heard of us."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for line, other in LINES.items():
        assert text.count(line) == 1
        text = text.replace(line, other)
    assert "HpcResume" not in text
    return text


def standing(text: str, *steps: int) -> str:
    """The script, which stands in a step of each of the first links until it is told to leave."""
    line = '        print(f"step {state.global_step}", flush=True)\n'
    return standing_script(text, line, "state.global_step", *steps)


def uncut(folder: Path, *launcher: str) -> dict[str, Any]:
    """What the example leaves, trained without a cut in the foreground."""
    done = subprocess.run(
        [*launcher, str(EXAMPLE), *SMALL],
        cwd=folder,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return left_in(folder / "out")


def left_in(out: Path) -> dict[str, Any]:
    """Weights, optimizer and random numbers of the last checkpoint, its log, the final model."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    return {
        "name": last.name,
        "weights": (last / "model.safetensors").read_bytes(),
        "optimizer": json.dumps(optimizer, default=lambda tensor: tensor.tolist()),
        "random": {p.name: p.read_bytes() for p in sorted(last.glob("rng_state*"))},
        "log": [(line["step"], line.get("loss")) for line in state["log_history"]],
        "final": (out / "final" / "model.safetensors").read_bytes(),
    }


@TRAINERS
def test_a_trainer_that_knows_nothing_of_us_is_killed_and_stopped_and_ends_as_the_uncut_one(
    chain: Chain, tmp_path: Path
) -> None:
    expected = uncut(tmp_path, sys.executable)
    (chain.folder / "main.py").write_text(standing(without_the_line(), 12, 17))
    chain.submit("--hf", "--", sys.executable, "main.py", *SMALL, detach=True)
    chain.cut_guest(1, signal.SIGKILL, after="step 12\n")
    chain.cut_guest(2, signal.SIGTERM, after="step 17\n")
    chain.completed()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    begun = [record["step"] for record in chain.records("restored") if record.get("guest")]
    assert begun[:2] == [0, 10]
    assert begun[2] >= 17
    assert left_in(chain.folder / "out") == expected
    assert [line["step"] for line in read_metrics(chain.run)] == list(range(3, 31, 3))
    status = chain.status()
    assert (status["state"], status["step"]) == ("complete", 30)
    # Nothing behind train() ran before the training was complete.
    assert "training is complete at step 30" in chain.printed(3)


@TRAINERS
@pytest.mark.long
def test_two_processes_of_torchrun_are_killed_and_stopped_at_the_same_step(
    chain: Chain, tmp_path: Path
) -> None:
    launcher = LAUNCHERS["torchrun"]
    expected = uncut(tmp_path, *launcher)
    (chain.folder / "main.py").write_text(standing(EXAMPLE.read_text(encoding="utf-8"), 7, 8))
    argv = ("--set=chain.lead_s=40", "--set=chain.signal_command=none")
    chain.submit(*argv, "--", *launcher, "main.py", *SMALL, detach=True)
    chain.cut_guest(1, signal.SIGKILL, after="step 7\n")
    chain.cut_guest(2, signal.SIGTERM, after="step 8\n")
    chain.completed()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    begun = [record["step"] for record in chain.records("restored") if record.get("guest")]
    assert begun[:2] == [0, 5]
    assert begun[2] >= 8
    assert len(expected["random"]) == 2
    assert left_in(chain.folder / "out") == expected


def test_a_script_that_makes_no_trainer_runs_as_ever_and_the_log_says_so(chain: Chain) -> None:
    (chain.folder / "main.py").write_text("print('no trainer here')\n")
    chain.submit("--hf", "--", sys.executable, "main.py")
    assert (chain.code, chain.ends()) == (0, ["completed"]), chain.story()
    assert "no trainer here" in chain.printed(1)
    assert "framework: huggingface had no effect" in chain.printed(1)


_OBEYS_THE_FILE = """
[ -e twice ] && exit 0; touch twice
trap 'echo "got a signal"' TERM
echo ready
while [ ! -e "$HPCRESUME_STOP" ]; do sleep 0.1; done
echo left
"""


def test_a_command_with_a_framework_gets_the_file_and_no_signal(chain: Chain) -> None:
    name = script(chain, _OBEYS_THE_FILE)
    chain.submit("--hf", "--", "bash", name, detach=True)
    chain.cut(1, signal.SIGTERM, after="ready")
    chain.completed()
    assert read_frozen(chain.run.config).framework == "huggingface"
    assert "left" in chain.printed(1)
    assert "got a signal" not in chain.printed(1)


def test_a_framework_without_a_command_is_refused(chain: Chain, here: Said) -> None:
    (chain.folder / "train.py").write_text("def train(session): pass\n")
    argv = ("--set=train=train.py:train", "--set=max_steps=1", "--set=framework=huggingface")
    (chain.folder / "hpcresume.yaml").write_text("{}\n")
    code, _, said = here("submit", "--cluster=local", *argv)
    assert code == 4
    assert "'framework' is there without 'command'" in said


# ---- how the callback comes in -----------------------------------------------------------------

_WAITED_FOR = """
import sys
sys.path.insert(0, {place!r})
import transformers.trainer
print(transformers.trainer.made, "torch" in sys.modules, "hpcresume" in sys.modules)
"""


def python(folder: Path, program: str, **environ: str) -> str:
    """What a Python prints whose environment says that it is to have our callback."""
    given = {**ENVIRON, **environ}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**given, **inject.variables(given, "huggingface")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_users_own_sitecustomize_is_read_all_the_same(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import builtins; builtins.mine = __file__\n")
    path = os.pathsep.join([str(own), ENVIRON["PYTHONPATH"]]) if "PYTHONPATH" in ENVIRON else own
    program = "import sitecustomize, sys; print(mine, sitecustomize.__file__)"
    said = python(tmp_path, program, PYTHONPATH=str(path))
    assert said.split() == [str(own / "sitecustomize.py")] * 2


def test_nothing_of_ours_is_loaded_until_the_framework_is(tmp_path: Path) -> None:
    program = "import sys; print([n for n in sys.modules if n.startswith(('hpcresume', 'torch'))])"
    assert python(tmp_path, program).strip() == "[]"


def test_a_python_without_our_package_trains_on_and_says_that_there_is_no_callback(
    tmp_path: Path,
) -> None:
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "trainer.py").write_text("class Trainer: pass\n")
    said = python(tmp_path, "import transformers.trainer; print('trained')")
    assert said.startswith("trained\n")
    assert "hpcresume: no callback in transformers.trainer: No module named" in said


# ---- the page about it -------------------------------------------------------------------------

PAGE = (EXAMPLE.parent.parent / "docs" / "integrations" / "huggingface.md").read_text()
TYPED = [line for line in PAGE.splitlines() if line.startswith("hpcresume submit")]


def test_the_diff_on_the_page_is_what_the_example_has_more_than_a_script_without_us() -> None:
    diff = PAGE.split("```diff\n")[1].split("```")[0].splitlines()
    added = [line[1:] for line in diff if line.startswith("+")]
    assert len([line for line in diff if line.startswith(("+", "-"))]) <= 5
    assert added[0] in EXAMPLE.read_text().splitlines()
    assert "HpcResumeCallback()]" in added[1]
    assert "HpcResumeCallback()]" in EXAMPLE.read_text()


@pytest.mark.parametrize("line", TYPED, ids=[str(n) for n, _ in enumerate(TYPED)])
def test_the_lines_of_the_page_can_be_typed_as_they_stand(
    chain: Chain, here: Said, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    (chain.folder / "main.py").touch()
    for program in ("torchrun", "accelerate"):
        (chain.folder / program).write_text("#!/bin/sh\n")
        (chain.folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{chain.folder}{os.pathsep}{os.environ['PATH']}")
    words = shlex.split(line)[1:]
    code, said, errors = here(words[0], "--dry-run", "--cluster=local", *words[1:])
    assert code == 0, errors
    assert said.startswith("# on this machine, for ")
