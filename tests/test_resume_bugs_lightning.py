"""Resume bugs of accelerate and Lightning that were really reported, and are not ours."""

from __future__ import annotations

import glob
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bug_links import (
    PER_EPOCH,
    Call,
    Killable,
    Noisy,
    Seen,
    assert_exact,
    assert_same,
    checkpoints,
    cut,
    digest,
    ids_of,
    link,
    log_lines,
    make_run,
    newest,
    ordinary,
    rewrite,
    series,
    steps_kept,
    storm,
    through,
)
from oracle import Chain
from torch import nn
from torch.optim import lr_scheduler

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.contents import RNG
from hpcresume.journal import LinkRecords
from hpcresume.run_dir import RunDir

# accelerate


def test_samples_go_on_in_order_beyond_the_first_epoch(tmp_path: Path) -> None:
    """accelerate #2016: after a resume beyond epoch 0 the sequence is another one."""
    size = {"max_steps": 6 * PER_EPOCH, "checkpoint": {"keep_last": 1}}
    uncut = assert_exact(tmp_path, (2 * PER_EPOCH + 3, 3 * PER_EPOCH, 5 * PER_EPOCH - 1), **size)
    assert len(orders(uncut)) == 6


def orders(run: RunDir) -> set[tuple[int, ...]]:
    """The different orders in which the epochs of a run went through the samples."""
    by_epoch: dict[int, list[int]] = {}
    for line in log_lines(run):
        by_epoch.setdefault(line["epoch"], []).extend(line["ids"])
    return {tuple(ids) for ids in by_epoch.values()}


def test_epoch_after_the_resumed_one_has_its_own_order(tmp_path: Path) -> None:
    """accelerate PR#4071: the loader that skips batches counts from 0, and sets epoch 0 again."""
    run = through(make_run(tmp_path / "run", max_steps=4 * PER_EPOCH), 9, 10, 16)
    assert len(orders(run)) == 4
    assert all(sorted(ids) == list(range(4 * PER_EPOCH)) for ids in orders(run))


def test_damaged_random_state_is_quarantined_and_an_older_checkpoint_used(tmp_path: Path) -> None:
    """accelerate #4283, PR#4308: a random state that cannot be restored is passed over."""
    run = make_run(tmp_path / "run", checkpoint={"steps": 4})
    cut(run, 6)
    path = newest(run).path / RNG
    path.write_bytes(path.read_bytes().replace(b"3", b"4", 1))
    first: list[int] = []
    through(run, train=partial(ordinary, each=lambda session: first.append(session.global_step)))
    assert first[0] == 4 and len(list(run.path.glob("quarantined-6.*"))) == 1
    assert_same(run, through(make_run(tmp_path / "uncut")))


@pytest.mark.parametrize("generator", ["python", "numpy", "torch"])
def test_random_state_that_does_not_load_ends_the_link(tmp_path: Path, generator: str) -> None:
    """accelerate #4283, PR#4308: a random state that cannot be restored is passed over."""
    run = make_run(tmp_path / "run")
    cut(run, 5)
    damage_generator(run, **{generator: "nonsense"})
    ended = link(run)
    assert (ended.how, ended.code) == ("failed", 7)
    assert "random state" in ended.why and steps_kept(run) == [5]


def damage_generator(run: RunDir, **states: Any) -> None:
    """Replace saved generators of rank 0, by a checkpoint whose digests fit."""
    found = newest(run)
    (own,) = files.read_json(found.path / RNG)
    rewrite(found, RNG, [{**own, **states}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_random_state_of_gpus_that_are_not_there_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """accelerate #3960, PR#4217: a KeyError of the CPU-only restore is swallowed."""
    run = make_run(tmp_path / "run")
    cut(run, 5)
    state = files.read_json(newest(run).path / RNG)[0]["torch"]
    damage_generator(run, cuda=[state, state])
    with caplog.at_level(logging.WARNING, "hpcresume"):
        cut(run, 8)
    assert any("2 GPUs" in text for text in caplog.messages)


GENERATORS: dict[str, Callable[[], float]] = {
    "python": random.random,
    "numpy": np.random.random,
    "torch": lambda: torch.rand(()).item(),
}
if torch.cuda.is_available():
    GENERATORS["cuda"] = lambda: torch.rand((), device="cuda").item()


@pytest.mark.parametrize("name", GENERATORS)
def test_every_global_generator_goes_on(tmp_path: Path, name: str) -> None:
    """accelerate #3960, PR#4217: only one of the generators is restored."""

    def train(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(1, 1))
        for _ in session.steps(session.loader(Noisy(), batch_size=4)):
            session.log(draw=GENERATORS[name]())

    uncut = assert_exact(tmp_path, (2, 2, 9), train=train, max_steps=12)
    assert len(set(series(uncut, "draw"))) == 12


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_every_registered_generator_goes_on(tmp_path: Path, name: str) -> None:
    """accelerate #3960, PR#4217: of the generators only one is restored, and none of the user's."""

    def train(session: hpcresume.Session) -> None:
        own = {
            "python": random.Random(1),
            "numpy": np.random.default_rng(1),
            "torch": torch.Generator().manual_seed(1),
        }[name]
        session.register(model=nn.Linear(1, 1), own=own)
        for _ in session.steps(session.loader(Noisy(), batch_size=4)):
            drawn = torch.rand((), generator=own) if name == "torch" else own.random()
            session.log(draw=float(drawn))

    uncut = assert_exact(tmp_path, (2, 2, 9), train=train, max_steps=12)
    assert len(set(series(uncut, "draw"))) == 12


def test_rotation_counts_by_number_and_not_by_letters(tmp_path: Path) -> None:
    """accelerate #1163: total_limit deletes by the order of letters, 10 before 9."""
    saved_at = (8, 9, 10, 11, 98, 99, 100, 101)

    def train(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(1, 1))
        for _ in session.steps(session.loader(Noisy(), batch_size=1)):
            if session.global_step + 1 in saved_at:
                session.save()

    quiet = {"keep_last": 2, "each_epoch": False}
    run = make_run(tmp_path / "run", max_steps=102, checkpoint=quiet)
    kept = []
    for step in (9, 10, 11, 99, 100, 101):
        cut(run, step, train)
        kept.append(steps_kept(run))
    assert kept == [[8, 9], [9, 10], [10, 11], [98, 99], [99, 100], [100, 101]]


def test_second_resume_overwrites_no_checkpoint(tmp_path: Path) -> None:
    """accelerate #1601, #3306: the counter of saves is lost, the second resume overwrites."""
    run = make_run(tmp_path / "run", checkpoint={"steps": 2, "keep_last": 4, "each_epoch": False})
    made: dict[int, str] = {}
    for step in (5, 9, 13):
        cut(run, step)
        now = {found.step: digest(found.path / "manifest.json") for found in checkpoints(run)}
        assert all(made.get(step, manifest) == manifest for step, manifest in now.items())
        made |= now
    through(run)
    assert steps_kept(run) == [16, 18, 20, 21]
    assert_same(run, through(make_run(tmp_path / "uncut", checkpoint={"steps": 2})))


@pytest.fixture(scope="module")
def killable(tmp_path_factory: pytest.TempPathFactory) -> Killable:
    return Killable(tmp_path_factory.mktemp("killable"))


def test_old_checkpoint_is_there_until_the_new_one_is_acknowledged(killable: Killable) -> None:
    """accelerate, read in its source in 2026: the old one is deleted before the new is saved."""
    run = killable.kill(Call("rename", "checkpoint-5"))
    assert steps_kept(run) == [5, 8]
    assert_same(through(run), killable.uncut)


# Lightning


def test_resumed_epoch_begins_with_the_next_batch(tmp_path: Path) -> None:
    """Lightning #19367: a resume in mid-epoch is off by one batch."""
    whole: Seen = []
    through(make_run(tmp_path / "uncut"), train=partial(ordinary, seen=whole))
    for cuts in ((3, 4), (10, 11, 12)):
        seen: Seen = []
        run = make_run(tmp_path / f"cut at {cuts}")
        through(run, *cuts, train=partial(ordinary, seen=seen))
        assert seen == whole


@pytest.mark.parametrize("cut", range(PER_EPOCH + 1))
def test_epoch_cut_at_any_batch_is_gone_through_once(tmp_path: Path, cut: int) -> None:
    """Lightning #5325, #1182, #850: the rest of the epoch is skipped, or it begins again."""
    seen: Seen = []
    run = make_run(tmp_path / "run", epochs=2, max_steps=None)
    cuts = [step for step in (cut, PER_EPOCH + cut) if 0 < step < 2 * PER_EPOCH]
    through(run, *cuts, train=partial(ordinary, seen=seen))
    for epoch in (0, 1):
        assert sorted(ids_of(seen, epoch)) == list(range(4 * PER_EPOCH))
    assert [epoch for epoch, _ in seen] == [0] * PER_EPOCH + [1] * PER_EPOCH


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_run_ends_at_max_steps_around_the_end_of_an_epoch(tmp_path: Path, beyond: int) -> None:
    """Lightning #11555, #19617: global_step is wrong, or max_steps at an epoch's end."""
    target = 2 * PER_EPOCH + beyond
    uncut = assert_exact(tmp_path, (PER_EPOCH, target - 1), (3, target - 2), max_steps=target)
    state = files.read_json(uncut.trainer_state)
    assert (state["global_step"], state["completed"]) == (target, True)
    assert link(uncut).how == "completed" and len(log_lines(uncut)) == target


def by_number(session: hpcresume.Session, scheduler: Any) -> None:
    """At the end of the body: step the schedule of epochs in the epoch's last step."""
    if (session.global_step + 1) % PER_EPOCH == 0:
        scheduler.step()


def by_epoch(session: hpcresume.Session, scheduler: Any) -> None:
    """At the beginning of the body: let the schedule catch up with the epoch."""
    while scheduler.last_epoch < session.epoch:
        scheduler.step()


# torch sees no step of the optimizer before the first of the schedule: it was in a link before.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("ways", [(None, by_number), (by_epoch, None)], ids=["number", "epoch"])
def test_schedule_of_epochs_is_not_one_behind(tmp_path: Path, ways: Any) -> None:
    """Lightning #4655: after a resume the schedule of learning rates is one epoch behind."""
    first, last = ways

    def train(session: hpcresume.Session) -> None:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        session.register(model=model, optimizer=optimizer, scheduler=scheduler)
        for _, points in session.steps(session.loader(Noisy(), batch_size=4)):
            if first is not None:
                first(session, scheduler)
            model(points).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(lr=optimizer.param_groups[0]["lr"])
            if last is not None:
                last(session, scheduler)

    uncut = assert_exact(tmp_path, (PER_EPOCH, 2 * PER_EPOCH), (6, 8, 14), train=train)
    lrs = [0.5**epoch for epoch in range(3) for _ in range(PER_EPOCH)]
    assert series(uncut, "lr") == [lr.hex() for lr in lrs]


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
def test_scale_of_the_gradients_goes_on(tmp_path: Path, device: str) -> None:
    """Lightning #10766: the scale of mixed precision is lost, the loss leaps after a resume."""

    def train(session: hpcresume.Session) -> None:
        model = nn.Linear(4, 1).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2)
        session.register(model=model, optimizer=optimizer, scaler=scaler)
        for _, points in session.steps(session.loader(Noisy(), batch_size=4)):
            loss = model(points.to(device)).square().mean()
            overflow = float("inf") if session.global_step % 5 == 4 else 1.0
            scaler.scale(loss * overflow).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            session.log(scale=scaler.get_scale())

    uncut = assert_exact(tmp_path, (2, 5, 10), (4, 4, 13), train=train)
    assert len(set(series(uncut, "scale"))) > 2


def test_logged_steps_go_up_by_one_even_after_a_crash(tmp_path: Path) -> None:
    """Lightning #12274, #13163: the logged step is reset to 0 by a resume."""
    # Each step is on the disk at once, so that the log goes beyond the checkpoint.
    often = {"checkpoint": {"steps": 4}, "log": {"every_steps": 1}}
    run = make_run(tmp_path / "run", **often)
    cut(run, 6)

    def crash(session: hpcresume.Session) -> None:
        if session.global_step == 11:
            # Of an exception the boundary behind a long step would be saved.
            raise SystemExit("the node is gone")

    assert link(run, partial(ordinary, each=crash)).how == "failed"
    assert (steps_kept(run)[-1], log_lines(run)[-1]["step"]) == (8, 11)
    through(run, 13)
    assert [line["step"] for line in log_lines(run)] == list(range(1, 3 * PER_EPOCH + 1))
    assert_same(run, through(make_run(tmp_path / "uncut", **often)))


HINTS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def test_storm_of_signals_changes_nothing(tmp_path: Path) -> None:
    """Lightning #21406: a checkpoint in the signal handler hangs.

    Every step is saved, so that signals meet saves, forward and backward alike.
    """
    often = {"max_steps": 60, "checkpoint": {"steps": 1, "keep_last": 1}}
    run = make_run(tmp_path / "run", **often)
    told = storm(run, *HINTS, from_step=1)
    assert told.get("how") == "completed", told
    assert all(told[number.name] >= 10 for number in HINTS)
    assert_same(run, through(make_run(tmp_path / "uncut", **often)))


def test_storm_of_requests_to_stop_saves_once_and_leaves(tmp_path: Path) -> None:
    """Lightning #21406: a checkpoint in the signal handler hangs."""
    often = {"max_steps": 60, "checkpoint": {"steps": 1, "keep_last": 1}}
    run = make_run(tmp_path / "run", **often)
    for step in (5, 12):
        told = storm(run, signal.SIGTERM, *HINTS, from_step=step)
        assert told.get("how") == "stopped" and told["SIGTERM"] >= 1, told
    reasons = [r.get("reason") for r in files.read_lines(run.link(2).training)]
    assert reasons.count("SIGTERM") == 2, "one request, one end"
    assert_same(through(run), through(make_run(tmp_path / "uncut", **often)))


#: What lies about in directories of runs: other tools' files, and remains.
JUNK_FOLDERS = ("checkpoint-", "checkpoint-best", "checkpoint-007", "checkpoint-1e3", "ckpt_.tmp")
JUNK_FILES = ("checkpoint-11", "epoch=3-step=100.ckpt", "last.ckpt", "latest", ".nfs0001", "é\n")


def litter(run: RunDir) -> None:
    for name in JUNK_FOLDERS:
        (run.path / name).mkdir(exist_ok=True)
    for name in JUNK_FILES:
        (run.path / name).write_text("junk")
    (run.path / "checkpoint-12").mkdir(exist_ok=True)
    if not (run.path / "checkpoint-13").is_symlink():
        (run.path / "checkpoint-13").symlink_to("nowhere")


def test_first_run_begins_fresh_in_a_directory_with_odd_names(tmp_path: Path) -> None:
    """Lightning #20347, #6544: auto-resume throws on the first run, or on odd names."""
    run = make_run(tmp_path / "run", max_steps=9)
    litter(run)
    through(run)
    assert_same(run, through(make_run(tmp_path / "uncut", max_steps=9)))


def test_resume_goes_by_checkpoints_and_not_by_odd_names(tmp_path: Path) -> None:
    """Lightning #20347, #6544: auto-resume throws on the first run, or on odd names."""
    run = make_run(tmp_path / "run")
    for step in (3, 8):
        litter(run)
        cut(run, step)
    litter(run)
    through(run)
    assert_same(run, through(make_run(tmp_path / "uncut")))
    assert all(os.path.lexists(run.path / name) for name in (*JUNK_FOLDERS, "latest", "last.ckpt"))


def test_killed_save_leaves_the_old_checkpoint_or_the_new_one(killable: Killable) -> None:
    """Lightning #688: a save that is killed leaves half a checkpoint."""
    publication = Call("rename", ".checkpoint-8.")
    for later, left in ((0, [5]), (1, [5, 8])):
        run = killable.kill(publication, later)
        assert steps_kept(run) == left
        assert_same(through(run), killable.uncut)


class Restless:
    """Draws random numbers when its state is taken and when it is loaded."""

    def __init__(self) -> None:
        self.state = torch.rand(3)

    def state_dict(self) -> dict[str, Any]:
        draw_all()
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        draw_all()
        self.state.copy_(state["state"])


def draw_all() -> list[float]:
    return [random.random(), float(np.random.random()), torch.rand(()).item()]


def test_random_state_after_loading_is_the_saved_one(tmp_path: Path) -> None:
    """Lightning #20204: loading a model changes the random state."""

    def train(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(1, 1), restless=Restless())
        loader = session.loader(Noisy(), batch_size=4)
        nn.Linear(session.global_step + 1, 1)
        for _ in session.steps(loader):
            session.log(draws=draw_all())

    assert_exact(tmp_path, (2, 2, 7, 10), train=train, max_steps=12)


#: A training whose process starts quickly: the first optimizer of torch takes a second to import.
QUICK = """
import time
import torch

def train(session):
    model = torch.nn.Linear(1, 1)
    loader = session.loader(torch.utils.data.TensorDataset(torch.ones(60, 1)), batch_size=1)
    session.register(model=model)
    for (batch,) in session.steps(loader):
        time.sleep(0.02)
        session.log(weight=model.weight)
"""


@pytest.mark.timeout(120)
def test_every_signal_in_every_state_leaves_exactly_one_successor(tmp_path: Path) -> None:
    """Lightning #20542, #4265: SIGTERM is bypassed, and the job is not queued again.

    One chain of real processes: a link is hit by the hints, and then by a request to stop, while
    it starts, while it trains and while it saves.
    """
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "quick.py").write_text(QUICK)
    chain = Chain(
        folder,
        train="quick.py:train",
        # More than are trained while it is hit.
        max_steps=240,
        chain={"no_progress_links": 9, "max_crashes": 0, "lead_s": 1.0},
        scheduler={"grace_s": 30},
        checkpoint={"steps": 1, "keep_last": 2},
    )
    number = 0
    for stop in (signal.SIGTERM, signal.SIGINT):
        for state in ("starting", "training", "saving"):
            number += 1
            supervisor, ranks = chain.pids(wait_for_state(chain, number, state))
            for hint in (signal.SIGUSR1, signal.SIGUSR2):
                for pid in (supervisor, *(ranks if state != "starting" else ())):
                    os.kill(pid, hint)
            os.kill(supervisor if state == "starting" else ranks[0], stop)
    chain.wait_completed()
    links = chain.links()
    assert [k.number for k in links] == list(range(1, number + 2)), chain.story()
    assert [k.last("stop_asked") is not None for k in links] == [True] * number + [False]
    jobs = [k.claim["job"] for k in links]
    queued = [r["queued_job"] for k in links for r in k.all("queued")]
    assert len(set(jobs)) == len(jobs) and len(set(queued)) == len(queued)
    assert set(jobs[1:]) <= set(queued)
    ends = [k.all("ended")[0]["t"] for k in links]
    starts = [k.all("claimed")[0]["t"] for k in links]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False)), "two at a time"


def wait_for_state(chain: Chain, number: int, state: str) -> LinkRecords:
    """Wait until a link is claimed, has saved a step, or writes a checkpoint just now."""

    def look(links: list[LinkRecords]) -> LinkRecords | None:
        found = next((k for k in links if k.number == number), None)
        return found if state == "starting" or (found and found.last("saved")) else None

    found: LinkRecords = chain.wait_for(look)
    pattern = f"{glob.escape(str(chain.run.path))}/.checkpoint-*.{number:04d}.*.partial"
    deadline = time.monotonic() + 60
    while state == "saving" and not glob.glob(pattern):
        assert time.monotonic() < deadline, f"link {number} is never {state}"
        time.sleep(0.001)
    return found
