"""Signs of life: what a rank tells, what the supervisor makes of it, and how long is too long."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcresume.journal import LinkRecords
from hpcresume.training import pace
from hpcresume.training.heartbeat import (
    END,
    FIRST_STEP,
    SAVE,
    STEP,
    Hang,
    Heartbeat,
    Watchdog,
)
from hpcresume.training.pace import UNKNOWN_S, Durations, Pace

BEAT = "rank-0.beat"


def told(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() and path.read_bytes() else {}


def wait_told(path: Path, *, after: int = 0, **wanted: Any) -> dict[str, Any]:
    """The sign that tells what is wanted, later than sign number `after`; a thread writes it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = told(path)
        fits = all(found.get(name) == value for name, value in wanted.items())
        if fits and found["n"] > after:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{told(path)} instead of {wanted}")


@pytest.fixture
def heart(tmp_path: Path) -> Iterator[Heartbeat]:
    heartbeat = Heartbeat(tmp_path / BEAT, fixed_s=0.2)
    yield heartbeat
    heartbeat.close()


# ---- how long something may last -------------------------------------------------------------


def seen(*seconds: float) -> Pace:
    durations = Durations()
    for value in seconds:
        durations.add(value)
    return durations.pace()


@pytest.mark.parametrize("durations", [(), (1.0,), (1.0, 500.0)], ids=len)
def test_what_was_seen_less_than_three_times_gets_half_an_hour(durations: tuple[float]) -> None:
    assert seen(*durations).limit_s == UNKNOWN_S == 1800


def test_short_work_gets_a_minute() -> None:
    assert seen(*[0.5] * 100).limit_s == 60


def test_long_work_gets_five_times_its_99th_percentile() -> None:
    assert seen(*[20.0] * 200, 30.0).limit_s == 100


def test_work_that_once_took_very_long_gets_twice_that() -> None:
    assert seen(*[1.0] * 500, 300.0).limit_s == 600


def test_pace_of_a_thousand_durations_knows_the_longest_of_all() -> None:
    durations = Durations()
    for value in [700.0, *[1.0] * 1000]:
        durations.add(value)
    assert durations.pace() == Pace(1001, 1.0, 700.0)


def link(number: int, *records: dict[str, Any]) -> LinkRecords:
    return LinkRecords(number, {}, [{"t": 0.0, "kind": "ended", **record} for record in records])


def test_links_learn_from_the_links_before_them() -> None:
    links = [
        link(1, {"kind": "saved", "pace": {SAVE: [1, 9.0, 9.0]}}),
        link(2, {"pace": {SAVE: [1, 2.0, 2.0]}}, {"pace": {SAVE: [2, 30.0, 30.0]}}),
    ]
    assert pace.remembered(links) == {SAVE: Pace(3, 30.0, 30.0)}


@pytest.mark.parametrize(
    "told",
    [7, [1, 2], {SAVE: 7}, {SAVE: [1, 2]}, {SAVE: [1, "x", 2]}, {SAVE: [1, -2.0, float("nan")]}],
    ids=str,
)
def test_a_pace_that_makes_no_sense_is_passed_over(told: Any) -> None:
    assert pace.remembered([link(1, {"pace": told})]) == {}


def test_what_was_taken_for_hung_may_last_ten_times_longer_in_the_next_link() -> None:
    hung = {"how": "hung", "at": STEP, "limit_s": 60.0}
    assert pace.relieved([link(1, hung), link(2, {"how": "stopped"})]) == {STEP: 600}
    assert pace.relieved([link(1, {**hung, "limit_s": 900.0})]) == {STEP: UNKNOWN_S}
    assert pace.relieved([link(1, {**hung, "limit_s": "long"}), link(2, {"how": "hung"})]) == {}


# ---- what a rank tells -----------------------------------------------------------------------


def test_a_rank_tells_what_it_is_at_and_for_how_long_that_may_last(
    tmp_path: Path, heart: Heartbeat
) -> None:
    path = tmp_path / BEAT
    assert wait_told(path, kind="start")["limit_s"] == UNKNOWN_S
    heart.enter(FIRST_STEP)
    assert wait_told(path, kind=FIRST_STEP)["limit_s"] == 0.2
    heart.step(7)
    wait_told(path, kind=STEP, step=7)
    with heart.during("évaluation"):
        wait_told(path, kind="évaluation", step=7)
    wait_told(path, kind=STEP, step=7)
    heart.step(8)
    wait_told(path, step=8)


def test_every_change_is_another_sign_of_the_same_length(tmp_path: Path, heart: Heartbeat) -> None:
    path = tmp_path / BEAT
    heart.enter(FIRST_STEP)
    heart.step(1)
    before = wait_told(path, kind=STEP)["n"]
    size = path.stat().st_size
    with heart.during(SAVE):
        wait_told(path, kind=SAVE)
    wait_told(path, kind=STEP, after=before)
    with heart.during("x" * 1000):
        wait_told(path, kind="x" * 32)
    assert path.stat().st_size == size


def test_work_too_short_to_be_told_is_a_sign_of_life_all_the_same(
    tmp_path: Path, heart: Heartbeat
) -> None:
    heart.step(1)
    before = wait_told(tmp_path / BEAT, kind=STEP)["n"]
    with heart.during(SAVE):
        pass
    assert wait_told(tmp_path / BEAT, kind=STEP, step=1, after=before)["n"] > before


def test_a_rank_learns_what_its_own_work_takes(tmp_path: Path) -> None:
    path = tmp_path / BEAT
    heart = Heartbeat(path)
    for step in range(3):
        heart.step(step)
        with heart.during(SAVE):
            assert heart.paces().get(SAVE, [0])[0] == step
    with heart.during(SAVE):
        assert wait_told(path, kind=SAVE)["limit_s"] == 60
    heart.enter(END)
    assert wait_told(path, kind=END)["limit_s"] == UNKNOWN_S
    heart.close()


def test_a_rank_begins_with_what_links_before_it_have_learned(tmp_path: Path) -> None:
    path = tmp_path / BEAT
    heart = Heartbeat(path)
    hung = {"how": "hung", "at": STEP, "limit_s": 70.0}
    heart.remember([link(1, {"pace": {FIRST_STEP: [5, 100.0, 100.0], STEP: [9, 1, 1]}}, hung)])
    heart.enter(FIRST_STEP)
    assert wait_told(path, kind=FIRST_STEP)["limit_s"] == 500
    heart.step(1)
    assert wait_told(path, kind=STEP)["limit_s"] == 700
    heart.close()


def test_a_rank_that_leaves_says_so_and_may_take_its_time(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / BEAT, fixed_s=0.2)
    heart.step(9)
    heart.close()
    sign = wait_told(tmp_path / BEAT, kind="leaving")
    assert (sign["step"], sign["limit_s"]) == (9, UNKNOWN_S)


def test_without_a_file_nothing_is_told_and_no_thread_runs(tmp_path: Path) -> None:
    heart = Heartbeat()
    heart.step(1)
    heart.enter(END)
    heart.close()
    assert not list(tmp_path.iterdir())


# ---- who looks at it -------------------------------------------------------------------------


class Watch:
    """A watchdog over files that the test writes, on a clock that the test turns."""

    def __init__(self, folder: Path, num_ranks: int = 1, **options: Any) -> None:
        self.folder = folder
        self.dog = Watchdog(self.path, num_ranks, **options)
        self.now = time.monotonic()

    def path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.beat"

    def sign(self, rank: int = 0, **values: Any) -> None:
        text = {"n": 1, "kind": STEP, "step": 3, "limit_s": 60, **values}
        self.path(rank).write_text(json.dumps(text))

    def wait(self, seconds: float) -> Hang | None:
        """What is found within so many seconds, looking each second."""
        for _ in range(round(seconds)):
            self.now += 1.0
            hang = self.dog.look(self.now)
            if hang is not None:
                return hang
        return None


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


def test_silence_beyond_the_limit_is_a_hang_in_the_step_in_progress(watch: Watch) -> None:
    watch.sign(step=19)
    assert watch.wait(60) is None
    hang = watch.wait(3)
    assert hang is not None
    assert (hang.kind, hang.step, hang.rank, hang.limit_s) == (STEP, 20, 0, 60)
    assert hang.reason.startswith("no sign of life in 6")


def test_silence_while_saving_is_a_hang_at_the_step_before(watch: Watch) -> None:
    watch.sign(kind=SAVE, step=19)
    hang = watch.wait(70)
    assert hang is not None and hang.step == 19


def test_signs_that_change_are_never_a_hang(watch: Watch) -> None:
    for number in range(20):
        watch.sign(n=number)
        assert watch.wait(50) is None


def test_a_rank_that_has_not_begun_gets_half_an_hour(watch: Watch) -> None:
    assert watch.wait(1790) is None
    hang = watch.wait(20)
    assert hang is not None and (hang.kind, hang.step) == ("start", 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"n": 2}', '{"kind": 1, "step": "x"}'], ids=repr)
def test_a_sign_that_cannot_be_read_is_no_hang_but_buys_time_once(watch: Watch, text: str) -> None:
    watch.sign()
    assert watch.wait(50) is None
    watch.path(0).write_text(text)
    assert watch.wait(500) is None
    watch.sign()
    assert watch.wait(59) is None
    assert watch.wait(3) is not None


def test_of_several_the_rank_that_fell_silent_first_is_named(tmp_path: Path) -> None:
    watch = Watch(tmp_path, num_ranks=3)
    for number in range(10):
        for rank in range(3):
            if number < 5 + abs(rank - 1):
                watch.sign(rank, n=number, step=number)
        assert watch.wait(1) is None
    hang = watch.wait(100)
    assert hang is not None and (hang.rank, hang.step) == (1, 5)


def test_time_in_which_the_supervisor_could_not_look_does_not_count(watch: Watch) -> None:
    watch.sign()
    watch.wait(30)
    watch.now += 3600  # Suspended, and its ranks with it.
    assert watch.wait(30) is None
    assert watch.wait(3) is not None


CHILD = """
import sys, time
from pathlib import Path
from hpcresume.training.heartbeat import FIRST_STEP, Heartbeat
heart = Heartbeat(Path(sys.argv[1]), fixed_s=0.5)
heart.enter(FIRST_STEP)
for step in range(1, 20):
    heart.step(step)
time.sleep(3600)
"""


def test_a_process_that_hangs_is_found_with_the_step_that_it_hangs_in(tmp_path: Path) -> None:
    path = tmp_path / "it's a run" / BEAT
    path.parent.mkdir()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)])
    try:
        wait_told(path, step=19)
        dog = Watchdog(lambda rank: path, 1, fixed_s=0.5)
        deadline = time.monotonic() + 20
        hang = None
        while hang is None and time.monotonic() < deadline:
            hang = dog.look(time.monotonic())
            time.sleep(0.02)
        assert hang is not None and hang.step == 20 and hang.silent_s > 0.5
    finally:
        child.kill()
        child.wait()
