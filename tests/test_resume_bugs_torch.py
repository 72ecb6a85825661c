"""Resume bugs of Composer, torchtitan, torch and torchdata that were really reported, and are not
ours; and the table of all forty-one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_resume_bugs_lightning as lightning
import test_resume_bugs_transformers as transformers
import torch
import torch.distributed as dist
from bug_links import (
    PER_EPOCH,
    Net,
    Noisy,
    Seen,
    assert_exact,
    assert_same,
    cut,
    ids_of,
    link,
    log_lines,
    loss_of,
    make_run,
    newest,
    series,
    steps_kept,
    through,
    two_ranks,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    get_worker_info,
)

import hpcresume
from hpcresume import files
from hpcresume.run_dir import RunDir

# Composer


def scaled(session: hpcresume.Session, *, forgets: bool = False) -> None:
    """Train with a scaler that is made when everything else has been restored."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session.register(model=model, optimizer=optimizer)
    loader = session.loader(Noisy(), batch_size=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    if not forgets:
        session.register(scaler=scaler)
    for _, points in session.steps(loader):
        scaler.scale(model(points).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        session.log(scale=scaler.get_scale())


def test_scaler_that_is_made_after_the_model_was_restored_goes_on(tmp_path: Path) -> None:
    """Composer PR#1376: a GradScaler that is created after the load loses its state."""
    uncut = assert_exact(tmp_path, (3, 4, 9), train=scaled, max_steps=12)
    assert len(set(series(uncut, "scale"))) > 4


def test_scaler_that_is_not_registered_any_more_is_an_error(tmp_path: Path) -> None:
    """Composer PR#1376: a GradScaler that is created after the load loses its state."""
    run = make_run(tmp_path / "run")
    cut(run, 5, scaled)
    ended = link(run, partial(scaled, forgets=True))
    assert (ended.how, ended.code) == ("failed", 7)
    assert "scaler" in ended.why


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with the checkpoints of steps 4 and 6."""
    run = make_run(tmp_path_factory.mktemp("cut") / "run", checkpoint={"steps": 4})
    cut(run, 6)
    return run


FILES = ["model.safetensors", "optimizer.safetensors", "rng.json", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_that_lacks_a_file_is_not_used_in_any_part(
    tmp_path: Path, cut_run: RunDir, name: str
) -> None:
    """Composer PR#2146: what one file lacks is silently taken from an older checkpoint."""
    run = RunDir(Path(shutil.copytree(cut_run.path, tmp_path / "run")))
    (newest(run).path / name).unlink()
    cut(run, 4)
    assert steps_kept(run) == [4] and log_lines(run)[-1]["step"] == 4


def test_all_ranks_resume_from_the_same_older_checkpoint(tmp_path: Path) -> None:
    """Composer PR#2146: one rank silently resumes from an older file than the others."""
    run, uncut = (make_run(tmp_path / n, max_steps=9) for n in ("run", "uncut"))
    two_ranks((run, 3), (run, 6), (uncut, None))
    (newest(run).path / "optimizer.safetensors").unlink()
    told = two_ranks((run, None))
    assert [len(rank.seen[0]) for rank in told] == [6, 6]
    assert_same(run, uncut)


def test_number_of_ranks_may_go_down_and_up_again(tmp_path: Path) -> None:
    """Composer PR#2409, #3902: stale links of single ranks are followed after 16, 8, 16 ranks."""
    run = make_run(tmp_path / "run")
    two_ranks((run, 4))
    cut(run, 8)
    told = two_ranks((run, 11), (run, None))
    assert [[ended.how for ended in rank.ends] for rank in told] == [["stopped", "completed"]] * 2
    assert [line["step"] for line in log_lines(run)] == list(range(1, 22))
    assert [path for path in run.path.rglob("*") if path.is_symlink()] == []


# torchtitan and torch


def test_optimizer_counts_the_steps_of_all_links(tmp_path: Path) -> None:
    """torchtitan #571, PR#647, pytorch PR#138575: the second resume has a stale step."""
    run = make_run(tmp_path / "run")
    for step in (4, 9, 9, 13):
        cut(run, step)
        saved = load_file(newest(run).path / "optimizer.safetensors")
        counts = {int(saved[name]) for name in saved if name.endswith(".step")}
        assert counts == {step}
    through(run)
    assert_same(run, through(make_run(tmp_path / "uncut")))


@pytest.fixture(scope="module")
def one_rank_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(model, backend="eager")
    return wrapped


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "compile": compiled,
    "DDP": DistributedDataParallel,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
}


def wrapped(session: hpcresume.Session, wrap: str) -> None:
    """Train what is inside of a wrapped model: dropout of compiled code is not the plain one's."""
    inner = Net()
    model = WRAPS[wrap](inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    session.register(model=model, optimizer=optimizer)
    for _, points in session.steps(session.loader(Noisy(), batch_size=4, shuffle=True)):
        loss = loss_of(inner, points)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)


@pytest.fixture(scope="module")
def never_wrapped(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("wraps") / "uncut", max_steps=8)
    return through(run, train=partial(wrapped, wrap="plain"))


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("second", WRAPS)
@pytest.mark.parametrize("first", WRAPS)
def test_wrapping_of_a_model_does_not_matter_in_any_resume(
    tmp_path: Path, never_wrapped: RunDir, first: str, second: str
) -> None:
    """torchtitan #961, nanoGPT #325, timm #2003: `_orig_mod.` breaks the first or second resume."""
    run = make_run(tmp_path / "run", max_steps=8)
    for step, wrap in ((2, first), (4, second), (6, first)):
        cut(run, step, partial(wrapped, wrap=wrap))
        names = set(load_file(newest(run).path / "model.safetensors"))
        assert names == set(Net().state_dict())
    assert_same(through(run, train=partial(wrapped, wrap=second)), never_wrapped)


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("wrap", WRAPS)
def test_model_that_runs_in_its_wrapping_resumes_exactly(tmp_path: Path, wrap: str) -> None:
    """torchtitan #961, nanoGPT #325, timm #2003: `_orig_mod.` breaks the first or second resume."""

    def train(session: hpcresume.Session) -> None:
        model = WRAPS[wrap](nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        session.register(model=model, optimizer=optimizer)
        for _, points in session.steps(session.loader(Noisy(), batch_size=4, shuffle=True)):
            loss = loss_of(model, points)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)

    assert_exact(tmp_path, (2, 2, 5), train=train, max_steps=8)


# torchdata


class Stream(IterableDataset[int]):
    """0 to 25, shared out over workers, and where each of them is."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        worker, count = (0, 1) if info is None else (info.id, info.num_workers)
        while self.next * count + worker < 26:
            self.next += 1
            yield (self.next - 1) * count + worker
        # As torchdata's nodes do: what has come to its end begins anew.
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.next = state["next"]


class Replayed(IterableDataset[int]):
    """A stream without a state: it can only be read again."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(26))


class Batches:
    """Batches of a loader with a state of its own, in another order in each epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.done = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = list(range(26))
        random.Random(self.epoch).shuffle(order)
        while self.done < PER_EPOCH:
            self.done += 1
            yield torch.tensor(order[4 * (self.done - 1) : 4 * self.done])
        self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


class StreamOfEpochs(Stream):
    """A stream that counts its epochs itself, and has another order in each."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = Batches()

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches:
            yield from batch.tolist()

    def state_dict(self) -> dict[str, int]:
        return self.batches.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.batches.load_state_dict(state)


def batch_sampler() -> BatchSampler:
    order = RandomSampler(range(26), generator=torch.Generator().manual_seed(3))
    return BatchSampler(order, 4, drop_last=False)


NUMBERS = TensorDataset(torch.arange(26))
SOURCES: dict[str, Callable[[hpcresume.Session], Any]] = {
    "dataset": lambda session: session.loader(NUMBERS, batch_size=4, shuffle=True),
    "batch sampler": lambda session: session.loader(NUMBERS, batch_sampler=batch_sampler()),
    "torch's loader": lambda session: DataLoader(NUMBERS, batch_size=4, shuffle=True),
    "torch's batch sampler": lambda session: DataLoader(NUMBERS, batch_sampler=batch_sampler()),
    "stream": lambda session: session.loader(Stream(), batch_size=4),
    "stream in one worker": lambda session: session.loader(Stream(), batch_size=4, num_workers=1),
    "stream in two workers": lambda session: session.loader(Stream(), batch_size=4, num_workers=2),
    "stream that counts epochs": lambda session: session.loader(StreamOfEpochs(), batch_size=4),
    "stream without a state": lambda session: session.loader(Replayed(), batch_size=4),
    "batches with a state": lambda session: Batches(),
    "list": lambda session: list(torch.arange(26).split(4)),
}


# Two workers on a machine of one core: torch says that this may be slow.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("source", SOURCES)
def test_second_and_later_resumes_find_their_place_in_the_data(tmp_path: Path, source: str) -> None:
    """torchtitan #3907, datasets #8308, #7447: later resumes begin at 0, or shorten the epoch."""

    def train(session: hpcresume.Session, seen: Seen) -> None:
        session.register(model=nn.Linear(1, 1))
        for batch in session.steps(SOURCES[source](session)):
            ids = batch[0] if isinstance(batch, (list, tuple)) else batch
            seen.append((session.epoch, ids.tolist()))

    whole: Seen = []
    shape = {"epochs": 3, "max_steps": None}
    through(make_run(tmp_path / "uncut", **shape), train=partial(train, seen=whole))
    for epoch in range(3):
        assert sorted(ids_of(whole, epoch)) == list(range(26))
    for stops in ((2, 2, 5, 9, 16), (PER_EPOCH, PER_EPOCH + 1, 2 * PER_EPOCH), (6, 13, 20)):
        seen: Seen = []
        run = make_run(tmp_path / f"cut at {stops}", **shape)
        through(run, *stops, train=partial(train, seen=seen))
        assert seen == whole


def test_run_is_complete_at_its_last_step_only(tmp_path: Path) -> None:
    """torchdata #1437, verl #7401: the state of an epoch's end skips one, and the job exits 0."""
    run = make_run(tmp_path / "run", epochs=3, max_steps=None)
    for epoch in (1, 2):
        cut(run, epoch * PER_EPOCH)
        state = files.read_json(run.trainer_state)
        assert (state["epoch"], state["completed"]) == (epoch, False)
        assert not run.final_model.exists()
    assert link(run).how == "completed"
    state = files.read_json(run.trainer_state)
    assert (state["global_step"], state["completed"]) == (3 * PER_EPOCH, True)
    assert_same(run, through(make_run(tmp_path / "uncut", epochs=3, max_steps=None)))


class EndsOnce(IterableDataset[int]):
    """A stream that gives nothing more once it has been gone through, in any process."""

    def __init__(self, run: RunDir) -> None:
        self.mark = run.path / "gone through"

    def __iter__(self) -> Iterator[int]:
        if not self.mark.exists():
            yield from range(4 * PER_EPOCH)
            self.mark.touch()


def test_link_whose_data_are_empty_is_not_the_end_of_training(tmp_path: Path) -> None:
    """torchdata #1437, verl #7401: the job exits 0 although nothing was trained."""
    run = make_run(tmp_path / "run", epochs=3, max_steps=None)

    def train(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(1, 1))
        for _ in session.steps(session.loader(EndsOnce(run), batch_size=4)):
            pass

    cut(run, PER_EPOCH, train)
    ended = link(run, train)
    assert ended.how == "failed" and ended.code != 0
    assert not files.read_json(run.trainer_state)["completed"]


def test_link_that_never_comes_to_its_steps_is_not_the_end_of_training(tmp_path: Path) -> None:
    """torchdata #1437, verl #7401: the job exits 0 although nothing was trained."""
    run = make_run(tmp_path / "run")
    cut(run, 5)
    ended = link(run, lambda session: None)
    assert ended.how == "failed" and ended.code != 0
    assert not run.final_model.exists()


# torch: types of the optimizer's state


class Momentum(torch.optim.Optimizer):
    """Gradient descent whose momentum has a type of its own, whatever its parameters have."""

    def __init__(self, parameters: Any, kind: torch.dtype) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=self.kind)
                state["momentum"].mul_(0.9).add_(parameter.grad.to(self.kind) / 3)
                parameter.sub_((group["lr"] * state["momentum"]).to(parameter.dtype))


KINDS = {"bf16 and fp32": (torch.bfloat16, torch.float32)}
KINDS["fp32 and bf16"] = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kinds", KINDS)
def test_momentum_keeps_its_own_type_and_bits(tmp_path: Path, kinds: str) -> None:
    """pytorch #43706, torchtitan PR#4615: load_state_dict casts it to the parameter's type."""
    own, momentum = KINDS[kinds]

    def train(session: hpcresume.Session) -> None:
        model = nn.Linear(4, 1).to(own)
        optimizer = Momentum(model.parameters(), momentum)
        session.register(model=model, optimizer=optimizer)
        for _, points in session.steps(session.loader(Noisy(), batch_size=4)):
            model(points.to(own)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(momentum=optimizer.state[model.weight]["momentum"].float())
            assert optimizer.state[model.weight]["momentum"].dtype == momentum

    uncut = assert_exact(tmp_path, (3, 3, 8, 9), train=train, max_steps=12)
    saved = load_file(newest(uncut).path / "optimizer.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {momentum}


# The table


#: Each of the bugs, by its number in our list: a test, and what its docstring names.
NUMBERED: dict[int, tuple[str, str]] = {
    1: ("test_restart_goes_on_with_the_dropout_of_the_uncut_run", "#11323"),
    2: ("test_random_numbers_are_restored_at_the_end_of_an_epoch_too", "#17032"),
    3: ("test_augmentation_goes_on_where_it_was_in_mid_epoch", "#39215"),
    4: ("test_another_number_of_ranks_is_said", "#14554"),
    5: ("test_resume_unpickles_nothing", "#34631"),
    6: (
        "test_link_that_was_killed_while_saving_is_followed_by_one_from_the_checkpoint_before",
        "#35782",
    ),
    7: ("test_rotation_keeps_the_newest_by_step_whatever_the_times_are", "#26961"),
    8: ("test_run_that_keeps_one_checkpoint_is_never_without_a_valid_one", "#25129"),
    9: ("test_position_counts_every_micro_batch_of_an_accumulation", "#5605"),
    10: ("test_learning_rates_after_a_restart_are_those_of_the_uncut_run", "#23099"),
    11: ("test_schedule_of_two_ranks_goes_on_one_step_at_a_time", "#23986"),
    12: ("test_objects_without_tensors_do_not_hinder_a_restart", "#29059"),
    13: ("test_run_that_is_moved_between_links_goes_on_and_ends", "#48315"),
    14: ("test_elastic_restart_neither_loses_nor_repeats_a_sample", "#40245"),
    15: ("test_log_of_a_cut_run_is_byte_for_byte_that_of_the_uncut_run", "PR#9818"),
    16: ("test_samples_go_on_in_order_beyond_the_first_epoch", "#2016"),
    17: ("test_epoch_after_the_resumed_one_has_its_own_order", "PR#4071"),
    18: ("test_random_state_that_does_not_load_ends_the_link", "#4283"),
    19: ("test_every_global_generator_goes_on", "#3960"),
    20: ("test_rotation_counts_by_number_and_not_by_letters", "#1163"),
    21: ("test_second_resume_overwrites_no_checkpoint", "#1601"),
    22: ("test_old_checkpoint_is_there_until_the_new_one_is_acknowledged", "in its source"),
    23: ("test_resumed_epoch_begins_with_the_next_batch", "#19367"),
    24: ("test_epoch_cut_at_any_batch_is_gone_through_once", "#5325"),
    25: ("test_run_ends_at_max_steps_around_the_end_of_an_epoch", "#11555"),
    26: ("test_schedule_of_epochs_is_not_one_behind", "#4655"),
    27: ("test_scale_of_the_gradients_goes_on", "#10766"),
    28: ("test_logged_steps_go_up_by_one_even_after_a_crash", "#12274"),
    29: ("test_storm_of_signals_changes_nothing", "#21406"),
    30: ("test_first_run_begins_fresh_in_a_directory_with_odd_names", "#20347"),
    31: ("test_every_signal_in_every_state_leaves_exactly_one_successor", "#20542"),
    32: ("test_killed_save_leaves_the_old_checkpoint_or_the_new_one", "#688"),
    33: ("test_random_state_after_loading_is_the_saved_one", "#20204"),
    34: ("test_scaler_that_is_made_after_the_model_was_restored_goes_on", "PR#1376"),
    35: ("test_all_ranks_resume_from_the_same_older_checkpoint", "PR#2146"),
    36: ("test_number_of_ranks_may_go_down_and_up_again", "PR#2409"),
    37: ("test_optimizer_counts_the_steps_of_all_links", "#571"),
    38: ("test_wrapping_of_a_model_does_not_matter_in_any_resume", "#961"),
    39: ("test_second_and_later_resumes_find_their_place_in_the_data", "#3907"),
    40: ("test_run_is_complete_at_its_last_step_only", "#1437"),
    41: ("test_momentum_keeps_its_own_type_and_bits", "#43706"),
}


def test_each_of_the_forty_one_bugs_has_a_test_that_names_it() -> None:
    tests = {**vars(transformers), **vars(lightning), **globals()}
    unnamed = [n for n, (name, number) in NUMBERED.items() if number not in tests[name].__doc__]
    assert list(NUMBERED) == list(range(1, 42)) and unnamed == []
