"""`hpcresume rehearse`: what a chain would do to a training, tried with real processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from oracle import ENVIRON, TRAINING, hpcresume

from hpcresume.cli.rehearse import shown
from hpcresume.rehearse import Played, Rehearsal

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIG = "name: toy\ntrain: rehearsed.py:{}\nmax_steps: 2000\nscheduler: {{grace_s: {}}}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of trainings, and beside it one for temporary files."""
    folder = tmp_path / "ada's project"
    folder.mkdir()
    shutil.copy(TRAINING / "rehearsed.py", folder)
    (tmp_path / "temporary").mkdir()
    return folder


def rehearse(
    project: Path, train: str, *argv: str, grace_s: float = 15
) -> subprocess.CompletedProcess[str]:
    (project / "c.yaml").write_text(CONFIG.format(train, grace_s))
    temporary = str(project.parent / "temporary")
    return hpcresume("rehearse", "c.yaml", *argv, cwd=project, timeout=280, TMPDIR=temporary)


def left_over(project: Path) -> list[Path]:
    return list((project.parent / "temporary").glob("hpcresume-rehearse-*"))


# ---- in real processes -----------------------------------------------------------------------


def test_the_example_survives_every_end_and_nothing_is_left_of_the_rehearsal(
    project: Path,
) -> None:
    shutil.copy(EXAMPLES / "train.py", project)
    text = "name: toy\ntrain: train.py:train\nepochs: 1000\ncheckpoint: {steps: 20}\n"
    (project / "hpcresume.yaml").write_text(text + "scheduler: {grace_s: 15}\n")
    temporary = str(project.parent / "temporary")
    done = hpcresume("rehearse", "--json", cwd=project, timeout=280, TMPDIR=temporary)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["survives"] and said["text"].startswith("this chain would survive: after 3 ends")
    links = said["links"]
    assert [link["end"] for link in links] == ["preempted", "time limit", "kill -9", "STOP"]
    for before, after in itertools.pairwise(links):
        assert before["committed"] == after["first_step"] == after["expected"] > 0
    for warned in links[:2]:
        assert warned["committed"] == warned["cut_at"] and warned["save_s"] < warned["lead_s"]
    killed = links[2]
    assert killed["lost"] == killed["cut_at"] - killed["committed"]
    assert not left_over(project)
    assert sorted(path.name for path in project.iterdir()) == [
        *("hpcresume.yaml", "rehearsed.py", "train.py")
    ]


def test_a_step_that_outlasts_the_grace_is_found_and_the_run_is_kept_on_request(
    project: Path,
) -> None:
    done = rehearse(project, "long_step", "--keep", "kept", grace_s=2)
    assert done.returncode == 7, done.stdout + done.stderr
    assert "link 1 (preempted) was at step 3 and had saved step 0 only" in done.stdout
    assert "within 2 s" in done.stdout
    assert (project / "kept/toy/links/0001/rank-0.log").is_file()
    assert not (project / "kept/toy/links/0002").exists()


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("own_loop", "link 1 failed: UsageError: .*without having gone through session.steps"),
        ("fails_after_a_cut", "link 2 failed: RuntimeError: it counts the steps of one link only"),
    ],
)
def test_a_training_that_fails_in_a_link_would_not_survive(
    project: Path, train: str, words: str
) -> None:
    done = rehearse(project, train, "--links", "2")
    assert done.returncode == 7, done.stdout + done.stderr
    assert re.search(f"this chain would not survive: {words}", done.stdout)
    assert not left_over(project)


def test_a_chain_that_uses_up_its_budget_leaves_with_8(project: Path) -> None:
    done = rehearse(project, "good", "--links", "1", "--set", "chain.max_links=1")
    assert done.returncode == 8, done.stdout + done.stderr
    assert "the chain ended in link 2: 1 link is used up (max_links: 1)" in done.stdout
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"1 +preempted +0 +(\d+) +\1 +\S+ s of 15 s", lines[1])
    assert re.fullmatch(r"2 +max_links +\d+", lines[2])


def wait_for_step(folder: Path, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if any(b'"started"' in f.read_bytes() for f in folder.glob("*/toy/links/*/training.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError("no link began to train")


def test_ctrl_c_ends_every_process_and_removes_the_run(project: Path) -> None:
    (project / "c.yaml").write_text(CONFIG.format("long_step", 1))
    temporary = project.parent / "temporary"
    environ = {**ENVIRON, "TMPDIR": str(temporary)}
    argv = [sys.executable, "-m", "hpcresume", "rehearse", "c.yaml"]
    started = subprocess.Popen(argv, cwd=project, env=environ, stderr=subprocess.DEVNULL)
    wait_for_step(temporary)
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == 130
    assert not left_over(project)
    assert not living(str(temporary))


def living(words: str) -> list[str]:
    """The processes whose command line names something."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                text = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            found += [text] if words in text else []
    return found


@pytest.mark.parametrize("limit", ["0", "soon", "00:00:00"])
def test_a_time_that_is_none_is_refused(project: Path, limit: str) -> None:
    done = rehearse(project, "good", "--time", limit)
    assert done.returncode in (2, 4) and limit in done.stderr
    assert "Traceback" not in done.stderr


def test_keep_takes_no_folder_that_is_in_use(project: Path) -> None:
    done = rehearse(project, "good", "--keep", ".")
    assert done.returncode == 2 and "new or empty" in done.stderr


# ---- the verdict -----------------------------------------------------------------------------


def played(link: int, **fields: Any) -> Played:
    usual: Mapping[str, Any] = {
        "end": "preempted",
        "warned": True,
        "first_step": 10 * (link - 1),
        "cut_at": 10 * link,
        "committed": 10 * link,
        "expected": 10 * (link - 1),
    }
    return Played(link=link, **{**usual, **fields})


def test_a_chain_of_links_that_saved_and_went_on_survives() -> None:
    rehearsal = Rehearsal((played(1), played(2), played(3, end="STOP")))
    assert (rehearsal.trouble, rehearsal.exit_code) == ("", 0)
    assert next(rehearsal.lines()).startswith("this chain would survive: after 2 ends")


TROUBLES: dict[str, tuple[dict[str, Any], int, str]] = {
    "no step": ({"first_step": None}, 7, "link 2 made no step"),
    "begun anew": ({"first_step": 0}, 7, "began with step 0, not 10"),
    "not saved": ({"committed": 10, "lead_s": 9.0}, 7, "at step 20 and had saved step 10"),
    "failed": ({"failure": "ValueError: boom (step 3)"}, 7, "failed: ValueError: boom"),
    "budget": ({"rule": "no_progress_links", "reason": "no newly"}, 8, "ended in link 2: no newly"),
    "rule": ({"rule": "same_exception", "reason": "it is the code"}, 7, "it is the code"),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_in_one_link_is_the_verdict_on_the_chain(name: str) -> None:
    fields, code, words = TROUBLES[name]
    rehearsal = Rehearsal((played(1), played(2, **fields)))
    assert rehearsal.exit_code == code
    assert words in rehearsal.trouble and rehearsal.played[1].over


def test_what_kill_9_costs_is_no_trouble_and_is_told() -> None:
    rehearsal = Rehearsal(
        (played(1), played(2, end="kill -9", warned=False, cut_at=17, committed=10), played(3))
    )
    again = Rehearsal((*rehearsal.played[:2], played(3, first_step=10, expected=10)))
    assert again.exit_code == 0
    assert "kill -9 cost 7 steps" in "\n".join(again.lines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_is_shown_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = played(3, end="kill -9", warned=False, cut_at=1027, committed=1020, first_step=1020)
    rehearsal = Rehearsal((played(1, save_s=0.3, lead_s=10.0), played(2), killed, played(4)))
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    lines = "\n".join(shown(rehearsal)).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("LINK  ENDED BY" if width >= 80 else "link 1")


def test_a_training_that_completes_early_says_so() -> None:
    rehearsal = Rehearsal((played(1), played(2, completed=True, end="time limit")))
    assert rehearsal.exit_code == 0
    assert "after 1 end (preempted)" in next(rehearsal.lines())
    assert "complete in link 2" in "\n".join(rehearsal.lines())
