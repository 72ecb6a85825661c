"""The picture of a run: every extreme is kept, and a later look sees what a first one would."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_chain import MadeChain
from made_run import ELSEWHERE, FakeSlurm, add_link, end_link, make_run, training

from hpcresume.display.web.patch import difference, patched
from hpcresume.journal import lineage
from hpcresume.observe.curves import MOST_BUCKETS, Curve, CurvesTail
from hpcresume.observe.entries import newest_entries
from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.loglines import LogWindow
from hpcresume.observe.overview import OverviewTail
from hpcresume.observe.picture import RunView
from hpcresume.run_dir import RunDir
from hpcresume.story import read_story

# ---- curves --------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_a_curve_keeps_its_extremes_whatever_its_length(values: list[float], gap: int) -> None:
    curve = Curve()
    for at, value in enumerate(values * 9):
        curve.add(1 + at * gap, value)
    drawn = curve.to_json()
    low, high = drawn.get("low", drawn["mean"]), drawn.get("high", drawn["mean"])
    assert len(drawn["steps"]) <= MOST_BUCKETS
    assert min(low) == pytest.approx(min(values), rel=1e-5)
    assert max(high) == pytest.approx(max(values), rel=1e-5)
    assert drawn["steps"] == sorted(set(drawn["steps"]))


def test_a_curve_that_has_grown_by_a_point_is_the_same_but_for_its_end() -> None:
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, math.sin(step))
    before = curve.to_json()
    curve.add(5001, 0.5)
    after = curve.to_json()
    for name in ("steps", "mean", "low", "high"):
        assert after[name][: len(before[name]) - 1] == before[name][:-1]


def test_a_curve_does_not_depend_on_when_it_was_looked_at() -> None:
    watched, other = Curve(), Curve()
    for step in range(1, 4001):
        watched.add(step, float(step % 97))
        other.add(step, float(step % 97))
        if step % 250 == 0:
            watched.to_json()
    assert watched.to_json() == other.to_json()


def test_a_value_that_is_no_number_is_marked_and_spoils_no_mean() -> None:
    curve = Curve()
    for step, value in enumerate((1.0, math.nan, 3.0, math.inf), start=1):
        curve.add(step, value)
    drawn = curve.to_json()
    assert (drawn["mean"], drawn["bad"], drawn["latest"]) == ([1.0, 3.0], [2, 4], [3, 3.0])


def test_steps_that_a_link_lost_are_taken_back_when_the_next_one_goes_on(tmp_path: Path) -> None:
    chain = MadeChain(tmp_path, "toy", total=300)
    chain.link(100, lost=40, saves=1)
    tail = CurvesTail(chain.run)
    assert tail.look(lineage(chain.run)).step == 100
    chain.link(20, saves=1)
    curves = tail.look(lineage(chain.run))
    assert curves.step == 80
    assert curves.by_name["loss"].to_json() == drawn_anew(chain.run)["loss"]


def test_a_link_that_was_overtaken_adds_nothing_more(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = add_link(run)
    first.metrics.write_text('{"step":1,"loss":1.0}\n')
    tail = CurvesTail(run)
    assert tail.look(lineage(run)).step == 1
    run.claim_link({"job": "2", "host": ELSEWHERE, "pid": 7, "num_tasks": 1})
    with first.metrics.open("a") as file:
        file.write('{"step":2,"loss":9.0}\n')
    assert tail.look(lineage(run)).step == 1


def drawn_anew(run: RunDir) -> dict[str, object]:
    curves = CurvesTail(run).look(lineage(run))
    return {name: curve.to_json() for name, curve in curves.by_name.items()}


# ---- the picture ---------------------------------------------------------------------------


def test_a_later_look_sees_what_a_first_one_would(tmp_path: Path) -> None:
    chain = MadeChain(tmp_path, "toy", total=500)
    view = RunView(chain.run)
    seen = [view.look([]).to_json()]
    for more in (
        {"steps": 100},
        {"steps": 80, "lost": 30, "cause": "node failure", "detail": "NODE_FAIL"},
        {"steps": 60, "cause": "preempted", "detail": "PREEMPTED"},
    ):
        chain.link(saves=2, **more)  # type: ignore[arg-type]
        seen.append(view.look([]).to_json())
    chain.run.pin(chain.run.checkpoint_steps()[0]).touch()
    seen.append(view.look([]).to_json())
    for picture in seen:
        picture.pop("free_bytes")
    anew = RunView(chain.run).look([]).to_json()
    del anew["free_bytes"]
    assert seen[-1] == anew
    assert len({json.dumps(picture) for picture in seen}) == len(seen)


def test_the_picture_tells_each_link_with_its_steps_and_the_cause_of_its_end(
    tmp_path: Path,
) -> None:
    chain = MadeChain(tmp_path, "toy", total=500)
    chain.link(100, saves=2)
    chain.link(80, lost=30, saves=2, cause="node failure", detail="job 2: NODE_FAIL on gpu031")
    shown = RunView(chain.run).look([])
    assert [(s.link, s.first_step, s.last_step, s.cause, s.detail) for s in shown.links] == [
        (1, 0, 100, "deadline", "deadline: 90 s left"),
        (2, 100, 150, "node failure", "job 2: NODE_FAIL on gpu031"),
    ]
    assert shown.bands == [(1, 0, 100), (2, 100, 180)]
    assert [c.step for c in shown.checkpoints] == [50, 100, 125, 150]
    assert [c.verified for c in shown.checkpoints] == [
        "as written",
        "read back",
        "as written",
        "as written",
    ]


def test_a_look_at_what_has_not_changed_opens_no_journal_and_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = MadeChain(tmp_path, "toy")
    for _ in range(3):
        chain.link(50)
    view = RunView(chain.run)
    # As a view is given it: a picture has ages besides, in whole seconds.
    before = view.look([]).to_json()
    opened: list[str] = []
    real = Path.open

    def noted(path: Path, *args: object, **kwargs: object) -> object:
        opened.append(path.name)
        return real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", noted)
    assert view.look([]).to_json() == before
    assert [name for name in opened if name.endswith((".jsonl", ".log"))] == []


def test_an_end_that_the_next_link_finds_out_replaces_what_was_guessed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_link(run)
    view = RunView(run)
    assert view.look([]).links[0].cause == "unknown"
    second = add_link(run)
    assert view.look([]).links[0].cause == "unknown"
    with training(second) as journal:
        journal.write("ended", cause="time limit", detail="job 1: TIMEOUT", seconds=9.0, of=1)
    assert view.look([]).links[0].cause == "time limit"


def test_the_log_of_all_links_is_shown_as_a_terminal_would(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_link(run, lines=1)
    window = LogWindow(run)
    assert window.look() == ["── link 1 · job 1 · gpu017 ──", "line 1 of link 1"]
    with run.link(1).rank_log(0).open("ab") as file:
        file.write(b" 10%\r 20%\r\x1b[31m 3\xc3")
    assert window.look()[-1] == " 3"
    with run.link(1).rank_log(0).open("ab") as file:
        file.write(b"\xa90%\n")
    add_link(run, lines=2, job="2")
    assert window.look()[2:] == [
        " 3é0%",
        "── link 2 · job 2 · gpu017 ──",
        "line 1 of link 2",
        "line 2 of link 2",
    ]


def test_the_window_holds_the_end_of_a_long_log(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_link(run, lines=50_000)
    window = LogWindow(run, most_lines=10)
    assert window.look() == [f"line {n} of link 1" for n in range(49_991, 50_001)]


def test_every_record_is_a_sentence_and_unknown_kinds_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    link = add_link(run)
    with training(link) as journal:
        journal.write("saved", step=5, bytes=1_200_000_000, seconds=0.81, digest="d")
        journal.write("invented_later", colour="blue", step=3)
    end_link(link, "stop", "user code", "user code: it is the code")
    told = {entry.kind: entry.text for entry in newest_entries(read_story(run), 50)}
    assert told == {
        "submitted": "by ada on login1",
        "restored": "nothing: it starts fresh",
        "started": "at step 0 of 10",
        "saved": "step 5 (1.2 GB in 0.8 s)",
        "invented_later": "colour blue, step 3",
        "ended": "user code: it is the code",
        "decided": "stop: user code: it is the code",
    }


# ---- many runs -----------------------------------------------------------------------------


def test_the_overview_names_what_is_damaged_and_shows_the_rest(tmp_path: Path) -> None:
    make_run(tmp_path, "good")
    make_run(tmp_path, "torn").identity.write_text("{")
    seen = OverviewTail(tmp_path, LivingJobs({})).look()
    assert [status.name for status in seen.runs.values()] == ["good"]
    assert len(seen.damaged) == 1 and "torn" in seen.damaged[0]


def test_a_run_at_rest_is_looked_at_again_when_it_goes_on(tmp_path: Path) -> None:
    chain = MadeChain(tmp_path, "toy")
    chain.link(10, decision=("stop", "cancelled by ada"), cause="cancelled", detail="by ada")
    tail = OverviewTail(tmp_path, LivingJobs({}))
    states = [status.state for status in tail.look().runs.values()]
    chain.link(10)
    states += [status.state for status in tail.look().runs.values()]
    assert states == ["stopped", "stalled"]


def test_complete_runs_that_are_not_shown_are_read_once(tmp_path: Path) -> None:
    for name in ("old", "new"):
        done = MadeChain(tmp_path, name)
        done.link(10, cause="completed", detail="complete")
        done.complete()
    tail = OverviewTail(tmp_path, LivingJobs({}), all_complete=False)
    shown = [run.name for run in tail.look().paths.values()]
    (hidden,) = {"old", "new"} - {*shown}
    # The folder's own time stays, as nothing was claimed or submitted.
    RunDir(tmp_path / hidden).link(1).training.write_text("")
    assert [run.name for run in tail.look().paths.values()] == shown


def test_a_run_that_takes_anothers_place_is_not_taken_for_it(tmp_path: Path) -> None:
    chain = MadeChain(tmp_path, "toy")
    chain.link(10)
    tail = OverviewTail(tmp_path, LivingJobs({}))
    (first,) = tail.look().runs
    shutil.rmtree(chain.run.path)
    make_run(tmp_path, "toy")
    (second,) = tail.look().runs
    assert first != second


def test_slurm_is_asked_once_for_all_runs_however_often_they_are_looked_at(
    tmp_path: Path,
) -> None:
    slurm = FakeSlurm(tmp_path)
    slurm.program("squeue", f"echo asked >> '{tmp_path}/asked'")
    runs = [make_run(tmp_path / "runs", name, cluster="slurm") for name in ("a", "b", "c")]
    jobs = LivingJobs({"PATH": slurm.path}, max_age_s=60)
    assert [jobs.of(run) for run in runs * 2] == [([], "")] * 6
    assert (tmp_path / "asked").read_text().split() == ["asked"]


def test_a_slurm_that_is_stuck_is_waited_for_once(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path)
    answer = tmp_path / "answer"
    os.mkfifo(answer)
    slurm.program("squeue", f"echo asked >> '{tmp_path}/asked'; read answer < '{answer}'")
    run = make_run(tmp_path / "runs", cluster="slurm")
    jobs = LivingJobs({"PATH": slurm.path}, patience_s=0.2)
    told = [jobs.of(run) for _ in range(4)]
    assert told == [(None, "squeue gave no answer in 0.2 s")] * 4
    # However late it began, it is there when its answer is taken.
    answer.write_text("\n")
    assert (tmp_path / "asked").read_text().split() == ["asked"]


# ---- patches -------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text("abc", max_size=1), inner),
    max_leaves=12,
)


@given(_JSON, _JSON)
@settings(max_examples=100, deadline=None)
def test_a_patch_makes_the_new_value_of_the_old_one(old: object, new: object) -> None:
    patch = difference(old, new)
    assert (patch is None) == (old == new)
    if patch is not None:
        assert patched(old, json.loads(json.dumps(patch))) == new


def test_a_list_that_grows_and_slides_costs_only_what_is_new() -> None:
    old = [f"line {n}" for n in range(400)]
    assert difference(old, [*old[2:], "a", "b"]) == {"keep": [2, 398], "add": ["a", "b"]}
