"""When a chain will be complete: what records tell of its pace, and what follows from it."""

from __future__ import annotations

import datetime
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from made_run import FakeSlurm, Said, add_link, end_link, make_run, training
from oracle import hpcresume

from hpcresume.chain.calendar import (
    Calendar,
    Pace,
    Place,
    Promise,
    calendar,
    free_since,
    measure,
    promised,
)
from hpcresume.cli.submit import begin
from hpcresume.config import format_moment, read_frozen
from hpcresume.display.tables import day_and_hour
from hpcresume.journal import Journal, LinkRecords, Record
from hpcresume.run_dir import RunDir


def record(kind: str, t: float, **more: Any) -> Record:
    return {"v": 1, "kind": kind, "t": t, **more}


def link(number: int, claimed: float, *, start: int, saved: int, more: list[Record]) -> LinkRecords:
    """A link with a start-up of 20 s that has trained ten steps a second."""
    begun = claimed + 20
    records = [
        record("claimed", claimed),
        record("started", begun, step=start),
        record("saved", begun + (saved - start) / 10, step=saved),
        *more,
    ]
    return LinkRecords(number, {}, records)


def ended(t: float, cause: str = "deadline", **more: Any) -> Record:
    return record("ended", t, cause=cause, **more)


def submitted(t: float, after: int = 0) -> Record:
    return record("submitted", t, after_link=after)


# ---- the pace --------------------------------------------------------------------------------


def test_nothing_is_measured_before_a_step_is_committed() -> None:
    fresh = LinkRecords(1, {}, [record("claimed", 100), record("started", 120, step=0)])
    assert measure([], [submitted(90)]) is None
    assert measure([fresh], [submitted(90)]) is None
    idle = link(1, 100, start=500, saved=500, more=[])
    assert measure([idle], []) is None


def test_the_pace_is_what_was_committed_in_the_time_since_the_first_step() -> None:
    pace = measure([link(1, 100, start=0, saved=600, more=[])], [submitted(40)])
    assert pace == Pace(steps_per_s=10, startup_s=20, waits_s=(60,), lasted_s=())


def test_a_newer_link_counts_twice_as_much_as_the_one_before() -> None:
    fast = link(1, 0, start=0, saved=600, more=[])
    records = [record("claimed", 900), record("started", 960, step=600)]
    slow = LinkRecords(2, {}, [*records, record("saved", 1020, step=660)])
    pace = measure([fast, slow], [])
    assert pace is not None
    assert pace.steps_per_s == pytest.approx((0.5 * 600 + 60) / (0.5 * 60 + 60))
    assert pace.startup_s == pytest.approx((0.5 * 20 + 60) / 1.5)


def test_a_clock_that_was_set_back_gives_no_pace() -> None:
    records = [record("started", 500, step=0), record("saved", 400, step=9)]
    assert measure([LinkRecords(1, {}, records)], []) is None


def test_a_link_waits_from_the_end_of_the_one_before_it() -> None:
    first = link(1, 100, start=0, saved=600, more=[ended(200), record("decided", 201)])
    second = link(2, 501, start=600, saved=900, more=[])
    pace = measure([first, second], [submitted(90)])
    assert pace is not None and pace.waits_s == (10, 300)


def test_the_rest_of_a_run_that_was_stopped_is_no_waiting_in_the_queue() -> None:
    first = link(1, 100, start=0, saved=600, more=[ended(200, "cancelled")])
    second = link(2, 9000, start=600, saved=900, more=[])
    pace = measure([first, second], [submitted(90), submitted(8970, after=1)])
    assert pace is not None and pace.waits_s == (10, 30)


def test_a_link_that_was_killed_ended_when_the_scheduler_says() -> None:
    first = link(1, 100, start=0, saved=600, more=[])
    found = ended(1501, "node failure", of=1, seconds=1300.0)
    second = link(2, 1500, start=600, saved=900, more=[found])
    pace = measure([first, second], [submitted(90)])
    assert pace is not None and pace.waits_s == (10, 100)
    assert free_since([first], []) == 180, "as long as nobody knows, its last word counts"


def test_links_last_as_long_as_those_whose_time_was_over() -> None:
    first = link(1, 100, start=0, saved=600, more=[ended(400)])
    second = link(2, 500, start=600, saved=900, more=[ended(560, "killed")])
    third = link(3, 600, start=900, saved=950, more=[ended(625, of=2)])
    pace = measure([first, second, third], [])
    assert pace is not None and pace.lasted_s == (300,)


def test_the_newest_job_tells_what_further_ones_may_take() -> None:
    first = record("queued", 90, time_s=3600, time_min_s=None, deadline=None)
    limits = {"time_s": 7200, "time_min_s": 600, "deadline": 5e9}
    one = link(1, 100, start=0, saved=9, more=[record("queued", 101, lead_s=30.0, **limits)])
    assert promised([one], [first]) == Promise(**limits, lead_s=30)
    assert promised([one], [first, record("queued", 900, time_s=60)]).time_s == 60
    assert promised([], [record("queued", 90, queued_job="7")]) == Promise()


@pytest.mark.parametrize("odd", [None, "x", 1e300, float("nan"), [], True])
def test_odd_values_in_records_are_no_numbers(odd: Any) -> None:
    records = [record("started", 100, step=odd), record("saved", 160, step=odd)]
    queued = record("queued", 90, time_s=odd, time_min_s=odd, deadline=odd, lead_s=odd)
    assert measure([LinkRecords(1, {}, records)], []) is None
    if odd is not True:
        assert promised([], [queued]) == Promise()


# ---- the calendar ----------------------------------------------------------------------------

NOW = 1_000_000.0
#: A step takes a second, and a link its first minute to start.
PACE = Pace(steps_per_s=1, startup_s=60, waits_s=(0, 600))
#: A link trains for 3600 - 60 - 60 = 3480 s.
JOB = Promise(time_s=3600, lead_s=60)


def place(steps_left: int, **more: Any) -> Place:
    return Place(steps_left=steps_left, now=NOW, **more)


CASES: dict[str, tuple[Pace, Promise, Place, tuple[float, float, int] | None]] = {
    # What there is, and: expected and best in seconds from now, links left.
    "this link": (PACE, JOB, place(1000, alive=True, started=True, left_s=2000), (1000, 1000, 1)),
    "this link, to its last second": (
        *(PACE, JOB, place(1940, alive=True, started=True, left_s=2000)),
        (1940, 1940, 1),
    ),
    "this link, which starts": (PACE, JOB, place(1000, alive=True, left_s=2000), (1060, 1060, 1)),
    "a link without an end": (
        PACE,
        Promise(),
        place(10**6, alive=True, started=True),
        (1e6, 1e6, 1),
    ),
    "one more": (
        *(PACE, JOB, place(3940, alive=True, started=True, left_s=2000)),
        (1940 + 300 + 60 + 2000, 1940 + 60 + 2000, 2),
    ),
    "two more": (
        *(PACE, JOB, place(1940 + 3480 + 1, alive=True, started=True, left_s=2000)),
        (1940 + 2 * 360 + 3481, 1940 + 2 * 60 + 3481, 3),
    ),
    "it leaves right now": (
        *(PACE, JOB, place(100, alive=True, started=True, left_s=30)),
        (300 + 60 + 100, 60 + 100, 2),
    ),
    "it waits": (PACE, JOB, place(1000), (300 + 60 + 1000, 60 + 1000, 1)),
    "it has waited for a part": (PACE, JOB, place(1000, waited_s=100), (200 + 1060, 1060, 1)),
    "it waits longer than usual": (PACE, JOB, place(1000, waited_s=9999), (1060, 1060, 1)),
    "only the first wait has begun": (
        *(PACE, JOB, place(3480 + 100, waited_s=9999)),
        (300 + 2 * 60 + 3580, 2 * 60 + 3580, 2),
    ),
    "never": (PACE, JOB, place(10**12), None),
    "nothing left but the end": (PACE, JOB, place(0), (360, 60, 1)),
    "nobody knows how long further links last": (PACE, Promise(), place(1000), None),
    "links too short for one step": (PACE, Promise(time_s=120, lead_s=60), place(1000), None),
    "no wait has been seen": (
        *(Pace(steps_per_s=2, startup_s=0), JOB, place(1000)),
        (500, 500, 1),
    ),
    "slurm gives less than asked for": (
        Pace(steps_per_s=1, startup_s=60, waits_s=(100,), lasted_s=(500, 620)),
        *(Promise(time_s=3600, time_min_s=300, lead_s=60), place(1500)),
        (3 * 100 + 3 * 60 + 1500, 100 + 60 + 1500, 3),
    ),
    "links that were cut short are no measure where the limit stands": (
        Pace(steps_per_s=1, startup_s=60, waits_s=(100,), lasted_s=(500, 620)),
        *(JOB, place(1500)),
        (100 + 60 + 1500, 100 + 60 + 1500, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_chain_is_complete_when_its_links_have_waited_started_and_trained(name: str) -> None:
    pace, promise, at, wanted = CASES[name]
    found = calendar(pace, promise, at)
    if wanted is None:
        assert found is None
        return
    expected, best, links = wanted
    assert found == Calendar(expected=NOW + expected, best=NOW + best, links_left=links)


@pytest.mark.parametrize(
    ("promise", "in_s", "expired"),
    [
        (Promise(time_s=3600, deadline=NOW), -3600, False),
        (Promise(time_s=3600, deadline=NOW), -3599, True),
        (Promise(time_s=3600, time_min_s=60, deadline=NOW), -60, False),
        (Promise(deadline=NOW), 1, True),
        (Promise(time_s=3600), 1e9, False),
    ],
)
def test_a_deadline_has_expired_when_no_job_could_end_before_it(
    promise: Promise, in_s: float, expired: bool
) -> None:
    assert promise.expired(NOW + in_s) is expired


# ---- what people see -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "shown"), [(0, "14:20"), (1, "Sun 14:20"), (5, "Thu 14:20"), (33, "24 Dec")]
)
def test_a_moment_is_shown_as_near_as_it_is(days: int, shown: str) -> None:
    today = datetime.datetime(2026, 11, 21, 9, 0)
    then = datetime.datetime(2026, 11, 21, 14, 20) + datetime.timedelta(days=days)
    assert day_and_hour(then.timestamp(), today.timestamp()) == shown


def waiting_run(root: Path, scheduler: dict[str, Any] | None = None, **promise: Any) -> RunDir:
    """A run that has trained 600 of 6600 steps in a minute, and waits for its next job."""
    run = make_run(root, cluster="slurm", max_steps=6600, scheduler=scheduler or {})
    made = add_link(run, step=0, host="gpu017")
    now = time.time()
    lines = made.training.read_text().splitlines()
    started = {**json.loads(lines[-1]), "t": now - 60}
    made.training.write_text("".join(f"{line}\n" for line in [*lines[:-1], json.dumps(started)]))
    with training(made) as journal:
        journal.write("saved", step=600, seconds=1.0, step_s=0.1)
    journal = Journal(made.journal, link=1, job="1")
    journal.write("queued", queued_job="2", after=["1"], token="t", lead_s=15.0, **promise)
    journal.close()
    end_link(made, "continue", "deadline", "the job's time was nearly over")
    run.trainer_state.write_text(json.dumps({"global_step": 600, "total_steps": 6600}))
    return run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # No Slurm answers here: its last word was that a job waits.
    monkeypatch.setenv("PATH", "/nonexistent")
    return tmp_path / "runs"


def status(runs: Path, *options: str) -> tuple[int, str]:
    """In a process of its own: within one, Slurm's answer is remembered."""
    done = hpcresume("status", "toy", *options, cwd=runs.parent, PATH=os.environ["PATH"])
    return done.returncode, done.stdout


def test_status_and_why_say_when_a_run_will_be_complete(runs: Path, said: Said) -> None:
    waiting_run(runs, time_s=3600, time_min_s=None, deadline=None)
    _, out = status(runs, "--json")
    (row,) = json.loads(out)["runs"]
    done = datetime.datetime.fromisoformat(row["calendar"]["expected"].replace("Z", "+00:00"))
    # 6000 steps at 10 a second; nothing waits or starts here.
    assert abs(done.timestamp() - time.time() - 600) < 60
    assert row["calendar"]["links_left"] == 1
    assert row["deadline"] is None
    # It moves on with the clock, as each of these looks at it.
    now = time.time()
    shown = tuple({day_and_hour(done.timestamp() + s, now + s) for s in range(-2, 300)})
    told = f"about ({'|'.join(map(re.escape, shown))}), in 1 more link\n"
    out = status(runs)[1]
    assert re.search(f"complete +{told}", out), out
    head, row, *_ = hpcresume(
        "status", cwd=runs.parent, PATH=os.environ["PATH"]
    ).stdout.splitlines()[1:]
    assert row[head.index("DONE") :].startswith(shown), (head, row)
    _, out, _ = said("why", "toy")
    assert re.search(f"  complete  {told}", out), out


def test_what_was_not_measured_is_not_made_up(runs: Path, said: Said) -> None:
    run = make_run(runs, cluster="slurm")
    add_link(run)
    run.trainer_state.write_text(json.dumps({"global_step": 0, "total_steps": 6600}))
    _, out = status(runs, "--json")
    assert json.loads(out)["runs"][0]["calendar"] is None
    _, out, _ = said("why", "toy")
    assert "complete" not in out


@pytest.mark.parametrize(("in_s", "late"), [(3700, False), (300, True)])
def test_a_deadline_that_comes_before_the_end_is_said(
    runs: Path, said: Said, in_s: float, late: bool
) -> None:
    waiting_run(runs, time_s=3600, time_min_s=60, deadline=time.time() + in_s)
    for out in (status(runs)[1], said("why", "toy")[1]):
        assert (", comes before it is complete" in " ".join(out.split())) is late


def test_a_run_of_which_no_job_could_end_in_time_is_stalled_and_says_so(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", FakeSlurm(tmp_path / "slurm").path)
    waiting_run(runs, time_s=3600, time_min_s=None, deadline=time.time() + 3000)
    document = json.loads(said("why", "toy", "--json")[1])
    assert document["state"] == "stalled"
    assert "none that begins now could end before its deadline, 20" in document["sentence"]
    assert document["next"][0]["command"].endswith("scheduler.deadline=now+7days")
    _, out = status(runs)
    assert "  none of its jobs could end before its deadline: hpcresume why toy" in out


def test_going_on_says_at_once_that_the_deadline_comes_too_early(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("sbatch", "echo 7")
    monkeypatch.setenv("PATH", slurm.path)
    for in_s, late in ((300, True), (4000, False)):
        asked = {"time": "60", "time_min": "1", "deadline": format_moment(time.time() + in_s)}
        run = waiting_run(runs / str(in_s), asked)
        assert begin(run, read_frozen(run.config), detach=False) == 0
        assert ("toy: its deadline, " in capsys.readouterr().err) is late
