"""What stands on a terminal, read from the screen of a real pseudo-terminal."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from oracle import ENVIRON, TRAINING, Chain
from terminal import COLOUR, CONTROL, Terminal

from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir

#: Of an escape sequence that switches to the other screen and back.
OTHER_SCREEN, BACK = b"\x1b[?1049h", b"\x1b[?1049l"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project whose training waits until it may go on."""
    folder = tmp_path / "it's a project"
    folder.mkdir()
    shutil.copy(TRAINING / "shown.py", folder)
    return folder


def go(folder: Path, step: int, name: str = "go") -> None:
    new = folder / f".{name}"
    new.write_text(str(step))
    new.rename(folder / name)


def foreground(folder: Path, *argv: str, **more: Any) -> Terminal:
    return Terminal(["shown.py", *argv], folder, **more)


# ---- progress in the terminal of a training ------------------------------------------------


def test_bars_show_epoch_and_steps_with_values_and_stay_below_what_is_printed(
    folder: Path,
) -> None:
    go(folder, 3)
    with foreground(folder) as terminal:
        # All of it is waited for: a screen may be read while it is drawn.
        terminal.wait_for(
            r"\[train\] step 2/12 \(16%\): loss 0.5000, lr 0.010000 · ",
            r"(?m)^\S Epoch 1/2 ━+╸?━+  50%   3/6 • 0:\d\d:\d\d < 0:\d\d:\d\d\n"
            r"  all steps ━+╸?━+  25%  3/12 • 0:\d\d:\d\d < 0:\d\d:\d\d\n"
            r"  loss 0.5000 • lr 0.010000 • .* s(teps)?/s(tep)? • .* samples/s\Z",
        )
        go(folder, 4)
        terminal.wait_for(
            r"(?s)evaluation begins.*all steps", r"(?m)^\S evaluate +━+ +• 0:\d\d:\d\d$"
        )
        terminal.resize(60, 20)
        narrow = terminal.wait_for(r"(?m)^\S Epoch 1/2 ━.{,50}$", r"(?m)^\S evaluate .{,50}$")
        assert max(map(len, narrow.splitlines())) <= 60
        terminal.interrupt()
        terminal.wait_for("evaluate", cursor=True)
        go(folder, 12, "evaluate")
        assert terminal.end() == 130
        assert "Saved at step 4" in terminal.screen
        assert "━━━━" not in terminal.screen.splitlines()[-1]
        assert terminal.cursor_is_shown


@pytest.fixture
def finished(folder: Path) -> Path:
    """A project whose training need not wait."""
    go(folder, 12)
    go(folder, 12, "evaluate")
    return folder


def test_an_ascii_terminal_without_colours_gets_ascii_without_colours(folder: Path) -> None:
    poor = {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    go(folder, 3)
    with foreground(folder, width=60, **poor) as terminal:
        terminal.wait_for(r"[-\\|/] Epoch 1/2 #+\.+  50%", r"/s(tep)? \| .* samples/s")
        go(folder, 12)
        go(folder, 12, "evaluate")
        assert terminal.end() == 0
    assert terminal.raw.isascii()
    assert not COLOUR.search(terminal.raw)
    assert b"=== Epoch 1/2 ===" in terminal.raw


def test_without_a_terminal_there_are_whole_lines_and_no_control_codes(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "shown.py", "--dashboard"],
        cwd=finished,
        env={**ENVIRON, "FORCE_COLOR": "1"},
        capture_output=True,
        timeout=90,
        check=True,
    )
    assert not CONTROL.search(done.stdout)
    assert COLOUR.search(done.stdout)
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", done.stdout).decode()
    steps = re.findall(r"\[train\] step (\d+)/12 \(\d+%\): loss \d\.\d{4}, lr 0.010000", plain)
    assert steps == ["1", "2", "4", "6", "8", "10", "12"]


# ---- the dashboard of a training -----------------------------------------------------------


def test_a_dashboard_is_left_by_q_for_bars_and_the_training_goes_on(folder: Path) -> None:
    go(folder, 3)
    with foreground(folder, "--dashboard", width=90, height=34) as terminal:
        terminal.wait_for("run +running · link 1", r"3/6", "LOG", "METRIC", "host memory")
        terminal.wait_for("q leaves, the job goes on")
        go(folder, 4)
        terminal.wait_for("evaluate")
        terminal.type("q")
        terminal.wait_for("evaluation begins", r"Epoch 1/2 ━+", r"\A(?![\s\S]*METRIC)")
        go(folder, 12)
        go(folder, 12, "evaluate")
        assert terminal.end() == 0
        assert "Training is complete at step 12" in terminal.screen
    assert terminal.raw.count(OTHER_SCREEN) == terminal.raw.count(BACK) == 1


# ---- a chain that is driven from this terminal ---------------------------------------------


def test_a_chain_driven_here_shows_its_bars_and_rests_after_ctrl_c(folder: Path) -> None:
    of_chain(folder)
    go(folder, 3)
    argv = ["-m", "hpcresume", "submit", "chain.yaml", "--cluster", "local"]
    with Terminal(argv, folder) as terminal:
        terminal.wait_for(r"── link 1 ──", r"\S Epoch 1/2 ━+.* 3/6", r"  run • link 1")
        terminal.interrupt()
        terminal.wait_for("stopping: the state is saved first", cursor=True)
        go(folder, 4)
        go(folder, 12, "evaluate")
        assert terminal.end() == 130
        assert re.search("Saved at step [45]. To go on: hpcresume resume run", terminal.screen)
        assert terminal.cursor_is_shown


# ---- watching a chain ----------------------------------------------------------------------


def of_chain(folder: Path) -> None:
    """Let the project be trained as a chain, with the project's own file `go`."""
    settings = {"train": "shown.py:train", "max_steps": 12, "checkpoint": {"steps": 2}}
    settings |= {"chain": {"lead_s": 1.0}, "scheduler": {"grace_s": 3}}
    (folder / "chain.yaml").write_text(yaml.safe_dump({"name": "run", **settings}))
    source = (folder / "shown.py").read_text()
    # The run trains a copy of its code.
    (folder / "shown.py").write_text(
        source.replace("HERE = Path(__file__).parent", f"HERE = Path({str(folder)!r})")
    )


@pytest.fixture
def chain(folder: Path) -> Iterator[Chain]:
    """A chain on the local backend whose training waits until it may go on."""
    of_chain(folder)
    go(folder, 3)
    chain = Submitted(folder)
    yield chain
    go(folder, 12)
    go(folder, 12, "evaluate")
    chain.wait_completed()


class Submitted(Chain):
    """A chain of the project as it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = RunDir(folder / "runs" / "run")
        subprocess.run(
            [sys.executable, "-m", "hpcresume", "submit", "chain.yaml"]
            + ["--cluster", "local", "--detach"],
            cwd=folder,
            env=ENVIRON,
            capture_output=True,
            check=True,
            timeout=60,
        )


def watch(chain: Chain, **more: Any) -> Terminal:
    return Terminal(["-m", "hpcresume", "watch", "run"], chain.folder, **more)


def alive(chain: Chain) -> bool:
    """Whether the newest link's rank trains."""
    _, ranks = chain.pids(read_chain(chain.run)[-1])
    return bool(ranks) and all(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_watch_follows_into_the_next_link_and_leaves_it_alone(chain: Chain) -> None:
    lines = subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "watch", "run"],
        cwd=chain.folder,
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    first = chain.wait_started(1)
    assert first is not None
    with watch(chain, height=36) as terminal:
        terminal.wait_for(r"run +running · link 1 · job 1", r"step 2 ·", r" 3/12")
        terminal.wait_for(r"CHECKPOINTS +1 kept", r"(?m)^ loss +0\.5000 +0\.5000 +1\.0000")
        told = told_until(lines, r"^\d\d-\d\d [\d:]{8} \[watch\] running · link 1 · job 1 · ")
        chain.cut(first, "term rank")
        go(chain.folder, 5)
        go(chain.folder, 5, "evaluate")
        terminal.wait_for(r"running · link 2 · job 2", r" 5/12", "resuming from step")
        terminal.resize(60, 20)
        terminal.wait_for(r"(?m)^\S Epoch 1/2 .{,50}$", r"\A run +running(.*\n){19}.*q leaves.*\Z")
        terminal.type("q")
        assert terminal.end() == 0
    assert terminal.raw.count(OTHER_SCREEN) == terminal.raw.count(BACK) == 1
    assert alive(chain)
    with watch(chain, width=120, height=24, PYTHONIOENCODING="ascii", NO_COLOR="1") as terminal:
        terminal.wait_for(r"run +running \| link 2", r" 5/12", "checkpoint")
        terminal.interrupt()
        assert terminal.end() == 130
        assert terminal.raw.isascii()
        assert not COLOUR.search(terminal.raw)
    assert alive(chain)
    told += told_until(lines, r"\[watch\] running · link 2 · job 2 · .* · step \d+/12 \(\d+%\)")
    go(chain.folder, 12)
    go(chain.folder, 12, "evaluate")
    told += lines.communicate(timeout=90)[0]
    assert lines.returncode == 0
    assert not CONTROL.search(told)
    last = told.decode().splitlines()[-1]
    assert re.fullmatch(r"\d\d-\d\d [\d:]{8} \[watch\] complete.*", last)


def told_until(process: subprocess.Popen[bytes], pattern: str) -> bytes:
    """What a process prints up to a line in which there is something."""
    assert process.stdout is not None
    told = b""
    while not re.search(pattern, (line := process.stdout.readline()).decode()):
        assert line, told
        told += line
    return told + line
