"""What `verify` sees in a training's variables, and that its looking changes nothing."""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hpcresume.verify import looks, watch
from hpcresume.verify.digest import digest
from hpcresume.verify.looks import Look, Looks, Seen
from hpcresume.verify.search import OwnCode, search

CODE = OwnCode("train.py:train")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the same process are no part of this training."""
    for name in list(sys.modules):
        if name != __name__ and CODE.has(name):
            monkeypatch.delitem(sys.modules, name)


def look(registered: dict[str, Any] | None = None) -> Look:
    """What the caller's variables lead to."""
    return search(CODE, registered or {}, sys._getframe(1))


def stateful(found: Look) -> dict[str, str]:
    """Name -> kind of what has a state and is not registered."""
    return {k: v.kind for k, v in found.items() if v.stateful and not v.registered}


class Samples:
    """A dataset with a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.drawn = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return float(self.rng.normal())


# ---- what is found -------------------------------------------------------------------------


def closure(samples: Samples) -> Callable[[], float]:
    return lambda: samples[0]


def stream(samples: Samples) -> Iterator[float]:
    yield samples[0]


@pytest.mark.parametrize(
    ("hide", "name"),
    [
        (lambda it: it, "held.rng"),
        (lambda it: [0, {"train": it}], "held[1]['train'].rng"),
        (lambda it: deque([it]), "held[0].rng"),
        (DataLoader, "held.dataset.rng"),
        (lambda it: it.__getitem__, "held.rng"),
        (lambda it: functools.partial(it.__getitem__, 1), "held[0].rng"),
        (closure, "held.samples.rng"),
        (stream, "held.samples.rng"),
    ],
    ids=["object", "dict", "deque", "loader", "method", "partial", "closure", "generator"],
)
def test_a_generator_is_found_wherever_a_variable_leads(
    hide: Callable[[Samples], Any], name: str
) -> None:
    held = hide(Samples())
    assert stateful(look())[name] == "numpy Generator"
    del held


def test_all_kinds_of_generators_are_found_and_not_advanced() -> None:
    numbers = np.random.RandomState(1)
    modern = np.random.default_rng(1)
    plain = random.Random(1)
    tensors = torch.Generator().manual_seed(1)
    first = look()
    assert stateful(first) == {
        "numbers": "numpy RandomState",
        "modern": "numpy Generator",
        "plain": "random Random",
        "tensors": "torch Generator",
    }
    again = look()
    names = ["numbers", "modern", "plain", "tensors"]
    assert [again[name] for name in names] == [first[name] for name in names]
    drawn = (numbers.rand(), modern.random(), plain.random(), torch.rand(1, generator=tensors))
    moved = look()
    assert drawn and all(moved[name] != first[name] for name in names)


def test_a_module_around_or_inside_a_registered_one_holds_nothing_more() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    wrapped, head = nn.Sequential(model), model[1]
    teacher = nn.Linear(2, 1)
    assert stateful(look({"model": model})) == {"teacher": "Linear"}
    assert wrapped is not head and teacher is not head


def test_an_optimizer_that_is_not_registered_is_found_with_its_state() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = look({"model": model})
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    after = look({"model": model})
    assert stateful(before) == stateful(after) == {"optimizer": "SGD"}
    assert before["optimizer"].digest != after["optimizer"].digest


def test_numbers_count_where_the_users_code_keeps_them() -> None:
    samples, patience, history = Samples(), 3, [0.5]
    library = DataLoader(samples)
    found = look()
    plain = {name for name, seen in found.items() if not seen.stateful}
    assert {"samples.drawn", "patience", "history"} <= plain
    assert not any(name.startswith("library.") for name in plain)
    assert library is not None and patience and history


# ---- what looking must not do --------------------------------------------------------------


consequences: list[str] = []


def forbidden(*_: Any) -> Any:
    consequences.append("the user's code was run")
    raise AssertionError


class Lazy:
    """Everything that it is asked for has consequences."""

    def __init__(self) -> None:
        vars(self)["rng"] = random.Random(1)

    loaded = property(forbidden)
    __class__ = property(forbidden)  # type: ignore[assignment]
    __getattr__ = __len__ = __iter__ = __bool__ = __hash__ = __repr__ = forbidden  # type: ignore[assignment]


class Careful(Lazy):
    """Not even its own attributes are given."""

    __getattribute__ = forbidden  # type: ignore[assignment]


class Listing(list):  # type: ignore[type-arg]
    """Loads what it lists."""

    __iter__ = __len__ = forbidden  # type: ignore[assignment]


class Table(dict):  # type: ignore[type-arg]
    """Loads what it lists."""

    items = keys = values = __iter__ = forbidden  # type: ignore[assignment]


def test_looking_runs_no_property_and_nothing_else_of_the_users() -> None:
    lazy, careful = Lazy(), Careful.__new__(Careful)
    object.__getattribute__(careful, "__dict__")["rng"] = random.Random(2)
    listing, table = Listing([Samples()]), Table(a=Samples())
    found = stateful(look())
    assert found.keys() >= {"lazy.rng", "careful.rng", "listing[0].rng", "table['a'].rng"}
    assert not consequences
    del lazy, careful, listing, table


class Broken:
    """Was never made to be saved."""

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("not yet")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("not yet")


def test_a_state_that_cannot_be_read_hides_no_other() -> None:
    broken, samples = Broken(), Samples()
    found = look()
    assert (found["broken"].kind, found["broken"].digest) == ("Broken", None)
    assert found["samples.rng"].digest is not None
    del broken, samples


def test_what_contains_itself_is_no_endless_search() -> None:
    ring: list[Any] = [Samples()]
    ring.append(ring)
    tree: list[Any] = []
    for _ in range(40):
        tree = [tree, tree]
    found = look()
    assert (found["ring"].digest, found["tree"].digest) == (None, None)
    assert "ring[0].rng" in found


def test_data_are_not_taken_for_state(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "tokens", mode="w+", shape=100)
    corpus = list(range(400_000))
    large = torch.zeros(1, dtype=torch.int8).expand(1 << 40)
    found = look()
    assert [found[name].digest for name in ("mapped", "corpus", "large")] == [None] * 3
    del mapped, corpus, large


class Drawing:
    """Its state depends on chance."""

    def state_dict(self) -> dict[str, Any]:
        return {"noise": [torch.rand(1), random.random(), np.random.rand()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_state_dict_that_draws_random_numbers_leaves_no_trace(tmp_path: Path) -> None:
    rank, drawing = watch._Watch(tmp_path / "looks.json", CODE), Drawing()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    rank.look("begin")
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert '"drawing"' in (tmp_path / "looks.json").read_text()
    del drawing


# ---- digests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"b": 1}),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (np.array(["a"], dtype=object), np.array(["b"], dtype=object)),
        (np.datetime64("2020-01-01"), np.datetime64("2020-01-02")),
    ],
    ids=lambda value: str(value).replace("\n", " "),
)
def test_other_values_have_other_digests(one: Any, other: Any) -> None:
    assert digest(one) is not None and digest(one) != digest(other)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0),
        torch.ones(4, 3).T,
        torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["scalar", "empty", "transposed", "bfloat16", "conjugate"],
)
def test_any_tensor_has_the_digest_of_its_copy(tensor: torch.Tensor) -> None:
    assert digest(tensor) is not None
    assert digest(tensor) == digest(tensor.detach().clone().contiguous())


# ---- what a cut has lost -------------------------------------------------------------------


def seen(state: str | None) -> Look:
    return {"it": Seen(kind="EMA", digest=state, stateful=True, registered=False)}


@pytest.mark.parametrize(
    ("first_end", "third_begin", "third_end", "uncut_end", "again_end", "told"),
    [
        ("b", "a", "c", "d", "d", True),
        ("b", "b", "d", "d", "d", False),
        ("b", "a", "d", "d", "d", False),
        ("b", "a", "c", "d", "e", False),
        (None, "a", None, "d", "d", False),
    ],
    ids=["begun anew", "kept", "made again before its use", "a time", "not readable"],
)
def test_lost_is_what_a_link_begins_anew_and_ends_differently(
    first_end: str | None,
    third_begin: str,
    third_end: str | None,
    uncut_end: str,
    again_end: str,
    told: bool,
) -> None:
    uncut, again = Looks(seen("a"), seen(uncut_end)), Looks(seen("a"), seen(again_end))
    first, third = Looks(seen("a"), seen(first_end)), Looks(seen(third_begin), seen(third_end))
    assert [it.name for it in looks.lost(0, uncut, again, first, third)] == ["it"] * told
