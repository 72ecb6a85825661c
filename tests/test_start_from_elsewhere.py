"""A run that begins with the state of another program, or of another run."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import (
    Net,
    assert_same,
    changes_said,
    link,
    make_run,
    newest,
    ordinary,
    outcome,
    steps_kept,
    through,
)
from foreign_files import (
    Bare,
    Objects,
    Take,
    averaged,
    begun,
    built,
    refusal,
    same,
    save_directory,
    states,
    takes,
    trained,
)
from torch import nn

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.foreign import open_foreign
from hpcresume.checkpoint.origin import check_same, find_origin
from hpcresume.errors import CheckpointError, ConfigError, NotFound
from hpcresume.journal import read_chain


def restored(run: Any) -> dict[str, Any]:
    record = read_chain(run)[-1].last("restored")
    assert record is not None
    return record


# A directory of state files


def test_everything_in_a_directory_of_state_files_is_taken_over(tmp_path: Path) -> None:
    theirs = trained(averaged(1))
    told = {"global_step": 826, "current_epoch": 117}
    source = save_directory(tmp_path / "checkpoint-epoch-118", theirs, told)
    take = Take(lambda: averaged(2))
    run = takes(tmp_path, source, take, stop_after=2)
    assert same(take.given, states(theirs))
    assert steps_kept(run) == [828]


def test_epoch_118_in_a_name_means_that_118_epochs_are_done(tmp_path: Path) -> None:
    told = {"global_step": 826, "current_epoch": 117}
    source = save_directory(tmp_path / "checkpoint-epoch-118", trained(built(1)), told)
    take = Take(built)
    run = takes(tmp_path, source, take)
    assert take.began == (826, 118)
    # Nothing is derived, and nothing is left out.
    assert changes_said(run) == []


def test_the_training_goes_on_to_the_configured_end(tmp_path: Path) -> None:
    told = {"global_step": 14, "current_epoch": 1}
    source = save_directory(tmp_path / "checkpoint-epoch-2", trained(built(1)), told)
    run, take = begun(tmp_path / "run", source, max_steps=None, epochs=4), Take(built)
    assert link(run, take).how == "completed"
    assert take.epochs == [2] * 7 + [3] * 7
    assert files.read_json(run.trainer_state)["global_step"] == 28


def test_data_of_an_unknown_place_begin_with_the_next_epoch(tmp_path: Path) -> None:
    told = {"global_step": 5000, "current_epoch": 3}
    source = save_directory(tmp_path / "checkpoint-5000", trained(built(1)), told)
    take = Take(built)
    run = takes(tmp_path, source, take)
    assert take.began == (5000, 4)
    (said,) = changes_said(run)
    assert "epoch 3, counted from 0" in said
    assert "training begins with epoch 5" in said


@pytest.mark.parametrize(
    ("name", "began", "words"),
    [
        ("checkpoint-epoch-118", (5, 118), ("its epoch is derived", "optimizer has counted")),
        ("checkpoint-5000", (5000, 0), ("its step, 5000, is derived", "its epoch is not known")),
        ("best", (5, 0), ("optimizer has counted", "its epoch is not known")),
    ],
)
def test_where_the_state_file_is_missing_it_is_said_what_is_derived(
    tmp_path: Path, name: str, began: tuple[int, int], words: tuple[str, ...]
) -> None:
    theirs = trained(built(1))
    take = Take(built)
    run = takes(tmp_path, save_directory(tmp_path / name, theirs), take)
    assert take.began == began
    assert same(take.given, states(theirs))
    said = "\n".join(changes_said(run))
    assert "no training_state.json" in said
    assert all(word in said for word in words), said


def test_without_schedule_and_average_both_begin_and_it_is_said(tmp_path: Path) -> None:
    theirs = trained(built(1))
    del theirs["scheduler"]
    source = save_directory(tmp_path / "checkpoint-5", theirs, {"global_step": 5, "epoch": 0})
    take = Take(lambda: averaged(2))
    run = takes(tmp_path, source, take)
    assert take.given["scheduler"]["last_epoch"] == 0
    # An average of what the code made would pull the weights back to it.
    assert same(take.given["ema"], theirs["model"].state_dict())
    said = "\n".join(changes_said(run))
    assert "'scheduler' begins as the code makes it" in said
    assert "'ema' begins with the weights of the model" in said


def test_without_an_optimizer_its_rate_is_that_of_the_schedule(tmp_path: Path) -> None:
    theirs = trained(built(1))
    rate = theirs["optimizer"].param_groups[0]["lr"]
    del theirs["optimizer"]
    told = {"global_step": 5, "epoch": 0}
    take = Take(built)
    run = takes(tmp_path, save_directory(tmp_path / "checkpoint-5", theirs, told), take)
    assert take.given["optimizer"]["state"] == {}
    assert take.given["optimizer"]["param_groups"][0]["lr"] == rate != 0.02
    assert "'optimizer' begins as the code makes it" in "\n".join(changes_said(run))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    told = {"global_step": 5, "current_epoch": 0}
    source = save_directory(tmp_path / "checkpoint-epoch-1", trained(averaged(1)), told)
    (source / "random_states_0.pkl").write_bytes(b"")
    run = takes(tmp_path, source, Take(built))
    (said,) = changes_said(run)
    assert said.endswith("left out: ema, random_states_0.pkl")


class Average:
    """An average that keeps the weights beside its decay, as many write it."""

    def __init__(self, model: nn.Module) -> None:
        self.decay = 0.9
        self.shadow = copy.deepcopy(model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay, self.shadow = state["decay"], state["shadow"]


@pytest.mark.parametrize("is_module", [True, False], ids=["module", "class"])
def test_an_average_beside_its_decay_is_taken_over(tmp_path: Path, is_module: bool) -> None:
    theirs = trained(averaged(1))
    weights = theirs["ema"].state_dict()
    told = {"global_step": 5, "current_epoch": 0}
    source = save_directory(tmp_path / "checkpoint-epoch-1", trained(built(1)), told)
    torch.save({"decay": 0.5, "shadow": weights}, source / "ema_model.pt")

    def mine() -> Objects:
        objects = averaged(2)
        return objects if is_module else {**objects, "ema": Average(objects["model"])}

    take = Take(mine)
    takes(tmp_path, source, take)
    expected = weights if is_module else {"decay": 0.5, "shadow": weights}
    assert same(take.given["ema"], expected)


def test_torchs_own_average_is_taken_over_with_its_count(tmp_path: Path) -> None:
    def mine(seed: int) -> Objects:
        objects = built(seed)
        return {**objects, "ema": torch.optim.swa_utils.AveragedModel(objects["model"])}

    theirs = mine(1)
    theirs["ema"].update_parameters(trained(built(3))["model"])
    told = {"global_step": 5, "current_epoch": 0}
    source = save_directory(tmp_path / "checkpoint-epoch-1", theirs, told)
    take = Take(lambda: mine(2))
    takes(tmp_path, source, take)
    assert same(take.given, states(theirs))
    assert take.given["ema"]["n_averaged"] == 1


# A single file


def save_file(path: Path, objects: Objects, **more: Any) -> Path:
    torch.save({f"{n}_state_dict": o.state_dict() for n, o in objects.items()} | more, path)
    return path


def test_everything_in_a_single_file_is_taken_over(tmp_path: Path) -> None:
    theirs = trained(built(1))
    source = save_file(
        tmp_path / "last.pt",
        theirs,
        epoch=9,
        step=700,
        loss=0.5,
        best_loss=0.4,
        config={"lr": 0.02},
        model_info={"name": "net", "parameters": 57},
    )
    take = Take(built)
    run = takes(tmp_path, source, take)
    assert same(take.given, states(theirs))
    assert take.began == (700, 10)
    assert changes_said(run)[-1].endswith("left out: best_loss, config, loss, model_info")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_bare_state_of_a_model_is_taken_over(tmp_path: Path, legacy: bool) -> None:
    theirs = trained(built(1))["model"].state_dict()
    source = tmp_path / "weights.pt"
    torch.save(theirs, source, _use_new_zipfile_serialization=not legacy)
    take = Take(built)
    takes(tmp_path, source, take)
    assert same(take.given["model"], theirs)
    assert take.began == (0, 0)


def test_what_was_taken_is_no_part_of_the_file_any_more(tmp_path: Path) -> None:
    theirs = trained(built(1))
    source = save_file(tmp_path / "last.pt", theirs, step=5)
    take = Take(built)
    run = begun(tmp_path / "run", source)

    def overwritten(session: hpcresume.Session) -> None:
        objects = built()
        session.register(**objects)
        take.given = states(objects)
        # In place, as `cp` does it.
        source.write_bytes(bytes(source.stat().st_size))
        assert same(states(objects), take.given)
        raise RuntimeError("enough")

    assert link(run, overwritten).why == "RuntimeError: enough"
    assert same(take.given, states(theirs))


def test_what_was_saved_on_a_gpu_is_read_without_one(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"].state_dict()
    torch.save(theirs, tmp_path / "cpu.pt")
    with (
        zipfile.ZipFile(tmp_path / "cpu.pt") as archive,
        zipfile.ZipFile(tmp_path / "gpu.pt", "w") as moved,
    ):
        for name in archive.namelist():
            # How a pickle holds the name of a device.
            here, there = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
            content = archive.read(name)
            assert name.endswith("data.pkl") == (here in content)
            moved.writestr(name, content.replace(here, there))
    take = Take(built)
    takes(tmp_path, tmp_path / "gpu.pt", take)
    assert same(take.given["model"], theirs)


def test_a_registered_name_of_its_own_finds_the_state_that_fits(tmp_path: Path) -> None:
    theirs = {"generator": trained(built(1))["model"], "discriminator": nn.Linear(3, 1)}
    source = save_file(tmp_path / "gan.pt", theirs, step=5)

    class Named(Take):
        def __call__(self, session: hpcresume.Session) -> None:
            other, own = nn.Linear(3, 1), Net()
            session.register(judge=other)
            session.register(net=own)
            self.given = states({"judge": other, "net": own})

    take = Named(built)
    link(begun(tmp_path / "run", source), take)
    assert same(take.given["judge"], theirs["discriminator"].state_dict())
    assert same(take.given["net"], theirs["generator"].state_dict())


# Names, types, shapes


def prefixed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {f"{prefix}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "model.net."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    theirs = trained(built(1))["model"].state_dict()
    source = tmp_path / "model.pt"
    torch.save({"model_state_dict": prefixed(prefix)(theirs), "step": 1, "epoch": 0}, source)
    take = Take(built)
    run = takes(tmp_path, source, take)
    assert same(take.given["model"], theirs)
    assert any("taken off" in said for said in changes_said(run))


def test_a_wrapped_model_takes_the_state_of_a_bare_one(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"]
    source = save_file(tmp_path / "model.pt", {"model": theirs}, step=1)
    take = Take(lambda: {"model": Bare()})

    def train(session: hpcresume.Session) -> None:
        model = Bare()
        session.register(model=model)
        take.given = states({"model": model.net})

    link(begun(tmp_path / "run", source), train)
    assert same(take.given["model"], theirs.state_dict())


def test_what_is_missing_and_left_over_is_named(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"].state_dict()
    theirs["extra.weight"] = theirs.pop("up.bias")
    torch.save({"model_state_dict": theirs}, tmp_path / "model.pt")
    why = refusal(tmp_path, tmp_path / "model.pt", Take(built))
    assert why.startswith("CheckpointError: ")
    assert "it lacks up.bias; it alone has extra.weight" in why


def test_another_shape_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"].state_dict()
    theirs["up.weight"] = torch.zeros(9, 4)
    torch.save({"model_state_dict": theirs}, tmp_path / "model.pt")
    why = refusal(tmp_path, tmp_path / "model.pt", Take(built))
    assert "'model.up.weight' is float32[8, 4] here, float32[9, 4] in 'model' of" in why


def test_nothing_is_changed_where_a_state_does_not_fit(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"].state_dict()
    theirs["norm.weight"] = torch.zeros(9)
    torch.save({"model_state_dict": theirs}, tmp_path / "model.pt")
    model = Net()
    before = copy.deepcopy(model.state_dict())

    def train(session: hpcresume.Session) -> None:
        session.register(model=model)

    assert link(begun(tmp_path / "run", tmp_path / "model.pt"), train).how == "failed"
    assert same(model.state_dict(), before)


def test_narrower_numbers_are_widened_without_loss_and_it_is_said(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"].to(torch.bfloat16).state_dict()
    torch.save({"model_state_dict": theirs, "step": 1, "epoch": 0}, tmp_path / "model.pt")
    take = Take(built)
    run = takes(tmp_path, tmp_path / "model.pt", take)
    assert same(take.given["model"]["up.weight"], theirs["up.weight"].float())
    assert any("widened without loss, bfloat16 to float32" in s for s in changes_said(run))


def test_wider_numbers_would_be_rounded_and_are_refused(tmp_path: Path) -> None:
    save_file(tmp_path / "model.pt", {"model": trained(built(1))["model"]})
    take = Take(lambda: {"model": Net().to(torch.bfloat16)})
    why = refusal(tmp_path, tmp_path / "model.pt", take)
    assert "would be rounded" in why
    assert "is bfloat16[8, 4] here, float32[8, 4] in" in why


def test_moments_of_another_type_than_their_parameters_stay_as_they_are(tmp_path: Path) -> None:
    def mixed() -> Objects:
        model = Net().to(torch.bfloat16)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    theirs = mixed()
    for param in theirs["model"].parameters():
        moments = {key: torch.rand(param.shape) for key in ("exp_avg", "exp_avg_sq")}
        theirs["optimizer"].state[param] = {"step": torch.tensor(3.0), **moments}
    source = save_file(tmp_path / "last.pt", theirs, step=3)
    given: dict[str, Any] = {}

    def train(session: hpcresume.Session) -> None:
        objects = mixed()
        session.register(**objects)
        given.update(states(objects))

    link(begun(tmp_path / "run", source), train)
    assert same(given, states(theirs))


class Tied(nn.Module):
    """Two names of one tensor, which safetensors keeps once."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.into.weight


@pytest.mark.parametrize("kept", ["into.weight", "out.weight"])
def test_a_tensor_of_two_names_may_be_saved_by_one_of_them(tmp_path: Path, kept: str) -> None:
    torch.save({"model": {kept: torch.ones(5, 3)}, "step": 1}, tmp_path / "tied.pt")
    model = Tied()

    def train(session: hpcresume.Session) -> None:
        session.register(model=model)

    link(begun(tmp_path / "run", tmp_path / "tied.pt"), train)
    assert same(model.into.weight, torch.ones(5, 3))
    assert model.out.weight is model.into.weight


def test_a_tied_tensor_that_is_two_in_the_source_is_refused(tmp_path: Path) -> None:
    two = {"into.weight": torch.ones(5, 3), "out.weight": torch.zeros(5, 3)}
    torch.save({"model": two, "step": 1}, tmp_path / "untied.pt")
    take = Take(lambda: {"model": Tied()})
    assert "two different ones" in refusal(tmp_path, tmp_path / "untied.pt", take)


def other(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Objects:
    model = built()["model"]
    return {"model": model, "optimizer": optimizer(model.parameters(), **options)}


def in_groups() -> Objects:
    model = built()["model"]
    norm = list(model.norm.parameters())
    rest = [param for param in model.parameters() if all(param is not n for n in norm)]
    return {
        "model": model,
        "optimizer": torch.optim.AdamW([{"params": rest}, {"params": norm}], lr=0.02),
    }


@pytest.mark.parametrize(
    ("mine", "words"),
    [
        (lambda: other(torch.optim.SGD, lr=0.1), "is of another optimizer than"),
        (in_groups, "has groups of 6 parameters, and 'optimizer' here of 4 and 2"),
    ],
    ids=["SGD", "groups"],
)
def test_the_state_of_another_optimizer_is_refused(
    tmp_path: Path, mine: Callable[[], Objects], words: str
) -> None:
    theirs = {k: v for k, v in trained(built(1)).items() if k != "scheduler"}
    source = save_file(tmp_path / "last.pt", theirs)
    why = refusal(tmp_path, source, Take(mine))
    assert why.startswith("CheckpointError: ")
    assert words in why


def test_the_state_of_another_schedule_is_refused(tmp_path: Path) -> None:
    def mine() -> Objects:
        objects = built()
        objects["scheduler"] = torch.optim.lr_scheduler.StepLR(objects["optimizer"], 3)
        return objects

    source = save_file(tmp_path / "last.pt", trained(built(1)))
    why = refusal(tmp_path, source, Take(mine))
    assert (
        "does not fit 'scheduler', a StepLR: it lacks gamma, step_size; it alone has T_max" in why
    )


def test_an_optimizer_of_an_older_torch_is_taken_over(tmp_path: Path) -> None:
    theirs = trained(built(1))
    state = copy.deepcopy(theirs["optimizer"].state_dict())
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    for values in state["state"].values():
        values["step"] = int(values["step"])
    torch.save({"model": theirs["model"].state_dict(), "optimizer": state}, tmp_path / "old.pt")
    take = Take(built)
    takes(tmp_path, tmp_path / "old.pt", take)
    assert same(take.given["optimizer"], theirs["optimizer"].state_dict())


# Broken, and hostile


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.path), 0o700, True)


def test_what_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    source = save_file(tmp_path / "evil.pt", trained(built(1)), config=Hostile(mark))
    with pytest.raises(CheckpointError, match=r"holds os\.makedirs, which .* add --trust"):
        open_foreign(source)
    assert not mark.exists()


def test_what_the_user_trusts_may_hold_anything(tmp_path: Path) -> None:
    mark, theirs = tmp_path / "mark", trained(built(1))
    source = save_file(tmp_path / "own.pt", theirs, config=Hostile(mark), step=5)
    take = Take(built)
    takes(tmp_path, source, take, trust=True)
    assert same(take.given, states(theirs))
    assert mark.exists()


def test_a_whole_pickled_module_needs_trust(tmp_path: Path) -> None:
    theirs = trained(built(1))["model"]
    torch.save(theirs, tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"holds bug_links\.Net, which .* --trust"):
        open_foreign(tmp_path / "module.pt")
    (found,) = open_foreign(tmp_path / "module.pt", trust=True).objects
    assert same(found.state(), theirs.state_dict())


def truncated(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def no_zip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + b"x" * 500)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")


def text(path: Path) -> None:
    path.write_text("This is no checkpoint.\n" * 50)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


BROKEN = [truncated, no_zip, other_zip, text, empty, plain_pickle]


@pytest.mark.parametrize("name", ["last.pt", "model.pt", "model.safetensors", ".metadata"])
@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_named_in_one_sentence(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    # torch itself writes no file of the name ".metadata".
    file = save_file(tmp_path / "last.pt", trained(built(1))).rename(tmp_path / name)
    damage(file)
    source = tmp_path if name in ("model.pt", ".metadata") else file
    with pytest.raises(CheckpointError) as refused:
        open_foreign(source)
    message = str(refused.value)
    assert str(file) in message
    assert "\n" not in message
    assert "damaged" in message or "restricted" in message or "holds a" in message


def test_an_empty_directory_is_told_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing"):
        open_foreign(tmp_path)


def test_a_folder_of_checkpoints_tells_their_names(tmp_path: Path) -> None:
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(CheckpointError, match="there is checkpoint-500, checkpoint-1000"):
        open_foreign(tmp_path)


def test_a_path_that_is_not_there_tells_what_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(NotFound, match=r"There is no .*checkpoint-50: in .* there is checkpoint-5"):
        find_origin(str(tmp_path / "checkpoint-50"), tmp_path / "runs")


def test_a_file_without_a_model_tells_what_it_holds(tmp_path: Path) -> None:
    torch.save({"loss": 0.5, "names": ["a"]}, tmp_path / "log.pt")
    with pytest.raises(CheckpointError, match="holds a dict with loss, names, and no state"):
        open_foreign(tmp_path / "log.pt")


def test_an_optimizer_alone_is_nothing_to_begin_with(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", {"optimizer": trained(built(1))["optimizer"]})
    with pytest.raises(CheckpointError, match="holds optimizer, and no state of a model"):
        open_foreign(source)


def test_a_training_that_registers_nothing_of_it_is_refused(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)))

    def train(session: hpcresume.Session) -> None:
        session.register(config={"width": 8})
        for _ in session.steps([torch.zeros(1)]):
            pass

    ended = link(begun(tmp_path / "run", source), train)
    assert "has nothing for what the training function registers" in ended.why


# The run that has begun


def test_where_it_came_from_is_in_the_journal(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)), step=5, epoch=0)
    run = takes(tmp_path, source, Take(built))
    record = restored(run)
    assert record["from"] == {"path": str(source), "layout": "a file of torch.save"}
    assert (record["step"], record["epoch"]) == (5, 1)
    assert record["digest"] == open_foreign(source).digest()[0]
    assert record["bytes"] == source.stat().st_size


def test_a_link_that_died_before_it_saved_is_followed_by_one_that_begins_again(
    tmp_path: Path,
) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)), step=5, epoch=0)
    run, take = begun(tmp_path / "run", source), Take(built)

    def dies(session: hpcresume.Session) -> None:
        objects = built()
        session.register(**objects)
        raise RuntimeError("killed")

    assert link(run, dies).how == "failed"
    assert link(run, take, 7).how == "stopped"
    assert take.began == (5, 1)
    assert "from" in restored(run)


def test_after_its_first_own_checkpoint_the_source_is_needed_no_more(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)), step=5, epoch=0)
    run = takes(tmp_path, source, Take(built))
    source.unlink()
    take = Take(built)
    assert link(run, take, 9).how == "stopped"
    assert take.began == (6, 1)
    assert "from" not in restored(run)


def test_a_run_that_lost_its_own_checkpoints_does_not_begin_again(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)), step=5, epoch=0)
    run = takes(tmp_path, source, Take(built))
    shutil.rmtree(newest(run).path)
    ended = link(run, Take(built), 9)
    assert "knows step 6 as committed" in ended.why


def test_a_source_that_is_gone_is_told_with_what_is_there(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", tmp_path / "store" / "last.pt")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "older.pt").write_text("")
    why = link(run, Take(built)).why
    assert why.startswith("NotFound: There is no ")
    assert "there is older.pt" in why
    assert "run was to begin with it" in why


def test_the_cut_run_is_the_uncut_one_whatever_it_began_with(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)), step=5, epoch=0)
    uncut = through(begun(tmp_path / "uncut", source, max_steps=26))
    run = through(begun(tmp_path / "cut", source, max_steps=26), 6, 13, 20)
    assert_same(run, uncut)


def test_a_source_that_stands_at_the_end_leaves_its_model(tmp_path: Path) -> None:
    theirs = trained(built(1))
    source = save_file(tmp_path / "last.pt", theirs, step=5, epoch=0)
    run = begun(tmp_path / "run", source, max_steps=5)
    assert link(run, Take(built)).how == "completed"
    (found,) = open_foreign(run.final_model).objects
    assert same(found.state(), theirs["model"].state_dict())


def test_a_rate_that_the_code_gives_differently_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = other(torch.optim.AdamW, lr=0.5)
    trained(theirs)
    source = save_file(tmp_path / "last.pt", theirs)
    take = Take(lambda: other(torch.optim.AdamW, lr=0.02))
    takes(tmp_path, source, take)
    assert take.given["optimizer"]["param_groups"][0]["lr"] == 0.5
    assert "lr 0.5 -> 0.02; the checkpoint's values are used" in caplog.text


# One of ours


def test_a_checkpoint_of_another_run_goes_on_exactly(tmp_path: Path) -> None:
    uncut = through(make_run(tmp_path / "uncut", max_steps=20))
    first = make_run(tmp_path / "first", max_steps=20)
    assert link(first, ordinary, 9).how == "stopped"
    origin = find_origin(str(first.path), tmp_path)
    assert origin.path == str(newest(first).path)
    run = through(begun(tmp_path / "run", Path(origin.path), max_steps=20), 12)
    left, expected = outcome(run), outcome(uncut)
    # The steps before are in the other run's log.
    assert left.pop("log") == expected.pop("log")[9:]
    assert left == expected
    assert changes_said(run) == []


def test_where_it_continues_from_another_run_is_in_the_journal(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    assert link(first, ordinary, 9).how == "stopped"
    run = begun(tmp_path / "run", newest(first).path, max_steps=12)
    assert link(run).how == "completed"
    record = restored(run)
    assert record["from"]["path"] == str(newest(first).path)
    assert record["digest"] == newest(first).manifest.digest


def test_a_damaged_checkpoint_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    assert link(first, ordinary, 9).how == "stopped"
    own = newest(first).path
    with open(own / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    ended = link(begun(tmp_path / "run", own))
    assert "model.safetensors has changed" in ended.why
    assert str(own) in ended.why
    assert own.is_dir()


def test_the_finished_model_of_another_run_gives_its_weights(tmp_path: Path) -> None:
    first = through(make_run(tmp_path / "first", max_steps=5))
    take = Take(built)
    takes(tmp_path, first.final_model, take)
    source = open_foreign(first.final_model)
    assert same(take.given["model"], source.objects[0].state())
    assert take.began == (0, 0)


def test_a_run_without_a_checkpoint_is_nothing_to_begin_with(tmp_path: Path) -> None:
    make_run(tmp_path / "first")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        find_origin("first", tmp_path)


def test_a_run_that_began_otherwise_does_not_take_another_source(tmp_path: Path) -> None:
    source = save_file(tmp_path / "last.pt", trained(built(1)))
    save_file(tmp_path / "other.pt", trained(built(1)))
    run = begun(tmp_path / "run", source)
    check_same(run, str(source), tmp_path)
    with pytest.raises(ConfigError, match=r"was begun with .*last.pt, not with .*other.pt"):
        check_same(run, str(tmp_path / "other.pt"), tmp_path)
    source.unlink()
    check_same(run, str(source), tmp_path)


def test_a_torn_record_of_the_source_is_no_fresh_start(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", tmp_path)
    run.origin.write_text(json.dumps({"asked": "/x"}))
    assert "origin.json is damaged" in link(run).why


def test_a_checkpoint_that_stands_at_the_end_leaves_its_model(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    assert link(first, ordinary, 9).how == "stopped"
    run = begun(tmp_path / "run", newest(first).path, max_steps=9)
    assert link(run).how == "completed"
    here, there = (found.path / "model.safetensors" for found in (newest(run), newest(first)))
    assert here.read_bytes() == there.read_bytes()
