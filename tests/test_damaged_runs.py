"""The read commands over runs that are not as links write them, and on poor machines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from made_chain import MadeChain
from made_run import Said, add_link, make_run
from oracle import ENVIRON

COMMANDS = (
    *("status", "status toy --plan", "why toy", "logs toy", "logs toy --metrics"),
    *("checkpoints toy", "report toy --md -"),
)
#: Whole lines, and nothing that a record of its kind needs.
EMPTY_RECORDS = b"".join(
    b'{"v":1,"t":%d,"kind":"%s"}\n' % (at, kind)
    for at, kind in enumerate(
        (
            *(b"saved", b"restored", b"started", b"save_failed", b"fell_back", b"queued"),
            *(b"ended", b"decided", b"submitted", b"completed", b"stop_asked", b"changed"),
        )
    )
)
ODD_RECORDS = (
    b'{"v":1,"t":1,"kind":"saved","step":1,"digest":{},"seconds":null,"bytes":"x"}\n'
    b'{"v":1,"t":2,"kind":"ended","cause":["x"],"of":1,"failure":"no","who":7}\n'
    b'{"v":1,"t":3,"kind":"decided","decision":5,"reason":{},"numbers":[]}\n'
    b'{"v":1,"t":4,"kind":"queued","queued_job":{},"time_s":"x","deadline":[]}\n'
    b'{"v":1,"t":-1e17,"kind":"restored","step":-5}\n'
)
PLACES = {
    "submissions": "submissions.jsonl",
    "journal": "links/0002/journal.jsonl",
    "training": "links/0002/training.jsonl",
    "followed": "links/0001/training.jsonl",
    "metrics": "links/0002/metrics.jsonl",
    "claim": "links/0002/claim.json",
    "state": "trainer_state.json",
    "config": "run.yaml",
    "manifest": "checkpoint-2000/manifest.json",
    "log": "links/0002/rank-0.log",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two links, the second of which lives."""
    monkeypatch.setenv("HPCRESUME_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    chain = MadeChain(tmp_path / "runs", "toy", total=4000)
    chain.link(1000)
    chain.link(1000, cause=None)
    return chain.run.path


def assert_all_answer(said: Said, commands: Sequence[str] = COMMANDS) -> None:
    for command in commands:
        # An exception that nobody expected would pass through.
        code, _, err = said(*command.split())
        assert code in (0, 3, 4, 5, 7), (command, err)
        assert "Errno" not in err and len(err.splitlines()) <= 2, (command, err)


@pytest.mark.parametrize("content", [EMPTY_RECORDS, ODD_RECORDS], ids=["empty", "odd"])
@pytest.mark.parametrize("place", ["submissions", "journal", "training", "followed", "metrics"])
def test_records_that_lack_what_they_should_say_bring_no_reader_down(
    run: Path, said: Said, place: str, content: bytes
) -> None:
    (run / PLACES[place]).write_bytes(content)
    assert_all_answer(said)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "place"),
    [(a_pipe, place) for place in PLACES] + [(a_folder, "journal"), (a_loop, "training")],
)
def test_what_is_no_file_is_neither_waited_for_nor_an_accident(
    run: Path, said: Said, place: str, make: Callable[[Path], None]
) -> None:
    (run / PLACES[place]).unlink()
    make(run / PLACES[place])
    assert_all_answer(said, ["status", "why toy", "logs toy", "logs toy --metrics"])


def test_a_claim_that_names_more_than_there_is_takes_no_memory(run: Path, said: Said) -> None:
    claim = run / PLACES["claim"]
    claim.write_text(claim.read_text().replace('"training":', '"training":9000000000000,"x":'))
    code, out, _ = said("status", "toy")
    assert code == 0 and "2000/4000" in out


def test_a_run_json_without_a_cluster_is_said_to_be_torn(run: Path, said: Said) -> None:
    (run / "run.json").write_text('{"id": "abc"}')
    code, _, err = said("status", "toy")
    assert code == 3
    assert err == f"hpcresume: {run} is not a run directory: its run.json is missing or torn.\n"


def test_a_run_that_may_not_be_read_does_not_hide_the_others(run: Path, said: Said) -> None:
    add_link(make_run(run.parent, "other"))
    (run / PLACES["training"]).unlink()
    (run / PLACES["training"]).mkdir()
    code, out, err = said("status")
    assert code == 0 and "\nother " in out
    assert err == f"hpcresume: {run / PLACES['training']}: Not a regular file. " + (
        "Mend it, and try again.\n"
    )
    assert said("status", "toy")[0] == 5


POOR = {
    "no home": {"HOME": None, "XDG_CONFIG_HOME": None},
    "home away": {"HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull},
    "ascii": {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "no colour": {"NO_COLOR": "1"},
    "narrow": {"COLUMNS": "40", "TERM": "dumb"},
    "no terminal": {"TERM": None, "COLUMNS": "0"},
}


@pytest.mark.parametrize("poor", POOR)
@pytest.mark.parametrize("command", ["status", "status toy --plan"])
def test_a_poor_environment_gets_its_answer_in_plain_letters(
    run: Path, command: str, poor: str
) -> None:
    environ = {**ENVIRON, "HPCRESUME_RUNS": str(run.parent)}
    for name, value in POOR[poor].items():
        environ.pop(name, None)
        if value is not None:
            environ[name] = value
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", *command.split()],
        env=environ,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    assert re.search(rb"\btoy\b", done.stdout)
    if poor == "ascii":
        assert done.stdout.isascii()
