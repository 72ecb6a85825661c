"""State that lies in parts on several ranks: FSDP2, saved and restored by any number of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bug_links import (
    CHILDREN,
    Ended,
    Noisy,
    assert_same,
    checkpoints,
    link,
    loss_of,
    make_run,
    newest,
    steps_kept,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import hpcresume
from hpcresume import files
from hpcresume.checkpoint import images, parts, staged, writer
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.foreign import open_foreign
from hpcresume.checkpoint.manifest import NAME, Committed, FileEntry, Manifest
from hpcresume.checkpoint.origin import Origin
from hpcresume.checkpoint.outline import Leaves, Outline
from hpcresume.checkpoint.sharded import Part, pieces
from hpcresume.checkpoint.staged import STATE
from hpcresume.errors import CheckpointError
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace

EACH = {"steps": 2, "each_epoch": False, "keep_last": 9}


# Training on several ranks


class Net(nn.Module):
    """Sharded layers, one of fewer rows than there are ranks, and a norm that is not sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(7, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.drop(torch.relu(self.norm(self.up(x)))))
        return out


def built(mesh: DeviceMesh | None) -> tuple[Net, torch.optim.AdamW]:
    """The model, the same on all ranks before it is sharded, and its optimizer."""
    torch.manual_seed(0)
    model = Net()
    if mesh is not None:
        fully_shard(model.up, mesh=mesh)
        fully_shard(model.down, mesh=mesh)
    split = [*model.up.parameters(), *model.down.parameters()]
    groups = [{"params": split}, {"params": list(model.norm.parameters())}]
    return model, torch.optim.AdamW(groups, lr=0.02)


class Sharded:
    """A training of several ranks with FSDP2; of one rank, with plain tensors."""

    def __init__(self, mesh: tuple[int, ...] = (), trains: bool = True) -> None:
        self.mesh = mesh
        self.trains = trains

    def _mesh(self) -> DeviceMesh | None:
        names = ("replicate", "shard")[-len(self.mesh) :]
        return init_device_mesh("cpu", self.mesh, mesh_dim_names=names) if self.mesh else None

    def __call__(self, session: hpcresume.Session) -> None:
        model, optimizer = built(self._mesh())
        loader = session.loader(Noisy(32), batch_size=8 // session.world_size, shuffle=True)
        session.register(model=model, optimizer=optimizer)
        for _, points in session.steps(loader, accumulate=2):
            if not self.trains:
                continue
            loss = loss_of(model, points)
            loss.backward()
            if session.sync_gradients:
                for p in model.norm.parameters():
                    assert p.grad is not None
                    dist.all_reduce(p.grad)
                optimizer.step()
                optimizer.zero_grad()
            session.log(loss=loss)


class Link(NamedTuple):
    """A link of a run up to a step, or to its end."""

    run: Path
    stop: int | None
    train: Sharded


class Trouble(NamedTuple):
    """What happens to rank 1 when it writes its n-th file."""

    file: int
    is_deadly: bool


def rank_of(
    rank: int,
    world_size: int,
    meeting: Path,
    report: Path,
    plan: Sequence[Link],
    trouble: Trouble | None,
) -> None:
    """One of several ranks through some links."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    if rank == 1 and trouble is not None:
        real, count = writer.write_file, 0

        def write_file(path: Path, content: Any) -> Any:
            nonlocal count
            count += 1
            if count == trouble.file and trouble.is_deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if count == trouble.file:
                raise ValueError("no number")
            return real(path, content)

        staged.writer.write_file = write_file
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=50),
    )
    place = RankPlace(rank=rank, world_size=world_size, local_rank=rank)
    ends = []
    for path, stop, train in plan:
        ends.append(link(RunDir(path), train, stop, place=place))
        files.write_json(report, ends)
        if ends[-1].how == "failed":
            # The others may wait for this one: they see that the process is gone.
            os._exit(1)
    dist.destroy_process_group()


def ranks(world_size: int, *plan: Link, trouble: Trouble | None = None) -> list[list[Ended]]:
    """Links of so many ranks, one after the other; how they ended, by rank.

    Where a rank ends badly, the others are ended as well, as srun does it.
    """
    first = plan[0].run
    base = first.with_name(f"{first.name} {len(list(first.parent.iterdir()))}")
    reports = [base.with_name(f"{base.name} {rank}.json") for rank in range(world_size)]
    children = [
        CHILDREN.Process(target=rank_of, args=(rank, world_size, base, report, plan, trouble))
        for rank, report in enumerate(reports)
    ]
    for child in children:
        child.start()
    running = {child.sentinel: child for child in children}
    while ended := wait(list(running), timeout=120):
        over = [running.pop(sentinel) for sentinel in ended]
        if not running or any(child.exitcode for child in over):
            break
    for child in children:
        child.kill()
        child.join()
    return [[Ended(*end) for end in files.read_json_or_none(r) or []] for r in reports]


def hows(ended: list[list[Ended]]) -> list[list[str]]:
    return [[end.how for end in ends] for ends in ended]


# What is in the files


def read_parts(committed: Committed, name: str) -> dict[str, torch.Tensor]:
    """The whole tensors of an object, by what its files say of themselves; NaN is nowhere."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(committed.path.glob(f"{name}*.safetensors")):
        with safe_open(path, "pt") as file:
            shards = json.loads((file.metadata() or {}).get("shards", "{}"))
        for key, tensor in load_file(path).items():
            if key not in shards:
                found[key] = tensor
                continue
            shape, offset = shards[key]["shape"], shards[key]["offset"]
            whole = found.setdefault(key, torch.full(shape, torch.nan, dtype=tensor.dtype))
            for dim, start in enumerate(offset):
                whole = whole.narrow(dim, start, tensor.shape[dim])
            whole.copy_(tensor)
    assert found
    for key, tensor in found.items():
        assert not tensor.isnan().any(), key
    return found


def assert_equal(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    assert here.keys() == there.keys()
    for key, tensor in here.items():
        assert tensor.dtype == there[key].dtype
        assert torch.equal(tensor, there[key]), key


# Chains of links


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir]:
    """A run of two ranks without a break, and one that was cut after steps 3 and 5."""
    folder = tmp_path_factory.mktemp("two")
    uncut, cut = (make_run(folder / name, max_steps=8, checkpoint=EACH) for name in ("un", "cut"))
    train = Sharded((2,))
    ended = ranks(
        2,
        Link(uncut.path, None, train),
        *(Link(cut.path, stop, train) for stop in (3, 5, None)),
    )
    assert hows(ended) == [["completed", "stopped", "stopped", "completed"]] * 2, ended
    return uncut, cut


def test_a_chain_of_two_sharded_ranks_gives_the_bytes_of_the_uncut_run(
    two: tuple[RunDir, RunDir],
) -> None:
    uncut, cut = two
    assert_same(cut, uncut)


def test_each_rank_writes_its_parts_into_a_file_of_its_own(two: tuple[RunDir, RunDir]) -> None:
    last = newest(two[0])
    entries = {entry.name: entry.rank for entry in last.manifest.files}
    assert {name: rank for name, rank in entries.items() if "-of-" in name} == {
        "model-00001-of-00002.safetensors": 0,
        "model-00002-of-00002.safetensors": 1,
        "optimizer-00001-of-00002.safetensors": 0,
        "optimizer-00002-of-00002.safetensors": 1,
    }
    assert not [name for name in entries if name.endswith(".index.json")]
    first, second = (load_file(last.path / f"model-0000{n}-of-00002.safetensors") for n in (1, 2))
    assert (first["up.weight"].shape, second["up.weight"].shape) == ((4, 4), (3, 4))
    assert (first["down.weight"].shape, second["down.weight"].shape) == ((1, 7), (0, 7))
    assert "norm.running_mean" in first and "norm.weight" in first
    assert not [name for name in second if name.startswith("norm.")]


def test_the_finished_model_is_one_file_of_whole_tensors(two: tuple[RunDir, RunDir]) -> None:
    final = two[0].final_model
    assert [path.name for path in final.glob("*.safetensors")] == ["model.safetensors"]
    assert_equal(load_file(final / "model.safetensors"), read_parts(newest(two[0]), "model"))
    assert final.joinpath(NAME).exists()
    Net().load_state_dict(load_file(final / "model.safetensors"))


def test_other_numbers_of_ranks_bring_back_every_tensor_bit_for_bit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", max_steps=5, checkpoint={**EACH, "steps": 1})
    assert hows(ranks(2, Link(run.path, 3, Sharded((2,))))) == [["stopped"]] * 2
    assert link(run, Sharded(trains=False), 4).how == "stopped"
    ended = ranks(2, Link(run.path, None, Sharded((2,), trains=False)))
    assert hows(ended) == [["completed"]] * 2
    two, one, two_again = checkpoints(run)[-3:]
    assert (one.path / "model.safetensors").exists()
    assert (one.path / "optimizer.safetensors").exists()
    assert (two_again.path / "optimizer-00002-of-00002.safetensors").exists()
    for name in ("model", "optimizer"):
        assert_equal(read_parts(two, name), read_parts(one, name))
        assert_equal(read_parts(one, name), read_parts(two_again, name))


def test_of_replicated_parts_one_rank_writes_each_and_a_chain_is_exact(tmp_path: Path) -> None:
    uncut, cut = (make_run(tmp_path / n, max_steps=3, checkpoint=EACH) for n in ("un", "cut"))
    train = Sharded((2, 2))
    ended = ranks(
        4,
        Link(uncut.path, None, train),
        Link(cut.path, 1, train),
        Link(cut.path, None, train),
    )
    assert hows(ended) == [["completed", "stopped", "completed"]] * 4, ended
    assert_same(cut, uncut)
    held = [
        set(load_file(newest(cut).path / f"optimizer-0000{n}-of-00004.safetensors"))
        for n in range(1, 5)
    ]
    assert held[1] and not held[2] and not held[3]


def test_a_rank_that_is_killed_while_it_writes_its_parts_leaves_the_checkpoint_before(
    tmp_path: Path, two: tuple[RunDir, RunDir]
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=EACH)
    # Two files a save: in the middle of the second one.
    ranks(2, Link(run.path, None, Sharded((2,))), trouble=Trouble(4, True))
    assert steps_kept(run) == [2]
    assert hows(ranks(2, Link(run.path, None, Sharded((2,))))) == [["completed"]] * 2
    assert_same(run, two[0])


def test_a_rank_that_fails_while_it_writes_its_parts_tells_the_others_at_once(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=EACH)
    ended = ranks(2, Link(run.path, None, Sharded((2,))), trouble=Trouble(4, False))
    assert [(end.how, "no number" in end.why) for end in ended[1]] == [("failed", True)]
    assert steps_kept(run) == [2]
    # Whether rank 0 comes to say why there is no emergency save either, is a matter of luck.
    refused = [
        record
        for record in files.read_lines(run.link(1).training)
        if record["kind"] == "save_failed" and not record["reason"].startswith("emergency: ")
    ]
    assert [record["step"] for record in refused] == [4]
    assert "rank 1 could not write its share" in refused[0]["reason"]


def test_a_part_of_another_rank_that_is_damaged_sends_all_ranks_to_the_checkpoint_before(
    tmp_path: Path, two: tuple[RunDir, RunDir]
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=EACH)
    assert hows(ranks(2, Link(run.path, 5, Sharded((2,))))) == [["stopped"]] * 2
    assert steps_kept(run) == [2, 4, 5]
    path = newest(run).path / "optimizer-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert hows(ranks(2, Link(run.path, None, Sharded((2,))))) == [["completed"]] * 2
    restored = [r for r in files.read_lines(run.link(2).training) if r["kind"] == "restored"]
    assert [record["step"] for record in restored] == [4]
    assert len(list(run.path.glob("quarantined-*"))) == 1
    assert_same(run, two[0])


# The engine, in this process


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Holder:
    """Holds any state, as some class of a user's does."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def spread(tensor: torch.Tensor, mesh: DeviceMesh, *placements: Placement) -> DTensor:
    found: DTensor = DTensor.from_local(tensor, mesh, placements or [Shard(0)], run_check=False)
    return found


def contents_of(**objects: Any) -> Contents:
    contents = Contents()
    for name, value in objects.items():
        contents.add(name, value)
    return contents


def commit(folder: Path, write: Callable[[Path], Sequence[FileEntry]]) -> Committed:
    """What `write` puts into a directory, as a checkpoint."""
    folder.mkdir()
    entries = tuple(write(folder))
    manifest = Manifest(
        step=1, epoch=0, link=1, run_id="r", parent=None, files=entries, created=0.0
    )
    return Committed(folder, manifest)


def save(folder: Path, **objects: Any) -> Committed:
    return commit(folder, contents_of(**objects).stage({"step": 1}, [], {}).write)


def restore(committed: Committed, **objects: Any) -> None:
    contents = contents_of(**objects)
    for name in objects:
        contents.restore(name, images.read(committed), files.read_json(committed.path / STATE))


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        (Partial(), "Partial"),
        (_StridedShard(0, split_factor=2), "_StridedShard"),
    ],
    ids=["partial", "strided"],
)
def test_a_tensor_that_is_spread_in_another_way_is_refused_by_name(
    mesh: DeviceMesh, placement: Placement, words: str
) -> None:
    state = Holder(layer={"weight": spread(torch.ones(4), mesh, placement)})
    with pytest.raises(CheckpointError, match=rf"layer\.weight.*{words}"):
        contents_of(ema=state).stage({}, [], {})


def test_an_optimizer_that_keeps_its_state_otherwise_than_the_parameters_is_refused(
    mesh: DeviceMesh,
) -> None:
    param = nn.Parameter(spread(torch.ones(4, 2), mesh))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param]["row"] = spread(torch.ones(4), mesh)
    with pytest.raises(CheckpointError, match=r"optimizer.*state\.0\.row"):
        contents_of(optimizer=optimizer).stage({}, [], {})


def test_an_outline_fits_while_each_tensor_keeps_its_place_on_the_ranks(mesh: DeviceMesh) -> None:
    own = torch.ones(4, 2)

    def leaves(part: torch.Tensor, rows: int = 4, placement: Placement | None = None) -> Leaves:
        whole = torch.Size([rows, 2])
        there = placement or Shard(0)
        made = DTensor.from_local(part, mesh, [there], run_check=False, shape=whole, stride=(2, 1))
        return Leaves({"a": made})

    outline = Outline({"a": spread(own, mesh)}, leaves(own), "ema")
    assert outline.fits(leaves(own))
    assert not outline.fits(leaves(own.clone()))
    assert not outline.fits(leaves(own, rows=8))
    assert not outline.fits(leaves(own, placement=Replicate()))
    assert not outline.fits(Leaves({"a": own}))


@pytest.mark.parametrize("split", [True, False], ids=["from parts", "from wholes"])
def test_optimizers_get_state_that_lies_as_their_parameters_do(
    tmp_path: Path, mesh: DeviceMesh, split: bool
) -> None:
    model, optimizer = built(mesh if split else None)
    loss_of(model, torch.ones(3, 4)).backward()
    optimizer.step()
    saved = save(tmp_path / "saved", model=model, optimizer=optimizer)
    torch.manual_seed(1)
    fresh, other = built(mesh)
    restore(saved, model=fresh, optimizer=other)
    state = other.state[fresh.up.weight]
    assert isinstance(state["exp_avg"], DTensor) and not isinstance(state["step"], DTensor)
    assert state["exp_avg"].placements == fresh.up.weight.placements
    moment = optimizer.state[model.up.weight]["exp_avg"]
    whole = moment.to_local() if isinstance(moment, DTensor) else moment
    assert torch.equal(state["exp_avg"].to_local(), whole)


def test_a_saved_part_is_restored_into_the_live_memory(tmp_path: Path, mesh: DeviceMesh) -> None:
    model, _ = built(mesh)
    saved = save(tmp_path / "saved", model=model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    before = model.up.weight
    restore(saved, model=model)
    assert model.up.weight is before
    assert_equal(
        {"up.weight": before.to_local().detach()}, {"up.weight": built(None)[0].up.weight.detach()}
    )


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path, mesh: DeviceMesh) -> None:
    saved = save(tmp_path / "saved", ema=Holder(a=spread(torch.ones(4, 2), mesh)))
    with pytest.raises(CheckpointError, match=r"'ema\.a' has shape \[3, 2\] here, \[4, 2\]"):
        restore(saved, ema=Holder(a=spread(torch.ones(3, 2), mesh)))


class Straying(Holder):
    """Loads something else than what it is given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.state["a"].to_local()[0] += 1


@pytest.mark.parametrize("split", [True, False], ids=["from parts", "from wholes"])
def test_a_part_that_did_not_arrive_is_an_error_that_names_the_tensor(
    tmp_path: Path, mesh: DeviceMesh, split: bool
) -> None:
    own = torch.ones(4, 2)
    saved = save(tmp_path / "saved", ema=Holder(a=spread(own, mesh) if split else own))
    with pytest.raises(CheckpointError, match=r"'ema': tensor 'a' is not what checkpoint-1 holds"):
        restore(saved, ema=Straying(a=spread(torch.zeros(4, 2), mesh)))


def test_ranks_that_share_no_mesh_have_each_its_own_part_again(
    tmp_path: Path, mesh: DeviceMesh
) -> None:
    both = [Contents(rank, world_size=2) for rank in range(2)]
    for rank, contents in enumerate(both):
        contents.add("ema", Holder(a=spread(torch.full((4,), float(rank)), mesh)))

    assert all(contents.is_divided() for contents in both)

    def write(folder: Path) -> list[FileEntry]:
        others = both[1].stage_share().write(folder)
        return [
            *both[0].stage({}, [], {}).write(folder),
            *(dataclasses.replace(entry, rank=1) for entry in others),
        ]

    saved = commit(tmp_path / "saved", write)
    for rank in range(2):
        fresh = Holder(a=spread(torch.full((4,), -1.0), mesh))
        contents = Contents(rank, world_size=2)
        contents.add("ema", fresh)
        contents.restore("ema", images.Images(saved), files.read_json(saved.path / STATE))
        assert fresh.state["a"].to_local().tolist() == [rank] * 4


def by_ranks(world_size: int, tensors: dict[str, torch.Tensor]) -> Callable[[Path], Any]:
    """Writes tensors in parts, as so many ranks would: by rows, the first ranks have the most."""

    def write(folder: Path) -> list[FileEntry]:
        entries = []
        for rank in range(world_size):
            own, shards = {}, {}
            for name, tensor in tensors.items():
                rows = -(-len(tensor) // world_size)
                begin = min(rank * rows, len(tensor))
                own[name] = tensor[begin : begin + rows].contiguous()
                offset = [begin, *[0] * (tensor.dim() - 1)]
                shards[name] = {"shape": list(tensor.shape), "offset": offset}
            head = writer.header(own, {"shards": json.dumps(shards)})
            rest = [writer.bytes_of(own[key]) for key in writer.layout(own) if own[key].numel()]
            path = folder / f"model-{rank + 1:05d}-of-{world_size:05d}.safetensors"
            entries.append(writer.write_pieces(path, [head, *rest]))
        return entries

    return write


TENSORS = {
    "a": torch.arange(35.0).view(7, 5),
    "b": torch.arange(3, dtype=torch.int16),
    "c": torch.arange(24, dtype=torch.float64).view(4, 3, 2),
    "none": torch.empty(0, 4),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 9])
def test_the_parts_of_any_number_of_ranks_make_whole_tensors(
    tmp_path: Path, world_size: int
) -> None:
    saved = commit(tmp_path / "saved", by_ranks(world_size, TENSORS))
    names = [entry.name for entry in saved.manifest.files]
    entry = parts.write_whole(saved, names, tmp_path / "whole.safetensors")
    assert entry.bytes == (tmp_path / "whole.safetensors").stat().st_size
    assert_equal(load_file(tmp_path / "whole.safetensors"), TENSORS)


def test_whole_tensors_larger_than_a_chunk_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (images, writer, parts.reader.writer, hpcresume.checkpoint.manifest):
        monkeypatch.setattr(module, "CHUNK_BYTES", 48)
    test_the_parts_of_any_number_of_ranks_make_whole_tensors(tmp_path, 3)


def test_a_damaged_part_never_becomes_a_finished_model(tmp_path: Path) -> None:
    saved = commit(tmp_path / "saved", by_ranks(2, TENSORS))
    names = [entry.name for entry in saved.manifest.files]
    data = bytearray((saved.path / names[1]).read_bytes())
    data[-1] ^= 1
    (saved.path / names[1]).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors has changed"):
        parts.write_whole(saved, names, tmp_path / "whole.safetensors")


def test_elements_that_no_file_holds_are_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    saved = commit(tmp_path / "saved", by_ranks(3, TENSORS))
    names = [saved.manifest.files[n].name for n in (0, 2)]
    with pytest.raises(CheckpointError, match="'c'"):
        parts.write_whole(saved, names, tmp_path / "whole.safetensors")


def boxes(shape: tuple[int, ...], world_size: int, dim: int) -> list[Part]:
    """A tensor in parts along one dimension, the last ones empty where they do not suffice."""
    size = -(-shape[dim] // world_size)
    found = []
    for rank in range(world_size):
        begin = min(rank * size, shape[dim])
        offset, sizes = [0] * len(shape), list(shape)
        offset[dim], sizes[dim] = begin, min(size, shape[dim] - begin)
        found.append(Part(shape, tuple(offset), tuple(sizes)))
    return found


@pytest.mark.parametrize("before", [1, 2, 3, 8])
@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0)], ids=str)
def test_every_element_comes_from_its_own_place(
    before: int, after: int, dims: tuple[int, int]
) -> None:
    whole = torch.arange(5 * 6).view(5, 6)
    held, wanted = boxes((5, 6), before, dims[0]), boxes((5, 6), after, dims[1])

    def cut(part: Part) -> torch.Tensor:
        box = tuple(slice(o, o + n) for o, n in zip(part.offset, part.sizes, strict=True))
        return whole[box]

    for part in wanted:
        found = torch.full(part.sizes, -1)
        for number, there, here in pieces("x", part, held):
            found[here] = cut(held[number])[there]
        assert torch.equal(found, cut(part))


def test_replicas_that_several_ranks_have_written_count_once() -> None:
    (part,) = boxes((4,), 1, 0)
    assert [number for number, _, _ in pieces("x", part, [part, part])] == [0]
    assert math.prod(part.sizes) == 4


def test_what_other_ranks_wrote_is_verified_but_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path) -> list[FileEntry]:
        first, second = by_ranks(2, TENSORS)(folder)
        return [first, dataclasses.replace(second, rank=1)]

    saved = commit(tmp_path / "saved", write)
    sizes: list[int] = []
    real = images.memory

    def memory(size: int) -> memoryview:
        sizes.append(size)
        return real(size)

    monkeypatch.setattr(images, "memory", memory)
    images.read(saved)
    assert sizes == [saved.manifest.files[0].bytes]
    data = bytearray((saved.path / saved.manifest.files[1].name).read_bytes())
    data[-1] ^= 1
    (saved.path / saved.manifest.files[1].name).write_bytes(data)
    with pytest.raises(CheckpointError, match="model-00002"):
        images.read(saved)


# Beginning with what others have saved


class LeavesDcp(Sharded):
    """Saves by torch's own means what it has trained for a step, and nothing by ours."""

    def __call__(self, session: hpcresume.Session) -> None:
        model, optimizer = built(self._mesh())
        stepped(model, optimizer)
        own, moments = get_state_dict(model, optimizer)
        content = {"model": own, "optimizer": moments, "step": 1, "epoch": 0}
        dcp.save(content, checkpoint_id=str(session.path / "dcp"))
        session.register(value=1)
        for _ in session.steps([torch.zeros(1)]):
            pass


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for param in model.parameters():
        param.grad = param.detach() * 0.5 + 1
    optimizer.step()


@pytest.fixture(scope="module")
def by_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of torch.distributed.checkpoint that two ranks have written."""
    run = make_run(tmp_path_factory.mktemp("torch") / "run", max_steps=1)
    assert hows(ranks(2, Link(run.path, None, LeavesDcp((2,))))) == [["completed"]] * 2
    return run.path / "dcp"


def begun_with(run: RunDir, source: Path) -> RunDir:
    origin = Origin(asked=str(source), path=str(source))
    files.write_json(run.origin, origin.to_json())
    return run


def test_the_parts_that_several_ranks_saved_by_torch_are_put_together(by_torch: Path) -> None:
    assert len([*by_torch.glob("*.distcp")]) == 2
    model, optimizer = built(None)
    stepped(model, optimizer)
    found = {each.name: each.state() for each in open_foreign(by_torch).objects}
    assert_equal(found["model"], model.state_dict())
    moments = {name: values["exp_avg"] for name, values in found["optimizer"]["state"].items()}
    assert_equal(moments, {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()})


def test_sharded_ranks_and_one_alone_begin_with_the_same_state(
    tmp_path: Path, by_torch: Path
) -> None:
    two, one = (
        begun_with(make_run(tmp_path / name, max_steps=3, checkpoint=EACH), by_torch)
        for name in ("two", "one")
    )
    ended = ranks(2, Link(two.path, None, Sharded((2,), trains=False)))
    assert hows(ended) == [["completed"]] * 2, ended
    assert link(one, Sharded(trains=False)).how == "completed"
    assert newest(two).path.joinpath("model-00002-of-00002.safetensors").exists()
    for name in ("model", "optimizer"):
        assert_equal(read_parts(newest(two), name), read_parts(newest(one), name))
    model, optimizer = built(None)
    stepped(model, optimizer)
    assert_equal(read_parts(newest(two), "model"), model.state_dict())
