"""`kill -9` at every file system call of a save, a restore, a removal and whole links: what is
found afterwards is whole, what was acknowledged is there, and nothing stands in the way.
"""

from __future__ import annotations

import collections
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bug_links import cut, link, make_run, outcome, through
from fault_layer import (
    ALL,
    Call,
    Saves,
    States,
    as_text,
    fast_folder,
    forked,
    kill_here,
    new_saves,
    newest_verified,
    objects_at,
    payload,
    result_of,
    saved_steps,
    struck,
)

from hpcresume import files
from hpcresume.checkpoint.retention import Policy
from hpcresume.journal import Journal
from hpcresume.run_dir import RunDir

#: What a link that has claimed the run after the killed one is called.
NEXT = 2
FINAL = ["model.safetensors", "templates/chat.jinja"]


class Scenario(NamedTuple):
    """What is there before; what the process does that is killed; which steps it may leave."""

    prepare: Callable[[Saves], None]
    act: Callable[[Saves], None]
    may_be_newest: frozenset[int]
    at_least: int
    """How many states of the disk it goes through."""
    damaged: frozenset[int] = frozenset()
    """Steps whose checkpoints were damaged before."""


def steps(*numbers: int) -> Callable[[Saves], None]:
    def prepare(saves: Saves) -> None:
        for number in numbers:
            saves.commit(number)

    return prepare


def damaged(*numbers: int) -> Callable[[Saves], None]:
    """The last of the steps lacks a byte."""

    def prepare(saves: Saves) -> None:
        steps(*numbers)(saves)
        path = saves.run.checkpoint(numbers[-1]) / "model.safetensors"
        os.truncate(path, path.stat().st_size - 1)

    return prepare


def save(saves: Saves) -> None:
    """What a link does for a save: commit, journal, remove what is not kept."""
    journal = Journal(saves.run.link(1).training, link=1, job=None)
    saves.commit(20)
    journal.write("saved", step=20)
    saves.store.prune(ALL, Policy(last=1, best=0))


def restore(saves: Saves) -> None:
    """What a link does before its first step."""
    saves.restored()
    saves.store.sweep(NEXT)


def half_written(saves: Saves) -> None:
    """What a killed link left of a save and of a removal."""
    steps(10)(saves)
    for number, name in enumerate(("checkpoint-20.0001", "removed-5.0000")):
        committed = saves.commit(30 + number)
        committed.path.rename(saves.run.partial(name))


def finish(saves: Saves) -> None:
    saves.finish(FINAL)


def finished(saves: Saves) -> None:
    steps(10)(saves)
    finish(saves)


def make_room(saves: Saves) -> None:
    refusal = saves.store.make_room(ALL, Policy(last=1), num_bytes=1 << 60, num_files=1)
    assert refusal is not None
    saves.store.prune(ALL, Policy(last=2, best=0))


SCENARIOS = {
    "save": Scenario(steps(5, 10), save, frozenset({10, 20}), 30),
    "first save": Scenario(steps(), save, frozenset({20}), 15),
    "save in the place of a damaged one": Scenario(
        damaged(5, 10, 20), save, frozenset({10, 20}), 30, frozenset({20})
    ),
    "removal": Scenario(steps(5, 10, 15, 20), make_room, frozenset({20}), 15),
    "restore": Scenario(steps(10, 20), restore, frozenset({20}), 1),
    "restore beside a damaged one": Scenario(
        damaged(10, 20), restore, frozenset({10}), 2, frozenset({20})
    ),
    "restore beside what a killed link left": Scenario(half_written, restore, frozenset({10}), 15),
    "finish": Scenario(steps(10), finish, frozenset({10}), 6),
    "finish again": Scenario(finished, finish, frozenset({10}), 10),
}


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


class Killed(NamedTuple):
    """What is wrong after one kill; empty where all is as it must be."""

    where: str
    found: int | None
    wrong: str


def act_until(scenario: Scenario, saves: Saves, number: int, when: str) -> None:
    """Act, and be killed before or after the call of that number; how the child ends tells."""

    def kill(call: Call) -> None:
        if call.number == number:
            kill_here()

    with struck(saves.run.path, **{when: kill}):
        scenario.act(saves)


def look(name: str, saves: Saves) -> tuple[int | None, str]:
    """What a process that comes later finds, and what is wrong with it."""
    scenario = SCENARIOS[name]
    acknowledged = max(saved_steps(saves.run), default=0)
    found = saves.latest()
    step = None if found is None else found.step
    if not saves.told.keys() <= scenario.damaged:
        return step, f"found damaged: {saves.told}"
    if found is None:
        return step, "" if name == "first save" and not acknowledged else "found nothing"
    if step not in scenario.may_be_newest:
        return step, f"found step {step}"
    if step < acknowledged:
        return step, f"step {acknowledged} was acknowledged"
    if payload(found.path) != EXPECTED[step]:
        return step, "found other bytes"
    if as_text(saves.restored()) != as_text(objects_at(step)):
        return step, "restored something else"
    final = saves.run.final_model
    if final.exists() and payload(final) != {n: EXPECTED[step][n] for n in FINAL}:
        return step, "the finished model is not whole"
    for other in saves.store.committed(ALL):
        if payload(other.path) != EXPECTED[other.step]:
            return step, f"checkpoint-{other.step} is not whole"
    return step, ""


def go_on(saves: Saves) -> str:
    """What is wrong with the saves of the next link."""
    before = saves.latest_step() or 0
    for step in (20, 30):
        if step > before:
            saves.commit(step, NEXT)
            found = saves.latest()
            if found is None or found.step != step or payload(found.path) != EXPECTED[step]:
                return f"saved step {step}, found {found}"
    finish(saves)
    saves.store.sweep(NEXT)
    steps_there = saves.run.checkpoint_steps()
    if steps_there != [found.step for found in saves.store.committed(ALL)]:
        # Nothing would ever remove it.
        return f"one of {steps_there} is half a checkpoint"
    return f"not swept: {left}" if (left := saves.hidden()) else ""


#: The bytes of each step's checkpoint, in the process that sweeps.
EXPECTED: dict[int, dict[str, bytes]] = {}


def templates(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """A run prepared for each scenario; notes what undamaged checkpoints hold."""
    whole = new_saves(folder / "whole")
    for step in (5, 10, 15, 20, 30, 31):
        EXPECTED[step] = payload(whole.commit(step).path)
    found = {}
    for name in names:
        saves = new_saves(folder / f"template {name}")
        saves.run.claim_link({"job": None})
        SCENARIOS[name].prepare(saves)
        found[name] = saves.run.path
    return found


def points(name: str, saves: Saves, *, each: bool) -> list[tuple[int, str]]:
    """Where to kill: at `each` call, or where that leaves another disk; acts once to find out."""
    calls: list[Call] = []
    states = States(saves.run.path)

    def before(call: Call) -> None:
        calls.append(call)
        states.before(call)

    with struck(saves.run.path, before):
        SCENARIOS[name].act(saves)
    if each:
        return [(call.number, when) for call in calls for when in ("before", "after")]
    return [*((number, "before") for number in states.numbers), (len(calls), "after")]


def sweep(folder: Path, name: str, each: bool) -> list[Killed]:
    """Kills at each point, each of a run of its own."""
    template = templates(folder, [name])[name]

    def fresh() -> Saves:
        shutil.rmtree(folder / "run", ignore_errors=True)
        return Saves(RunDir(Path(shutil.copytree(template, folder / "run"))))

    results = []
    for number, when in points(name, fresh(), each=each):
        saves = fresh()
        code = forked(lambda: act_until(SCENARIOS[name], saves, number, when))  # noqa: B023
        assert code == -signal.SIGKILL, (number, when, code)
        found, wrong = look(name, saves)
        results.append(Killed(f"{when} call {number}", found, wrong or go_on(saves)))
    return results


def check(folder: Path, name: str, *, each: bool) -> None:
    folder.mkdir()
    results: list[Killed] = result_of(sweep, folder, name, each, timeout_s=1000)
    shutil.rmtree(folder)
    assert [killed for killed in results if killed.wrong] == []
    expected = SCENARIOS[name].may_be_newest | ({None} if name == "first save" else set())
    assert {killed.found for killed in results} == expected
    # Fewer would mean that the layer is passed by.
    assert len(results) >= SCENARIOS[name].at_least * (4 if each else 1)


@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_wherever_it_leaves_another_disk_leaves_a_whole_one_and_the_way_free(
    memory: Path, name: str
) -> None:
    check(memory / name, name, each=False)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_before_and_after_each_call_leaves_a_whole_disk_and_the_way_free(
    memory: Path, name: str
) -> None:
    check(memory / f"{name}, each call", name, each=True)


def sweep_twice(folder: Path, seed: int, cases: int) -> list[str]:
    """A save is killed, and then the restore after it is killed as well, each anywhere."""
    made = templates(folder, ["save", "save in the place of a damaged one"])
    dice = random.Random(seed)
    wrong = []
    for case in range(cases):
        name = sorted(made)[case % len(made)]
        saves = Saves(RunDir(Path(shutil.copytree(made[name], folder / "run"))))
        kills = [(dice.randrange(1, most), dice.choice(["before", "after"])) for most in (250, 120)]
        for (number, when), act in zip(kills, (save, restore), strict=True):
            scenario = SCENARIOS[name]._replace(act=act)
            forked(lambda: act_until(scenario, saves, number, when))  # noqa: B023
        problem = look(name, saves)[1] or go_on(saves)
        if problem:
            wrong.append(f"{name}, {kills}: {problem}")
        shutil.rmtree(saves.run.path)
    return wrong


def test_kill_of_a_restore_after_the_kill_of_a_save_leaves_the_same(memory: Path) -> None:
    folder = memory / "twice"
    folder.mkdir()
    assert result_of(sweep_twice, folder, 7, 40) == []
    shutil.rmtree(folder)


# Whole links

SETTINGS: dict[str, Any] = {
    "max_steps": 9,
    "checkpoint": {
        **{"steps": 3, "each_epoch": False, "keep_last": 1, "keep_best": 0},
        "background": True,
    },
}


def begun(path: Path) -> RunDir:
    """A run at step 4, of nine."""
    run = make_run(path, **SETTINGS)
    cut(run, 4)
    return run


def killed_link(run: RunDir, number: int, when: str) -> None:
    """A link to the end, killed at a call."""

    def kill(call: Call) -> None:
        if call.number == number:
            kill_here()

    with struck(run.path, **{when: kill}):
        link(run)


def wrong_after(run: RunDir, expected: dict[str, Any]) -> str:
    """What is wrong with a run whose link was killed: with what it left, and what comes of it."""
    known = max(saved_steps(run))
    found, bad = newest_verified(run)
    if bad or found < known:
        return f"found {found}, bad {bad}, known {known}"
    code = forked(lambda: complete(run))
    if code:
        return f"the next link ended with {code}"
    left = outcome(run)
    others = [part for part in expected if left.get(part) != expected[part]]
    # Only a clean end sweeps nothing: what the killed link left, the next one has removed.
    hidden = sorted(path.name for path in run.path.glob(".*.partial"))
    return f"{others} differ, {hidden} left" if others or hidden else ""


def complete(run: RunDir) -> None:
    ended = link(run)
    assert ended.how == "completed", ended


def uncut_outcome(path: Path) -> None:
    """Writes what a run without a break leaves; in a process that may have threads."""
    run = through(make_run(path, **SETTINGS))
    files.write_json(path.with_suffix(".json"), outcome(run))


def prepared(folder: Path) -> tuple[RunDir, dict[str, Any]]:
    """A run at step 4, and what it must leave."""
    assert forked(lambda: uncut_outcome(folder / "uncut")) == 0
    assert forked(lambda: begun(folder / "begun") and None) == 0
    return RunDir(folder / "begun"), files.read_json(folder / "uncut.json")


def calls_of_a_link(run: RunDir, report: Path) -> int:
    def count() -> None:
        calls: list[Call] = []
        with struck(run.path, calls.append):
            complete(run)
        files.write_json(report, len(calls))

    assert forked(count) == 0
    number: int = files.read_json(report)
    return number


def kill_links(folder: Path, seed: int, cases: int | None) -> tuple[int, list[str]]:
    """Links that are killed at random calls, or at all; how many were, and what was wrong."""
    template, expected = prepared(folder)
    copy = RunDir(Path(shutil.copytree(template.path, folder / "counted")))
    total = calls_of_a_link(copy, folder / "total.json")
    points = [(number, when) for number in range(1, total + 1) for when in ("before", "after")]
    if cases is not None:
        points = sorted(random.Random(seed).sample(points, cases))
    struck_ones, wrong = 0, []
    for number, when in points:
        run = RunDir(Path(shutil.copytree(template.path, folder / "run")))
        struck_ones += forked(lambda: killed_link(run, number, when)) == -signal.SIGKILL  # noqa: B023
        problem = wrong_after(run, expected)
        if problem:
            wrong.append(f"{when} call {number}: {problem}")
        shutil.rmtree(run.path)
    return struck_ones, wrong


def test_link_that_is_killed_at_a_call_is_followed_by_one_with_the_uncut_bytes(
    memory: Path,
) -> None:
    folder = memory / "links"
    folder.mkdir()
    number, wrong = result_of(kill_links, folder, 11, 24)
    assert wrong == [] and number >= 20


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_link_that_is_killed_at_any_call_is_followed_by_one_with_the_uncut_bytes(
    memory: Path,
) -> None:
    folder = memory / "all links"
    folder.mkdir()
    number, wrong = result_of(kill_links, folder, 0, None, timeout_s=3500)
    assert wrong == [] and number > 300


# Real calls of the system, those of other languages and of threads among them

SYSTEM_CALLS = (
    *("write", "pwrite64", "fsync", "rename", "openat", "linkat", "unlinkat", "unlink"),
    *("mkdir", "rmdir", "close", "mmap"),
)


def trace_link(run: RunDir, log: Path, *options: str) -> int:
    """A link under strace from its first step on; how it ended."""
    go, told = os.pipe()

    def wait_and_train() -> None:
        os.close(told)
        os.read(go, 1)
        link(run)

    pid = os.fork()
    if not pid:
        code = 70
        try:
            wait_and_train()
            code = 0
        finally:
            os._exit(code)
    os.close(go)
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-p", str(pid), "-o", str(log), *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    attached = "attached" in said
    os.close(told)
    if not attached:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tracer.communicate()
    if not attached:
        raise PermissionError(said)
    return code


def strace_links(folder: Path, seed: int, cases: int) -> tuple[int, list[str]]:
    """Links killed in front of calls of the system below the run."""
    template, expected = prepared(folder)
    dice = random.Random(seed)
    copy = RunDir(Path(shutil.copytree(template.path, folder / "counted")))
    log = folder / "strace.log"
    try:
        trace_link(copy, log, "-e", f"trace={','.join(SYSTEM_CALLS)}")
    except PermissionError as error:
        return -1, [str(error)]
    # strace counts for each thread by itself, and so does this.
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    points = set()
    for line in log.read_text().splitlines():
        found = re.match(r"(\d+) +(\w+)\(", line)
        if found is not None:
            counts[found[1], found[2]] += 1
            if str(copy.path) in line:
                points.add((found[2], counts[found[1], found[2]]))
    struck_ones, wrong = 0, []
    for name, number in dice.sample(sorted(points), min(cases, len(points))):
        run = RunDir(Path(shutil.copytree(template.path, folder / "run")))
        options = ("-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}")
        struck_ones += trace_link(run, log, *options) == -signal.SIGKILL
        problem = wrong_after(run, expected)
        if problem:
            wrong.append(f"{name} {number}: {problem}")
        shutil.rmtree(run.path)
    return struck_ones, wrong


@pytest.mark.parametrize(
    "cases", [16, pytest.param(400, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_link_that_is_killed_at_a_call_of_the_system_is_followed_by_one_with_the_uncut_bytes(
    memory: Path, cases: int
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to strike at calls that do not go through Python")
    folder = memory / f"strace {cases}"
    folder.mkdir()
    number, wrong = result_of(strace_links, folder, 3, cases, timeout_s=12 * cases + 100)
    if number < 0:
        pytest.skip(f"strace may not look at a process here: {wrong[0]}")
    assert wrong == [] and number >= min(cases, 100) * 3 // 4
