"""Resume bugs of the Hugging Face Trainer that were really reported, and are not ours."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bug_links import (
    PER_EPOCH,
    Call,
    Killable,
    Noisy,
    Ranked,
    Seen,
    assert_exact,
    assert_same,
    checkpoints,
    cut,
    ids_of,
    link,
    log_lines,
    make_run,
    newest,
    ordinary,
    series,
    steps_kept,
    through,
    two_ranks,
    watched,
)
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import RandomSampler

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.images import verify
from hpcresume.errors import CheckpointError
from hpcresume.run_dir import RunDir


def test_restart_goes_on_with_the_dropout_of_the_uncut_run(tmp_path: Path) -> None:
    """Hugging Face #11323, #11504, #12942: results differ after a restart, RNG was not saved."""
    assert_exact(tmp_path, (4, 11), (1, 1, 2, 20))


def test_random_numbers_are_restored_at_the_end_of_an_epoch_too(tmp_path: Path) -> None:
    """Hugging Face #17032: checkpoints at an epoch's end do not reload the RNG."""
    assert_exact(tmp_path, (PER_EPOCH, 2 * PER_EPOCH), (PER_EPOCH, PER_EPOCH, 2 * PER_EPOCH))


# Three workers on a machine of two cores: torch says that this may be slow.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_augmentation_goes_on_where_it_was_in_mid_epoch(tmp_path: Path, workers: int) -> None:
    """Hugging Face #39215, PR#46628: RNG is restored after the first fetch has drawn from it."""
    size = {"max_steps": 10, "args": {"workers": workers}}
    assert_exact(tmp_path, (3, 9), **size)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_augmentation_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Hugging Face #39215, PR#46628: skipped batches advance the RNG of whoever reads them."""
    uncut, run = (make_run(tmp_path / name, max_steps=10) for name in ("uncut", "cut"))

    def with_workers(session: hpcresume.Session, number: int) -> None:
        noise = []
        loader = session.loader(Noisy(), batch_size=4, shuffle=True, num_workers=number)
        session.register(config={})
        for _, points in session.steps(loader):
            noise.append(points.sum().item().hex())
            session.log(noise=noise[-1])

    through(uncut, train=partial(with_workers, number=0))
    for step, number in ((3, 3), (9, 0)):
        cut(run, step, partial(with_workers, number=number))
    assert link(run, partial(with_workers, number=1)).how == "completed"
    assert series(run, "noise") == series(uncut, "noise")


class Halves(NamedTuple):
    """A run of two ranks at step 5, and the samples that both have trained on."""

    run: RunDir
    consumed: Seen

    def copy(self, folder: Path) -> RunDir:
        return RunDir(Path(shutil.copytree(self.run.path, folder / "run")))


def both(told: list[Ranked], how: str) -> Seen:
    """Epoch and samples of each step of two ranks' only link."""
    assert [[ended.how for ended in rank.ends] for rank in told] == [[how], [how]], told
    steps = zip(*(rank.seen[0] for rank in told), strict=True)
    return [(epoch, [*left, *right]) for (epoch, left), (_, right) in steps]


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    run = make_run(tmp_path_factory.mktemp("halves") / "run")
    return Halves(run, both(two_ranks((run, 5)), "stopped"))


def test_another_number_of_ranks_is_said(
    tmp_path: Path, halves: Halves, caplog: pytest.LogCaptureFixture
) -> None:
    """Hugging Face #14554, PR#14994: with fewer GPUs the failed RNG load is ignored in silence."""
    run = halves.copy(tmp_path)
    with caplog.at_level(logging.WARNING, "hpcresume"):
        cut(run, 8)
    assert any("world_size 2 -> 1" in text for text in caplog.messages)
    changes = [
        r["change"] for r in files.read_lines(run.link(2).training) if r["kind"] == "changed"
    ]
    assert any("world_size 2 -> 1" in text for text in changes)


def test_another_global_batch_is_refused(tmp_path: Path, halves: Halves) -> None:
    """Hugging Face #14554, PR#14994: fewer GPUs train another run without a word."""
    run = halves.copy(tmp_path)
    ended = link(run, partial(ordinary, batch=2), 8)
    assert (ended.how, ended.code) == ("failed", 7)
    assert "batch" in ended.why and steps_kept(run) == [5]


class Unpickled:
    """The names of all that is unpickled, until `stop`: an audit hook cannot be taken back."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._listening = True
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._listening and event == "pickle.find_class":
            self.names.append(".".join(map(str, arguments)))

    def stop(self) -> list[str]:
        self._listening = False
        return self.names


def test_resume_unpickles_nothing(tmp_path: Path) -> None:
    """Hugging Face #34631, #40500: `weights_only` of torch 2.6 rejects its own rng_state.pth."""
    run = make_run(tmp_path / "run")
    cut(run, 9)
    unpickled = Unpickled()
    through(run, 12)
    assert unpickled.names == []
    pickle.loads(pickle.dumps(Path))
    assert unpickled.stop() == ["pathlib.Path"]


def test_checkpoint_holds_nothing_but_tensors_and_json(tmp_path: Path) -> None:
    """Hugging Face #34631, #40500: what one version of torch pickled, the next rejects."""
    run = make_run(tmp_path / "run")
    cut(run, 9)
    for path in newest(run).path.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"
            head = path.read_bytes()
            json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Killable:
    return Killable(tmp_path_factory.mktemp("killable"))


PLACES = {
    "before its first file": (Call("mkdir", ".checkpoint-8."), 1),
    "in its midst": (Call("mkdir", ".checkpoint-8."), 8),
    "before it is published": (Call("rename", ".checkpoint-8."), 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_link_that_was_killed_while_saving_is_followed_by_one_from_the_checkpoint_before(
    killable: Killable, place: str
) -> None:
    """Hugging Face #35782, #35525: killed while saving, every later resume crashes."""
    run = killable.kill(*PLACES[place])
    assert steps_kept(run) == [5]
    first: list[int] = []
    through(run, train=partial(ordinary, each=lambda session: first.append(session.global_step)))
    assert first[0] == 5
    assert_same(run, killable.uncut)


def test_rotation_keeps_the_newest_by_step_whatever_the_times_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hugging Face #26961, #27138, #11769: rotation by mtime deletes the newest checkpoint."""
    run = make_run(tmp_path / "run", checkpoint={"steps": 2, "keep_last": 3, "each_epoch": False})
    dice, real = random.Random(4), time.time
    ten_years_s = 3.2e8

    def confuse(session: hpcresume.Session) -> None:
        for path in [*run.path.glob("checkpoint-*"), *run.path.glob("checkpoint-*/*")]:
            os.utime(path, (dice.uniform(0, 2e9),) * 2)

    monkeypatch.setattr(time, "time", lambda: real() + dice.choice((-1, 0, 1)) * ten_years_s)
    kept = []
    for step in (5, 9, 13):
        cut(run, step, partial(ordinary, each=confuse))
        kept.append(steps_kept(run))
    assert kept == [[2, 4, 5], [6, 8, 9], [10, 12, 13]]
    through(run)
    monkeypatch.undo()
    assert_same(run, through(make_run(tmp_path / "uncut", checkpoint={"steps": 2})))


def test_run_that_keeps_one_checkpoint_is_never_without_a_valid_one(tmp_path: Path) -> None:
    """Hugging Face #25129: save_total_limit=1 deleted all checkpoints."""
    only_one = {"steps": 3, "keep_last": 1, "keep_best": 0, "each_epoch": False}
    run = make_run(tmp_path / "run", checkpoint=only_one)
    cut(run, 3)
    looking, calls, least = False, 0, 2

    def count_valid(_call: Any) -> None:
        nonlocal looking, calls, least
        if looking:
            return
        looking, calls = True, calls + 1
        least = min(least, sum(is_valid(run, step) for step in steps_kept(run)))
        looking = False

    with watched(count_valid):
        cut(run, 10)
    assert calls > 100 and least == 1
    assert steps_kept(run) == [10]


def is_valid(run: RunDir, step: int) -> bool:
    try:
        verify(next(found for found in checkpoints(run) if found.step == step))
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("accumulate", [1, 3, 4])
def test_position_counts_every_micro_batch_of_an_accumulation(
    tmp_path: Path, accumulate: int
) -> None:
    """Hugging Face #5605, PR#8624: skipped batches ignore the accumulation factor.

    An epoch of seven micro-batches has a ragged last group with three and with four.
    """
    shape = {"epochs": 3, "max_steps": None, "args": {"accumulate": accumulate}}
    per_epoch = -(-PER_EPOCH // accumulate)
    traces: list[Seen] = []
    runs = []
    for number, stops in enumerate([(), (1, per_epoch, per_epoch + 1), (2, 2, 2 * per_epoch)]):
        traces.append([])
        run = make_run(tmp_path / str(number), **shape)
        runs.append(through(run, *stops, train=partial(ordinary, seen=traces[-1])))
    assert traces[1] == traces[2] == traces[0] and len(traces[0]) == 3 * PER_EPOCH
    assert len(log_lines(runs[0])) == 3 * per_epoch
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


Schedule = Callable[[Optimizer], Any]
SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 6),
            lr_scheduler.ExponentialLR(o, 0.9),
        ],
        milestones=[6],
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


def scheduled(session: hpcresume.Session, schedule: Schedule) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    scheduler = schedule(optimizer)
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    session.register(model=model, optimizer=optimizer, scheduler=scheduler)
    for _, points in session.steps(session.loader(Noisy(), batch_size=4, shuffle=True)):
        loss = (model(points) - 1).square().mean()
        loss.backward()
        session.log(lr=optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([loss.item()] if plateau else []))
        optimizer.zero_grad()


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_after_a_restart_are_those_of_the_uncut_run(
    tmp_path: Path, name: str
) -> None:
    """Hugging Face #23099, #27749: the learning rate resets or anneals wrongly after a resume."""
    train = partial(scheduled, schedule=SCHEDULES[name])
    uncut = assert_exact(tmp_path, (5, 6, 13), train=train)
    assert len(set(series(uncut, "lr"))) > 3


def test_schedule_of_two_ranks_goes_on_one_step_at_a_time(tmp_path: Path) -> None:
    """Hugging Face #23986, PR#24088: the scheduler is stepped once for every process."""
    uncut, run, alone = (make_run(tmp_path / n, max_steps=16) for n in ("uncut", "cut", "alone"))
    for rank in two_ranks((uncut, None), (run, 4), (run, 7), (run, 7), (run, None)):
        assert [ended.how for ended in rank.ends] == [
            *("completed", "stopped", "stopped", "stopped", "completed")
        ]
    assert_same(run, uncut)
    assert series(run, "lr") == series(through(alone), "lr")


def test_objects_without_tensors_do_not_hinder_a_restart(tmp_path: Path) -> None:
    """Hugging Face #29059: a file that one backend does not write makes all restarts fail."""

    def train(session: hpcresume.Session) -> None:
        model, nothing = nn.Linear(4, 1), nn.ReLU()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        session.register(model=model, plain=plain, scaler=scaler, nothing=nothing, config={})
        for _, points in session.steps(session.loader(Noisy(), batch_size=4)):
            model(points).square().mean().backward()
            plain.step()
            plain.zero_grad()
            session.log(weight=model.weight)

    uncut = assert_exact(tmp_path, (3, 3, 9), train=train)
    found = newest(uncut)
    files_there = {path.name for path in found.path.iterdir()} - {"manifest.json"}
    assert {entry.name for entry in found.manifest.files} == files_there
    assert not (found.path / "plain.safetensors").exists()


def best_at_some(session: hpcresume.Session) -> None:
    if session.global_step in (4, 9, 15):
        session.best(val_loss=20.0 - session.global_step if session.global_step < 12 else 99.0)


def test_run_that_is_moved_between_links_goes_on_and_ends(tmp_path: Path) -> None:
    """Hugging Face #48315: a stale absolute best_model_checkpoint crashes the moved run's end."""
    train = partial(ordinary, each=best_at_some)
    keep = {"keep_last": 1, "keep_best": 1}
    uncut = through(make_run(tmp_path / "uncut", checkpoint=keep), train=train)
    run = make_run(tmp_path / "first place" / "run", checkpoint=keep)
    for step, place in ((6, "second place"), (13, "it's the third")):
        cut(run, step, train)
        run = RunDir(Path(shutil.move(run.path, tmp_path / place)))
    through(run, train=train)
    assert_same(run, uncut)
    state = files.read_json(run.trainer_state)
    assert state["best_model_checkpoint"] == "checkpoint-10"
    assert is_valid(run, 10)
    written = [p for p in run.path.rglob("*") if p.is_file() and p != run.identity]
    assert [p.name for p in written if b"place" in p.read_bytes()] == []


@pytest.mark.parametrize("shape", [{"batch": 4}, {"batch": 2, "accumulate": 2}], ids=str)
def test_elastic_restart_neither_loses_nor_repeats_a_sample(
    tmp_path: Path, halves: Halves, shape: dict[str, int]
) -> None:
    """Hugging Face #40245: an elastic restart loses or repeats samples.

    Two ranks, then one that takes their batch at once or in two halves, then two.
    """
    run, consumed = halves.copy(tmp_path), list(halves.consumed)
    cut(run, 10, partial(ordinary, seen=consumed, **shape))
    consumed += both(two_ranks((run, None)), "completed")
    expected: Seen = []
    through(make_run(tmp_path / "uncut"), train=partial(ordinary, seen=expected))
    for epoch in range(3):
        assert sorted(ids_of(consumed, epoch)) == list(range(4 * PER_EPOCH))
        assert ids_of(consumed, epoch) == ids_of(expected, epoch)


def test_elastic_restart_keeps_the_order_of_a_sampler_of_the_user(tmp_path: Path) -> None:
    """Hugging Face #40245: an elastic restart loses or repeats samples.

    The sampler draws the order of each epoch from a generator of its own.
    """

    def train(session: hpcresume.Session, seen: Seen, parts: int = 1) -> None:
        own = RandomSampler(range(28), generator=torch.Generator().manual_seed(3))
        loader = session.loader(Noisy(), batch_size=4 // parts, sampler=own)
        session.register(model=nn.Linear(1, 1))
        for ids, _ in session.steps(loader, accumulate=parts):
            seen.append((session.epoch, ids.tolist()))

    expected: Seen = []
    consumed: Seen = []
    through(make_run(tmp_path / "uncut"), train=partial(train, seen=expected))
    run = make_run(tmp_path / "run")
    cut(run, 10, partial(train, seen=consumed))
    cut(run, 16, partial(train, seen=consumed, parts=2))
    through(run, train=partial(train, seen=consumed))
    for epoch in range(3):
        assert ids_of(consumed, epoch) == ids_of(expected, epoch)


class RunningMean:
    """What a training keeps to log a smooth loss."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.count = 0

    def add(self, value: float) -> float:
        self.sum += value
        self.count += 1
        return self.sum / self.count

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum, self.count = state["sum"], state["count"]


def test_log_of_a_cut_run_is_byte_for_byte_that_of_the_uncut_run(tmp_path: Path) -> None:
    """Hugging Face PR#9818, #33336: the first loss after a resume is wrong, its sum was lost."""

    def train(session: hpcresume.Session) -> None:
        mean = RunningMean()
        session.register(mean=mean)
        for _, points in session.steps(session.loader(Noisy(), batch_size=4), accumulate=3):
            session.log(loss=points.sum(), mean=mean.add(float(points.sum())))

    def written(run: RunDir) -> bytes:
        return b"".join(run.link(n).metrics.read_bytes() for n in run.link_numbers())

    uncut = through(make_run(tmp_path / "uncut", max_steps=8), train=train)
    cut = through(make_run(tmp_path / "cut", max_steps=8), 2, 3, 4, train=train)
    assert written(cut) == written(uncut)
    history = [files.read_json(run.trainer_state)["log_history"] for run in (uncut, cut)]
    assert history[1][-1] == history[0][-1]
