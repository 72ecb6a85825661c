"""`session.retry`: another attempt is as if the failed ones had not been, or there is none."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bug_links import (
    ALONE,
    Net,
    Noisy,
    assert_same,
    changes_said,
    link,
    log_lines,
    loss_of,
    make_run,
    steps_kept,
    through,
)
from torch import nn

import hpcresume
from hpcresume.config import read_frozen
from hpcresume.errors import HpcResumeError, UsageError
from hpcresume.serving import berth_for
from hpcresume.signals import SignalFlags
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks
from hpcresume.training.retrying import TRANSIENT, retried
from hpcresume.training.stopping import StopWatch
from hpcresume.training.watch import Watch


class Attempts:
    """A function that fails in its first attempts, with a model to work on; and the waits."""

    def __init__(self) -> None:
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.counters = {"seen": [0]}
        self.waits: list[float] = []
        self.hurry: str | None = None
        self.made = 0

    def wait(self, seconds: float) -> str | None:
        self.waits.append(seconds)
        return self.hurry

    def run(
        self,
        fn: Callable[[], Any],
        attempts: int = 3,
        on: Any = TRANSIENT,
        *,
        fails: int = 1,
        error: Exception | None = None,
    ) -> Any:
        def attempt() -> Any:
            self.made += 1
            result = fn()
            if self.made <= fails:
                raise error or ConnectionResetError(104, "Connection reset by peer")
            return result

        objects = [("model", self.model), ("optimizer", self.optimizer), ("c", self.counters)]
        watch = Watch(objects)
        return retried(attempt, attempts, on, watch=watch, generators={}, wait=self.wait)


@pytest.fixture
def tries() -> Attempts:
    return Attempts()


def nothing() -> None:
    pass


def test_the_wait_doubles_from_two_seconds_to_ten(tries: Attempts) -> None:
    assert tries.run(lambda: "read", 7, fails=5) == "read"
    assert tries.waits == [2, 4, 8, 10, 10]


def test_the_last_exception_goes_on_when_all_attempts_have_failed(tries: Attempts) -> None:
    error = TimeoutError("no answer")
    with pytest.raises(TimeoutError) as caught:
        tries.run(nothing, fails=3, error=error)
    assert caught.value is error
    assert tries.made == 3


def test_a_failed_attempt_is_announced_with_what_is_left_and_what_helps(
    tries: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    tries.run(nothing, fails=1)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        "ConnectionResetError: [Errno 104] Connection reset by peer (attempt 1 of 3); again in "
        "2 s, 2 left; where it comes often, ask whether compute nodes may use this network"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("no"), KeyError("x")], ids=repr
)
def test_a_mistake_in_the_code_is_not_tried_again(tries: Attempts, error: Exception) -> None:
    with pytest.raises(type(error)):
        tries.run(nothing, error=error)
    assert tries.made == 1


def test_a_gpu_without_memory_is_tried_again(tries: Attempts) -> None:
    tries.run(nothing, error=torch.OutOfMemoryError("CUDA out of memory"))
    assert tries.made == 2


def test_errors_that_are_named_are_tried_again_and_only_those(tries: Attempts) -> None:
    tries.run(nothing, on=LookupError, error=KeyError("shard 3"))
    assert tries.made == 2
    with pytest.raises(OSError, match="gone"):
        tries.run(nothing, on=LookupError, fails=9, error=OSError("gone"))


def test_less_than_one_attempt_is_refused(tries: Attempts) -> None:
    with pytest.raises(UsageError, match="attempts is 0, and must be 1 or more"):
        tries.run(nothing, 0)


def test_all_attempts_draw_the_same_random_numbers(tries: Attempts) -> None:
    drawn = []

    def draw() -> None:
        drawn.append((random.random(), np.random.normal(), torch.rand(2).tolist()))

    tries.run(draw, fails=2)
    assert drawn[0] == drawn[1] == drawn[2]


def test_gradients_and_running_statistics_of_a_failed_attempt_are_dropped(tries: Attempts) -> None:
    points, once = torch.randn(8, 4), Attempts()
    once.model.load_state_dict(tries.model.state_dict())
    for each, fails in ((once, 0), (tries, 2)):
        torch.manual_seed(3)
        each.run(lambda each=each: loss_of(each.model, points).backward(), fails=fails)
    assert tries.made == 3
    pairs = zip(once.model.parameters(), tries.model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert all(map(torch.equal, once.model.buffers(), tries.model.buffers()))


def add_gradients(tries: Attempts) -> None:
    loss_of(tries.model, torch.randn(8, 4)).backward()


def step(tries: Attempts) -> None:
    add_gradients(tries)
    tries.optimizer.step()


def weights(tries: Attempts) -> None:
    with torch.no_grad():
        tries.model.up.weight.add_(1)


def count(tries: Attempts) -> None:
    tries.counters["seen"][0] += 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (weights, "the state of 'model' had changed (up.weight)"),
        (step, "the step of 'optimizer' had begun"),
        (count, "the state of 'c' had changed"),
    ],
    ids=["weights", "optimizer", "counter"],
)
def test_there_is_no_further_attempt_after_a_change_of_what_is_registered(
    tries: Attempts, change: Callable[[Attempts], None], words: str
) -> None:
    with pytest.raises(HpcResumeError) as caught:
        tries.run(lambda: change(tries))
    assert words in str(caught.value)
    assert "Connection reset by peer" in str(caught.value)
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert tries.made == 1


def test_there_is_no_further_attempt_after_gradients_were_added_to(tries: Attempts) -> None:
    add_gradients(tries)
    with pytest.raises(HpcResumeError, match="gradients from before the attempt had been added to"):
        tries.run(lambda: add_gradients(tries))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_there_is_no_further_attempt_after_a_collective_operation(tries: Attempts) -> None:
    with pytest.raises(HpcResumeError, match="took part in a collective operation"):
        tries.run(lambda: dist.all_reduce(torch.ones(1)))
    assert tries.made == 1


@pytest.mark.usefixtures("group")
def test_an_attempt_without_communication_is_repeated_among_ranks(tries: Attempts) -> None:
    tries.run(nothing)
    assert tries.made == 2


def test_a_stop_during_the_wait_leaves_one_attempt(
    tries: Attempts, caplog: pytest.LogCaptureFixture
) -> None:
    tries.hurry = "SIGTERM"
    with pytest.raises(OSError, match="reset"):
        tries.run(nothing, 9, fails=9)
    assert tries.made == 2
    assert "the last attempt is made at once: SIGTERM" in caplog.text


def test_the_wait_does_not_outlast_the_deadline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    # The job ends in half an hour, and the last save must begin 40 minutes before.
    clock = Clock(end_time=time.time() + 1800, file=None, lead_s=2400.0, guess_s=0.0)
    claimed = run.claim_link({"job": None, "num_tasks": 1, "foreground": True})
    berth = berth_for(
        run, claimed, read_frozen(run.config), Ranks(ALONE), SignalFlags(), clock, job=None
    )
    reason = StopWatch(berth).wait(600)
    assert reason is not None and reason.startswith("deadline")


# In training


def unreliable(
    fail_in: int, attempts: list[int], meanwhile: Callable[[Any], None] = lambda session: None
) -> Any:
    """A training whose forward and backward pass in one step fails in the first attempt."""

    def train(session: hpcresume.Session) -> None:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        session.register(model=model, optimizer=optimizer)
        loader = session.loader(Noisy(), batch_size=4, shuffle=True)

        for _, points in session.steps(loader):

            def attempt(points: torch.Tensor = points) -> float:
                loss = loss_of(model, points + 0.1 * torch.randn(4) + random.gauss(0, 0.1))
                loss.backward()
                if session.global_step == fail_in - 1:
                    attempts.append(session.global_step)
                    if len(attempts) == 1:
                        meanwhile(session)
                        raise OSError(116, "Stale file handle")
                return float(loss.detach())

            session.log(loss=session.retry(attempt), noise=random.random())
            optimizer.step()
            optimizer.zero_grad()

    return train


def test_a_step_that_needed_two_attempts_leaves_the_bytes_of_one_that_did_not(
    tmp_path: Path,
) -> None:
    uncut = through(make_run(tmp_path / "uncut"), train=unreliable(0, []))
    attempts: list[int] = []
    run = through(make_run(tmp_path / "run"), 4, train=unreliable(6, attempts))
    assert attempts == [5, 5]
    assert_same(run, uncut)
    assert changes_said(run) == []


def test_a_link_that_must_stop_while_it_waits_ends_after_its_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    attempts: list[int] = []
    train = unreliable(6, attempts, lambda session: (session.path / "STOP").touch())
    ended = link(run, train)
    assert (ended.how, ended.why, ended.code) == ("stopped", "STOP", 0)
    assert attempts == [5, 5]
    assert "the last attempt is made at once: STOP" in caplog.text
    assert steps_kept(run) == [6]


def test_no_batch_is_skipped_where_all_attempts_fail(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", checkpoint={"steps": 1})

    def train(session: hpcresume.Session) -> None:
        model = nn.Linear(4, 1)
        session.register(model=model)
        for number in session.steps(list(range(9))):
            session.log(batch=number)
            if number == 4:
                session.retry(lambda: open("/nowhere/at/all").close(), attempts=1)

    ended = link(run, train)
    assert ended.how == "failed" and "/nowhere/at/all" in ended.why
    assert steps_kept(run)[-1] == 4
    assert [line["batch"] for line in log_lines(run)] == [0, 1, 2, 3]
