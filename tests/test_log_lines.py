"""Log lines: what every user sees without asking, in one form, and the names of its records."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path

import pytest
from bug_links import PER_EPOCH, link, make_run, ordinary
from made_run import Said, add_link, training
from made_run import make_run as submitted_run

import hpcresume
from hpcresume.display.logging import LineFormatter, coloured, debug_to, logging_to
from hpcresume.display.terminal import forgive, plain
from hpcresume.journal import asking_about, read_link, record_id

LINE = re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d \[([a-z_-]+?)(-[A-Z]+)?\] (.*)")


def watched(session: hpcresume.Session) -> None:
    """The ordinary training; some of its steps are the best so far, one read fails at first."""
    failures = iter([OSError("the disk is away")])

    def each(session: hpcresume.Session) -> None:
        if session.global_step in (2, 5):
            session.best(val_loss=1.0 / session.global_step)
        if session.global_step == 3:
            session.retry(lambda: [(_ for _ in ()).throw(error) for error in failures])

    ordinary(session, each=each)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, str]]:
    """Module, level and text of each line of a run of two epochs, cut in the second."""
    run = make_run(tmp_path_factory.mktemp("it's a run") / "toy", epochs=2, log={"every_steps": 4})
    for stop_at in (PER_EPOCH + 3, None):
        with logging_to(run.train_log, console=False):
            link(run, watched, stop_at)
    found = []
    for line in run.train_log.read_text(encoding="utf-8").splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        found.append((match[1], match[2] or "", match[3]))
    return found


def said_in(told: list[tuple[str, str, str]], pattern: str) -> list[tuple[str, str, str]]:
    return [line for line in told if re.fullmatch(pattern, line[2])]


@pytest.mark.parametrize(
    ("module", "pattern", "times"),
    [
        ("checkpoint", r"starting fresh: no checkpoint in /.*/toy", 1),
        (
            "checkpoint",
            r"found \d checkpoints, resuming from step 10 of epoch 2 "
            r"\(verified, \d+ s old, [0-9a-f]{8}\)",
            1,
        ),
        ("train", r"━━━ Epoch 1/2 ━━━", 1),
        ("train", r"━━━ Epoch 1/2 ━━━ loss \d\.\d{4} · lr 0\.01\d{4} · 0:\d\d:\d\d", 1),
        ("train", r"━━━ Epoch 2/2 ━━━", 1),
        ("train", r"━━━ Epoch 2/2 ━━━ goes on at step 3/7 of it", 1),
        ("train", r"━━━ Epoch 2/2 ━━━ loss \d\.\d{4} · lr 0\.01\d{4} · 0:\d\d:\d\d", 1),
        (
            "train",
            r"step 4/14 \(28%\): loss \S+, lr \S+, noise .*s(teps)?/s(tep)? · .*samples/s.*",
            1,
        ),
        ("train", r"step (1|4|8|11|12|14)/14 .*", 6),
        ("checkpoint", r"saved step 7 of epoch 1 \(\d+\.\d kB in \d+\.\d s\)", 1),
        ("train", r"best so far: val_loss 0\.5000", 1),
        ("train", r"best so far: val_loss 0\.2000 \(before: 0\.5000\)", 1),
    ],
)
def test_a_user_sees_without_asking(
    told: list[tuple[str, str, str]], module: str, pattern: str, times: int
) -> None:
    found = said_in(told, pattern)
    assert [(m, level) for m, level, _ in found] == [(module, "")] * times


def test_lines_come_at_the_first_step_of_a_link_at_each_multiple_and_at_the_end(
    told: list[tuple[str, str, str]],
) -> None:
    steps = [int(m[1]) for line in told if (m := re.match(r"step (\d+)/14", line[2]))]
    assert steps == [1, 4, 8, 11, 12, 14]


def test_a_retry_says_what_failed_how_many_are_left_and_what_helps(
    told: list[tuple[str, str, str]],
) -> None:
    ((_, level, text),) = [line for line in told if line[0] == "retrying"]
    assert level == "-WARNING"
    assert text.startswith("OSError: the disk is away (attempt 1 of 3); again in 2 s, 2 left; ")
    assert "copy the data to a local disk" in text


def test_what_is_at_debug_goes_into_the_file_for_it_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("hpcresume.saving")
    with logging_to(tmp_path / "train.log"):
        debug_to(tmp_path / "rank-0.debug.log")
        log.info("saved step 7")
        log.debug("it is /checkpoint-7")
    shown = capsys.readouterr().out
    assert LINE.fullmatch(shown.rstrip("\n"))
    assert (tmp_path / "train.log").read_text() == shown
    assert "[checkpoint-DEBUG] it is /checkpoint-7" in (tmp_path / "rank-0.debug.log").read_text()


def test_a_debug_file_that_cannot_be_made_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to():
        debug_to(tmp_path / "no such folder" / "rank-0.debug.log")
        logging.getLogger("hpcresume.saving").info("saved step 7")
    out, err = capsys.readouterr()
    assert out.endswith("[checkpoint] saved step 7\n")
    assert err == ""


def test_colours_of_a_line_leave_its_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    record = logging.LogRecord("hpcresume.rank", 40, "", 0, "it failed\n  Traceback", (), None)
    line = LineFormatter().format(record)
    assert coloured(line) == line
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = coloured(line)
    assert "\x1b[1;31mit failed\x1b[0m\n  Traceback" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == line
    monkeypatch.setenv("NO_COLOR", "1")
    assert coloured(line) == line


def test_our_signs_have_a_likeness_where_the_encoding_has_only_ascii(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    forgive()
    print("━━━ Epoch 1/2 ━━━ loss 0.5 · ü…")
    sys.stdout.flush()
    assert raw.getvalue() == b"=== Epoch 1/2 === loss 0.5 | ?...\n"
    assert plain("→ ×") == "-> x"


# ---- records -------------------------------------------------------------------------------


def named(text: str) -> str:
    """The record that a log line names."""
    found = re.search(r"\(more: hpcresume why toy --record ([0-9a-f]{8})\)", text)
    assert found, text
    return found[1]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCRESUME_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def failing(session: hpcresume.Session) -> None:
    def each(session: hpcresume.Session) -> None:
        if session.global_step == 2:
            raise ValueError("this step fails")

    ordinary(session, each=each)


def test_the_line_of_a_failure_names_place_and_record_and_why_shows_that(
    runs: Path, said: Said
) -> None:
    run = make_run(runs / "toy")
    with logging_to(run.train_log, console=False):
        link(run, failing)
    (line,) = [x for x in run.train_log.read_text().splitlines() if "rank-ERROR" in x]
    assert "rank 0 failed in step 3 (" in line
    assert f"{Path(__file__).name}, line" in line
    assert "): ValueError: this step fails (more: " in line
    code, out, _ = said("why", "toy", "--record", named(line))
    assert code == 0
    assert "failed · link 1" in out
    assert 'raise ValueError("this step fails")' in out
    assert "hpcresume why toy" in out


def test_the_line_of_a_checkpoint_that_is_not_used_names_its_record(runs: Path, said: Said) -> None:
    run = make_run(runs / "toy", checkpoint={"steps": 2})
    link(run, stop_at=5)
    damaged = run.checkpoint(5) / "model.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with logging_to(run.train_log, console=False):
        link(run, stop_at=6)
    (line,) = [x for x in run.train_log.read_text().splitlines() if "checkpoint-WARNING" in x]
    assert "checkpoint-5 is not used: " in line
    code, out, _ = said("why", "toy", "--record", named(line))
    assert code == 0
    assert "quarantined · link 2" in out
    assert "hpcresume checkpoints toy" in out


def test_every_record_of_a_journal_is_found_by_its_name(runs: Path, said: Said) -> None:
    run = submitted_run(runs)
    link_dir = add_link(run)
    with training(link_dir) as journal:
        written = journal.write("save_failed", step=7, reason="No space left – on device")
        other = journal.write("save_failed", step=7, reason="No space left on the other device")
    assert record_id(other) != record_id({**other, "reason": written["reason"]})
    read, _ = read_link(run, 1).all("save_failed")
    assert record_id(read) == record_id(written)
    assert asking_about(run, written).endswith(f"--record {record_id(read)})")
    code, out, _ = said("why", "toy", "--record", record_id(read), "--json")
    assert code == 0
    assert '"reason": "No space left' in out
    code, out, _ = said("why", "toy", "--record", record_id(read))
    assert "save failed · link 1 · job 1 · " in out


def test_a_record_that_is_not_there_is_told_in_a_sentence(runs: Path, said: Said) -> None:
    submitted_run(runs)
    code, _, err = said("why", "toy", "--record", "00000000")
    assert code == 3
    assert "toy has no record '00000000'" in err
