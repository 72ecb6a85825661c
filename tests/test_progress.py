"""How far a run is, seen from outside of its ranks, and `watch` without a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyte
import pytest
from made_run import Said, add_link, complete, make_run
from oracle import ENVIRON
from rich.text import Text
from test_cli import PROBE

from hpcresume import files
from hpcresume.display.progress import Drawn, OneAtATime
from hpcresume.observe.progress import ProgressTail
from hpcresume.run_dir import RunDir
from hpcresume.training.progress import Progress, from_json

NOW = Progress(
    step=3,
    total_steps=12,
    epoch=1,
    epochs=2,
    step_in_epoch=3,
    steps_per_epoch=6,
    left_s=90.0,
    steps_per_s=0.1,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose first link has published step 3."""
    run = make_run(tmp_path / "runs", max_steps=12)
    add_link(run)
    publish(run, NOW)
    return run


def publish(run: RunDir, progress: Progress, **more: Any) -> None:
    files.write_json(run.trainer_state, {"progress": progress.to_json(), "link": 1, **more})


def beat(run: RunDir, number: int, kind: str, step: int) -> None:
    sign = {"n": 1, "kind": kind, "step": step, "limit_s": 60.0}
    run.link(number).beat(0).write_text(json.dumps(sign))


def looked(run: RunDir) -> Progress:
    found = ProgressTail(run).look()
    assert found is not None
    return found


def test_progress_is_read_as_it_was_published(run: RunDir) -> None:
    assert from_json(json.loads(json.dumps(NOW.to_json()))) == NOW
    found = looked(run)
    assert replace(found, epoch_s=0.0, train_s=0.0, left_s=90.0) == NOW


@pytest.mark.parametrize(
    ("step", "epoch", "in_epoch"), [(2, 1, 3), (5, 1, 5), (6, 2, 0), (8, 2, 2), (12, 2, 6)]
)
def test_steps_since_then_are_told_by_signs_of_life(
    run: RunDir, step: int, epoch: int, in_epoch: int
) -> None:
    beat(run, 1, "step", step)
    found = looked(run)
    assert (found.step, found.epoch, found.step_in_epoch) == (max(3, step), epoch, in_epoch)
    assert found.busy == ""


def test_what_goes_on_besides_steps_is_told_by_signs_of_life(run: RunDir) -> None:
    beat(run, 1, "evaluate", 3)
    assert looked(run).busy == "evaluate"


def test_a_link_that_has_published_nothing_yet_starts(run: RunDir) -> None:
    beat(run, 1, "evaluate", 4)
    add_link(run)
    found = looked(run)
    assert found.busy == "link 2 starts"
    assert (found.step, found.steps_per_s) == (3, 0.0)


def test_a_complete_run_is_at_nothing(run: RunDir) -> None:
    beat(run, 1, "save", 12)
    publish(run, replace(NOW, step=12, busy="save"), completed=True)
    assert looked(run).busy == ""


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"progress": 3}', '{"progress": {"step": "x"}}', '{"progress": {"step": -4}}'],
)
def test_what_is_no_progress_is_none(run: RunDir, content: str) -> None:
    run.trainer_state.write_text(content)
    assert ProgressTail(run).look() is None


@pytest.mark.parametrize("sign", ["", "[]", '{"kind": 3, "step": "x"}', "\x00" * 512])
def test_a_torn_sign_of_life_changes_nothing(run: RunDir, sign: str) -> None:
    run.link(1).beat(0).write_text(sign)
    assert (looked(run).step, looked(run).busy) == (3, "")


# ---- watch without a terminal ----------------------------------------------------------------


def watched(run: RunDir) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, "watch", str(run.path)],
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("damage", ["", '{"progress": [], "log_history": 3, "global_step": {}}'])
def test_watch_does_without_torch_and_ends_where_the_run_is_over(
    tmp_path: Path, damage: str
) -> None:
    run = complete(make_run(tmp_path / "it's a folder"))
    if damage:
        run.trainer_state.write_text(damage)
    done = watched(run)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "[watch] complete · link 1" in line
    assert done.stderr.splitlines()[-1] == "False"


def test_watch_of_a_run_that_is_not_there_is_a_sentence(said: Said, tmp_path: Path) -> None:
    code, _, err = said("watch", "none", "--runs", str(tmp_path))
    assert code == 3
    assert "No run 'none'" in err


def test_a_line_that_a_thread_prints_while_another_one_does_loses_nothing_and_leaves_no_bar() -> (
    None
):
    out = io.StringIO()
    console = OneAtATime(file=out, force_terminal=True, width=60, height=20)
    bars = [4]
    printed = threading.Event()

    def interrupt() -> None:
        bars[0] = 2
        console.print("from another thread")
        printed.set()

    class Slow:
        """Is drawn when the console has settled how many lines it erases."""

        def __rich_console__(self, _console: Any, _options: Any) -> Iterator[Text]:
            other.start()
            # Where the other one does not wait for us, it is through by then.
            printed.wait(0.3)
            yield Text("from this thread")

    other = threading.Thread(target=interrupt)
    with Drawn(console, lambda _: [Text(f"bar {n}") for n in range(bars[0])], lambda: False):
        console.print("before")
        console.print(Slow())
        other.join()
        screen = pyte.Screen(60, 20)
        pyte.Stream(screen).feed(out.getvalue().replace("\n", "\r\n"))
    rows = [line.rstrip() for line in screen.display if line.strip()]
    assert rows == ["before", "from this thread", "from another thread", "bar 0", "bar 1"]
