"""A state behind a loss that is not finite is never committed; the run stops, or goes back."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import (
    Net,
    changes_said,
    checkpoints,
    cut,
    in_child,
    in_children,
    link,
    log_lines,
    loss_of,
    make_run,
    newest,
    ordinary,
    outcome,
    series,
    steps_kept,
    through,
)
from torch import nn

import hpcresume
from hpcresume import chain, files
from hpcresume.errors import NonFinite
from hpcresume.history import past_links
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.story import read_story
from hpcresume.training.record import BadStep, MetricLog

NAN, INF = math.nan, math.inf
#: Batches of an epoch in these trainings, each a list of points.
BATCHES = torch.randn(12, 4, 4, generator=torch.Generator().manual_seed(2)).unbind()


def poisoned(*bad: int) -> list[torch.Tensor]:
    """The batches, some of which (counted from 1) cannot be learned from."""
    return [batch * NAN if n in bad else batch for n, batch in enumerate(BATCHES, 1)]


def training(
    batches: list[Any], note: Callable[[hpcresume.Session, float], None] | None = None
) -> Callable[[hpcresume.Session], None]:
    """A training on a list of batches, with dropout, running statistics and momentum."""

    def train(session: hpcresume.Session) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        session.register(model=model, optimizer=optimizer)
        for points in session.steps(batches):
            loss = loss_of(model, points)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
            if note is not None:
                note(session, float(loss.detach()))

    return train


def logging(**values: dict[int, Any]) -> Callable[[hpcresume.Session], None]:
    """A training that logs these values in the steps (from 1) that are named, else 0.5."""

    def train(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(1, 1))
        for _ in session.steps(list(range(12))):
            step = session.global_step + 1
            session.log(**{name: at.get(step, 0.5) for name, at in values.items()})

    return train


def make(folder: Path, **checkpoint: Any) -> RunDir:
    settings = {"steps": 4, "each_epoch": False, **checkpoint}
    return make_run(folder, max_steps=None, epochs=1, checkpoint=settings)


def learned(run: RunDir) -> dict[str, Any]:
    """What a finished run has learned, without what it says about its data and its way."""
    parts = outcome(run)
    return {name: parts[name] for name in parts if name not in ("state", "log")}


# The metric log


def first_bad(*steps: dict[str, Any]) -> BadStep | None:
    metrics = MetricLog(None)
    for number, values in enumerate(steps, 1):
        metrics.add(values)
        metrics.end_step(number, 0, number)
    metrics.flush()
    return metrics.bad


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (NAN, "nan"),
        (INF, "inf"),
        (-INF, "-inf"),
        (torch.tensor(NAN), "nan"),
        (torch.tensor([1.0, INF]), "[1.0, inf]"),
        (torch.tensor(NAN, dtype=torch.bfloat16), "nan"),
    ],
    ids=["nan", "inf", "-inf", "tensor", "several", "bfloat16"],
)
def test_the_first_step_that_is_not_finite_is_found(value: Any, text: str) -> None:
    steps = [{"loss": 1.0}, {"grad_norm": value}, {"loss": NAN}]
    assert first_bad(*steps) == BadStep("grad_norm", text, 2, 0, 2)


@pytest.mark.parametrize("value", [1, 1e300, 10**400, "none yet", None, True, [1.0, 2.0]], ids=repr)
def test_what_is_finite_or_no_number_is_not_bad(value: Any) -> None:
    assert first_bad({"loss": value}, {"loss": 0.5}) is None


def test_the_mean_of_accumulated_losses_is_bad_where_one_of_them_is() -> None:
    metrics = MetricLog(None)
    for value in (1.0, NAN, 2.0):
        metrics.add({"loss": value})
    metrics.end_step(1, 0, 3)
    metrics.flush()
    assert metrics.bad is not None and metrics.bad.step == 1


def test_other_metrics_may_be_what_they_are() -> None:
    assert first_bad({"best_so_far": INF, "loss": 1.0}) is None


def test_a_rank_without_a_log_looks_at_its_losses_now_and_then_all_the_same() -> None:
    metrics = MetricLog(None)
    for step in range(1, 101):
        metrics.add({"loss": NAN, "text": "kept nowhere"})
        metrics.end_step(step, 0, step)
    assert metrics.bad == BadStep("loss", "nan", 1, 0, 1)


# Stop


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
@pytest.mark.parametrize(
    ("bad", "kept"),
    [(1, []), (4, []), (5, [4]), (6, [4]), (8, [4]), (12, [4, 8])],
    ids=str,
)
def test_no_state_after_a_step_that_was_not_finite_is_committed(
    tmp_path: Path, metric: str, bad: int, kept: list[int]
) -> None:
    run = make(tmp_path / "run")
    # All later steps are finite: what was learned from that one is in the state all the same.
    ended = link(run, logging(**{metric: {bad: NAN}}))
    assert (ended.how, ended.code) == ("failed", 8)
    assert f"{metric} was nan in step {bad} of epoch 1" in ended.why
    assert steps_kept(run) == kept


def ask(session: hpcresume.Session, what: str) -> None:
    if session.global_step + 1 != 3:
        return
    if what == "save":
        session.save()
    elif what == "best":
        session.best(score=0.1)
    else:
        (session.path / "STOP").touch()


@pytest.mark.parametrize("what", ["save", "best", "stop"])
def test_what_asks_for_a_save_does_not_get_one_of_a_bad_step(tmp_path: Path, what: str) -> None:
    run = make(tmp_path / "run")
    ended = link(run, training(poisoned(3), lambda session, loss: ask(session, what)))
    assert (ended.how, ended.code) == ("failed", 8)
    assert steps_kept(run) == []


def test_the_link_is_recorded_as_not_finite_and_the_chain_stops(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    link(run, training(poisoned(6)))
    (past,) = past_links(read_story(run), {})
    assert past.cause is chain.Cause.NON_FINITE
    assert past.failure is not None and past.failure.type == NonFinite.__name__
    decision = chain.decide([past], chain.Budgets())
    assert (decision.kind, decision.rule) == ("stop", "non_finite")
    assert "step 4 is committed, and kept" in decision.reason


def test_a_link_that_was_resumed_meets_it_again(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for _ in range(2):
        assert link(run, training(poisoned(6))).code == 8
    assert steps_kept(run) == [4]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_norm_that_tells_a_scaler_to_skip_is_in_order(
    tmp_path: Path, enabled: bool
) -> None:
    run = make(tmp_path / "run")

    def train(session: hpcresume.Session) -> None:
        session.register(scaler=torch.amp.GradScaler("cpu", enabled=enabled))
        logging(grad_norm={1: INF})(session)

    assert link(run, train).how == ("completed" if enabled else "failed")


# Go back


def test_the_run_goes_back_and_learns_as_if_the_bad_batches_had_not_been_there(
    tmp_path: Path,
) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back")
    ended = link(run, training(poisoned(7)))
    assert ended == ("stopped", "roll back to step 4: loss was not finite in step 7", 0)
    through(run, train=training(poisoned(7)))
    without = poisoned()[:4] + poisoned()[7:]
    clean = through(make(tmp_path / "clean"), train=training(without))
    assert learned(run) == learned(clean)
    assert series(run, "loss") == series(clean, "loss")
    assert [line["step"] for line in log_lines(run)] == list(range(1, 10))


def test_the_divergence_is_journalled_with_its_numbers(tmp_path: Path) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back")
    link(run, training(poisoned(7)))
    through(run, train=training(poisoned(7)))
    assert changes_said(run)[0] == (
        "loss was not finite in step 7: the run goes back to step 4, and leaves out the batches "
        "after batch 4 of epoch 1 up to batch 7 of epoch 1; its result is not that of an uncut run"
    )
    skipped = files.read_json(newest(run).path / "state.json")["progress"]["skipped"]
    assert skipped == [{"after": [0, 4], "through": [0, 7], "step": 7}]


@pytest.mark.parametrize(
    ("back", "left"), [(1, 8), (2, 4), (5, 4)], ids=["newest", "the one before", "oldest"]
)
def test_the_run_goes_back_as_many_checkpoints_as_it_is_told(
    tmp_path: Path, back: int, left: int
) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back", roll_back=back)
    link(run, training(poisoned(10)))
    through(run, train=training(poisoned(10)))
    clean = through(make(tmp_path / "clean"), train=training(poisoned()[:left] + poisoned()[10:]))
    assert learned(run) == learned(clean)


def test_the_data_are_left_out_across_the_end_of_an_epoch(tmp_path: Path) -> None:
    settings = {"steps": 5, "each_epoch": False, "on_non_finite": "roll_back"}
    run = make_run(tmp_path / "run", max_steps=None, epochs=3, checkpoint=settings)
    epochs: list[int] = []

    def note(session: hpcresume.Session, loss: float) -> None:
        epochs.append(session.epoch)
        if len(epochs) == 13:
            session.log(loss=NAN)

    train = training(poisoned(), note)
    assert link(run, train).why == "roll back to step 10: loss was not finite in step 13"
    before = len(epochs)
    through(run, train=train)
    # The two last batches of the first epoch and the first of the second are left out.
    assert epochs[before:] == [1] * 11 + [2] * 12
    assert files.read_json(run.trainer_state)["max_steps"] == 10 + 23


def test_samples_of_a_shuffled_epoch_are_left_out_in_their_order(tmp_path: Path) -> None:
    uncut = through(make_run(tmp_path / "uncut"))
    settings = {"steps": 5, "each_epoch": False, "on_non_finite": "roll_back"}
    run = make_run(tmp_path / "run", checkpoint=settings)
    bad = [True]

    def spoil(session: hpcresume.Session) -> None:
        if bad and session.global_step == 8:
            session.log(loss=NAN)

    train = partial(ordinary, each=spoil)
    assert link(run, train).why == "roll back to step 5: loss was not finite in step 9"
    bad.clear()
    through(run, train=train)
    ids, of_uncut = series(run, "ids"), series(uncut, "ids")
    assert ids[:17] == of_uncut[:5] + of_uncut[9:]


def test_a_link_that_is_killed_behind_a_roll_back_does_not_undo_it(tmp_path: Path) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back", roll_back=2)
    link(run, training(poisoned(10)))
    assert in_child(killed_in_step, run.path, 10, 6) == -signal.SIGKILL
    # It had not committed anything: the data have to be left out again.
    through(run, 5, train=training(poisoned(10)))
    clean = through(make(tmp_path / "clean"), train=training(poisoned()[:4] + poisoned()[10:]))
    assert learned(run) == learned(clean)
    assert sum("leaves out" in words for words in changes_said(run)) == 2


def killed_in_step(path: Path, bad: int, step: int) -> None:
    """A link that is killed in a step."""
    torch.set_num_threads(1)

    def note(session: hpcresume.Session, loss: float) -> None:
        if session.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    link(RunDir(path), training(poisoned(bad), note))


def test_two_bad_places_are_left_out_one_after_the_other(tmp_path: Path) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back", steps=2)
    train = training(poisoned(4, 10))
    whys = [link(run, train).why for _ in range(2)]
    assert whys == [
        "roll back to step 2: loss was not finite in step 4",
        "roll back to step 6: loss was not finite in step 8",
    ]
    through(run, train=train)
    without = [batch for n, batch in enumerate(poisoned(), 1) if n not in (3, 4, 9, 10)]
    assert learned(run) == learned(through(make(tmp_path / "clean"), train=training(without)))


def test_what_comes_again_at_once_stops_the_run(tmp_path: Path) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back")
    train = training(poisoned(6, 7, 8, 9))
    assert link(run, train).how == "stopped"
    ended = link(run, train)
    assert (ended.how, ended.code) == ("failed", 8)
    assert "loss was nan in step 5 of epoch 1: no state after step 4 is kept" in ended.why
    assert "were left out already" in ended.why
    assert steps_kept(run) == [4]


def test_without_a_checkpoint_to_go_back_to_the_run_stops(tmp_path: Path) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back")
    ended = link(run, training(poisoned(2)))
    assert (ended.how, ended.code) == ("failed", 8)
    assert "no state is kept" in ended.why


def test_what_was_committed_behind_the_place_to_go_back_to_is_out_of_the_way(
    tmp_path: Path,
) -> None:
    run = make(tmp_path / "run", on_non_finite="roll_back", roll_back=2)
    link(run, training(poisoned(10)))
    assert steps_kept(run) == [4, 8]
    cut(run, 5, training(poisoned(10)))
    assert steps_kept(run) == [4, 5]
    assert [found.manifest.link for found in checkpoints(run)] == [1, 2]


# Several ranks


def test_what_another_rank_alone_has_met_is_not_committed(tmp_path: Path) -> None:
    run = make(tmp_path / "run", steps=1)
    meeting = tmp_path / "meeting"
    in_children([(bad_on_one_rank, (rank, meeting, run.path)) for rank in range(2)])
    assert steps_kept(run) == [1, 2]
    told = files.read_json(run.link(1).rank_failure(1))
    assert told["type"] == "NonFinite" and "loss was nan in step 3" in told["message"]


def bad_on_one_rank(rank: int, meeting: Path, path: Path) -> None:
    """One of two ranks; the second has a loss in step 3 that is not finite."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    method = f"file://{meeting}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
    place = RankPlace(rank=rank, world_size=2, local_rank=rank)
    link(RunDir(path), logging(loss={3: NAN} if rank else {}), place=place)
    torch.distributed.destroy_process_group()
