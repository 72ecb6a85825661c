"""`hpcresume logs`: of what all links printed, the lines and steps that are asked for."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest
from made_run import Said, add_link, end_link, make_run

from hpcresume.errors import UsageError
from hpcresume.observe.loglines import Printed
from hpcresume.observe.sieve import Sieve, parse_since
from hpcresume.run_dir import RunDir

HOUR = 3600.0


def dated(age_s: float, tag: str, text: str) -> str:
    """A line of our log, so old."""
    at = time.localtime(time.time() - age_s)
    return f"{time.strftime('%m-%d %H:%M:%S', at)} [{tag}] {text}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Link 1 failed three hours ago; link 2 goes on, and warns."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs")
    now = time.time()
    add_link(run, t=now - 4 * HOUR).rank_log(0).write_text(
        "Loading data\n"
        + dated(3.5 * HOUR, "train", "step 100: loss 2.1")
        + "Traceback (most recent call last):\n"
        + '  File "toy.py", line 3, in train\n'
        + "    raise Boom(1)\n"
        + "toy.Boom: the loader is empty\n"
        + "goodbye\n"
    )
    second = add_link(run, job="2", t=now - HOUR)
    second.rank_log(0).write_text(
        "loader ready\n"
        + dated(0.9 * HOUR, "train", "step 200: loss 1.9")
        + dated(60, "retrying-WARNING", "OSError: the loader is away")
        + "an afterthought\n"
    )
    second.rank_log(1).write_text("rank 1 speaks\n")
    return run


def shown(said: Said, *argv: str) -> list[str]:
    """What was printed, without the times."""
    code, out, err = said("logs", *argv)
    assert (code, err) == (0, "")
    return [line.partition("[")[2] or line for line in out.splitlines()]


FIRST, SECOND = "── link 1 · job 1 · gpu017 ──", "── link 2 · job 2 · gpu017 ──"


def test_since_shows_what_came_later_and_what_has_no_time_with_the_line_before_it(
    run: RunDir, said: Said
) -> None:
    last = ["retrying-WARNING] OSError: the loader is away", "an afterthought"]
    assert shown(said, "--since", "10m") == [SECOND, *last]
    assert shown(said, "--since", "2h") == [
        SECOND,
        "loader ready",
        "train] step 200: loss 1.9",
        *last,
    ]


def test_err_shows_warnings_errors_and_whole_tracebacks(run: RunDir, said: Said) -> None:
    assert shown(said, "--err") == [
        FIRST,
        "Traceback (most recent call last):",
        '  File "toy.py", line 3, in train',
        "    raise Boom(1)",
        "toy.Boom: the loader is empty",
        SECOND,
        "retrying-WARNING] OSError: the loader is away",
    ]


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("slurmstepd: error: Detected 1 oom_kill event", True),
        ("srun: error: gpu017: task 0: Killed", True),
        ("toy.py:3: UserWarning: slow", True),
        ("[rank1]: torch.OutOfMemoryError: CUDA out of memory", True),
        ("gpu017:1:2 [0] NCCL WARN Call to connect failed", True),
        ("mean squared error: 0.5", False),
        ("Errors: 0", False),
        ("11-21 10:00:00 [train] ValueError: is what it says", False),
        ("11-21 10:00:00 [train-DEBUG] x", False),
    ],
)
def test_bad_news_of_others_is_known_by_how_it_is_written(
    run: RunDir, line: str, bad: bool
) -> None:
    sieve = Sieve(run, errors=True)
    found = sieve.take(Printed(1, f"{line}\n", opens=True))
    assert found == ([FIRST, line] if bad else [])


def test_grep_fits_a_pattern_and_adds_to_the_other_filters(run: RunDir, said: Said) -> None:
    assert shown(said, "--grep", "[lL]oad") == [
        FIRST,
        "Loading data",
        "toy.Boom: the loader is empty",
        SECOND,
        "loader ready",
        "retrying-WARNING] OSError: the loader is away",
    ]
    both = shown(said, "--grep", "loader", "--err", "--since", "2h")
    assert both == [SECOND, "retrying-WARNING] OSError: the loader is away"]
    assert shown(said, "--link", "2", "--rank", "1", "--grep", "1 s") == [SECOND, "rank 1 speaks"]
    assert shown(said, "--grep", "loss", "-n", "1") == ["train] step 200: loss 1.9"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--grep", "("], 2, "--grep '(' is no pattern"),
        (["--since", "soon"], 2, "--since 'soon' is no time that has been"),
        (["--since", "now+1hour"], 2, "is no time that has been"),
        (["--grep", "nowhere"], 3, "toy has printed no such line."),
        (["--format", "csv"], 2, "name both"),
        (["--metrics", "--grep", "x"], 2, "leave --since, --grep and --err out"),
        (["--metrics", "--format", "csv", "-f"], 2, "needs all its columns at once"),
    ],
    ids=["pattern", "word", "future", "nothing", "format", "metrics", "table"],
)
def test_what_cannot_be_asked_is_said(
    run: RunDir, said: Said, argv: list[str], code: int, words: str
) -> None:
    given, out, err = said("logs", *argv)
    assert (given, out) == (code, "")
    assert words in err


def test_since_takes_ages_and_moments_that_have_been() -> None:
    now = time.mktime((2026, 3, 5, 12, 0, 0, 0, 0, -1))
    assert parse_since("1h30m", now=now) == now - 5400
    assert parse_since("08:00", now=now) == now - 4 * HOUR
    assert parse_since("20:00", now=now) == now - 16 * HOUR
    assert parse_since("2026-03-05T11:00", now=now) == now - HOUR
    with pytest.raises(UsageError):
        parse_since("2026-03-05T13:00", now=now)


def test_a_line_of_last_december_is_older_than_one_of_this_january(run: RunDir) -> None:
    """The log's times have no year."""
    ahead = time.strftime("%m-%d", time.localtime(time.time() + 40 * 86400))
    sieve = Sieve(run, since=time.time() - HOUR)
    text = f"{ahead} 10:00:00 [train] old\n" + dated(5, "train", "new")
    heading, *lines = sieve.take(Printed(2, text, opens=True))
    assert heading == SECOND
    assert [line[-3:] for line in lines] == ["new"]


def test_following_filters_too_and_waits_for_whole_lines(
    run: RunDir, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_on() -> None:
        with run.link(2).rank_log(0).open("a") as log:
            log.write("loader\nnothing else\n")

    def end() -> None:
        third = add_link(run, job="3")
        third.rank_log(0).write_text("the loader is done")
        end_link(third, "stop", "cancelled", "enough")

    with run.link(2).rank_log(0).open("a") as log:
        log.write("loss 1.8 of the ")
    # One after the other, between its looks.
    events = iter((write_on, end))
    monkeypatch.setattr(time, "sleep", lambda _seconds: next(events)())
    found = shown(said, "-f", "-n", "0", "--grep", "loader")
    assert found == [
        "loss 1.8 of the loader",
        "── link 3 · job 3 · gpu017 ──",
        "the loader is done",
    ]


def test_metrics_as_a_table_have_a_column_for_every_name_that_was_logged(
    run: RunDir, said: Said
) -> None:
    run.link(2).metrics.write_text(
        '{"step":1,"loss":2.5}\n{"step":2,"loss":2.0,"val, loss":1.5}\n{"step":3,"loss":null}\n'
    )
    code, out, _ = said("logs", "--metrics", "--format", "csv")
    assert code == 0
    assert list(csv.reader(io.StringIO(out))) == [
        ["step", "loss", "val, loss"],
        ["1", "2.5", ""],
        ["2", "2.0", "1.5"],
        ["3", "", ""],
    ]
    said_last = said("logs", "--metrics", "--format", "csv", "-n", "1")[1]
    assert said_last == "step,loss\n3,\n"
