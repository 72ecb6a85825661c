"""Runs that begin with what Hugging Face, Lightning and torch.distributed themselves have saved."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from bug_links import Net, changes_said, loss_of
from foreign_files import Objects, Take, built, refusal, same, states, takes, trained
from torch.distributed.checkpoint.state_dict import get_state_dict

import hpcresume
from hpcresume.checkpoint.foreign import open_foreign
from hpcresume.errors import CheckpointError

#: One process each: to import and train with them takes longest.
HUGGING_FACE = pytest.mark.xdist_group("Hugging Face")
LIGHTNING = pytest.mark.xdist_group("Lightning")


# Hugging Face


@pytest.fixture(scope="module")
def trainer_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers' Trainer leaves of a small GPT-2, as safetensors: 2 epochs of 3 steps."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    path = tmp_path_factory.mktemp("trainer")
    data = [
        {"input_ids": torch.arange(n, n + 4), "labels": torch.arange(n, n + 4)} for n in range(6)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        save_steps=2,
        save_strategy="steps",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        learning_rate=0.01,
    )
    trainer = transformers.Trainer(model=gpt(), args=arguments, train_dataset=data)
    trainer.train()
    trainer.model.save_pretrained(path / "sharded", max_shard_size="4KB")
    return path


def gpt() -> Any:
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def in_groups_of_trainer() -> Objects:
    """What Trainer makes: no decay of biases and norms; a linear schedule of 6 steps."""
    import transformers

    model = gpt()
    decayed = [p for n, p in model.named_parameters() if "bias" not in n and "ln_" not in n]
    rest = [p for n, p in model.named_parameters() if "bias" in n or "ln_" in n]
    groups = [{"params": decayed, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 6)
    return {"model": model, "optimizer": optimizer, "scheduler": schedule}


class TakeOnly(Take):
    """Registers, and trains without looking at what the model is for."""

    def __call__(self, session: hpcresume.Session) -> None:
        objects = self.build()
        session.register(**objects)
        self.given = states(objects)
        self.began = session.global_step, session.epoch
        for _ in session.steps([torch.zeros(1)] * 3):
            pass


@HUGGING_FACE
def test_a_checkpoint_of_trainer_is_taken_over(trainer_runs: Path, tmp_path: Path) -> None:
    source = trainer_runs / "checkpoint-4"
    take = TakeOnly(in_groups_of_trainer)
    run = takes(tmp_path, source, take)
    # In the middle of its second epoch.
    assert take.began == (4, 2)
    theirs = torch.load(source / "optimizer.pt", weights_only=True)
    assert same(take.given["optimizer"]["state"], theirs["state"])
    assert take.given["scheduler"]["last_epoch"] == 4
    weights = gpt().from_pretrained(source).state_dict()
    assert same(take.given["model"], weights)
    said = "\n".join(changes_said(run))
    assert "saved at epoch 1.33333" in said
    assert "left out: rng_state.pth, training_args.bin" in said


@HUGGING_FACE
def test_the_end_of_an_epoch_of_trainer_leaves_nothing_out(
    trainer_runs: Path, tmp_path: Path
) -> None:
    take = TakeOnly(in_groups_of_trainer)
    run = takes(tmp_path, trainer_runs / "checkpoint-6", take)
    assert take.began == (6, 2)
    assert not any("where in its data" in said for said in changes_said(run))


@HUGGING_FACE
def test_a_folder_of_trainer_tells_its_checkpoints(trainer_runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint-2, checkpoint-4, checkpoint-6"):
        open_foreign(trainer_runs)


@HUGGING_FACE
def test_weights_in_several_files_are_put_together(trainer_runs: Path, tmp_path: Path) -> None:
    source = trainer_runs / "sharded"
    assert len([*source.glob("model-*.safetensors")]) > 1
    take = TakeOnly(lambda: {"model": gpt()})
    takes(tmp_path, source, take)
    assert same(take.given["model"], gpt().from_pretrained(source).state_dict())
    lost = min(source.glob("model-*.safetensors"))
    content = lost.read_bytes()
    lost.unlink()
    try:
        with pytest.raises(CheckpointError, match=lost.name):
            open_foreign(source)
    finally:
        lost.write_bytes(content)


@HUGGING_FACE
def test_one_group_of_parameters_does_not_take_the_two_of_trainer(
    trainer_runs: Path, tmp_path: Path
) -> None:
    def mine() -> Objects:
        model = gpt()
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01)}

    why = refusal(tmp_path, trainer_runs / "checkpoint-4", TakeOnly(mine))
    assert "make the same groups, or begin with the weights' file alone" in why


@HUGGING_FACE
def test_the_weights_alone_of_a_checkpoint_are_a_beginning(
    trainer_runs: Path, tmp_path: Path
) -> None:
    take = TakeOnly(lambda: {"model": gpt()})
    takes(tmp_path, trainer_runs / "checkpoint-4" / "model.safetensors", take)
    assert same(
        take.given["model"], gpt().from_pretrained(trainer_runs / "checkpoint-4").state_dict()
    )
    assert take.began == (0, 0)


@HUGGING_FACE
def test_what_accelerate_saves_is_taken_over(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    theirs = built(1)
    accelerator = accelerate.Accelerator(cpu=True)
    theirs["model"], theirs["optimizer"] = accelerator.prepare(theirs["model"], theirs["optimizer"])
    accelerator.register_for_checkpointing(theirs.pop("scheduler"))
    trained(theirs)
    accelerator.save_state(str(tmp_path / "state"))
    take = Take(lambda: {k: v for k, v in built().items() if k != "scheduler"})
    takes(tmp_path, tmp_path / "state", take)
    assert same(take.given, states(theirs))


# Lightning


@pytest.fixture(scope="module")
def lightning_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What Lightning's Trainer leaves: at an epoch's end, within one, and when all is over."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    path = tmp_path_factory.mktemp("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = built(1)["model"]

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            if self.trainer.global_step == 10:
                self.trainer.save_checkpoint(path / "within.ckpt")
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.02)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
            return [optimizer], [schedule]

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=[
            lightning.pytorch.callbacks.ModelCheckpoint(path, filename="{epoch}", save_top_k=-1)
        ],
    )
    points = torch.randn(28, 4, generator=torch.Generator().manual_seed(7))
    trainer.fit(Module(), torch.utils.data.DataLoader(points, batch_size=4))
    trainer.save_checkpoint(path / "over.ckpt")
    return {name: path / f"{name}.ckpt" for name in ("epoch=0", "epoch=1", "within", "over")}


@LIGHTNING
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "began", "is_within"),
    [
        ("epoch=0", (7, 1), False),
        ("within", (10, 2), True),
        ("epoch=1", (14, 2), False),
        ("over", (14, 2), False),
    ],
)
def test_a_lightning_checkpoint_is_taken_over(
    lightning_files: dict[str, Path],
    tmp_path: Path,
    name: str,
    began: tuple[int, int],
    is_within: bool,
) -> None:
    take, source = Take(built), lightning_files[name]
    run = takes(tmp_path, source, take)
    assert take.began == began
    theirs = torch.load(source, weights_only=True)
    model = {key.removeprefix("net."): value for key, value in theirs["state_dict"].items()}
    assert same(take.given["model"], model)
    assert same(take.given["optimizer"], theirs["optimizer_states"][0])
    assert same(take.given["scheduler"], theirs["lr_schedulers"][0])
    said = "\n".join(changes_said(run))
    assert "'model': the prefix 'net.' is taken off" in said
    assert ("where in its data is not known" in said) is is_within


# torch.distributed.checkpoint


def saved(path: Path, content: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        # It tells that this is no distributed training.
        warnings.simplefilter("ignore")
        dcp.save(content, checkpoint_id=str(path), no_dist=True)
    return path


def test_a_directory_of_dcp_is_taken_over(tmp_path: Path) -> None:
    theirs = trained(built(1))
    source = saved(tmp_path / "dcp", {**states(theirs), "epoch": 3, "step": 77, "loss": 0.5})
    take = Take(built)
    run = takes(tmp_path, source, take)
    assert same(take.given, states(theirs))
    assert take.began == (77, 4)
    assert changes_said(run)[-1].endswith("left out: loss")


def test_names_of_parameters_are_told_apart_in_an_optimizer_of_dcp(tmp_path: Path) -> None:
    theirs = trained(built(1))
    model, optimizer = get_state_dict(theirs["model"], theirs["optimizer"])
    source = saved(tmp_path / "checkpoint-5", {"app": {"model": model, "optim": optimizer}})

    def backwards() -> Objects:
        objects = {k: v for k, v in built().items() if k != "scheduler"}
        params = [*objects["model"].parameters()][::-1]
        return {**objects, "optimizer": torch.optim.AdamW(params, lr=0.02)}

    take = Take(backwards)
    takes(tmp_path, source, take)
    assert take.began == (5, 0)
    given, expected = take.given["optimizer"]["state"], theirs["optimizer"].state_dict()["state"]
    last = len(expected) - 1
    assert same(given, {last - number: values for number, values in expected.items()})


def test_a_look_into_dcp_reads_no_large_tensor(tmp_path: Path) -> None:
    source = saved(tmp_path / "dcp", {"model": Net().state_dict()})
    found = open_foreign(source).objects[0]
    assert all(tensor.is_meta for key, tensor in found.tree.items() if "num_batches" not in key)
    assert not any(tensor.is_meta for tensor in found.state().values())


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.path), 0o700, True)


def test_an_entry_of_dcp_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = {"model": Net().state_dict(), "config": Hostile(mark)}
    source = saved(tmp_path / "dcp", content)
    with pytest.raises(CheckpointError, match=r"'config' in .* holds os\.makedirs, .* --trust"):
        open_foreign(source)
    assert not mark.exists()
    open_foreign(source, trust=True)
    assert mark.exists()


def test_metadata_of_dcp_that_would_run_code_is_refused_even_of_a_trusted_one(
    tmp_path: Path,
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=r"\.metadata holds os\.makedirs"):
            open_foreign(tmp_path, trust)
    assert not mark.exists()


def test_a_lost_file_of_dcp_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "dcp", {"model": Net().state_dict()})
    (lost,) = source.glob("*.distcp")
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        open_foreign(source)


def test_a_truncated_file_of_dcp_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "dcp", {"model": Net().state_dict()})
    (file,) = source.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"'model\.\S+' in .*distcp.* damaged"):
        open_foreign(source).objects[0].state()
