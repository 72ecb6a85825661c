"""A disk that refuses, at any call and for real: the checkpoints before stay, training goes on, and
what comes later is saved as if nothing had been.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bug_links import Train, link, make_run, ordinary, outcome, steps_kept, through
from fault_layer import (
    ALL,
    SYNCS,
    Call,
    Saves,
    disk_of_its_own,
    fast_folder,
    forked,
    missing_rights,
    new_saves,
    newest_verified,
    payload,
    result_of,
    saved_steps,
    struck,
    told_by_fork,
)

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.retention import Policy
from hpcresume.errors import HpcResumeError
from hpcresume.journal import Journal
from hpcresume.run_dir import RunDir

ERRORS = ("ENOSPC", "EDQUOT", "EIO")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


class Refusing:
    """Refuses the call of a number, once, and notes what else is asked for."""

    def __init__(self, number: int, error: str) -> None:
        self.number = number
        self.error = getattr(errno, error)
        self.calls = 0
        self.syncs: list[int] = []
        """The calls that make lines of a journal or metric log survive."""
        self.refused: Call | None = None
        self._unsynced: tuple[int, int] | None = None
        self.synced_again = False
        """Whether a file whose fsync was refused was synced once more: the second time the system
        may say that all is well, although the pages are gone."""

    def before(self, call: Call) -> None:
        self.calls = call.number
        if call.name in SYNCS and call.path.endswith(".jsonl"):
            self.syncs.append(call.number)
        if self.refused is None and call.number == self.number:
            full = self.error in (errno.ENOSPC, errno.EDQUOT)
            if full and not call.changes and call.name != "close":
                # Only who writes finds a disk full.
                return
            self.refused = call
            if call.name in SYNCS:
                self._unsynced = _file(call.path)
                if self._unsynced:
                    # Held for as long as this process lives: the number of a file that is gone is
                    # given to another one, on most disks.
                    os.open(call.path, os.O_RDONLY)
            raise OSError(self.error, os.strerror(self.error), call.path)
        if call.name in SYNCS and self._unsynced and _file(call.path) == self._unsynced:
            self.synced_again = True


def _file(path: str) -> tuple[int, int] | None:
    """What a path leads to, where that is a file; a directory has no other way to be synced."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


# Every call of a save


def save(saves: Saves, journal: Journal) -> None:
    """What a link does for a save: room, commit, journal, remove what is not kept."""
    saves.store.make_room(ALL, Policy(last=2), num_bytes=1, num_files=1)
    saves.commit(20)
    journal.write("saved", step=20)
    saves.store.prune(ALL, Policy(last=1, best=0))


class Refused(NamedTuple):
    error: str
    call: str
    told: bool
    found: int | None
    wrong: str


def prepared(folder: Path) -> Saves:
    saves = new_saves(folder)
    saves.run.claim_link({"job": None})
    for step in (5, 10):
        saves.commit(step)
    return saves


def refuse_everywhere(folder: Path) -> list[Refused]:
    """Each call of a save is refused with each error that it may have."""
    whole = new_saves(folder / "whole")
    expected = {step: payload(whole.commit(step).path) for step in (10, 20, 30)}
    template = prepared(folder / "template")
    results = []
    for error in ERRORS:
        for number in range(1, 100_000):
            shutil.rmtree(folder / "run", ignore_errors=True)
            saves = Saves(RunDir(Path(shutil.copytree(template.run.path, folder / "run"))))
            journal = Journal(saves.run.link(1).training, link=1, job=None)
            disk = Refusing(number, error)
            told = False
            with struck(saves.run.path, disk.before):
                try:
                    save(saves, journal)
                except OSError as refusal:
                    told = refusal.errno == disk.error
            journal.close()
            if disk.refused is None:
                if disk.calls < number:
                    break
                continue
            found, wrong = look(saves, expected)
            wrong = wrong or ("the file was synced again" if disk.synced_again else "")
            call = f"{disk.refused.name} {Path(disk.refused.path).name}"
            results.append(Refused(error, call, told, found, wrong))
    return results


def look(saves: Saves, expected: dict[int, dict[str, bytes]]) -> tuple[int | None, str]:
    """What is there after a refusal, and what is wrong with that or with the saves that follow."""
    found = saves.latest()
    step = None if found is None else found.step
    if found is None or step not in (10, 20) or saves.told:
        return step, f"found {step}, damaged: {saves.told}"
    if payload(found.path) != expected[step]:
        return step, "found other bytes"
    # The next save of the same link, before anything was swept.
    later = step + 10
    saves.commit(later)
    found = saves.latest()
    if found is None or found.step != later or payload(found.path) != expected[later]:
        return step, f"saved step {later}, found {found}"
    saves.store.sweep(2)
    return step, f"not swept: {left}" if (left := saves.hidden()) else ""


@pytest.fixture(scope="module")
def refused(memory: Path) -> list[Refused]:
    folder = memory / "refused"
    folder.mkdir()
    found: list[Refused] = result_of(refuse_everywhere, folder)
    shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("error", ERRORS)
def test_refused_call_leaves_a_whole_checkpoint_and_the_next_save_works(
    refused: list[Refused], error: str
) -> None:
    own = [result for result in refused if result.error == error]
    assert len(own) > 60
    assert [result for result in own if result.wrong] == []


def test_commit_that_was_refused_says_so(refused: list[Refused]) -> None:
    # What is found although it was refused was refused after it was there.
    assert [result for result in refused if result.found == 10 and not result.told] == []
    assert {result.found for result in refused} == {10, 20}


# Every call of a restore

#: What a system says that cannot tell at present: no descriptor, no memory, a server that is away.
PASSING = ("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ETIMEDOUT", "EACCES")


def refuse_restores(folder: Path) -> tuple[int, list[str]]:
    """How many calls were refused, one at a time, and where that did harm."""
    saves = prepared(folder / "run")
    there = sorted(os.listdir(saves.run.path))
    number, wrong = 0, []
    while True:
        number += 1
        disk = Refusing(number, PASSING[number % len(PASSING)])
        with struck(saves.run.path, disk.before):
            try:
                saves.restored()
            except OSError as refusal:
                if refusal.errno != disk.error:
                    wrong.append(f"{disk.refused}: raised {refusal!r}")
        if disk.refused is None:
            return number - 1, wrong
        if saves.told or sorted(os.listdir(saves.run.path)) != there or saves.latest_step() != 10:
            wrong.append(f"{disk.refused}: told {saves.told}")
            return number, wrong


def test_passing_error_of_a_restore_is_told_and_quarantines_nothing(memory: Path) -> None:
    folder = memory / "restores"
    folder.mkdir()
    number, wrong = result_of(refuse_restores, folder)
    assert wrong == [] and number > 30


# Every call of a link

SETTINGS: dict[str, Any] = {
    "max_steps": 9,
    "checkpoint": {"steps": 3, "each_epoch": False, "keep_last": 2, "keep_best": 0},
}


def refused_link(run: RunDir, number: int, error: str) -> dict[str, Any]:
    """A whole link in which one call is refused: how it ended, and what was refused."""
    disk = Refusing(number, error)
    with struck(run.path, disk.before):
        try:
            how = link(run).how
        except (OSError, HpcResumeError):
            # Before it had begun to train: its configuration, its claim, its journal.
            how = "not begun"
    call = disk.refused
    return {
        "how": how,
        "call": None if call is None else f"{call.name} {os.path.relpath(call.path, run.path)}",
        "calls": disk.calls,
        "syncs": disk.syncs,
        "synced again": disk.synced_again,
    }


def complete(run: RunDir) -> dict[str, Any]:
    """A link to the end, and what the run consists of then."""
    ended = link(run)
    assert ended.how == "completed", ended
    return outcome(run)


def uncut_outcome(path: Path) -> dict[str, Any]:
    return outcome(through(make_run(path, **SETTINGS)))


def refuse_links(folder: Path, seed: int, cases: int | None) -> list[str]:
    """What was wrong with links that were refused one call."""
    expected = told_by_fork(lambda: uncut_outcome(folder / "uncut"))
    total = told_by_fork(lambda: refused_link(make_run(folder / "counted", **SETTINGS), 0, "EIO"))
    points = [(number, error) for number in range(1, total["calls"] + 1) for error in ERRORS]
    if cases is not None:
        syncs = [(number, "EIO") for number in total["syncs"]]
        points = sorted({*syncs, *random.Random(seed).sample(points, cases)})
    wrong = []
    for number, error in points:
        shutil.rmtree(folder / "run", ignore_errors=True)
        run = make_run(folder / "run", **SETTINGS)
        told = told_by_fork(lambda: refused_link(run, number, error))  # noqa: B023
        problem = wrong_after(run, told, expected)
        if problem:
            wrong.append(f"{error} at call {number}, {told['call']}, {told['how']}: {problem}")
    return wrong


def wrong_after(run: RunDir, told: dict[str, Any], expected: dict[str, Any]) -> str:
    saving = ".partial" in (told["call"] or "") and "checkpoint-" in told["call"]
    if told["how"] not in ("completed", "failed", "not begun"):
        return "the link ended otherwise"
    if told["synced again"]:
        return "a file whose fsync had failed was synced again"
    records = list(files.read_lines(run.link(1).training))
    failures = [record for record in records if record["kind"] == "save_failed"]
    last = [record for record in failures if record["step"] == SETTINGS["max_steps"]]
    if saving and not failures and ".checkpoint-" in told["call"]:
        return "nobody was told"
    if saving and told["how"] != "completed" and not last:
        return "training did not go on"
    newest, bad = newest_verified(run)
    known = max(saved_steps(run), default=0)
    if bad or newest < known:
        return f"found {newest}, damaged {bad}, known {known}"
    left = told_by_fork(lambda: complete(run))
    others = [part for part in expected if left.get(part) != expected[part]]
    hidden = sorted(path.name for path in run.path.glob(".*.partial"))
    return f"{others} differ, {hidden} left" if others or hidden else ""


def test_link_that_is_refused_a_call_trains_on_and_what_follows_has_the_uncut_bytes(
    memory: Path,
) -> None:
    folder = memory / "links"
    folder.mkdir()
    assert result_of(refuse_links, folder, 5, 20) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_link_that_is_refused_any_call_trains_on_and_what_follows_has_the_uncut_bytes(
    memory: Path,
) -> None:
    folder = memory / "all links"
    folder.mkdir()
    assert result_of(refuse_links, folder, 0, None, timeout_s=3500) == []


# Disks that are really full


def fill(folder: Path, with_what: str) -> None:
    """Take all the room that a disk has, in bytes or in files."""
    number = 0
    try:
        while True:
            number += 1
            with (folder / f"ballast {number}").open("wb", buffering=0) as file:
                size = 1 << 16
                while with_what == "bytes" and size:
                    try:
                        while file.write(bytes(size)) == size:
                            pass
                        size >>= 1
                    except OSError:
                        size >>= 1
                os.fsync(file.fileno())
                if with_what == "bytes":
                    return
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def make_space(folder: Path) -> None:
    for path in folder.glob("ballast *"):
        path.unlink()


FULL_SETTINGS: dict[str, Any] = {
    "max_steps": 14,
    "checkpoint": {"steps": 2, "each_epoch": False, "keep_last": 2, "keep_best": 0},
}


def training_on_a_disk(disk: Path, full_from: int, until: int, with_what: str) -> Train:
    """Ordinary training; the disk is full from the beginning of one step to that of another."""

    def each(session: hpcresume.Session) -> None:
        if session.global_step == full_from:
            fill(disk, with_what)
        if session.global_step == until:
            make_space(disk)

    return lambda session: ordinary(session, each=each)


def full_disk(folder: Path, system: str, with_what: str, until: int) -> dict[str, Any]:
    """A run on a small disk that is full from step 5 to another; what came of it."""
    torch.set_num_threads(1)
    expected = told_by_fork(lambda: outcome(through(make_run(folder / "uncut", **FULL_SETTINGS))))
    with disk_of_its_own(folder, system, size_bytes=3 << 20, num_files=220) as disk:
        run = make_run(disk / "run", **FULL_SETTINGS)

        def first() -> list[str]:
            ended = link(run, training_on_a_disk(disk, 5, until, with_what))
            return [ended.how, ended.why]

        how, why = told_by_fork(first)
        newest, bad = newest_verified(run)
        make_space(disk)
        records = list(files.read_lines(run.link(1).training))
        if how != "completed":
            assert forked(lambda: complete(run) and None) == 0
        left = told_by_fork(lambda: outcome(run))
        return {
            "how": how,
            "why": why,
            "newest": newest,
            "bad": bad,
            "refused": [r["step"] for r in records if r["kind"] == "save_failed"],
            "reasons": sorted({r["reason"][:23] for r in records if r["kind"] == "save_failed"}),
            "different": [part for part in expected if left.get(part) != expected[part]],
            "kept": steps_kept(run),
            "hidden": sorted(path.name for path in run.path.glob(".*.partial")),
        }


DISKS = [("tmpfs", "bytes"), ("tmpfs", "files"), ("ext4", "bytes"), ("ext4", "files")]


@pytest.mark.parametrize(("system", "with_what"), DISKS)
def test_training_goes_on_while_the_disk_is_full_and_saves_again_when_there_is_room(
    memory: Path, system: str, with_what: str
) -> None:
    if reason := missing_rights(system):
        pytest.skip(reason)
    folder = memory / f"full {system} {with_what}"
    folder.mkdir()
    found = result_of(full_disk, folder, system, with_what, 10)
    assert (found["how"], found["newest"], found["bad"]) == ("completed", 14, {}), found
    assert found["refused"] == [6, 8, 10] and found["reasons"] == ["No space left on device"]
    assert found["different"] == [] and found["kept"] == [12, 14] and found["hidden"] == []


@pytest.mark.parametrize(("system", "with_what"), DISKS)
def test_run_whose_link_ends_on_a_full_disk_is_completed_by_the_next(
    memory: Path, system: str, with_what: str
) -> None:
    if reason := missing_rights(system):
        pytest.skip(reason)
    folder = memory / f"ends {system} {with_what}"
    folder.mkdir()
    found = result_of(full_disk, folder, system, with_what, 99)
    assert (found["how"], found["newest"], found["bad"]) == ("failed", 4, {}), found
    assert "could not be saved" in found["why"]
    assert found["different"] == [] and found["kept"] == [12, 14] and found["hidden"] == []
