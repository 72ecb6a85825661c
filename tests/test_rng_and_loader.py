"""Random states come back exactly, and a loader's position is a number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from hpcresume.checkpoint import rng
from hpcresume.errors import CheckpointError, UsageError
from hpcresume.training.loader import ResumableLoader

quick = settings(database=None, deadline=None, max_examples=60)

DRAWS: dict[str, Callable[[], Any]] = {
    "python": lambda: [random.random(), random.gauss(0, 1), random.randrange(10**30)],
    "numpy": lambda: [np.random.rand(3).tolist(), np.random.normal(), np.random.randint(99)],
    "torch": lambda: [torch.rand(3).tolist(), torch.randn(5).tolist(), torch.randperm(9).tolist()],
}


def draw() -> dict[str, Any]:
    return {name: some() for name, some in DRAWS.items()}


def global_states() -> tuple[Any, ...]:
    """The states of all global generators, comparable."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()


# Random states


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("drawn_before", [0, 1, 700])
def test_generator_draws_the_same_after_a_round_trip_through_json(
    name: str, drawn_before: int
) -> None:
    for _ in range(drawn_before):
        DRAWS[name]()
    text = json.dumps(rng.capture())
    expected = [DRAWS[name]() for _ in range(3)]
    rng.restore(json.loads(text))
    assert [DRAWS[name]() for _ in range(3)] == expected


@pytest.mark.parametrize("one", [lambda: random.gauss(0, 1), np.random.normal])
def test_second_half_of_a_pair_of_normal_draws_is_kept(one: Callable[[], float]) -> None:
    one()
    text = json.dumps(rng.capture())
    expected = one()
    rng.restore(json.loads(text))
    assert one() == expected


def test_capture_draws_nothing() -> None:
    before = global_states()
    rng.capture()
    assert global_states() == before


def test_capture_after_a_restore_is_what_was_restored() -> None:
    captured = json.loads(json.dumps(rng.capture()))
    draw()
    rng.restore(captured)
    assert json.loads(json.dumps(rng.capture())) == captured


def damaged_states() -> list[Any]:
    good = rng.capture()
    version, internal, gauss = good["python"]
    name, keys, position, has_gauss, cached = good["numpy"]
    return [
        None,
        [],
        {},
        "text",
        {**good, "python": None},
        {**good, "python": [version, internal]},
        {**good, "python": [99, internal, gauss]},
        {**good, "python": [version, internal[:-1], gauss]},
        {**good, "python": [version, [-1, *internal[1:]], gauss]},
        {**good, "python": [version, [2**70, *internal[1:]], gauss]},
        {**good, "python": [version, ["x", *internal[1:]], gauss]},
        {k: v for k, v in good.items() if k != "torch"},
        {**good, "torch": ""},
        {**good, "torch": "not base64!"},
        {**good, "torch": 5},
        {**good, "torch": good["torch"][: len(good["torch"]) // 8 * 4]},
        {**good, "torch": "A" * len(good["torch"])},
        {**good, "numpy": None},
        {**good, "numpy": [name, keys[:-1], position, has_gauss, cached]},
        {**good, "numpy": [name, [2**40, *keys[1:]], position, has_gauss, cached]},
        {**good, "numpy": [name, [-1, *keys[1:]], position, has_gauss, cached]},
        {**good, "numpy": ["PCG64", keys, position, has_gauss, cached]},
        {**good, "numpy": [name, keys, 10**9, has_gauss, cached]},
        {**good, "numpy": [name, keys, -5, has_gauss, cached]},
        {**good, "numpy": [name, keys, 10**30, has_gauss, cached]},
    ]


@pytest.mark.parametrize("number", range(25))
def test_random_state_that_is_damaged_is_a_checkpoint_error(number: int) -> None:
    state = damaged_states()[number]
    with pytest.raises(CheckpointError):
        rng.restore(state)


def test_all_damaged_random_states_are_tried() -> None:
    assert len(damaged_states()) == 25


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_random_state_of_gpus_that_are_not_there_is_said() -> None:
    state = rng.capture()
    (said,) = rng.restore({**state, "cuda": [state["torch"]]})
    assert said.startswith("the checkpoint holds the random state of 1 GPUs and 0 are visible")


OWN: dict[str, Callable[[], Any]] = {
    "numpy": lambda: np.random.default_rng(3),
    "numpy-mt": lambda: np.random.Generator(np.random.MT19937(3)),
    "numpy-philox": lambda: np.random.Generator(np.random.Philox(3)),
    "numpy-legacy": lambda: np.random.RandomState(3),
    "torch": lambda: torch.Generator().manual_seed(3),
    "python": lambda: random.Random(3),
}


def drawn(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return torch.randn(5, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.random(), generator.gauss(0, 1)]
    return [generator.normal(), generator.bytes(3)]


@pytest.mark.parametrize("name", OWN)
def test_generator_of_ones_own_draws_the_same_after_a_round_trip_through_json(name: str) -> None:
    made = OWN[name]()
    drawn(made)
    text = json.dumps(rng.capture({"mine": made}))
    expected = drawn(made)
    fresh = OWN[name]()
    assert rng.restore(json.loads(text), {"mine": fresh}) == []
    assert drawn(fresh) == expected


def test_generator_that_the_checkpoint_does_not_know_is_a_checkpoint_error() -> None:
    state = rng.capture({"mine": random.Random()})
    with pytest.raises(CheckpointError, match="register the same"):
        rng.restore(state, {"other": random.Random()})


# The loader


class Numbers(Dataset[int]):
    """0, 1, 2, …"""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Numbers):
    """Each sample draws from all global generators."""

    def __getitem__(self, index: int) -> tuple[int, str]:  # type: ignore[override]
        return index, repr(draw())


def make(length: int = 23, **fields: Any) -> ResumableLoader:
    dataset = fields.pop("dataset", Numbers(length))
    options = fields.pop("options", {})
    return ResumableLoader(
        dataset,
        **{
            "batch_size": 4,
            "shuffle": True,
            "drop_last": False,
            "seed": 5,
            "rank": 0,
            "world_size": 1,
            "options": options,
            **fields,
        },
    )


def indices(loader: ResumableLoader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch, _ in loader.batches(epoch, start)]


def flat(batches: Iterable[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_order_is_the_same_in_every_loader() -> None:
    assert torch.equal(make().order(3), make().order(3))


def test_order_does_not_depend_on_the_epochs_before() -> None:
    walked = make()
    for epoch in range(3):
        indices(walked, epoch)
    assert torch.equal(walked.order(3), make().order(3))


def test_order_does_not_depend_on_global_generators() -> None:
    expected = make().order(3)
    torch.manual_seed(99)
    random.seed(99)
    assert torch.equal(make().order(3), expected)


def test_order_is_known_for_ever() -> None:
    # What a checkpoint's position means must not change with a release of this package.
    assert make(length=10).order(1).tolist() == [9, 6, 0, 2, 7, 5, 3, 8, 1, 4]


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 1}])
def test_order_changes_with_seed_and_epoch(change: dict[str, int]) -> None:
    epoch = change.pop("epoch", 0)
    assert not torch.equal(make(**change).order(epoch), make().order(0))


@quick
@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 200))
def test_order_is_a_permutation(seed: int, epoch: int, length: int) -> None:
    assert sorted(make(length=length, seed=seed).order(epoch).tolist()) == list(range(length))


def test_without_shuffle_the_order_is_the_dataset_s() -> None:
    assert flat(indices(make(shuffle=False))) == list(range(23))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [20, 23, 4, 5, 7])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resuming_at_every_batch_gives_the_rest_of_the_epoch(
    shuffle: bool, drop_last: bool, length: int, rank: int, world_size: int
) -> None:
    shape = {
        "shuffle": shuffle,
        "drop_last": drop_last,
        "length": length,
        "batch_size": 2,
        "rank": rank,
        "world_size": world_size,
    }
    whole = indices(make(**shape), epoch=2)
    assert len(whole) == len(make(**shape))
    for start in range(len(whole) + 1):
        assert indices(make(**shape), 2, start) == whole[start:]


WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}


@pytest.fixture(scope="module")
def noisy_epoch() -> list[Any]:
    """An epoch whose samples draw random numbers in two workers."""
    loader = make(length=7, dataset=Noisy(7), batch_size=2, options=WORKERS)
    return [batch for batch, _ in loader.batches(1, 0)]


@pytest.mark.parametrize("start", range(5))
def test_resuming_with_workers_gives_the_same_samples_and_noise(
    noisy_epoch: list[Any], start: int
) -> None:
    loader = make(length=7, dataset=Noisy(7), batch_size=2, options=WORKERS)
    resumed = [batch for batch, _ in loader.batches(1, start)]
    assert repr(resumed) == repr(noisy_epoch[start:])


def test_workers_give_the_order_of_the_main_process(noisy_epoch: list[Any]) -> None:
    assert [batch[0].tolist() for batch in noisy_epoch] == indices(make(length=7, batch_size=2), 1)


def test_noise_in_workers_differs_between_samples(noisy_epoch: list[Any]) -> None:
    noise = [text for batch in noisy_epoch for text in batch[1]]
    assert len(set(noise)) == 7


def test_noise_is_the_same_with_any_number_of_workers(noisy_epoch: list[Any]) -> None:
    loader = make(length=7, dataset=Noisy(7), batch_size=2)
    assert repr([batch for batch, _ in loader.batches(1, 0)]) == repr(noisy_epoch)


def test_noise_differs_between_epochs() -> None:
    loader = make(length=7, dataset=Noisy(7), batch_size=2, shuffle=False)
    first, second = (next(loader.batches(epoch, 0))[0][1] for epoch in (0, 1))
    assert first != second


class NoisyCollate:
    def __call__(self, samples: list[Any]) -> Any:
        assert type(samples) is list
        return [index for index, _ in samples], repr(draw())


def test_noise_of_the_collate_function_is_the_same_with_any_number_of_workers() -> None:
    found = [
        [batch for batch, _ in loader.batches(1, start)][-2:]
        for options, start in ((WORKERS, 0), ({}, 0), ({}, 2))
        for loader in [
            make(
                length=7,
                dataset=Noisy(7),
                batch_size=2,
                options={**options, "collate_fn": NoisyCollate()},
            )
        ]
    ]
    assert found[0] == found[1] == found[2]


def test_workers_that_outlive_an_epoch_give_each_epoch_its_own_order_and_noise() -> None:
    persistent = {**WORKERS, "persistent_workers": True}
    lasting = make(length=7, dataset=Noisy(7), batch_size=2, options=persistent)
    fresh = make(length=7, dataset=Noisy(7), batch_size=2)
    for epoch in range(3):
        expected = [batch for batch, _ in fresh.batches(epoch, 0)]
        assert repr([batch for batch, _ in lasting.batches(epoch, 0)]) == repr(expected)


def test_only_the_last_batch_of_an_epoch_is_called_the_last() -> None:
    for start in range(6):
        found = [last for _, last in make().batches(0, start)]
        assert found == [False] * (5 - start) + [True]


@pytest.mark.parametrize("options", [{}, WORKERS], ids=["main process", "workers"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_iterating_draws_nothing_from_a_global_generator(
    options: dict[str, Any], shuffle: bool
) -> None:
    before = global_states()
    indices(make(shuffle=shuffle, options=options), start=2)
    assert global_states() == before


@quick
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_ranks_together_see_each_sample_once_but_for_padding_at_the_end(
    length: int, batch_size: int, world_size: int, shuffle: bool, epoch: int
) -> None:
    shape = {"length": length, "batch_size": batch_size, "world_size": world_size}
    ranks = [
        indices(make(**shape, shuffle=shuffle, rank=rank), epoch) for rank in range(world_size)
    ]
    order = make(**shape, shuffle=shuffle).order(epoch).tolist()
    together = [index for batches in zip(*ranks, strict=True) for b in batches for index in b]
    padding = -length % (batch_size * world_size) and -length % world_size
    assert together[:length] == order
    assert len(together) == length + padding
    assert set(together[length:]) <= set(order[:padding])


@quick
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3))
def test_ranks_take_the_same_number_of_samples_at_every_step(
    length: int, batch_size: int, world_size: int
) -> None:
    shape = {"length": length, "batch_size": batch_size, "world_size": world_size}
    sizes = [[len(b) for b in indices(make(**shape, rank=rank))] for rank in range(world_size)]
    assert all(size == sizes[0] for size in sizes)


@quick
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3))
def test_dropping_the_last_leaves_only_whole_batches_without_repeats(
    length: int, batch_size: int, world_size: int
) -> None:
    shape = {"length": length, "batch_size": batch_size, "world_size": world_size}
    if length < batch_size * world_size:
        return
    ranks = [indices(make(**shape, drop_last=True, rank=rank)) for rank in range(world_size)]
    together = [index for batches in ranks for batch in batches for index in batch]
    assert len(together) == len(set(together)) == length - length % (batch_size * world_size)


def test_global_batch_is_the_same_for_every_number_of_ranks() -> None:
    one = indices(make(length=24, batch_size=6))
    three = [indices(make(length=24, batch_size=2, rank=r, world_size=3)) for r in range(3)]
    assert one == [flat(batches) for batches in zip(*three, strict=True)]


@pytest.mark.parametrize("drop_last", [True, False])
def test_length_is_the_number_of_batches(drop_last: bool) -> None:
    loader = make(drop_last=drop_last)
    assert len(loader) == len(indices(loader)) == (5 if drop_last else 6)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(9))


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return 9


@pytest.mark.parametrize("dataset", [{1, 2}, iter([1, 2])], ids=["set", "iterator"])
def test_dataset_without_positions_is_refused(dataset: Any) -> None:
    with pytest.raises(UsageError, match="a length and an index"):
        make(dataset=dataset)


@pytest.mark.parametrize("shape", [{"length": 0}, {"length": 3, "drop_last": True}], ids=str)
def test_dataset_that_gives_no_batch_is_refused(shape: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="give no batch"):
        make(**shape)


def test_fingerprint_does_not_depend_on_rank_or_workers() -> None:
    other = make(rank=1, world_size=2, options={"num_workers": 2})
    assert other.fingerprint() == make().fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"length": 24}, {"batch_size": 5}, {"shuffle": False}, {"drop_last": True}, {"seed": 6}],
)
def test_fingerprint_differs_where_the_position_would_mean_something_else(
    change: dict[str, Any],
) -> None:
    assert make(**change).fingerprint() != make().fingerprint()
