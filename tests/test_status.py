"""`hpcresume status`: the table of runs, one run, its plan, and both again and again."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import Said, complete, end_link, make_run, queue_job, training
from made_run import add_link as begin_link
from oracle import ENVIRON
from terminal import CONTROL, Terminal

from hpcresume.chain.calendar import Calendar, Pace, Place, Promise
from hpcresume.chain.plan import PlannedSave, Rhythm, plan, usual_interval
from hpcresume.display import tables
from hpcresume.display.standing import plan_table, standing
from hpcresume.display.tables import status_table
from hpcresume.journal import LinkRecords
from hpcresume.observe.plan import RunPlan
from hpcresume.run_dir import RunDir
from hpcresume.status import RunStatus

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cli_runs import Folder

# ---- the table -----------------------------------------------------------------------------

RUNNING = RunStatus(
    name="minimind-sft",
    path=Path("/scratch/ada/runs/minimind-sft"),
    state="running",
    step=84_210,
    total_steps=100_000,
    epoch=2.526,
    loss=1.7234,
    link=12,
    job="48211",
    node="gpu017",
    time_left_s=4329,
    checkpoint_step=84_000,
    checkpoint_age_s=251,
    checkpoint_verified=True,
    queued=["48212", "48213"],
    worked_s=83_000,
    queued_s=11_400,
    train_left_s=15_790,
    calendar=Calendar(expected=1_796_000_000, best=1_796_000_000, links_left=3),
)
FAILED = replace(
    RUNNING,
    name="llama-7b-continued-pretraining-with-a-long-name",
    state="failed",
    why="ValueError: the batch\nis \x1b[31mempty\x1b[0m, at step 7",
    time_left_s=None,
    job="",
    node="",
)
WAITING = replace(RUNNING, name="x", state="waiting", why="other jobs are before it (Priority)")
ROWS = [RUNNING, FAILED, WAITING]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes standard output a terminal of some width."""

    def become(width: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))

    return become


@pytest.mark.parametrize("show", [status_table, lambda rows: "\n\n".join(map(standing, rows))])
@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 100, 120, 140, 200])
def test_nothing_is_wider_than_the_terminal(
    terminal: Callable[[int], None], width: int, show: Callable[[list[RunStatus]], str]
) -> None:
    terminal(width)
    lines = _COLOUR.sub("", show(ROWS)).split("\n")
    assert max(map(len, lines)) <= width
    for row in ROWS:
        assert any(row.name[:20] in line for line in lines)
        assert any(row.state in line for line in lines)


def test_a_wider_terminal_shows_all_that_a_narrower_one_does(
    terminal: Callable[[int], None],
) -> None:
    seen: set[str] = set()
    for width in (88, 100, 120, 140, 200):
        terminal(width)
        heads = set(_COLOUR.sub("", status_table(ROWS)).split("\n")[0].split())
        assert seen <= heads
        seen = heads
    assert {*tables._COLUMNS} - {""} == seen


def test_where_it_is_no_terminal_all_is_told_without_signs_and_colours() -> None:
    head, row, *_ = status_table(ROWS).split("\n")
    assert head.split() == [column for column in tables._COLUMNS if column]
    assert row.split()[:5] == ["minimind-sft", "running", "84210/100000", "84%", "1.7234"]
    assert row.endswith("step 84000, 4 min ago, verified")
    assert row.isascii()


def test_somebody_elses_words_are_shown_without_what_a_terminal_obeys() -> None:
    for shown in (status_table([FAILED]), standing(replace(FAILED, name="a\x1b[2Jb"))):
        assert "\x1b" not in shown
        assert "ValueError: the batch is ?[31mempty?[0m, at step 7" in shown


def test_nothing_is_at_100_percent_before_it_is_complete() -> None:
    row = replace(RUNNING, step=99_999)
    assert tables.percent(row) == "99%"
    assert tables.percent(replace(row, step=100_000)) == "99%"
    assert tables.percent(replace(row, step=100_000, state="complete")) == "100%"


def test_one_run_is_told_with_all_that_is_known_of_it() -> None:
    shown = standing(RUNNING)
    for fact in (
        "84210/100000 · epoch 2.53 · loss 1.7234",
        "12 · job 48211 on gpu017 · 1:12:09 left",
        "queued      job 48212, job 48213",
        "step 84000, 4 min ago, verified",
        "4:23:10 left at the pace of its links so far",
        "23:03:20 in 12 links · 3:10:00 in the queue",
    ):
        assert fact in shown


def test_a_run_without_an_end_has_no_bar_and_no_percent() -> None:
    shown = standing(replace(RUNNING, total_steps=None, train_left_s=None))
    assert "%" not in shown and "━" not in shown
    assert "step        84210 ·" in shown


# ---- which runs ----------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCRESUME_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def test_of_complete_runs_the_newest_is_shown_and_with_a_all_of_them(
    runs: Path, said: Said
) -> None:
    for name in ("old", "older", "new"):
        complete(make_run(runs, name))
    end_link(begin_link(make_run(runs, "open")), "stop", "exception", "it is the code")
    for age_s, name in enumerate(("new", "open", "old", "older")):
        for path in (RunDir(runs / name).submissions, RunDir(runs / name).links):
            os.utime(path, (NOW - age_s, NOW - age_s))

    def names(*options: str) -> list[str]:
        return [row["name"] for row in json.loads(said("status", "--json", *options)[1])["runs"]]

    assert names() == ["new", "open"]
    assert sorted(names("-a")) == ["new", "old", "older", "open"]


# ---- the plan ------------------------------------------------------------------------------

PACE = Pace(steps_per_s=2.0, startup_s=50.0, waits_s=(100.0, 300.0))
#: A link trains 1000 s, 2000 steps.
PROMISE = Promise(time_s=1100.0, lead_s=50.0)
NOW = 1_000_000.0


def planned(left: int, rhythm: Rhythm, **place: Any) -> list[tuple[int, float, float, int, str]]:
    """Of each save: step, cumulative seconds, seconds from now with the queue, link, reason."""
    found = plan(
        step=100,
        link=3,
        pace=PACE,
        promise=place.pop("promise", PROMISE),
        place=Place(steps_left=left, now=NOW, **place),
        rhythm=rhythm,
    )
    return [(s.step, s.cumulative_s, s.at - NOW, s.link, s.reason) for s in found]


def test_a_living_link_saves_by_its_rhythm_at_its_end_and_the_next_ones_go_on() -> None:
    alive = {"alive": True, "started": True, "left_s": 550.0}
    assert planned(2000, Rhythm(steps=400), **alive) == [
        (400, 150.0, 150.0, 3, "steps"),
        (800, 350.0, 350.0, 3, "steps"),
        (1100, 500.0, 500.0, 3, "deadline"),
        # 200 s in the queue on average, and 50 s until its first step.
        (1200, 600.0, 800.0, 4, "steps"),
        (1600, 800.0, 1000.0, 4, "steps"),
        (2000, 1000.0, 1200.0, 4, "steps"),
        (2100, 1050.0, 1250.0, 4, "complete"),
    ]


def test_what_a_job_has_waited_already_it_does_not_wait_again() -> None:
    rows = planned(5000, Rhythm(), waited_s=150.0)
    assert rows == [
        (2100, 1050.0, 1100.0, 4, "deadline"),
        (4100, 2100.0, 2350.0, 5, "deadline"),
        (5100, 2650.0, 3100.0, 6, "complete"),
    ]


def test_whichever_comes_first_saves_the_epoch_the_minutes_or_the_steps() -> None:
    rhythm = Rhythm(steps=500, seconds=150.0, epoch_steps=700)
    rows = planned(1000, rhythm, alive=True, started=True, left_s=None)
    assert [(step, reason) for step, *_, reason in rows] == [
        (400, "minutes"),
        (500, "steps"),
        (700, "epoch"),
        (1000, "steps"),
        (1100, "complete"),
    ]


def test_a_link_that_is_about_to_end_saves_no_more_and_the_next_one_begins() -> None:
    rows = planned(100, Rhythm(), alive=True, started=True, left_s=20.0)
    assert [(step, link) for step, _, _, link, _ in rows] == [(200, 4)]


def test_links_that_are_over_before_their_first_step_have_no_plan() -> None:
    assert planned(100, Rhythm(), promise=Promise(time_s=90.0, lead_s=50.0)) == []


def test_a_plan_without_end_ends() -> None:
    assert len(planned(10**9, Rhythm(steps=1), promise=Promise())) == 10_000


def test_the_usual_interval_is_that_of_the_newest_links_saves() -> None:
    def link(number: int, times: list[float]) -> LinkRecords:
        return LinkRecords(number, {}, [{"kind": "saved", "t": t} for t in times])

    assert usual_interval([link(1, [0, 60, 120]), link(2, [500, 530, 560, 590])]) == 30
    assert usual_interval([link(1, [0])]) is None
    slow, fast = [60 * n for n in range(25)], [5000 + 30 * n for n in range(20)]
    assert usual_interval([link(1, slow), link(2, fast)]) == 30


def test_a_long_plan_shows_the_last_checkpoint_of_each_link() -> None:
    saves = [
        PlannedSave(
            step=n, seconds=60, cumulative_s=60 * n, at=NOW, link=1 + n // 10, reason="minutes"
        )
        for n in range(1, 51)
    ]
    found = RunPlan(saves, 50)
    lines = plan_table(found, everything=False).split("\n")
    assert [line.split()[0] for line in lines[1:7]] == ["9", "19", "29", "39", "49", "50"]
    # The time is since the line above, so that they add up.
    assert lines[2].split()[1:3] == ["0:10:00", "0:19:00"]
    assert "-a shows all 50" in plan_table(found, everything=False)
    assert len(plan_table(found, everything=True).split("\n")) == 50 + 3


def test_the_plan_of_a_run_goes_from_its_checkpoint_to_its_end(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    folder.add("one", "waiting", links=4, saves=4)
    for name in ("PATH", "HPCRESUME_RUNS"):
        monkeypatch.setenv(name, folder.environ[name])
    document = json.loads(said("status", "--plan", "--json")[1])
    row, saves = document["runs"][0], document["plan"]["saves"]
    assert saves[0]["step"] > row["checkpoint_step"]
    assert saves[-1]["step"] == row["total_steps"]
    # The plan and the calendar are of one mind, each from the moment that it was made.
    ends = [
        datetime.datetime.fromisoformat(at.replace("Z", "+00:00"))
        for at in (saves[-1]["at"], row["calendar"]["expected"])
    ]
    assert abs(ends[0] - ends[1]) < datetime.timedelta(minutes=1)
    assert saves[-1]["link"] == row["link"] + row["calendar"]["links_left"]
    _, out, _ = said("status", "one", "--plan")
    assert re.search(r"CHECKPOINT +TIME +CUMULATIVE +% +LINK +WHEN +BY\n", out)
    assert re.search(rf"\n +{row['total_steps']} .* 100% +\d .* complete\n", out)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (complete, "Training is complete"),
        (begin_link, "It has no number of steps"),
    ],
    ids=["complete", "no-end"],
)
def test_where_there_is_no_plan_a_sentence_says_why(
    runs: Path, said: Said, make: Callable[..., Any], words: str
) -> None:
    make(make_run(runs))
    code, out, _ = said("status", "toy", "--plan")
    assert code == 0 and words in out


def test_before_the_first_checkpoint_the_plan_is_yet_to_come(runs: Path, said: Said) -> None:
    run = make_run(runs)
    begin_link(run)
    run.trainer_state.write_text(json.dumps({"global_step": 3, "total_steps": 10}))
    assert "The plan comes with the first checkpoint" in said("status", "toy", "--plan")[1]


def test_what_lasts_for_ages_has_no_plan(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    state = folder.add("one", "waiting", links=2, saves=2).trainer_state
    for name in ("PATH", "HPCRESUME_RUNS"):
        monkeypatch.setenv(name, folder.environ[name])
    state.write_text(json.dumps(json.loads(state.read_text()) | {"total_steps": 10**17}))
    code, out, _ = said("status", "one", "--plan")
    assert code == 0 and "more than ten years" in out


# ---- again and again -----------------------------------------------------------------------


def test_w_shows_the_runs_in_their_place_and_what_has_changed(runs: Path) -> None:
    run = make_run(runs)
    link = begin_link(run)
    argv = ["-m", "hpcresume", "status", "-w"]
    with Terminal(argv, runs.parent, width=80, height=20, HPCRESUME_RUNS=str(runs)) as terminal:
        terminal.wait_for("▲ stalled", "q leaves")
        end_link(link, "stop", "cancelled", "cancelled by ada")
        # And once: a screen may be read while it is drawn.
        terminal.wait_for(
            "■ stopped", "cancelled by ada", r"\A((?!toy)[\s\S])*toy((?!toy)[\s\S])*\Z"
        )
        terminal.type("q")
        assert terminal.end() == 0
        # What was seen last stays on the terminal.
        terminal.wait_for("■ stopped", cursor=True)


def test_w_says_how_many_lines_a_small_screen_leaves_out(runs: Path) -> None:
    for n in range(30):
        begin_link(make_run(runs, f"run-{n}"))
    argv = ["-m", "hpcresume", "status", "-w"]
    with Terminal(argv, runs.parent, width=80, height=10, HPCRESUME_RUNS=str(runs)) as terminal:
        terminal.wait_for(rf"\A.*{re.escape(str(runs)[:20])}", "… 54 more lines", "q leaves")
        terminal.interrupt()
        assert terminal.end() == 130


def test_w_prints_blocks_where_it_is_no_terminal_until_all_runs_rest(runs: Path) -> None:
    run = make_run(runs)
    end_link(begin_link(run), "stop", "cancelled", "cancelled by ada")
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "status", "toy", "-w"],
        env={**ENVIRON, "HPCRESUME_RUNS": str(runs)},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert not CONTROL.search(done.stdout)
    assert re.match(rb"\d\d-\d\d \d\d:\d\d:\d\d \[status\]\n", done.stdout)
    assert b"cancelled by ada" in done.stdout


@pytest.mark.parametrize("other", ["--json", "--exit-code"])
def test_w_goes_with_no_option_that_is_for_programs(runs: Path, said: Said, other: str) -> None:
    make_run(runs)
    code, _, err = said("status", "-w", other)
    assert code == 2 and "leave out" in err


@pytest.mark.parametrize(
    ("named", "words"),
    [(["toy"], "not a run directory"), ([], "No run is there any more")],
    ids=["one", "all"],
)
def test_w_goes_on_where_the_folder_is_away_for_a_while(
    runs: Path, named: list[str], words: str
) -> None:
    run = make_run(runs)
    link = begin_link(run)
    argv = ["-m", "hpcresume", "status", *named, "-w"]
    with Terminal(argv, runs.parent, width=80, height=20, HPCRESUME_RUNS=str(runs)) as terminal:
        terminal.wait_for("▲ stalled")
        runs.rename(runs.with_name("away"))
        terminal.wait_for(words)
        runs.with_name("away").rename(runs)
        with training(link) as journal:
            journal.write("completed", step=10, epoch=1)
        run.final_model.mkdir()
        terminal.wait_for("✔ complete")
        terminal.type("q")
        assert terminal.end() == 0


def test_a_job_that_waits_locally_is_waited_for(runs: Path, said: Said) -> None:
    queue_job(make_run(runs))
    assert "▲" not in said("status", "toy")[1]
