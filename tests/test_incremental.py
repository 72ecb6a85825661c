"""What is not trained is written twice, and linked from then on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import assert_exact, checkpoints, link, make_run, newest, steps_kept, through
from safetensors.torch import load_file
from torch import nn

import hpcresume
from hpcresume.checkpoint.arena import Arena, Image
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.disk import occupied_bytes
from hpcresume.checkpoint.images import verify
from hpcresume.checkpoint.manifest import Committed, hash_stream
from hpcresume.checkpoint.reader import METADATA, held_in
from hpcresume.run_dir import RunDir

TRAINED, FROZEN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EACH = {"steps": 1, "each_epoch": False, "keep_last": 9, "background": False}


class Adapted(nn.Module):
    """A large base that is not trained, and a small head that is."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(512, 1024)
        self.head = nn.Linear(1024, 1)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.relu(self.base(x)))
        return out


def adapt(session: hpcresume.Session, thaw_at: int = -1, shift_at: int = -1) -> None:
    """Train the head; `shift_at` moves the base past autograd, `thaw_at` has it trained too."""
    model = Adapted()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.01)
    session.register(model=model, optimizer=optimizer)
    batches = torch.randn(8, 4, 512, generator=torch.Generator().manual_seed(3))
    for batch in session.steps(list(batches)):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=loss)
        if session.global_step == shift_at:
            model.base.weight.data[0, 0] += 1
        if session.global_step == thaw_at:
            model.base.requires_grad_(True)


def adapted(path: Path, steps: int, **checkpoint: Any) -> RunDir:
    return make_run(path, max_steps=steps, checkpoint={**EACH, **checkpoint})


def copies(found: list[Committed], file: str = FROZEN) -> list[int]:
    """Which of the copies on the disk each checkpoint has, numbered as they come."""
    numbers: dict[int, int] = {}
    inodes = [(each.path / file).stat().st_ino for each in found]
    return [numbers.setdefault(inode, len(numbers)) for inode in inodes]


def test_two_copies_of_what_is_not_trained_take_turns(tmp_path: Path) -> None:
    run = through(adapted(tmp_path / "run", 7), train=adapt)
    assert copies(checkpoints(run)) == [0, 1, 0, 1, 0, 1, 0]
    assert copies(checkpoints(run), TRAINED) == [*range(7)]


def test_a_new_link_goes_on_with_the_copies_of_the_one_before(tmp_path: Path) -> None:
    run = through(adapted(tmp_path / "run", 7), 3, 5, train=adapt)
    assert copies(checkpoints(run)) == [0, 1, 0, 1, 0, 1, 0]


def test_both_copies_stay_when_retention_removes_the_oldest(tmp_path: Path) -> None:
    run = through(adapted(tmp_path / "run", 7, keep_last=2, keep_best=0), train=adapt)
    assert steps_kept(run) == [6, 7] and copies(checkpoints(run)) == [0, 1]


def test_the_only_checkpoint_that_is_kept_shares_nothing(tmp_path: Path) -> None:
    run = through(adapted(tmp_path / "run", 4, keep_last=1, keep_best=0), train=adapt)
    assert (newest(run).path / FROZEN).stat().st_nlink == 1


@pytest.mark.parametrize("left", range(1, 5))
def test_checkpoints_may_be_deleted_in_any_order(tmp_path: Path, left: int) -> None:
    run = through(adapted(tmp_path / "run", 4), train=adapt)
    for found in checkpoints(run):
        if found.step != left:
            shutil.rmtree(found.path)
    verify(newest(run))
    assert newest(run).step == left


def test_the_files_are_those_of_hugging_face(tmp_path: Path) -> None:
    run = through(adapted(tmp_path / "run", 2), train=adapt)
    for folder in (newest(run).path, run.final_model):
        index = json.loads((folder / INDEX).read_bytes())
        held = {file: load_file(folder / file) for file in (TRAINED, FROZEN)}
        assert index["weight_map"] == {key: file for file in held for key in held[file]}
        assert held[FROZEN].keys() == {"base.weight", "base.bias"}
        sizes = [t.numel() * t.element_size() for each in held.values() for t in each.values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        assert not (folder / "model.safetensors").exists()


def test_an_adapted_model_cut_anywhere_is_the_uncut_one(tmp_path: Path) -> None:
    assert_exact(tmp_path, (1, 2, 5), (4,), train=adapt, max_steps=7, checkpoint=EACH)


def test_what_changes_behind_autograd_is_written_anew(tmp_path: Path) -> None:
    def train(session: hpcresume.Session) -> None:
        adapt(session, shift_at=4)

    run = through(adapted(tmp_path / "run", 8), 6, train=train)
    # Four steps with the base as it was, and then two new copies.
    assert copies(checkpoints(run)) == [0, 1, 0, 1, 2, 3, 2, 3]
    first, last = (load_file(checkpoints(run)[at].path / FROZEN) for at in (0, -1))
    assert float(last["base.weight"][0, 0] - first["base.weight"][0, 0]) == pytest.approx(1)


def test_what_begins_to_be_trained_moves_to_the_other_file(tmp_path: Path) -> None:
    def train(session: hpcresume.Session) -> None:
        adapt(session, thaw_at=2)

    run = adapted(tmp_path / "run", 5)
    assert link(run, train).how == "completed"
    files = [{entry.name for entry in each.manifest.files} for each in checkpoints(run)]
    assert [FROZEN in names for names in files] == [True, True, False, False, False]
    assert "model.safetensors" in files[-1] and INDEX not in files[-1]


def test_a_layout_of_one_file_is_restored_into_one_of_two_and_back(tmp_path: Path) -> None:
    def thawed(session: hpcresume.Session) -> None:
        model = Adapted()
        model.base.requires_grad_(session.global_step in (2, 3))
        session.register(model=model)
        for _ in session.steps([0] * 9):
            pass

    run = through(adapted(tmp_path / "run", 6), 2, 4, train=thawed)
    weights = []
    for found in checkpoints(run):
        held: dict[str, torch.Tensor] = {}
        for path in found.path.glob("model*.safetensors"):
            held |= load_file(path)
        weights.append({key: tensor.tolist() for key, tensor in held.items()})
    names = {entry.name for entry in checkpoints(run)[2].manifest.files}
    assert "model.safetensors" in names
    assert all(each == weights[0] for each in weights)


def test_one_bad_sector_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    run = adapted(tmp_path / "run", 9)
    assert link(run, adapt, 5).how == "stopped"
    path = newest(run).path / FROZEN
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert link(run, adapt, 6).how == "stopped"
    assert 4 in steps_kept(run) and 5 in steps_kept(run)
    for found in checkpoints(run)[-2:]:
        verify(found)


def test_what_several_checkpoints_share_is_counted_once(tmp_path: Path) -> None:
    run = through(adapted(tmp_path / "run", 6), train=adapt)
    found = checkpoints(run)
    frozen = found[0].manifest.entry(FROZEN).bytes
    payload = sum(each.manifest.payload_bytes for each in found)
    assert occupied_bytes(found) == payload - 4 * frozen


def test_a_file_system_without_links_gets_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("hpcresume.checkpoint.staged.os.link", refuses)
    run = through(adapted(tmp_path / "run", 4), train=adapt)
    assert copies(checkpoints(run)) == [0, 1, 2, 3]
    verify(newest(run))


# ---- what is staged of it --------------------------------------------------------------------


def staged_still(arena: Arena, tensors: dict[str, torch.Tensor]) -> Image:
    (image,) = arena.stage({FROZEN: tensors}, METADATA, still={FROZEN})
    return image


def hashed(image: Image) -> Image:
    _, image.digests = hash_stream([image.content])
    return image


def test_what_is_there_from_the_save_before_is_looked_at_and_not_copied() -> None:
    arena, tensors = Arena(), {"b": torch.rand(3, 5), "a": torch.rand(1 << 22), "c": torch.ones(0)}
    image = hashed(staged_still(arena, tensors))
    # Only a copy would take this mark away.
    image.content[-1] ^= 1
    marked = bytes(image.content)
    assert bytes(staged_still(arena, tensors).content) == marked
    tensors["a"].data[1 << 21] += 1
    changed = staged_still(arena, tensors)
    assert changed.digests is None
    found = held_in(FROZEN, changed.content).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_another_layout_is_staged_anew() -> None:
    arena, tensors = Arena(), {"a": torch.rand(8, 16)}
    hashed(staged_still(arena, tensors))
    for other in (tensors["a"].reshape(16, 8), tensors["a"].view(torch.int32), torch.rand(9)):
        image = staged_still(arena, {"a": other})
        assert torch.equal(held_in(FROZEN, image.content).tensors["a"], other)
        hashed(image)


class Rotary(nn.Module):
    """A module with a table that its state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(8.0), persistent=False)


def test_a_table_that_grows_and_shrinks_is_in_the_saves_where_it_is_not_as_made() -> None:
    model, contents, found = Rotary(), Contents(), []
    contents.add("model", model)
    for number in (0.0, 1.0, 1.0, 2.0, 0.0):
        model.table = torch.arange(8.0) + number
        staged = contents.stage({}, [], {}).beside(lambda entry: None)
        tables = [held_in(i.name, i.content).tensors for i in staged.images if "buf" in i.name]
        found.append([table["table"][0].item() for table in tables])
    assert found == [[], [1.0], [1.0], [2.0], []]
