"""Checkpoints: what goes in comes out bit for bit; what is damaged is found, and not used."""

from __future__ import annotations

import collections
import copy
import dataclasses
import errno
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import hpcresume
from hpcresume import files
from hpcresume.checkpoint import images, writer
from hpcresume.checkpoint import manifest as manifests
from hpcresume.checkpoint.arena import Arena
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.images import verify
from hpcresume.checkpoint.manifest import Committed, FileEntry, Manifest, read_committed
from hpcresume.checkpoint.retention import Policy, to_remove
from hpcresume.checkpoint.staged import STATE
from hpcresume.checkpoint.store import Store
from hpcresume.checkpoint.tensors import join, plain_name, split
from hpcresume.errors import CheckpointError, Fenced, HpcResumeError, UsageError
from hpcresume.journal import Lineage, Segment
from hpcresume.run_dir import RunDir

ROOT = Path(hpcresume.__file__).parents[1]
#: A directory whose name needs quoting everywhere.
ODD = "a 'run' with \"all\"\nof it $HOME"
#: The lineage of a run without links: everything counts.
ALL = Lineage()
RUN_ID = "run-1"

quick = settings(
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

Write = Callable[[Path], Sequence[FileEntry]]


def make_run(path: Path) -> RunDir:
    run = RunDir(path)
    run.create("", cluster="none", project=path.parent, versions={})
    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(make_run(tmp_path / ODD), RUN_ID)


def text_files(**contents: Any) -> Write:
    """Writes JSON files, a.json for a=…"""

    def write(directory: Path) -> list[FileEntry]:
        return [
            writer.write_file(directory / f"{k}.json", files.to_json(v))
            for k, v in contents.items()
        ]

    return write


def commit(store: Store, step: int, write: Write | None = None, **fields: Any) -> Committed:
    return store.commit(
        write or text_files(state={"step": step}, rng=[step]),
        **{
            "step": step,
            "epoch": 0,
            "link": 1,
            "parent": None,
            "metric": None,
            "lineage": ALL,
            "fence": lambda: None,
            **fields,
        },
    )


def latest(store: Store, lineage: Lineage = ALL) -> int | None:
    found = store.latest_verified(lineage, lambda step, reason: None)
    return None if found is None else found.committed.step


def bad_ones(store: Store, lineage: Lineage = ALL) -> dict[int, str]:
    """What `latest_verified` finds wrong, by step."""
    bad: dict[int, str] = {}
    store.latest_verified(lineage, bad.__setitem__)
    return bad


def steps(store: Store, lineage: Lineage = ALL) -> list[int]:
    return [found.step for found in store.committed(lineage)]


def hidden(store: Store) -> list[str]:
    """What is half-written or half-removed."""
    return sorted(path.name for path in store.run.path.glob(".*.partial"))


def quarantined(store: Store) -> list[str]:
    return sorted(path.name.split(".")[0] for path in store.run.path.glob("quarantined-*"))


def save(store: Store, step: int = 10, **objects: Any) -> Committed:
    """Commit registered objects."""
    contents = Contents()
    for name, value in objects.items():
        contents.add(name, value)
    return keep(store, contents, step)


def keep(store: Store, contents: Contents, step: int = 10) -> Committed:
    """Commit what is registered, as it is now."""
    staged = contents.stage({"step": step}, [], {}).beside(lambda entry: None)
    return commit(store, step, staged.write)


def restore(committed: Committed, **objects: Any) -> list[str]:
    """Restore objects, as a session does; returns what it says about differences."""
    contents = Contents()
    state = files.read_json(committed.path / STATE)
    said = []
    for name, value in objects.items():
        contents.add(name, value)
        said += contents.restore(name, images.read(committed), state)
    return said


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    """Equal for tensors that are the same bit for bit."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.dtype, plain.shape, bytes(plain.reshape(-1).view(torch.uint8).tolist())


def all_bits(state: Any) -> Any:
    """A state with its tensors as bits, comparable."""
    if isinstance(state, torch.Tensor):
        return bits(state)
    if isinstance(state, Mapping):
        return {key: all_bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [all_bits(value) for value in state]
    return state


# Tensors in files


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


def every_bit_pattern(dtype: torch.dtype) -> torch.Tensor:
    """Elements of random bits, NaNs and infinities among them."""
    if dtype is torch.bool:
        return torch.tensor([True, False, True])
    raw = torch.randint(0, 256, (512,), dtype=torch.uint8, generator=torch.Generator())
    return raw.view(dtype)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> FileEntry:
    (image,) = Arena().stage({path.name: tensors}, metadata)
    return writer.write_file(path, image.content)


def written(path: Path, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors as another tool reads them from our file."""
    write_tensors(path / "x.safetensors", tensors, {"format": "pt"})
    return load_file(path / "x.safetensors")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_read_by_safetensors_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = every_bit_pattern(dtype)
    assert bits(written(tmp_path, x=tensor)["x"]) == bits(tensor)


ROWS = torch.arange(24, dtype=torch.float32).reshape(4, 6)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.tensor(True),
        torch.empty(0),
        torch.empty(3, 0, 2, dtype=torch.int64),
        ROWS.t(),
        ROWS[:, ::2],
        ROWS[1:3, 2:4],
        ROWS[0].expand(3, 6),
        ROWS.flip(0),
        torch.ones(5, dtype=torch.bfloat16)[::2],
        torch.ones(4, 4).to(torch.float8_e4m3fn).t(),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        nn.Parameter(torch.randn(2, 3)),
    ],
    ids=[
        *("scalar", "boolean scalar", "empty", "empty in the middle", "transposed", "strided"),
        *("inner part", "expanded", "flipped", "strided bf16", "transposed fp8", "conjugate"),
        *("negative", "parameter"),
    ],
)
def test_every_layout_is_read_by_safetensors(tmp_path: Path, tensor: torch.Tensor) -> None:
    assert bits(written(tmp_path, x=tensor)["x"]) == bits(tensor)


def test_names_of_tensors_may_be_anything(tmp_path: Path) -> None:
    names = ["a.b", "a b", "é", "q\"uo'te", "new\nline", "\\", "x" * 500]
    tensors = {name: torch.tensor([n]) for n, name in enumerate(names)}
    assert all_bits(written(tmp_path, **tensors)) == all_bits(tensors)


MIXED = {
    "one byte": torch.ones(3, dtype=torch.uint8),
    "two": torch.ones(5, dtype=torch.bfloat16),
    "eight": torch.ones(3, dtype=torch.int64),
    "four": torch.ones(7),
    "none": torch.empty(0, dtype=torch.float64),
}


@pytest.mark.parametrize("length", range(8))
def test_every_tensor_lies_aligned_in_its_file(tmp_path: Path, length: int) -> None:
    write_tensors(tmp_path / "x", MIXED, {"text": "x" * length})
    data = (tmp_path / "x").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    starts = {name: 8 + size + header[name]["data_offsets"][0] for name in MIXED}
    assert [name for name, at in starts.items() if at % MIXED[name].element_size()] == []


def test_file_without_tensors_is_a_safetensors_file(tmp_path: Path) -> None:
    assert written(tmp_path) == {}


def test_digests_of_a_tensor_file_are_those_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = write_tensors(path, {"x": torch.zeros(9 << 20, dtype=torch.uint8)}, {})
    assert (entry.bytes, entry.chunks) == manifests.hash_stream(manifests.read_pieces(path))
    assert len(entry.chunks) == 2


def test_tensor_file_never_replaces_another(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {}, {})


class Wrapping(torch.Tensor):
    """Holds its elements in another tensor, as sharded tensors do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, *_args: Any, **_kwargs: Any) -> Any:
        return Wrapping(torch.ones(3))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
        (Wrapping(torch.ones(3)), "Wrapping"),
    ],
    ids=["complex128", "sparse", "meta", "wrapping"],
)
def test_tensor_that_safetensors_cannot_hold_is_refused_by_name(
    store: Store, tensor: torch.Tensor, words: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"layer\.weight.*{words}"):
        save(store, ema=Holder({"layer": {"weight": tensor}}))


def test_tensor_with_the_name_of_the_metadata_is_refused(store: Store) -> None:
    with pytest.raises(CheckpointError, match="__metadata__"):
        save(store, ema=Holder({"__metadata__": torch.ones(1)}))


# State as tensors and JSON


class Holder:
    """Holds any state, as some class of a user's does."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def through_files(store: Store, state: Any) -> Any:
    """A state that was saved and restored into something else."""
    held = Holder(None)
    restore(save(store, thing=Holder(state)), thing=held)
    return held.state


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-3, 3) | st.sampled_from(["$tensor", "$dict", "$", "a.b"])
tensors = st.builds(
    lambda numbers, dtype: torch.tensor(numbers, dtype=dtype),
    st.lists(st.integers(0, 1), max_size=3) | st.integers(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=8,
)


def shape_of(state: Any) -> str:
    """A state as text, types and bits included; dicts of any kind are alike."""
    if isinstance(state, torch.Tensor):
        return repr(bits(state))
    if isinstance(state, dict):
        return f"{{{', '.join(f'{k!r}: {shape_of(v)}' for k, v in state.items())}}}"
    if isinstance(state, (list, tuple)):
        return f"{type(state).__name__}({', '.join(map(shape_of, state))})"
    if isinstance(state, (set, frozenset)):
        # The order of texts in a set is another one in each process.
        return f"{{{', '.join(sorted(map(shape_of, state)))}}}"
    return repr(state)


@quick
@given(trees)
def test_every_state_comes_back_from_its_halves(state: Any) -> None:
    try:
        halves = split(state, "thing")
    except CheckpointError:
        # Two keys, "a.b" and {"a": {"b"}} or 1 and "1", gave their tensors one name.
        assume(False)
    tree = json.loads(files.to_json(halves.tree))
    assert shape_of(join(tree, halves.tensors, halves.aliases)) == shape_of(state)


@pytest.mark.parametrize(
    "state",
    [
        {"best": math.inf, "worst": -math.inf, "zero": -0.0},
        {"best": math.nan},
        {"big": 2**200},
        {1: "a", "1": "b", 1.5: "c", None: "d", False: "e"},
        {"seen": {3, 1, 2}, "mixed": {1, "a", None}},
        {"nothing": {}, "empty": [], "pair": ()},
        collections.Counter({3: 2, 7: 1}),
        {"text": "\ud800 é \n \0"},
        torch.ones(2),
        [],
        None,
    ],
)
def test_state_without_surprises_survives_a_checkpoint(store: Store, state: Any) -> None:
    assert shape_of(through_files(store, state)) == shape_of(state)


def test_number_of_numpy_becomes_a_number(store: Store) -> None:
    numpy = pytest.importorskip("numpy")
    state = {"a": numpy.float32(0.5), "b": numpy.int64(3), "c": numpy.bool_(True)}
    assert through_files(store, state) == {"a": 0.5, "b": 3, "c": True}


def long_double() -> Any:
    return pytest.importorskip("numpy").longdouble(1)


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (object, "inner.thing"),
        (lambda: len, "inner.thing"),
        (lambda: 1j, "inner.thing"),
        (lambda: b"x", "inner.thing"),
        (lambda: Path("x"), "inner.thing"),
        (lambda: torch.float32, "inner.thing"),
        (lambda: pytest.importorskip("numpy").ones(2), "inner.thing"),
        (long_double, "inner.thing"),
        (lambda: {(1, 2)}, "inner.thing"),
        (lambda: {object()}, "inner.thing"),
        (lambda: [0, object()], "inner.thing.1"),
        (lambda: ({"x": object()},), "inner.thing.0.x"),
    ],
)
def test_state_that_is_neither_tensor_nor_json_is_refused_by_name(
    store: Store, make: Callable[[], Any], where: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"'sched'.*'{re.escape(where)}'"):
        save(store, sched=Holder({"inner": {"thing": make()}}))


def test_key_that_json_lacks_is_refused_by_name(store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"'sched'.*tuple.*\(1, 2\)"):
        save(store, sched=Holder({"inner": {(1, 2): 3}}))


@pytest.mark.parametrize(
    "state",
    [
        {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)},
        {1: torch.zeros(1), "1": torch.ones(1)},
    ],
    ids=["dotted", "number and text"],
)
def test_two_tensors_of_one_name_are_never_mixed_up(store: Store, state: Any) -> None:
    with pytest.raises(CheckpointError, match="two tensors"):
        save(store, thing=Holder(state))


def test_refused_state_leaves_the_checkpoints_alone(store: Store) -> None:
    commit(store, 5)
    with pytest.raises(CheckpointError):
        save(store, 10, sched=Holder(object()))
    assert (steps(store), hidden(store)) == ([5], [])


# Models


class Net(nn.Module):
    """A small network with everything that has state."""

    def __init__(self, width: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


def test_model_file_is_the_state_dict_as_other_tools_read_it(store: Store) -> None:
    model = Net()
    committed = save(store, model=model)
    assert all_bits(load_file(committed.path / "model.safetensors")) == all_bits(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_model_comes_back_bit_for_bit(store: Store, dtype: torch.dtype) -> None:
    saved, fresh = Net(dtype=dtype), Net(dtype=dtype)
    saved(torch.randn(4, 2, dtype=dtype))
    restore(save(store, model=saved), model=fresh)
    assert all_bits(fresh.state_dict()) == all_bits(saved.state_dict())


def test_model_is_restored_in_place(store: Store) -> None:
    fresh = Net()
    before = [p.data_ptr() for p in fresh.parameters()]
    restore(save(store, model=Net()), model=fresh)
    assert [p.data_ptr() for p in fresh.parameters()] == before


class Tied(nn.Module):
    """Two layers that share their weights, as embeddings do; or do not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_are_written_once(store: Store) -> None:
    committed = save(store, model=Tied())
    assert list(load_file(committed.path / "model.safetensors")) == ["embed.weight"]


def test_tied_weights_come_back_tied(store: Store) -> None:
    saved, fresh = Tied(), Tied()
    restore(save(store, model=saved), model=fresh)
    assert bits(fresh.head.weight) == bits(saved.embed.weight)
    assert fresh.head.weight is fresh.embed.weight


def test_model_that_no_longer_ties_its_weights_is_refused(store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        restore(save(store, model=Tied()), model=Tied(tied=False))


def test_model_that_begins_to_tie_its_weights_is_refused(store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"weight"):
        restore(save(store, model=Tied(tied=False)), model=Tied())


def grown() -> nn.Module:
    model = Net()
    model.register_parameter("extra", nn.Parameter(torch.ones(1)))
    return model


def recast() -> nn.Module:
    model = Net()
    model.first.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("saved", "fresh", "words"),
    [
        (grown, Net, "it alone has extra"),
        (Net, grown, "it lacks extra"),
        (
            Net,
            functools.partial(Net, 4),
            r"first\.weight' is float32\[4, 2\] here, float32\[3, 2\]",
        ),
        (Net, recast, r"first\.weight' is bfloat16\[3, 2\] here, float32\[3, 2\]"),
    ],
    ids=["missing", "surplus", "reshaped", "recast"],
)
def test_model_that_does_not_fit_is_refused_by_name(
    store: Store, saved: Callable[[], nn.Module], fresh: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        restore(save(store, model=saved()), model=fresh())


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[no-any-return]


class Outer(nn.Module):
    """Holds a network, wrapped or not."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.inner = wrap(Net())


def same(model: nn.Module) -> nn.Module:
    return model


WRAPS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Outer(same),
    "compiled": lambda: compiled(Outer(same)),
    "parallel": lambda: nn.DataParallel(Outer(same)),
    "both": lambda: nn.DataParallel(compiled(Outer(same))),
    "inside": lambda: Outer(lambda net: compiled(nn.DataParallel(compiled(net)))),
    "twice": lambda: nn.DataParallel(Outer(lambda net: nn.DataParallel(nn.DataParallel(net)))),
}


@pytest.mark.parametrize("saved", WRAPS)
@pytest.mark.parametrize("fresh", WRAPS)
def test_wrappers_of_a_model_may_change_between_links(store: Store, saved: str, fresh: str) -> None:
    old, new = WRAPS[saved](), WRAPS[fresh]()
    restore(save(store, model=old), model=new)
    pairs = zip(new.state_dict().values(), old.state_dict().values(), strict=True)
    assert all(bits(a) == bits(b) for a, b in pairs)


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappers_leave_no_trace_in_the_file(store: Store, wrap: str) -> None:
    committed = save(store, model=WRAPS[wrap]())
    plain = sorted(WRAPS["plain"]().state_dict())
    assert sorted(load_file(committed.path / "model.safetensors")) == plain


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.weight", "a.weight"),
        ("_orig_mod.a.weight", "a.weight"),
        ("module._orig_mod.a.weight", "a.weight"),
        ("_orig_mod.module.a.weight", "a.weight"),
        ("a._orig_mod.module._fsdp_wrapped_module.b.weight", "a.b.weight"),
        ("a.module.module.b", "a.b"),
        ("module.module.module.b", "b"),
        ("_orig_mod.a._orig_mod._orig_mod.b", "a.b"),
        ("a.my_module.b", "a.my_module.b"),
        ("a.module2.b", "a.module2.b"),
        ("a.module", "a.module"),
        ("module", "module"),
    ],
)
def test_name_without_wrappers(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_names_that_collide_without_wrappers_are_an_error(store: Store) -> None:
    model = nn.ModuleDict({"module": nn.ModuleDict({"a": nn.Linear(1, 1)}), "a": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match=r"two tensors named 'a\.weight'"):
        save(store, model=model)


class Extra(nn.Linear):
    """A layer with a state that no parameter holds."""

    def __init__(self, note: Any) -> None:
        super().__init__(1, 1)
        self.note = note

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


@pytest.mark.parametrize("nested", [False, True])
def test_extra_state_of_a_module_comes_back(store: Store, nested: bool) -> None:
    note = {"calls": 3, "scale": torch.tensor([2.0])}
    saved, fresh = Extra(note), Extra({"calls": 0, "scale": torch.tensor([0.0])})
    whole = (nn.Sequential(saved), nn.Sequential(fresh)) if nested else (saved, fresh)
    restore(save(store, model=whole[0]), model=whole[1])
    assert fresh.note["calls"] == 3 and fresh.note["scale"].tolist() == [2.0]


class Cached(nn.Linear):
    """A layer with a buffer that its state dict leaves out."""

    def __init__(self, size: int = 2) -> None:
        super().__init__(1, 1)
        self.register_buffer("seen", torch.zeros(size), persistent=False)


def test_buffer_that_no_state_dict_holds_comes_back_where_it_changed(store: Store) -> None:
    saved, fresh = Cached(), Cached()
    contents = Contents()
    contents.add("model", saved)
    saved.seen += 7
    committed = keep(store, contents)
    restore(committed, model=fresh)
    assert fresh.seen.tolist() == [7.0, 7.0]
    assert "model.buffers.safetensors" not in contents.model_files(committed)


def test_buffer_that_no_state_dict_holds_is_not_saved_where_it_is_as_made(store: Store) -> None:
    committed = save(store, model=Cached())
    assert "model.buffers.safetensors" not in [entry.name for entry in committed.manifest.files]


def test_buffer_that_has_grown_comes_back_as_large(store: Store) -> None:
    fresh, contents, saved = Cached(), Contents(), Cached()
    contents.add("model", saved)
    saved.seen = torch.arange(5.0)
    restore(keep(store, contents), model=fresh)
    assert fresh.seen.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_averaged_model_comes_back_with_its_count(store: Store) -> None:
    saved, fresh = AveragedModel(Net()), AveragedModel(Net())
    saved.update_parameters(Net())
    restore(save(store, ema=saved), ema=fresh)
    assert all_bits(fresh.state_dict()) == all_bits(saved.state_dict())
    assert int(fresh.n_averaged) == 1


# Optimizers


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(count):
        x = torch.randn(4, 2, generator=generator).to(dtype)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss  # type: ignore[no-any-return]

        optimizer.step(closure)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    first, *rest = model.parameters()
    return [{"params": [first], "weight_decay": 0.1}, {"params": rest, "lr": 0.01}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(groups(m), lr=0.1),
    "SGD with momentum": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(groups(m), lr=0.1, amsgrad=True),
    "AdamW with a tensor as lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.1)),
    "Adafactor": lambda m: torch.optim.Adafactor(groups(m), lr=0.1),
    "Adagrad": lambda m: torch.optim.Adagrad(groups(m), lr=0.1),
    "RMSprop": lambda m: torch.optim.RMSprop(groups(m), lr=0.1, centered=True),
    "NAdam": lambda m: torch.optim.NAdam(groups(m), lr=0.1),
    "ASGD": lambda m: torch.optim.ASGD(groups(m), lr=0.1),
    "Rprop": lambda m: torch.optim.Rprop(groups(m), lr=0.1),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, history_size=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_a_restored_optimizer_is_the_uncut_training(store: Store, name: str) -> None:
    model, fresh = Net(), Net()
    optimizer, resumed = OPTIMIZERS[name](model), OPTIMIZERS[name](fresh)
    train(model, optimizer, 5)
    restore(save(store, model=model, optimizer=optimizer), model=fresh, optimizer=resumed)
    train(model, optimizer, 5, seed=1)
    train(fresh, resumed, 5, seed=1)
    assert all_bits(fresh.state_dict()) == all_bits(model.state_dict())
    assert all_bits(resumed.state_dict()) == all_bits(optimizer.state_dict())


@pytest.mark.parametrize(
    ("parameters", "moments"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=["fp32 moments of bf16", "bf16 moments of fp32"],
)
def test_optimizer_state_keeps_its_own_type_and_bits(
    store: Store, parameters: torch.dtype, moments: torch.dtype
) -> None:
    model, fresh = Net(dtype=parameters), Net(dtype=parameters)
    optimizer, resumed = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, fresh))
    train(model, optimizer, 3)
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.randn(state[key].shape).to(moments)
    restore(save(store, optimizer=optimizer), optimizer=resumed)
    assert {s["exp_avg"].dtype for s in resumed.state.values()} == {moments}
    assert all_bits(resumed.state_dict()) == all_bits(optimizer.state_dict())


def test_optimizer_of_another_model_is_refused(store: Store) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    committed = save(store, optimizer=optimizer)
    with pytest.raises((CheckpointError, ValueError), match=r"parameter group|optimizer"):
        restore(committed, optimizer=torch.optim.AdamW(nn.Linear(1, 1).parameters()))


def test_restored_state_does_not_depend_on_the_file_any_more(store: Store) -> None:
    # A mapped file that retention removes is a bus error on file systems without open-unlink.
    model, fresh = Net(), Net()
    optimizer, resumed = (torch.optim.AdamW(m.parameters()) for m in (model, fresh))
    train(model, optimizer, 1)
    committed = save(store, model=model, optimizer=optimizer)
    restore(committed, model=fresh, optimizer=resumed)
    assert "checkpoint-10" not in Path("/proc/self/maps").read_text()
    assert all_bits(resumed.state_dict()) == all_bits(optimizer.state_dict())


def test_thing_that_drops_part_of_its_state_is_refused_by_name(store: Store) -> None:
    class Forgetful(Holder):
        def load_state_dict(self, state: Any) -> None:
            self.state = {**state, "count": 0}

    with pytest.raises(CheckpointError, match=r"ema\.count is 0, was 7"):
        restore(save(store, ema=Holder({"count": 7})), ema=Forgetful({}))


def test_number_that_is_none_may_be_copied_by_a_thing(store: Store) -> None:
    class Copying(Holder):
        def load_state_dict(self, state: Any) -> None:
            self.state = {"best": float(str(state["best"]))}

    held = Copying({})
    restore(save(store, meter=Holder({"best": math.nan})), meter=held)
    assert math.isnan(held.state["best"])


def test_thing_that_casts_a_tensor_is_refused_by_name(store: Store) -> None:
    class Casting(Holder):
        def load_state_dict(self, state: Any) -> None:
            self.state = {"a": state["a"], "shadow": state["shadow"].double()}

    state = {"a": torch.ones(2), "shadow": torch.ones(2)}
    with pytest.raises(CheckpointError, match="'ema': tensor 'shadow'"):
        restore(save(store, ema=Holder(state)), ema=Casting({}))


def test_tensors_that_the_checkpoint_holds_and_the_thing_lost_are_an_error(store: Store) -> None:
    class Empty(Holder):
        def load_state_dict(self, state: Any) -> None:
            self.state = {}

    with pytest.raises(CheckpointError, match="ema"):
        restore(save(store, ema=Holder({"shadow": torch.ones(2)})), ema=Empty({}))


# Schedulers of the learning rate


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[str]:
    found = []
    for number in range(count):
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 + number % 2)
        else:
            scheduler.step()
        found += [float(group["lr"]).hex() for group in optimizer.param_groups]
    return found


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 6, 9]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "LinearLR, then MultiStepLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=7), lr_scheduler.MultiStepLR(o, [2, 4])], [7]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.MultiStepLR(o, [2, 8])]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_go_on_as_without_a_break(store: Store, name: str) -> None:
    first, second = (torch.optim.SGD(Net().parameters(), lr=0.1, momentum=0.5) for _ in range(2))
    scheduler, resumed = SCHEDULERS[name](first), SCHEDULERS[name](second)
    rates(first, scheduler, 5)
    committed = save(store, optimizer=first, scheduler=scheduler)
    restore(committed, optimizer=second, scheduler=resumed)
    assert rates(second, resumed, 8) == rates(first, scheduler, 8)


def test_gradient_scaler_comes_back(store: Store) -> None:
    saved, fresh = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu")
    saved.load_state_dict({**saved.state_dict(), "scale": 512.0, "_growth_tracker": 7})
    restore(save(store, scaler=saved), scaler=fresh)
    assert fresh.state_dict() == saved.state_dict()


# JSON values and tokenizers


def test_registered_dict_gets_the_values_of_the_checkpoint(store: Store) -> None:
    config = {"width": 4}
    said = restore(save(store, config={"width": 3}), config=config)
    assert config == {"width": 3} and "'config' is not what" in said[0]


def test_registered_value_that_is_equal_is_not_mentioned(store: Store) -> None:
    committed = save(store, config={"pair": (1, 2), "nan": math.nan})
    assert restore(committed, config={"nan": float("nan"), "pair": [1, 2]}) == []


def test_value_that_cannot_be_changed_in_place_keeps_the_code_s(store: Store) -> None:
    assert "value of the code is kept" in restore(save(store, size=1), size=2)[0]


@pytest.mark.parametrize(
    ("begun", "change"),
    [({"best": 9}, lambda v: v.update(best=3)), ([1], lambda v: v.append(2))],
    ids=["dict", "list"],
)
def test_value_that_training_changes_comes_back_without_a_word(
    store: Store, begun: Any, change: Callable[[Any], None]
) -> None:
    live, contents, fresh = copy.deepcopy(begun), Contents(), copy.deepcopy(begun)
    contents.add("seen", live)
    change(live)
    assert restore(keep(store, contents), seen=fresh) == []
    assert fresh == live


@pytest.mark.parametrize("make", [Net, lambda: {"a": 1}, lambda: Holder({})])
def test_object_that_the_checkpoint_does_not_hold_is_refused_by_name(
    store: Store, make: Callable[[], Any]
) -> None:
    with pytest.raises(CheckpointError, match="holds no 'late'"):
        restore(save(store, model=Net()), late=make())


@pytest.mark.parametrize(
    "name", ["state", "rng", "manifest", "training_args", "a/b", "", "1a", "é"]
)
def test_name_that_would_take_another_file_cannot_be_registered(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be registered"):
        Contents().add(name, Net())


def test_name_can_be_registered_once() -> None:
    contents = Contents()
    contents.add("model", Net())
    with pytest.raises(UsageError, match="registered already"):
        contents.add("model", Net())


@pytest.mark.parametrize("value", [object(), {1, 2}, {"a": object()}, torch.ones(1)])
def test_thing_that_cannot_be_saved_cannot_be_registered(value: Any) -> None:
    with pytest.raises(UsageError, match="no state_dict"):
        Contents().add("thing", value)


class Tokenizer:
    """Writes files of its own, as tokenizers do."""

    def __init__(self, **contents: str) -> None:
        self.contents = contents

    def save_pretrained(self, directory: str) -> None:
        for name, text in self.contents.items():
            path = Path(directory, name)
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)


def test_files_of_a_tokenizer_are_part_of_the_checkpoint(store: Store) -> None:
    committed = save(store, tokenizer=Tokenizer(**{"vocab.txt": "a b"}))
    assert committed.manifest.entry("vocab.txt").bytes == 3


@pytest.mark.parametrize("name", ["added tokens.json", ".gitattributes", "manifest.json", "a/b/c"])
def test_file_of_a_tokenizer_that_no_manifest_can_name_is_refused(store: Store, name: str) -> None:
    commit(store, 5)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        save(store, 10, tokenizer=Tokenizer(**{name: "x"}))
    assert latest(store) == 5


TEMPLATE = "additional_chat_templates/tools.jinja"


def test_file_in_a_folder_of_a_tokenizer_is_part_of_the_checkpoint(store: Store) -> None:
    committed = save(store, tokenizer=Tokenizer(**{TEMPLATE: "abc"}))
    assert read_committed(committed.path, ALL).manifest.entry(TEMPLATE).bytes == 3


def test_file_in_a_folder_of_a_tokenizer_is_verified(store: Store) -> None:
    committed = save(store, tokenizer=Tokenizer(**{TEMPLATE: "abc"}))
    (committed.path / TEMPLATE).write_text("abd")
    assert TEMPLATE in bad_ones(store)[10]


def test_folder_that_is_a_link_is_found(store: Store, tmp_path: Path) -> None:
    committed = save(store, tokenizer=Tokenizer(**{TEMPLATE: "abc"}))
    folder = (committed.path / TEMPLATE).parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert TEMPLATE in bad_ones(store)[10]


def test_file_in_a_folder_of_a_tokenizer_is_part_of_the_finished_model(store: Store) -> None:
    committed = save(store, tokenizer=Tokenizer(**{TEMPLATE: "abc"}))
    store.finish(committed, [TEMPLATE])
    assert (store.run.final_model / TEMPLATE).read_text() == "abc"


@pytest.mark.parametrize(
    "objects",
    [
        {"config": {"a": 1}, "tokenizer": Tokenizer(**{"config.json": "{}"})},
        {"tokenizer": Tokenizer(**{"config.json": "{}"}), "config": {"a": 1}},
        {"model": nn.Linear(1, 1), "tokenizer": Tokenizer(**{"model.safetensors": "x"})},
        {"one": Tokenizer(**{"vocab.txt": "a"}), "two": Tokenizer(**{"vocab.txt": "b"})},
    ],
    ids=["value first", "tokenizer first", "model", "two tokenizers"],
)
def test_two_objects_that_write_one_file_are_refused(store: Store, objects: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"(config\.json|model\.safetensors|vocab\.txt)"):
        save(store, **objects)


def test_finished_model_is_made_of_weights_values_and_tokenizer(store: Store) -> None:
    model = Net()
    contents = Contents()
    objects = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), momentum=0.9),
        "ema": AveragedModel(model),
        "config": {"a": 1},
        "tokenizer": Tokenizer(**{"vocab.txt": "a"}),
    }
    for name, value in objects.items():
        contents.add(name, value)
    committed = commit(store, 10, contents.stage({}, [], {}).write)
    assert sorted(contents.model_files(committed)) == [
        *("config.json", "model.safetensors", "vocab.txt"),
    ]


# What a commit leaves


def test_commit_leaves_its_files_and_the_manifest_and_nothing_else(store: Store) -> None:
    committed = commit(store, 10)
    assert {path.name for path in committed.path.iterdir()} == {
        *("state.json", "rng.json", "manifest.json"),
    }
    assert hidden(store) == []


def test_checkpoint_is_private_to_its_user(store: Store) -> None:
    committed = commit(store, 10)
    modes = {
        oct(path.stat().st_mode & 0o077) for path in [committed.path, *committed.path.iterdir()]
    }
    assert modes == {"0o0"}


def test_returned_manifest_is_the_one_on_the_disk(store: Store) -> None:
    committed = commit(store, 10, metric={"name": "é", "value": math.nan, "mode": "min"})
    data = (committed.path / "manifest.json").read_bytes()
    assert committed.manifest.digest == manifests.parse(data).digest != ""
    assert committed.manifest.to_bytes() == data


def test_manifest_carries_the_digest_of_its_parent(store: Store) -> None:
    first = commit(store, 10)
    second = commit(store, 20, parent=first.manifest.digest)
    assert read_committed(second.path, ALL).manifest.parent == first.manifest.digest


def test_newest_checkpoint_is_the_latest_by_step(store: Store) -> None:
    for step in (100, 9, 99, 10):
        commit(store, step)
    assert (steps(store), latest(store)) == ([9, 10, 99, 100], 100)


def test_run_without_checkpoints_has_no_latest(store: Store) -> None:
    assert latest(store) is None


def test_checkpoints_survive_a_move_of_the_run(store: Store, tmp_path: Path) -> None:
    commit(store, 10)
    moved = RunDir(store.run.path.rename(tmp_path / "else\nwhere"))
    assert latest(Store(moved, RUN_ID)) == 10


@pytest.mark.parametrize(
    "name",
    [
        *("checkpoint-20.bak", "checkpoint-", "checkpoint-020", "checkpoint-٢٠", "checkpoint-+20"),
        *("xcheckpoint-20", "checkpoint-20 ", "Checkpoint-20", ".checkpoint-20", "checkpoint-20\n"),
    ],
)
def test_stray_directory_is_no_checkpoint_and_no_obstacle(store: Store, name: str) -> None:
    committed = commit(store, 20)
    committed.path.rename(committed.path.with_name(name))
    commit(store, 10)
    assert (steps(store), bad_ones(store), latest(store)) == ([10], {}, 10)
    assert (store.run.path / name).is_dir()


def test_file_with_the_name_of_a_checkpoint_is_no_checkpoint(store: Store) -> None:
    commit(store, 10)
    store.run.checkpoint(20).write_text("")
    assert (steps(store), latest(store)) == ([10], 10)


def test_link_to_a_checkpoint_is_no_checkpoint(store: Store) -> None:
    commit(store, 10)
    store.run.checkpoint(20).symlink_to(store.run.checkpoint(10))
    assert (steps(store), latest(store)) == ([10], 10)


def test_empty_directory_with_the_name_of_a_checkpoint_is_quarantined(store: Store) -> None:
    commit(store, 10)
    store.run.checkpoint(20).mkdir()
    assert "manifest" in bad_ones(store)[20]
    assert quarantined(store) == ["quarantined-20"]


# Damage


def checkpoint_with_tensors(store: Store, step: int) -> Committed:
    model = nn.Linear(3, 2)
    return save(store, step, model=model, optimizer=Holder({"step": step}))


FILES = ["manifest.json", "model.safetensors", "rng.json", "state.json"]


def test_every_file_of_a_checkpoint_is_attacked_here(store: Store) -> None:
    committed = checkpoint_with_tensors(store, 10)
    assert sorted(path.name for path in committed.path.iterdir()) == FILES


def found_damage(committed: Committed) -> str:
    """What loading would say about it; empty if nothing."""
    try:
        verify(read_committed(committed.path, ALL))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_its_file_named(store: Store, name: str) -> None:
    committed = checkpoint_with_tensors(store, 10)
    path = committed.path / name
    data = path.read_bytes()
    word = "manifest" if name == "manifest.json" else name
    missed = []
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for bit in range(8) if len(data) < 400 else (position % 8,):
                os.pwrite(file.fileno(), bytes([byte ^ (1 << bit)]), position)
                if word not in found_damage(committed):
                    missed.append((position, bit))
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert missed == [] and found_damage(committed) == ""


def test_damage_is_placed_in_its_chunk(store: Store) -> None:
    data = torch.zeros(9 << 20, dtype=torch.uint8)
    committed = save(store, ema=Holder({"x": data}))
    with (committed.path / "ema.safetensors").open("r+b") as file:
        file.seek((8 << 20) + 100)
        file.write(b"\1")
    assert re.search(
        r"ema\.safetensors.*between byte 8,388,608 and 9,437,", found_damage(committed)
    )


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def turn_into_link(path: Path) -> None:
    copy = path.parent.with_name(f"elsewhere-{path.name}")
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def turn_into_link_of_the_right_length(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.symlink_to("x" * size)
    assert path.lstat().st_size == size


def turn_into_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut to nothing": lambda path: cut(path, 0),
    "cut by two bytes": lambda path: cut(path, path.stat().st_size - 2),
    "cut in half": lambda path: cut(path, path.stat().st_size // 2),
    "longer by a byte": lambda path: cut(path, path.stat().st_size + 1),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "missing": lambda path: path.unlink(),
    "link to the same content": turn_into_link,
    "link of the right length": turn_into_link_of_the_right_length,
    "directory": turn_into_directory,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_named(store: Store, name: str, damage: str) -> None:
    committed = checkpoint_with_tensors(store, 10)
    DAMAGE[damage](committed.path / name)
    assert ("manifest" if name == "manifest.json" else name) in bad_ones(store)[10]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_older_checkpoint_is_used_where_the_newest_is_damaged(
    store: Store, name: str, damage: str
) -> None:
    checkpoint_with_tensors(store, 10)
    DAMAGE[damage](checkpoint_with_tensors(store, 20).path / name)
    assert latest(store) == 10
    assert (steps(store), quarantined(store)) == ([10], ["quarantined-20"])


@pytest.mark.parametrize("tail", [b"\0", b"x", b"{}", b"\xff"])
def test_text_after_the_manifest_is_found(store: Store, tail: bytes) -> None:
    committed = commit(store, 10)
    with (committed.path / "manifest.json").open("ab") as file:
        file.write(tail)
    assert "manifest" in bad_ones(store)[10]


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "zeroed"])
def test_what_has_a_wrong_file_is_not_counted_as_a_checkpoint(store: Store, damage: str) -> None:
    committed = checkpoint_with_tensors(store, 10)
    DAMAGE[damage](committed.path / "model.safetensors")
    assert steps(store) == []


def test_file_that_becomes_a_link_while_it_is_looked_at_is_found(store: Store) -> None:
    committed = checkpoint_with_tensors(store, 10)
    turn_into_link(committed.path / "rng.json")
    with pytest.raises(CheckpointError, match=r"rng\.json cannot be read"):
        verify(committed)


def test_checkpoint_that_vanishes_while_it_is_looked_at_is_passed_over(store: Store) -> None:
    class Removing(Lineage):
        """Stands for another link's retention, which comes between two calls."""

        def holds(self, link: int, step: int) -> bool:
            if step == 20:
                shutil.rmtree(store.run.checkpoint(20))
            return step != 20

    commit(store, 10)
    commit(store, 20)
    assert (bad_ones(store, Removing()), latest(store)) == ({}, 10)


def test_swapped_files_are_found(store: Store) -> None:
    committed = commit(store, 10, text_files(a=[1], b=[2]))
    a, b, between = (committed.path / name for name in ("a.json", "b.json", "c"))
    a.rename(between)
    b.rename(a)
    between.rename(b)
    assert "a.json" in bad_ones(store)[10]


def test_quarantined_checkpoint_keeps_its_bytes(store: Store) -> None:
    committed = commit(store, 10)
    cut(committed.path / "rng.json", 0)
    bad_ones(store)
    (found,) = store.run.path.glob("quarantined-10.*")
    assert (found / "state.json").exists() and (found / "manifest.json").exists()


def test_all_checkpoints_damaged_leaves_none(store: Store) -> None:
    for step in (10, 20, 30):
        cut(commit(store, step).path / "state.json", 1)
    assert sorted(bad_ones(store)) == [10, 20, 30]
    assert latest(store) is None


def test_surplus_file_in_a_checkpoint_is_no_damage(store: Store) -> None:
    # File systems put files there themselves (.nfs0000…, .snapshot).
    committed = commit(store, 10)
    (committed.path / ".nfs0001").write_text("x")
    (committed.path / "model.safetensors").write_text("evil")
    assert latest(store) == 10


def test_surplus_file_in_a_checkpoint_is_never_read(store: Store) -> None:
    committed = save(store, thing=Holder({"a": 1}))
    (committed.path / "thing.safetensors").write_text("evil")
    (committed.path / "late.json").write_text('{"a": 2}')
    restore(committed, thing=Holder({}))
    with pytest.raises(CheckpointError, match="holds no 'late'"):
        restore(committed, late={"a": 1})


@pytest.mark.parametrize(("low", "high"), [(9, 10), (10, 9), (10, 99), (99, 100)])
def test_checkpoint_renamed_to_another_step_is_found(store: Store, low: int, high: int) -> None:
    commit(store, low).path.rename(store.run.checkpoint(high))
    assert f"belongs to step {low}" in bad_ones(store)[high]


# Manifests that somebody made


def forged(committed: Committed, **changes: Any) -> None:
    """Give a checkpoint a manifest with a right digest and wrong content."""
    content = dataclasses.replace(committed.manifest, **changes)
    (committed.path / "manifest.json").write_bytes(content.to_bytes())


@pytest.mark.parametrize(
    "name",
    [
        *("../state.json", "/etc/passwd", "a/../b", "a/b/c", "..", ".", "", "a/", "a\nb", "a\0b"),
        *("manifest.json", "../../x", "a/..", "./a", "a//b", "a/.b"),
        *(".hidden", "-rf", "a b", "é", "x" * 300, "state.json\n", None, 5, ["a"], {}),
    ],
    ids=repr,
)
def test_manifest_that_names_an_impossible_file_is_refused(store: Store, name: Any) -> None:
    commit(store, 5)
    committed = commit(store, 10)
    entry = dataclasses.replace(committed.manifest.files[0], name=name)
    forged(committed, files=(entry,))
    assert "manifest" in bad_ones(store)[10]


@pytest.mark.parametrize("name", ["../state.json", ".hidden", "a b", "manifest.json"])
def test_manifest_that_could_not_be_read_back_is_not_published(store: Store, name: str) -> None:
    entry = FileEntry(name=name, bytes=0, chunks=())
    with pytest.raises(CheckpointError, match="impossible file"):
        commit(store, 10, lambda directory: [entry])
    assert (store.run.checkpoint_steps(), hidden(store)) == ([], [])


def test_checkpoint_of_another_run_is_not_used(store: Store) -> None:
    commit(store, 10)
    commit(Store(store.run, "run-2"), 20)
    assert "another run" in bad_ones(store)[20]
    assert latest(store) == 10


def test_checkpoint_of_another_run_is_none_for_retention(store: Store) -> None:
    commit(store, 10)
    commit(Store(store.run, "run-2"), 20)
    assert steps(store) == [10]
    assert store.prune(ALL, Policy(last=1, best=0)) == []


def test_checkpoint_of_another_run_gives_its_place_away(store: Store) -> None:
    commit(Store(store.run, "run-2"), 10)
    commit(store, 10)
    assert (latest(store), quarantined(store)) == (10, ["quarantined-10"])


def test_manifest_of_another_format_is_refused(store: Store) -> None:
    forged(commit(store, 10), format=2)
    assert "format 2" in bad_ones(store)[10]


WRONG = [None, True, -1, 1.5, math.nan, "x", "", [], {}, [1], {"a": 1}, 10**400]


@pytest.mark.parametrize(
    "key", [f.name for f in dataclasses.fields(Manifest) if f.name != "digest"]
)
def test_manifest_with_a_wrong_type_is_refused_or_harmless(store: Store, key: str) -> None:
    committed = commit(store, 10)
    content = json.loads(committed.manifest.to_bytes())
    for value in WRONG:
        text = json.dumps(with_digest({**content, key: value}))
        (committed.path / "manifest.json").write_text(text)
        assert found_damage(committed) or value_is_harmless(key, value), value


def value_is_harmless(key: str, value: Any) -> bool:
    """What says nothing about the bytes, or is of the right type."""
    return {
        "parent": value is None or isinstance(value, str),
        "run_id": isinstance(value, str),
        "created": type(value) in (int, float),
        "epoch": type(value) is int,
        "link": type(value) is int,
        "metric": value is None,
        "format": value == manifests.FORMAT,
        "files": value == [] and isinstance(value, list),
    }.get(key, False)


@pytest.mark.parametrize("key", ["name", "bytes", "chunks", "rank", "surplus"])
def test_file_entry_with_a_wrong_type_is_refused_or_harmless(store: Store, key: str) -> None:
    committed = commit(store, 10)
    content = json.loads(committed.manifest.to_bytes())
    for value in WRONG:
        entry = {**content["files"][0], key: value}
        text = json.dumps(with_digest({**content, "files": [entry]}))
        (committed.path / "manifest.json").write_text(text)
        assert found_damage(committed) or (key == "rank" and type(value) is int), value


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "digest": manifests._digest(content)}


def test_deep_nesting_is_refused_as_unreadable() -> None:
    with pytest.raises(CheckpointError, match="not readable"):
        manifests.parse(b'{"digest":' + b"[" * 200_000)


@settings(quick, max_examples=300)
@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "ignore")))
def test_no_bytes_are_a_manifest_by_chance(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        manifests.parse(data)


# Lineage and fencing


#: Link 2 has adopted the work of link 1 up to step 10.
ADOPTED = Lineage((Segment(1, 10, 0),), 2)


def test_late_commit_of_a_fenced_link_is_never_latest(store: Store) -> None:
    commit(store, 10, link=1)
    commit(store, 20, link=1)
    assert "after a newer link had taken over" in bad_ones(store, ADOPTED)[20]
    assert latest(store, ADOPTED) == 10


def test_late_commit_of_a_fenced_link_is_none_for_retention(store: Store) -> None:
    commit(store, 10, link=1)
    commit(store, 20, link=1)
    assert store.prune(ADOPTED, Policy(last=1, best=0)) == []


def test_commit_onto_a_late_commit_quarantines_it(store: Store) -> None:
    commit(store, 20, link=1)
    commit(store, 20, text_files(state=["mine"]), link=2, lineage=ADOPTED)
    assert files.read_json(store.run.checkpoint(20) / "state.json") == ["mine"]
    assert quarantined(store) == ["quarantined-20"]


def test_commit_onto_a_damaged_checkpoint_quarantines_it(store: Store) -> None:
    (commit(store, 20).path / "manifest.json").unlink()
    commit(store, 20)
    assert (latest(store), quarantined(store)) == (20, ["quarantined-20"])


def test_step_that_is_committed_is_not_committed_again(store: Store) -> None:
    first = commit(store, 20)
    with pytest.raises(HpcResumeError, match="checkpoint-20 is committed already"):
        commit(store, 20, text_files(state=["other"]))
    assert read_committed(first.path, ALL).manifest == first.manifest
    assert hidden(store) == []


def fenced() -> None:
    raise Fenced("Link 9 has taken over.")


def test_fenced_link_publishes_nothing(store: Store) -> None:
    with pytest.raises(Fenced):
        commit(store, 20, fence=fenced)
    assert (store.run.checkpoint_steps(), hidden(store)) == ([], [])


def test_commit_that_is_fenced_in_its_last_moment_is_not_acknowledged(store: Store) -> None:
    asked = []

    def second_time() -> None:
        asked.append(store.run.checkpoint_steps())
        if len(asked) == 2:
            fenced()

    with pytest.raises(Fenced):
        commit(store, 20, fence=second_time)
    assert (latest(store, ADOPTED), quarantined(store)) == (None, ["quarantined-20"])


def test_fence_is_asked_when_everything_else_is_done(store: Store) -> None:
    seen = []

    def fence() -> None:
        partial = [
            sorted(p.name for p in found.iterdir()) for found in store.run.path.glob(".*.partial")
        ]
        seen.append((partial, store.run.checkpoint_steps()))

    commit(store, 20, fence=fence)
    whole = ["manifest.json", "rng.json", "state.json"]
    assert seen == [([whole], []), ([], [20])]


# Retention


def manifest(step: int, value: float | None = None, mode: str = "min") -> Manifest:
    metric = None if value is None else {"name": "loss", "value": value, "mode": mode}
    return Manifest(
        step=step, epoch=0, link=1, run_id="", parent=None, files=(), created=0.0, metric=metric
    )


def kept(found: Sequence[Manifest], **policy: int) -> list[int]:
    removed = to_remove(found, Policy(**policy))
    return [m.step for m in sorted(found, key=lambda m: m.step) if m.step not in removed]


@pytest.mark.parametrize("present", [[8, 9, 10], [98, 99, 100], [999, 1000, 2]])
def test_retention_goes_by_number_and_not_by_text(present: list[int]) -> None:
    assert kept([manifest(s) for s in present], last=2, best=0) == sorted(present)[-2:]


def test_retention_keeps_the_best_besides_the_last() -> None:
    found = [manifest(s, v) for s, v in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2))]
    assert kept(found, last=2, best=1) == [2, 4, 5]


def test_retention_keeps_the_largest_where_larger_is_better() -> None:
    found = [manifest(s, v, "max") for s, v in ((1, 0.5), (2, 0.9), (3, 0.4))]
    assert kept(found, last=1, best=1) == [2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_number_that_is_none_is_never_the_best(value: float, mode: str) -> None:
    found = [manifest(1, value, mode), manifest(2, 0.5, mode), manifest(3, value, mode)]
    assert kept([*found, manifest(4)], last=1, best=1) == [2, 4]


@pytest.mark.parametrize("policy", [{"last": 0, "best": 0}, {"last": 1, "best": 0}])
def test_retention_never_removes_the_newest(policy: dict[str, int]) -> None:
    assert kept([manifest(s) for s in (1, 2, 3)], **policy) == [3]


@quick
@given(
    st.dictionaries(st.integers(0, 200), st.none() | st.floats(), max_size=12),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_retention_keeps_as_many_as_it_says(
    found: dict[int, float | None], last: int, best: int
) -> None:
    present = [manifest(step, value) for step, value in found.items()]
    numbered = sum(v is not None and math.isfinite(v) for v in found.values())
    left = kept(present, last=last, best=best)
    assert left[-max(last, 1) :] == sorted(found)[-max(last, 1) :]
    assert min(len(found), max(last, 1, min(best, numbered))) <= len(left)
    assert len(left) <= max(last, 1) + best


def test_prune_goes_by_step_whatever_the_file_times_are(store: Store) -> None:
    for step, year in ((9, 2090), (10, 1975), (99, 2050), (100, 1971)):
        path = commit(store, step).path
        for entry in (*path.iterdir(), path):
            os.utime(entry, ((year - 1970) * 31_556_952,) * 2)
    assert store.prune(ALL, Policy(last=2, best=0)) == [9, 10]
    assert (steps(store), hidden(store)) == ([99, 100], [])


def test_prune_goes_on_after_one_that_cannot_be_removed(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        commit(store, step)
    (commit(store, 4).path / "busy").mkdir()
    (store.run.checkpoint(1) / "busy").mkdir()
    immovable = store.run.checkpoint(1) / "busy"
    done = subprocess.run(["chattr", "+i", str(immovable)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("needs root and a file system with immutable files")
    try:
        assert store.prune(ALL, Policy(last=1, best=0)) == [2, 3]
    finally:
        for path in store.run.path.rglob("busy"):
            subprocess.run(["chattr", "-i", str(path)], check=True)
    assert "could not remove checkpoint-1" in caplog.text


def test_sweep_removes_what_older_links_left_half_written(store: Store) -> None:
    for number in (1, 2, 3):
        store.run.partial(f"checkpoint-10.{number:04d}").mkdir()
    store.run.partial("removed-5.0000").mkdir()
    store.run.partial("final_model.0001").mkdir()
    store.sweep(3)
    assert [name.split(".")[1:3] for name in hidden(store)] == [["checkpoint-10", "0003"]]


def test_sweep_leaves_everything_else_alone(store: Store) -> None:
    commit(store, 10)
    commit(store, 20)
    store.quarantine(20)
    (store.run.path / ".mine.partial").mkdir()
    before = {path.name for path in store.run.path.iterdir()}
    store.sweep(99)
    assert {path.name for path in store.run.path.iterdir()} == before


# The finished model


def final_files(store: Store) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in store.run.final_model.iterdir()}


def test_finished_model_stands_on_its_own(store: Store) -> None:
    model = Net()
    committed = save(store, model=model)
    store.finish(committed, ["model.safetensors"])
    shutil.rmtree(committed.path)
    loaded = load_file(store.run.final_model / "model.safetensors")
    assert all_bits(loaded) == all_bits(model.state_dict())


def test_finished_model_has_a_manifest_of_what_it_holds(store: Store) -> None:
    committed = save(store, model=Net())
    store.finish(committed, ["model.safetensors"])
    content = manifests.parse(final_files(store)["manifest.json"])
    assert [entry.name for entry in content.files] == ["model.safetensors"]


def test_file_that_changed_after_its_commit_is_not_made_the_finished_model(store: Store) -> None:
    committed = save(store, model=Net())
    with (committed.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        store.finish(committed, ["model.safetensors"])
    assert not store.run.final_model.exists() and hidden(store) == []


def test_finishing_again_replaces_the_finished_model(store: Store) -> None:
    store.finish(commit(store, 10, text_files(a=[1])), ["a.json"])
    store.finish(commit(store, 20, text_files(a=[2])), ["a.json"])
    assert json.loads(final_files(store)["a.json"]) == [2]


def test_finishing_again_leaves_nothing_behind(store: Store) -> None:
    store.finish(commit(store, 10, text_files(a=[1])), ["a.json"])
    store.finish(commit(store, 20, text_files(a=[2])), ["a.json"])
    assert hidden(store) == []


def test_finished_model_lacking_a_file_is_refused(store: Store) -> None:
    with pytest.raises(CheckpointError, match="holds no b"):
        store.finish(commit(store, 10, text_files(a=[1])), ["a.json", "b"])
    assert not store.run.final_model.exists() and hidden(store) == []


# Full disks


@pytest.fixture
def no_growth() -> Iterator[Callable[[int], None]]:
    """Sets the size beyond which this process can write no file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 200, 1000])
def test_write_that_the_disk_refuses_leaves_the_checkpoints_before_it(
    store: Store, no_growth: Callable[[int], None], size: int
) -> None:
    commit(store, 10)
    no_growth(size)
    with pytest.raises(OSError, match=f"Errno {errno.EFBIG}"):
        commit(store, 20, text_files(state={"big": "x" * 2000}))
    assert (latest(store), hidden(store)) == (10, [])


FULL_DISK = """
import errno, json, os, subprocess, sys
from pathlib import Path
from hpcresume import files
from hpcresume.checkpoint.manifest import FileEntry, hash_stream
from hpcresume.checkpoint.store import Store
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir

disk = Path(sys.argv[1])
run = RunDir(disk)

def write(size):
    def fill(directory):
        entries = []
        for name in ("a", "b"):
            data = os.urandom(size)
            files.write_new(directory / name, data)
            entries.append(FileEntry(name=name, bytes=size, chunks=hash_stream([data])[1]))
        return entries
    return fill

def commit(step, size):
    Store(run, "r").commit(write(size), step=step, epoch=0, link=1, parent=None, metric=None,
                           lineage=Lineage(), fence=lambda: None)

def latest():
    found = Store(run, "r").latest_verified(Lineage(), lambda step, reason: None)
    return found and found.committed.step

results = []
for options in json.loads(sys.argv[2]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
    commit(10, 4096)
    try:
        commit(20, 4096)
        error = 0
    except OSError as refusal:
        error = refusal.errno
    left = [p.name for p in disk.glob(".*")]
    found = latest()
    later = None
    if error:
        try:
            subprocess.run(["mount", "-o", "remount,size=1m,nr_inodes=100", str(disk)], check=True)
            commit(20, 4096)
            later = latest()
        except OSError as refusal:
            later = str(refusal)
    results.append([error, left, found, later])
    subprocess.run(["umount", str(disk)], check=True)
print(json.dumps(results))
"""


def run_python(
    script: str, *args: str, wrapper: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*wrapper, sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def full_disks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """A commit onto small disks, from one page or entry of room for it up to enough."""
    options = [f"size={pages * 4}k" for pages in range(3, 8)]
    options += [f"size=1m,nr_inodes={count}" for count in range(5, 11)]
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("needs root, to mount a small disk")
    disk = tmp_path_factory.mktemp("disk")
    done = run_python(FULL_DISK, str(disk), json.dumps(options), wrapper=["unshare", "-m"])
    if "mount" in done.stderr and "denied" in done.stderr:
        pytest.skip("needs the right to mount a small disk")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert isinstance(results, list)
    return results


def test_disks_of_the_tests_are_full_at_first_and_roomy_in_the_end(
    full_disks: list[list[Any]],
) -> None:
    errors = [result[0] for result in full_disks]
    assert errors[0] == errors[5] == errno.ENOSPC
    assert errors[4] == errors[10] == 0


def test_full_disk_leaves_the_checkpoint_before(full_disks: list[list[Any]]) -> None:
    assert all(found == 10 for error, _, found, _ in full_disks if error)


def test_full_disk_leaves_nothing_half_written(full_disks: list[list[Any]]) -> None:
    assert all(left == [] for _, left, _, _ in full_disks)


def test_full_disk_is_an_error_of_the_system(full_disks: list[list[Any]]) -> None:
    assert {error for error, *_ in full_disks} == {0, errno.ENOSPC}


def test_step_that_a_full_disk_refused_can_be_committed_later(full_disks: list[list[Any]]) -> None:
    assert all(later == 20 for error, _, _, later in full_disks if error)


# Killed, and refused, at every call


COMMIT = """
import os, sys
from pathlib import Path
from hpcresume import files
from hpcresume.checkpoint.manifest import FileEntry, hash_stream
from hpcresume.checkpoint.retention import Policy
from hpcresume.checkpoint.store import Store
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir

store = Store(RunDir(Path(sys.argv[1])), "run-1")

def write(directory):
    entries = []
    for name in ("model", "optimizer", "state", "rng"):
        data = name.encode() * 1000
        files.write_new(directory / name, data)
        entries.append(FileEntry(name=name, bytes=len(data), chunks=hash_stream([data])[1]))
    return entries

try:
    committed = store.commit(write, step=20, epoch=0, link=1, parent=None, metric=None,
                             lineage=Lineage(), fence=lambda: None)
except OSError:
    raise SystemExit(7)
os.write(1, b"acknowledged")
store.prune(Lineage(), Policy(last=1, best=0))
os.write(1, b" pruned")
store.finish(committed, ["model"])
"""
#: The calls that change a disk.
CALLS = ["write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir"]


@dataclasses.dataclass
class Struck:
    """What is left after a commit that was killed, or refused, at one call."""

    point: str
    code: int
    said: str
    found: int | None
    bad: dict[int, str]
    next: int | None
    hidden: list[str]
    final: dict[str, bytes] | None
    """The finished model, if there is one."""


def counted(run: RunDir, log: Path) -> dict[str, int]:
    """How often the script makes each call."""
    wrapper = ["strace", "-f", "-o", str(log), "-e", f"trace={','.join(CALLS)}"]
    done = run_python(COMMIT, str(run.path), wrapper=wrapper)
    if done.returncode:
        pytest.skip(f"strace does not work here: {done.stderr[-200:]}")
    calls = re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE)
    return collections.Counter(calls)


def strike(root: Path, what: str, point: tuple[str, int], *, occupied: bool = False) -> Struck:
    """Commit step 20 after step 10, struck at a call; then look, and commit step 30.

    Where it is `occupied`, a damaged checkpoint stands in the place of step 20.
    """
    call, count = point
    store = Store(make_run(root / f"{what} {call} {count}".replace("=", " ")), RUN_ID)
    commit(store, 10)
    if occupied:
        (commit(store, 20).path / "state.json").unlink()
    done = run_python(
        COMMIT,
        str(store.run.path),
        wrapper=["strace", "-f", "-o", os.devnull, "-e", f"trace={call}"]
        + ["-e", f"inject={call}:{what}:when={count}"],
    )
    bad: dict[int, str] = {}
    found = store.latest_verified(ALL, bad.__setitem__)
    store.sweep(2)
    commit(store, 30, link=2)
    return Struck(
        point=f"{call} {count}",
        code=done.returncode,
        said=done.stdout,
        found=None if found is None else found.committed.step,
        bad=bad,
        next=latest(store),
        hidden=hidden(store),
        final=final_files(store) if store.run.final_model.exists() else None,
    )


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Every call of a commit and the retention after it, by its kind and number."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to strike at a given call")
    root = tmp_path_factory.mktemp("points")
    store = Store(make_run(root / "run"), RUN_ID)
    commit(store, 10)
    calls = counted(store.run, root / "log")
    return [(call, n) for call in CALLS for n in range(1, calls[call] + 1)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, points: list[tuple[str, int]]) -> list[Struck]:
    root = tmp_path_factory.mktemp("killed")
    return [strike(root, "signal=KILL", point) for point in points]


def test_commit_makes_enough_calls_to_be_killed_at(points: list[tuple[str, int]]) -> None:
    counts = collections.Counter(call for call, _ in points)
    assert counts["write"] >= 9 and counts["fsync"] >= 12
    assert counts["rename"] == 3 and counts["mkdir"] == 2 and len(points) >= 30


def test_every_kill_has_struck(killed: list[Struck]) -> None:
    assert {struck.code for struck in killed} <= {-signal.SIGKILL, 128 + signal.SIGKILL}


def test_killed_commit_leaves_the_old_or_the_new_checkpoint_whole(killed: list[Struck]) -> None:
    assert [s.point for s in killed if s.found not in (10, 20) or s.bad] == []


def test_killed_commits_leave_sometimes_the_old_and_sometimes_the_new(killed: list[Struck]) -> None:
    assert {struck.found for struck in killed} == {10, 20}


def test_acknowledged_commit_survives_every_later_kill(killed: list[Struck]) -> None:
    assert [s.point for s in killed if "acknowledged" in s.said and s.found != 20] == []


def test_commit_after_a_killed_one_succeeds(killed: list[Struck]) -> None:
    assert [s.point for s in killed if s.next != 30] == []


def test_finished_model_is_whole_or_not_there_after_a_kill(killed: list[Struck]) -> None:
    expected = {"model": b"model" * 1000}
    finals = [
        {name: data for name, data in struck.final.items() if name != "manifest.json"}
        for struck in killed
        if struck.final is not None
    ]
    assert finals and all(final == expected for final in finals)


def test_next_link_sweeps_away_what_a_killed_commit_left(killed: list[Struck]) -> None:
    assert [s.point for s in killed if s.hidden] == []


def test_commit_that_is_killed_while_it_clears_its_place_leaves_a_checkpoint_whole(
    tmp_path: Path, points: list[tuple[str, int]]
) -> None:
    around = [("rename", n) for n in (1, 2, 3)] + [("fsync", n) for n in (8, 9)]
    struck = [strike(tmp_path, "signal=KILL", point, occupied=True) for point in around]
    assert points and [s.found for s in struck] == [10, 10, 10, 10, 20]
    assert [s.next for s in struck] == [30] * 5


@pytest.fixture(scope="module")
def refused(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[str, int]]
) -> list[Struck]:
    """Every call of a commit is answered by an I/O error, one at a time."""
    root = tmp_path_factory.mktemp("refused")
    counts = {"mkdir": 1, "write": 5, "fsync": 8, "rename": 1}
    commits = [point for point in points if point[1] <= counts.get(point[0], 0)]
    return [strike(root, "error=EIO", point) for point in commits]


def test_refused_call_is_an_error_of_the_commit(refused: list[Struck]) -> None:
    assert [s.point for s in refused if (s.code, s.said) != (7, "")] == []


def test_refused_commit_leaves_the_old_checkpoint(refused: list[Struck]) -> None:
    assert [s.point for s in refused if s.found != 10 or s.bad] == []


def test_commit_after_a_refused_one_succeeds(refused: list[Struck]) -> None:
    assert [s.point for s in refused if s.next != 30 or s.hidden] == []


# The order of a commit


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The calls of a commit as (call, path below the run), in order; p/ is the partial one."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to see the calls")
    return traced(COMMIT, tmp_path_factory.mktemp("trace"))


def traced(script: str, root: Path) -> list[tuple[str, str]]:
    run = make_run(root / "run")
    log = root / "log"
    wrapper = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=write,fsync,rename,mkdir"]
    done = run_python(script, str(run.path), wrapper=wrapper)
    if done.returncode:
        pytest.skip(f"strace does not work here: {done.stderr[-200:]}")
    calls = []
    for line in log.read_text().splitlines():
        found = re.match(r"\d+ +(\w+)\((?:\d+<([^>]*)>|\"([^\"]*)\")", line)
        if found is not None:
            path = re.sub(r"\.checkpoint-20[^/]*\.partial", "p", found[2] or found[3] or "")
            calls.append((found[1], os.path.relpath(path, run.path) if path else ""))
    return calls


FILES_WRITTEN = ["p/model", "p/optimizer", "p/state", "p/rng"]


def test_every_file_is_synced_after_its_last_write_and_before_the_rename(
    trace: list[tuple[str, str]],
) -> None:
    renamed = trace.index(("rename", "p"))
    for name in [*FILES_WRITTEN, "p/manifest.json"]:
        last_write = max(n for n, call in enumerate(trace) if call == ("write", name))
        assert last_write < trace.index(("fsync", name)) < renamed, name


def test_manifest_is_written_when_all_else_is_on_the_disk(trace: list[tuple[str, str]]) -> None:
    written_at = trace.index(("write", "p/manifest.json"))
    synced = [call[1] for call in trace[:written_at] if call[0] == "fsync"]
    assert synced == [*FILES_WRITTEN, "p"]


def test_directory_is_synced_between_manifest_and_rename(trace: list[tuple[str, str]]) -> None:
    between = trace[trace.index(("fsync", "p/manifest.json")) : trace.index(("rename", "p"))]
    assert ("fsync", "p") in between


def test_run_directory_is_synced_before_the_acknowledgement(trace: list[tuple[str, str]]) -> None:
    after = trace[trace.index(("rename", "p")) + 1 :]
    assert after[0] == ("fsync", ".")


OBJECTS = """
import sys
from pathlib import Path
import torch
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.store import Store
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir

class Tokenizer:
    def save_pretrained(self, directory):
        Path(directory, "vocab.txt").write_text("a")
        Path(directory, "templates").mkdir()
        Path(directory, "templates", "chat.jinja").write_text("b")

contents = Contents()
contents.add("model", torch.nn.Linear(2, 2))
contents.add("config", {"a": 1})
contents.add("tokenizer", Tokenizer())
committed = Store(RunDir(Path(sys.argv[1])), "r").commit(
    contents.stage({}, [], {}).write, step=20, epoch=0, link=1, parent=None, metric=None,
    lineage=Lineage(), fence=lambda: None)
print(*(entry.name for entry in committed.manifest.files))
"""


def test_every_file_of_registered_objects_is_synced_before_the_rename(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to see the calls")
    trace = traced(OBJECTS, tmp_path)
    synced = {path for call, path in trace[: trace.index(("rename", "p"))] if call == "fsync"}
    names = ["model.safetensors", "config.json", "rng.json", "state.json", "vocab.txt"]
    names += ["templates/chat.jinja", "templates", "manifest.json"]
    assert {f"p/{name}" for name in names} <= synced
