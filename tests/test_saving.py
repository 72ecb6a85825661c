"""Saves in the background: what they hold, when they come, and how what goes wrong is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import checkpoints, link, make_run, newest, outcome, steps_kept, through
from safetensors.torch import load_file
from torch import nn

import hpcresume
from hpcresume import files
from hpcresume.chain import Cause
from hpcresume.checkpoint import disk
from hpcresume.checkpoint.retention import Policy
from hpcresume.checkpoint.store import Store
from hpcresume.journal import lineage
from hpcresume.run_dir import RunDir
from hpcresume.training import saving

OFTEN = {"steps": 1, "each_epoch": False, "background": True}


def records(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [r for r in files.read_lines(run.link(1).training) if r["kind"] == kind]


class SlowDisk:
    """Lets the first commit wait until it is told to go on."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: OSError | None = None) -> None:
        self.go_on = threading.Event()
        self.began = threading.Event()
        real = Store.commit

        def commit(store: Store, *args: Any, **kwargs: Any) -> Any:
            first = not self.began.is_set()
            self.began.set()
            assert self.go_on.wait(30)
            if first and fails is not None:
                raise fails
            return real(store, *args, **kwargs)

        patch.setattr(Store, "commit", commit)


def counting(disk: SlowDisk, until: int, weights: list[torch.Tensor] | None = None) -> Any:
    """Training whose weight is the step; the disk goes on when so many steps are done."""

    def train(session: hpcresume.Session) -> None:
        model = nn.Linear(1, 1)
        session.register(model=model)
        for _ in session.steps(list(range(100))):
            with torch.no_grad():
                model.weight.fill_(session.global_step + 1)
            if session.global_step == until:
                assert disk.began.wait(30)
                disk.go_on.set()

    return train


def test_a_save_holds_what_was_there_when_it_was_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint={**OFTEN, "keep_last": 9})
    through(run, train=counting(SlowDisk(monkeypatch), until=5))
    held = {
        found.step: float(load_file(found.path / "model.safetensors")["weight"])
        for found in checkpoints(run)
    }
    assert 1 in held and 8 in held
    assert held == {step: float(step) for step in held}


def test_what_falls_due_while_a_save_is_written_comes_after_it_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint={**OFTEN, "keep_last": 9})
    through(run, train=counting(SlowDisk(monkeypatch), until=5))
    saved = [record["step"] for record in records(run, "saved")]
    # Step 1 was being written until the sixth step was under way.
    assert saved[:1] == [1] and not {2, 3, 4, 5} & set(saved)
    assert saved == sorted(set(saved)) and saved[-1] == 8


def test_a_disk_that_refuses_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(monkeypatch, OSError(28, "No space left on device"))
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=OFTEN)
    through(run, train=counting(slow, until=5))
    (refused,) = records(run, "save_failed")
    assert refused["step"] == 1 and refused["reason"].startswith("No space left on device")
    assert newest(run).step == 8


def test_a_link_that_was_taken_over_leaves_at_a_boundary_without_a_word_in_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowDisk(monkeypatch)
    run = make_run(tmp_path / "run", max_steps=50, checkpoint=OFTEN)

    def train(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(1, 1))
        for _ in session.steps(list(range(100))):
            if session.global_step == 1:
                run.claim_link({"job": None})
                slow.go_on.set()

    ended = link(run, train)
    assert ended.how == "failed" and ended.why.startswith("Fenced")
    assert steps_kept(run) == []


def test_saving_by_itself_ends_with_the_bytes_of_a_run_that_waits(tmp_path: Path) -> None:
    waits = outcome(through(make_run(tmp_path / "waits")))
    own = {"minutes": "auto", "background": True}
    itself = outcome(through(make_run(tmp_path / "itself", checkpoint=own)))
    assert [part for part in waits if waits[part] != itself[part] and part != "state"] == []


def test_nothing_goes_to_make_room_while_the_newest_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"steps": 2, "keep_last": 3, "each_epoch": False}
    run = through(make_run(tmp_path / "run", max_steps=6, checkpoint=kept))
    full = disk.Room(where="the disk", free_bytes=None, free_files=8)
    monkeypatch.setattr(disk, "room_of_disk", lambda path: full)
    store, over = Store(run, run.identify()["id"]), lineage(run)
    weights = newest(run).path / "model.safetensors"
    data = weights.read_bytes()
    asked = {"num_bytes": 0, "num_files": 1}
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    store.make_room(over, Policy(last=2, best=0), **asked)
    assert steps_kept(run) == [2, 4, 6]
    weights.write_bytes(data)
    store.make_room(over, Policy(last=2, best=0), **asked)
    assert steps_kept(run) == [4, 6]


def test_ends_without_a_loss_are_words_of_the_chain() -> None:
    assert {cause.value for cause in Cause} >= saving._HARMLESS
