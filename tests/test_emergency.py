"""A failure in the training code: the step boundary before it is committed where it is intact."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bug_links import (
    Net,
    Noisy,
    assert_same,
    changes_said,
    link,
    loss_of,
    make_run,
    newest,
    steps_kept,
    through,
)
from torch.utils.data import IterableDataset

import hpcresume
from hpcresume import files
from hpcresume.errors import UsageError
from hpcresume.history import past_links
from hpcresume.run_dir import RunDir
from hpcresume.story import read_story
from hpcresume.training import emergency

Fail = Callable[["Training"], Any]


@pytest.fixture(autouse=True)
def _any_step_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """To remember the boundary behind it, on however slow a machine; see test_emergency_cost."""
    monkeypatch.setattr(emergency, "_SHORTEST_S", 0.0)
    monkeypatch.setattr(emergency, "_SHARE", math.inf)


class Numbers(IterableDataset[Any]):
    """A stream with a state of its own."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < 40:
            self.at += 1
            yield torch.full((4,), self.at / 40) + 0.1 * torch.randn(4)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Training:
    """Dropout, BatchNorm, a schedule, an average, a scaler; fails once, at a named place."""

    def __init__(self, place: str = "", step: int = 6, fail: Fail | None = None) -> None:
        self.place, self.step = place, step
        self.fail = fail
        self.failed = False
        self.stream = False
        self.accumulate = 1
        self.only_when_synced = False

    def at(self, place: str) -> None:
        if self.only_when_synced and not self.session.sync_gradients:
            return
        if place == self.place and self.session.global_step + 1 == self.step and not self.failed:
            self.failed = True
            if self.fail is not None:
                self.fail(self)
            raise RuntimeError(f"failed at: {place}")

    def __call__(self, session: hpcresume.Session) -> None:
        self.session = session
        self.model = Net()
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=40)
        self.scaler = torch.amp.GradScaler("cpu")
        self.counters = {"seen": 0}
        self.dice = np.random.default_rng(1)
        session.register(
            model=self.model,
            average=self.average,
            optimizer=self.optimizer,
            schedule=self.schedule,
            scaler=self.scaler,
            counters=self.counters,
            dice=self.dice,
        )
        loader = session.loader(
            Numbers() if self.stream else Noisy(), batch_size=4, shuffle=not self.stream
        )
        for batch in session.steps(loader, accumulate=self.accumulate):
            points = batch if self.stream else batch[1]
            # The rate is set by hand, as many do, and so has changed when a later line fails.
            self.optimizer.param_groups[0]["weight_decay"] = 0.01 * session.global_step
            points = points + 0.1 * float(self.dice.normal()) + random.gauss(0, 0.1)
            self.at("forward")
            loss = loss_of(self.model, points)
            self.at("backward")
            self.scaler.scale(loss).backward()
            self.at("optimizer")
            if session.sync_gradients:
                self.scaler.step(self.optimizer)
                self.at("after the optimizer")
                self.scaler.update()
                self.schedule.step()
                self.average.update_parameters(self.model)
                self.optimizer.zero_grad()
            self.counters["seen"] += len(points)
            session.log(loss=loss, noise=random.random())
            self.at("end")


def make(folder: Path, **config: Any) -> RunDir:
    return make_run(folder, max_steps=12, checkpoint={"each_epoch": False}, **config)


def unsaved(run: RunDir) -> list[str]:
    """Why boundaries were not saved."""
    records = [
        r for number in run.link_numbers() for r in files.read_lines(run.link(number).training)
    ]
    return [record["reason"] for record in records if record["kind"] == "save_failed"]


def reasons(run: RunDir) -> list[str]:
    """Why what was saved was saved."""
    records = [
        r for number in run.link_numbers() for r in files.read_lines(run.link(number).training)
    ]
    return [record["reason"] for record in records if record["kind"] == "saved"]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return through(make(tmp_path_factory.mktemp("uncut") / "run"), train=Training())


# It is intact


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_the_step_before_the_failed_one_is_saved_and_goes_on_to_the_uncut_bytes(
    tmp_path: Path, uncut: RunDir, place: str
) -> None:
    run = make(tmp_path / "run")
    train = Training(place)
    ended = link(run, train)
    assert (ended.how, ended.why) == ("failed", f"RuntimeError: failed at: {place}")
    assert steps_kept(run) == [5]
    assert reasons(run) == ["emergency"]
    through(run, train=train)
    assert_same(run, uncut)
    assert changes_said(run) == []


def test_three_links_that_fail_one_after_the_other_go_on_to_the_uncut_bytes(
    tmp_path: Path, uncut: RunDir
) -> None:
    run = make(tmp_path / "run")
    for place, step in (("forward", 3), ("optimizer", 4), ("backward", 11)):
        assert link(run, Training(place, step)).how == "failed"
    assert steps_kept(run) == [2, 3, 10]
    assert_same(through(run, train=Training()), uncut)


def test_half_an_accumulated_step_is_done_again(tmp_path: Path) -> None:
    runs = [make(tmp_path / name) for name in ("uncut", "run")]
    # Step 5 is the second of its epoch: three batches, of which the last fails.
    trainings = [Training(), Training("optimizer", step=5)]
    for train in trainings:
        train.accumulate = 3
    trainings[1].only_when_synced = True
    through(runs[0], train=trainings[0])
    assert link(runs[1], trainings[1]).how == "failed"
    assert steps_kept(runs[1]) == [4]
    assert_same(through(runs[1], train=trainings[1]), runs[0])


def test_a_stream_goes_on_behind_the_last_whole_step(tmp_path: Path) -> None:
    runs = [make(tmp_path / name) for name in ("uncut", "run")]
    trainings = [Training(), Training("optimizer")]
    for train in trainings:
        train.stream = True
    through(runs[0], train=trainings[0])
    assert link(runs[1], trainings[1]).how == "failed"
    assert_same(through(runs[1], train=trainings[1]), runs[0])


def test_a_failure_while_a_batch_is_read_is_as_harmless(tmp_path: Path) -> None:
    broken = [True]

    class Breaks(Noisy):
        def __getitem__(self, index: int) -> Any:
            if broken and self.reads == 4 * 5:
                broken.clear()
                raise OSError(5, "Input/output error")
            self.reads += 1
            return super().__getitem__(index)

        reads = 0

    def train(session: hpcresume.Session) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        session.register(model=model, optimizer=optimizer)
        for _, points in session.steps(session.loader(Breaks(), batch_size=4, shuffle=True)):
            loss_of(model, points).backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(noise=random.random())

    run = make(tmp_path / "run")
    assert "Input/output error" in link(run, train).why
    assert steps_kept(run) == [5]
    whole = through(make(tmp_path / "uncut"), train=train)
    assert_same(through(run, train=train), whole)


def test_what_the_failed_step_reported_as_the_best_is_not_in_the_state(
    tmp_path: Path, uncut: RunDir
) -> None:
    run = make(tmp_path / "run")
    train = Training("optimizer", fail=lambda training: training.session.best(score=0.1))
    link(run, train)
    assert newest(run).manifest.metric is None
    assert_same(through(run, train=train), uncut)


def test_a_chain_sees_that_the_failed_link_came_further(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    link(run, Training("forward"))
    (past,) = past_links(read_story(run), {})
    assert (past.first_step, past.committed_step) == (0, 5)
    assert past.failure is not None and past.failure.step == 6


# It is not, or cannot be told


def learn(training: Training) -> None:
    with torch.no_grad():
        training.average.module.up.weight.add_(1)


def clip(training: Training) -> None:
    training.model.up.weight.data.clamp_(-0.01, 0.01)


@pytest.mark.parametrize(
    ("place", "fail", "why"),
    [
        ("after the optimizer", None, "the step of 'optimizer' had begun"),
        ("end", None, "the step of 'optimizer' had begun"),
        ("backward", learn, "the state of 'average' had changed (module.up.weight)"),
        ("backward", clip, "tensors had changed past autograd's counters"),
        ("backward", lambda t: t.schedule.step(), "the state of 'schedule' had changed"),
    ],
    ids=["optimizer", "end", "average", "weights", "schedule"],
)
def test_what_is_not_intact_is_not_saved_and_it_is_said_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, fail: Fail | None, why: str
) -> None:
    run = make(tmp_path / "run")
    assert link(run, Training(place, fail=fail)).how == "failed"
    assert steps_kept(run) == []
    assert unsaved(run) == [f"emergency: {why}"]
    assert f"step 5 is not saved in spite of the failure: {why}" in caplog.text


def test_a_run_that_lost_a_step_goes_on_from_the_checkpoint_before(
    tmp_path: Path, uncut: RunDir
) -> None:
    run = make_run(tmp_path / "run", max_steps=12, checkpoint={"steps": 4, "each_epoch": False})
    link(run, Training("after the optimizer"))
    assert steps_kept(run) == [4]
    assert_same(through(run, train=Training()), uncut)


def test_a_boundary_that_is_committed_already_is_not_saved_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", max_steps=12, checkpoint={"steps": 5, "each_epoch": False})
    link(run, Training("forward"))
    assert reasons(run) == ["steps"]
    assert unsaved(run) == []


def test_a_failure_in_the_first_step_has_nothing_to_save(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    link(run, Training("forward", step=1))
    assert steps_kept(run) == [] and unsaved(run) == []


def leave(training: Training) -> None:
    raise SystemExit(3)


def misuse(training: Training) -> None:
    raise UsageError("no")


@pytest.mark.parametrize("fail", [leave, misuse], ids=["exit", "misuse"])
def test_an_end_that_is_no_failure_of_the_code_saves_nothing(tmp_path: Path, fail: Fail) -> None:
    run = make(tmp_path / "run")
    assert link(run, Training("forward", fail=fail)).how == "failed"
    assert steps_kept(run) == [] and unsaved(run) == []


def test_a_state_behind_a_loss_that_was_not_finite_is_not_saved(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    train = Training("forward")
    train.at = lambda place: (  # type: ignore[method-assign]
        train.session.log(loss=float("nan"))
        if place == "end" and train.session.global_step == 4
        else Training.at(train, place)
    )
    assert link(run, train).how == "failed"
    assert steps_kept(run) == []
    (why,) = unsaved(run)
    assert why.startswith("emergency: NonFinite: loss was nan in step 5")


def test_the_exception_is_told_although_the_save_fails_as_well(tmp_path: Path) -> None:
    run = make(tmp_path / "run")

    def overtaken(training: Training) -> None:
        run.claim_link({"job": None, "num_tasks": 1, "foreground": True})

    ended = link(run, Training("forward", fail=overtaken))
    assert ended.why == "RuntimeError: failed at: forward"
    (why,) = unsaved(run)
    assert "Fenced" in why
