"""The power fails: what was acknowledged is there afterwards, and what is found is whole.

A real ext4 on a loop device is shut down without a flush: at every call that changes the disk, and
at random moments of real links. Needs root; without it, nothing here can be tried.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bug_links import link, make_run, outcome, through
from fault_layer import (
    ALL,
    Call,
    Saves,
    as_text,
    cut_power,
    fast_folder,
    forked,
    kill_here,
    leave_the_mounts_of_others,
    make_ext4,
    missing_rights,
    mount_ext4,
    new_saves,
    newest_verified,
    objects_at,
    result_of,
    saved_steps,
    struck,
    told_by_fork,
    unmount,
)

from hpcresume import files
from hpcresume.checkpoint.manifest import NAME, hash_stream, read_pieces
from hpcresume.checkpoint.retention import Policy
from hpcresume.journal import Journal
from hpcresume.run_dir import RunDir

FINAL = ["model.safetensors", "templates/chat.jinja"]


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def rights() -> None:
    if reason := missing_rights("ext4"):
        pytest.skip(reason)


class Disk:
    """A small ext4 that can lose its power."""

    def __init__(self, folder: Path, size_bytes: int = 6 << 20) -> None:
        leave_the_mounts_of_others()
        self.image = folder / "image"
        self.path = folder / "disk"
        self.path.mkdir()
        make_ext4(self.image, size_bytes, 500)
        self.on()

    def on(self) -> None:
        mount_ext4(self.image, self.path)

    def off(self) -> None:
        """In order: everything is written."""
        unmount(self.path)

    def without_power(self) -> None:
        """What is on the disk now is all that there is; then it is on again."""
        cut_power(self.path)
        unmount(self.path)
        mount_ext4(self.image, self.path)


# A cut at every call


def save(saves: Saves, told: int) -> None:
    """What a link does for a save and at its end; what is done is told at once."""
    journal = Journal(saves.run.link(1).training, link=1, job=None)
    saves.commit(20)
    os.write(told, b"committed ")
    journal.write("saved", step=20)
    journal.close()
    os.write(told, b"saved ")
    saves.store.prune(ALL, Policy(last=1, best=0))
    saves.finish(FINAL)
    os.write(told, b"finished ")


def save_until(saves: Saves, told: int, disk: Path, number: int) -> None:
    def before(call: Call) -> None:
        if call.number == number:
            cut_power(disk)
            kill_here()

    with struck(saves.run.path, before):
        save(saves, told)


def calls_of(saves: Saves) -> list[Call]:
    calls: list[Call] = []
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with struck(saves.run.path, calls.append):
        save(saves, nowhere)
    return calls


def what_is_left(saves: Saves, told: str) -> str:
    """What is wrong after a cut; empty where nothing is."""
    found = saves.latest()
    step = 0 if found is None else found.step
    if saves.told or step not in (10, 20):
        return f"found step {step}, damaged: {saves.told}"
    if "committed" in told and step != 20:
        return "step 20 had been committed"
    if as_text(saves.restored()) != as_text(objects_at(step)):
        return f"step {step} holds something else"
    if "saved" in told and saved_steps(saves.run) != [20]:
        return "the record was lost"
    final = saves.run.final_model
    if "finished" in told and not final.exists():
        return "the finished model was lost"
    if final.exists():
        manifest = files.read_json(final / NAME)
        for entry in manifest["files"]:
            size, chunks = hash_stream(read_pieces(final / entry["name"]))
            if [size, list(chunks)] != [entry["bytes"], entry["chunks"]]:
                return f"{entry['name']} of the finished model is not whole"
    saves.store.sweep(2)
    saves.commit(30, 2)
    return "" if saves.latest_step() == 30 and not saves.hidden() else "the next save was not kept"


def cut_everywhere(folder: Path) -> tuple[int, list[str], list[str]]:
    """How many cuts there were; what was told before them; what was wrong after them."""
    disk = Disk(folder)
    saves = new_saves(disk.path / "run")
    saves.run.claim_link({"job": None})
    saves.commit(5)
    saves.commit(10)
    disk.off()
    template = shutil.copy(disk.image, folder / "template")
    disk.on()
    calls = [Call(*call) for call in told_by_fork(lambda: calls_of(saves))]
    points = sorted({1, len(calls) + 1, *(call.number + 1 for call in calls if call.changes)})
    tellings, wrong = [], []
    for number in points:
        disk.off()
        shutil.copy(template, disk.image)
        disk.on()
        here, there = os.pipe()
        code = forked(lambda: save_until(saves, there, disk.path, number))  # noqa: B023
        os.close(there)
        with open(here) as file:
            told = file.read()
        tellings.append(told)
        if code != -signal.SIGKILL:
            # Behind the last call: the power fails when all is done.
            assert code == 0 and number == len(calls) + 1, (code, number)
            cut_power(disk.path)
        unmount(disk.path)
        disk.on()
        problem = what_is_left(saves, told)
        if problem:
            wrong.append(f"before call {number}, {calls[number - 2]}, told '{told}': {problem}")
    disk.off()
    return len(points), sorted(set(tellings)), wrong


def test_power_that_fails_at_any_call_takes_nothing_that_was_acknowledged(memory: Path) -> None:
    folder = memory / "calls"
    folder.mkdir()
    number, told, wrong = result_of(cut_everywhere, folder)
    assert wrong == []
    done = "committed saved finished "
    assert number > 60 and told == sorted(["", "committed ", "committed saved ", done])


# Cuts at random moments of whole links

SETTINGS: dict[str, Any] = {
    "max_steps": 40,
    "checkpoint": {"steps": 1, "each_epoch": False, "keep_last": 2, "background": True},
}


def telling_link(run: RunDir, told: int) -> None:
    """A link that tells each step when its record is in the journal."""
    write = Journal.write

    def telling(journal: Journal, kind: str, **fields: Any) -> Any:
        record = write(journal, kind, **fields)
        if kind in ("saved", "completed"):
            os.write(told, f"{fields['step']} {kind}\n".encode())
        return record

    Journal.write = telling  # type: ignore[method-assign]
    link(run)


def uncut_outcome(path: Path) -> dict[str, Any]:
    return outcome(through(make_run(path, **SETTINGS)))


def cut_links(folder: Path, seed: int, cuts: int) -> tuple[int, list[str]]:
    """Runs whose links lose their power; how many acknowledgements came, and what was wrong."""
    expected = told_by_fork(lambda: uncut_outcome(folder / "uncut"))
    dice = random.Random(seed)
    disk = Disk(folder, 24 << 20)
    acknowledged, wrong = 0, []
    run, known = make_run(disk.path / "run 0", **SETTINGS), 0
    for cut in range(cuts):
        here, there = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                telling_link(run, there)
            finally:
                os._exit(0)
        os.close(there)
        with open(here, "rb", buffering=0) as file:
            text = b""
            # A link may be cut before its first save.
            for _ in range(dice.choice([0, 1, 1, 2, 5, 9])):
                text += file.read(1 << 16)
            time.sleep(dice.random() * 0.02)
            # What is told while the power fails is told to nobody: a kernel that lives on, other
            # than one without power, may then call an fsync done that is not.
            os.set_blocking(here, False)
            text += file.read() or b""
            cut_power(disk.path)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        unmount(disk.path)
        disk.on()
        lines = text.decode().splitlines()
        acknowledged += len(lines)
        known = max([known, *(int(line.split()[0]) for line in lines)])
        completed = any(line.endswith("completed") for line in lines)
        found, bad = newest_verified(run)
        # A step whose record the power took is completed by the next link, and not saved again.
        if bad or found < known or known not in [0, *saved_steps(run, "saved", "completed")]:
            wrong.append(f"cut {cut}: found {found}, damaged {bad}, acknowledged {known}")
        if completed or cut == cuts - 1:
            left = told_by_fork(lambda: outcome(through(run)))  # noqa: B023
            others = [part for part in expected if left.get(part) != expected[part]]
            if others:
                wrong.append(f"cut {cut}: {others} differ in the end")
            shutil.rmtree(run.path)
            run, known = make_run(disk.path / f"run {cut + 1}", **SETTINGS), 0
    disk.off()
    return acknowledged, wrong


@pytest.mark.parametrize(
    "cuts", [24, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_power_that_fails_at_any_moment_takes_nothing_that_was_acknowledged(
    memory: Path, cuts: int
) -> None:
    folder = memory / f"moments {cuts}"
    folder.mkdir()
    acknowledged, wrong = result_of(cut_links, folder, cuts, cuts, timeout_s=100 + 5 * cuts)
    assert wrong == [] and acknowledged >= cuts
