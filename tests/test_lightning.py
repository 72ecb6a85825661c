"""A Lightning training with our callback: cut anywhere, it ends as one that was not."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_run import add_link, make_run

from hpcresume import files
from hpcresume.errors import CheckpointError, ConfigError
from hpcresume.run_dir import RunDir

# What we use lies in Lightning; what it warns of here is its own, torch's and the platform's.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning", reason="needs the extra: pip install lightning")
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    import numpy as np
    import torch
    import torchmetrics
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.io import TorchCheckpointIO
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    from lightning.pytorch.utilities import CombinedLoader
    from torch import nn
    from torch.optim import lr_scheduler
    from torch.utils.data import DataLoader, IterableDataset

    from hpcresume.adapters.lightning import HpcResumeCallback, fits
    from hpcresume.adapters.resumable import ResumableBatches, Turn
    from hpcresume.adapters.vouched import read_voucher, vouch, voucher_path, why_not

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
pytestmark = pytest.mark.filterwarnings("ignore")
#: Batches of an epoch of these tests.
PER_EPOCH = 7


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    state = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(state)
    assert {s: signal.getsignal(s) for s in before} == before, "handlers are put back"


class Crash(Exception):
    """What ends a process in these tests without warning."""


class Model(lightning.LightningModule):
    """Draws random numbers wherever a user might, and counts what a user might."""

    def __init__(self, cut: tuple[int, str] | None, plateau: str | None = None) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.2), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 10)
        self.average = nn.Linear(8, 10).requires_grad_(False)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=10)
        self.cut = cut
        self.plateau = plateau
        self.epochs: dict[int, Any] = {}
        self.validations: dict[int, float] = {}

    def training_step(self, batch: Any) -> torch.Tensor:
        number, how = self.cut or (0, "")
        if number == self.trainer.fit_loop.total_batch_idx + 1:
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGTERM)
        images, labels = batch
        out = self.head(self.model(images))
        loss = nn.functional.cross_entropy(out, labels)
        self.accuracy(out.detach(), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("worst", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            noise = 0.01 * torch.randn(10, 8)
            self.average.weight.mul_(0.9).add_(0.1 * self.head.weight + noise)

    def on_train_epoch_start(self) -> None:
        np.random.rand(2)
        torch.rand(1)

    def on_train_epoch_end(self) -> None:
        seen = self.trainer.callback_metrics
        values = [float(seen[name]) for name in ("loss_epoch", "worst", "accuracy")]
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        # What loggers are told as the step.
        logged = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        self.epochs[self.current_epoch] = (*values, rate, self.global_step, logged)

    def validation_step(self, batch: Any) -> None:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.head(self.model(images)), labels)
        self.log("val_loss", loss + 0.3 * torch.rand(()))

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validations[self.global_step] = float(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        if self.plateau is not None:
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            watched = {"monitor": "val_loss", "interval": self.plateau, "strict": False}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **watched}}
        steps = int(self.trainer.estimated_stepping_batches)
        if steps < 0:
            return optimizer
        rising = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        digits = images(100)
        yield from (digits[index] for index in torch.randperm(100).tolist())


def images(count: int) -> Any:
    from lightning_module import Digits

    return Digits(count)


class Training:
    """A script's `fit`, started again and again, each time as a process would start it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.plateau = options.pop("plateau", None)
        self.stream = options.pop("stream", False)
        self.workers = options.pop("workers", 0)
        self.callbacks: Callable[[], list[Any]] = options.pop("callbacks", list)
        self.every = options.pop("every", None)
        self.ours = options.pop("ours", True)
        self.dirpath = options.pop("dirpath", None)
        self.options = {"max_epochs": 3, **options}
        self.new_process = True
        self.epochs: dict[int, Any] = {}
        self.validations: dict[int, float] = {}

    def link(self, cut: tuple[int, str] | None = None, **fit: Any) -> Any:
        """Train until the cut, or to the end; the Trainer, or None where it was cut."""
        if self.new_process:
            fits.clear()
        lightning.seed_everything(1, verbose=False)
        data = Stream() if self.stream else images(100)
        loader = DataLoader(
            data, batch_size=16, shuffle=not self.stream or None, num_workers=self.workers
        )
        callbacks = self.callbacks()
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        if self.ours:
            callbacks.append(HpcResumeCallback(every_n_steps=self.every, dirpath=self.dirpath))
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=self.folder,
            logger=False,
            enable_checkpointing=saves,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
            **self.options,
        )
        model = Model(cut, self.plateau)
        left: Any = None
        try:
            trainer.fit(model, loader, DataLoader(images(40), batch_size=16, shuffle=True), **fit)
        except (Crash, SystemExit) as error:
            left = error
        self.code = getattr(left, "code", 0)
        self.epochs |= model.epochs
        self.validations |= model.validations
        return None if left else trainer

    def result(self, trainer: Any) -> dict[str, Any]:
        """All that must not depend on cuts."""
        found = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
        for number, state in trainer.optimizers[0].state_dict()["state"].items():
            found |= {f"{number}.{name}": value.tolist() for name, value in state.items()}
        return found | {
            "step": trainer.global_step,
            "epochs": self.epochs,
            "validations": self.validations,
        }


def through(training: Training, *cuts: tuple[int, str]) -> dict[str, Any]:
    for cut in cuts:
        assert training.link(cut) is None, f"not cut at {cut}"
        assert training.code == 0
    return training.result(training.link())


STOP, CRASH = "stop", "crash"
#: Batches at which to cut: in an accumulation group, at the end of an epoch, and three in a row.
CUTS = {
    "in a group": [(1, STOP)],
    "before the end of an epoch": [(PER_EPOCH - 1, STOP), (PER_EPOCH, STOP)],
    "at the end of an epoch": [(PER_EPOCH, STOP), (2 * PER_EPOCH, STOP)],
    "after a validation": [(3, STOP), (10, STOP)],
    "again and again": [(2, STOP), (4, STOP), (9, STOP), (11, STOP), (16, STOP)],
}
TRAININGS: dict[str, dict[str, Any]] = {
    "accumulating": {"accumulate_grad_batches": 2},
    "validating in mid-epoch": {"val_check_interval": 0.5, "plateau": "step"},
    "validating across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "watching a metric": {"plateau": "epoch", "max_epochs": 4},
    "watching it now and then": {"plateau": "epoch", "check_val_every_n_epoch": 2},
    "counting steps": {"max_steps": 17, "max_epochs": -1},
    "with workers": {"workers": 2, "accumulate_grad_batches": 2},
    "of a stream": {"stream": True},
    "of a part": {"limit_train_batches": 5, "reload_dataloaders_every_n_epochs": 2},
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_training_cut_anywhere_ends_as_the_uncut_one(tmp_path: Path, kind: str) -> None:
    uncut = through(Training(tmp_path / "uncut", **TRAININGS[kind]))
    for name, cuts in CUTS.items():
        # An epoch of a part is shorter.
        fitting = [cut for cut in cuts if kind != "of a part" or cut[0] <= 15]
        cut = through(Training(tmp_path / name, **TRAININGS[kind]), *fitting)
        assert cut == uncut, name


def test_a_training_that_crashes_goes_on_from_its_last_save(tmp_path: Path) -> None:
    uncut = through(Training(tmp_path / "uncut"))
    crashed = Training(tmp_path / "crashed", every=2)
    assert through(crashed, (6, CRASH), (9, STOP), (13, CRASH), (20, CRASH)) == uncut


def test_a_training_that_stops_by_itself_stops_at_the_same_step_and_once(tmp_path: Path) -> None:
    def stopping() -> list[Any]:
        return [EarlyStopping("val_loss", patience=1, min_delta=0.2)]

    options = {"callbacks": stopping, "max_epochs": 9}
    training = Training(tmp_path / "uncut", **options)
    uncut = through(training)
    assert uncut["step"] < 9 * PER_EPOCH
    assert through(Training(tmp_path / "cut", **options), (5, STOP), (11, STOP)) == uncut
    # What a script does behind its training may fail, and then all of it is run again.
    again = training.link()
    assert again.global_step == uncut["step"]
    assert training.result(again)["head.weight"] == uncut["head.weight"]


# ---- in a link ---------------------------------------------------------------------------------


class Linked(Training):
    """The same in the links of a run."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.run = make_run(folder / "runs", "run")
        self.said: list[str] = []

    def link(self, cut: tuple[int, str] | None = None, **fit: Any) -> Any:
        link = add_link(self.run, step=max([0, *(r["step"] for r in self.told("saved"))]))
        names = {"HPCRESUME_RUN": str(self.run.path), "HPCRESUME_LINK": str(link.number)}
        heard = Kept(self.said)
        logging.getLogger("hpcresume").addHandler(heard)
        os.environ.update(names)
        try:
            return super().link(cut, **fit)
        finally:
            logging.getLogger("hpcresume").removeHandler(heard)
            for name in names:
                del os.environ[name]

    def told(self, kind: str) -> list[dict[str, Any]]:
        links = [self.run.link(number) for number in self.run.link_numbers()]
        records = [record for link in links for record in files.read_lines(link.guest)]
        return [record for record in records if record["kind"] == kind]


class Kept(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append(record.getMessage())


def checkpoints(run: RunDir) -> list[Path]:
    return sorted(run.framework.glob("*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))


def test_its_link_is_told_where_it_began_what_it_saved_and_that_it_is_complete(
    tmp_path: Path,
) -> None:
    training = Linked(tmp_path, log_every_n_steps=2)
    assert training.link((5, STOP)) is None
    training.link()
    began = training.told("began")
    assert [(r["step"], r["verified"]) for r in began] == [(0, False), (5, True)]
    assert [r["step"] for r in training.told("saved")] == [5, 3 * PER_EPOCH]
    assert [(r["step"], r["reason"]) for r in training.told("left")] == [(5, "SIGTERM")]
    assert [r["step"] for r in training.told("completed")] == [3 * PER_EPOCH]
    progress = training.told("progress")[-1]
    assert (progress["max_steps"], progress["epochs"]) == (3 * PER_EPOCH, 3)
    lines = [*files.read_lines(training.run.link(1).metrics)]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"loss_step", "learning_rate"} <= lines[0].keys()
    lines = [*files.read_lines(training.run.link(2).metrics)]
    assert {"loss_epoch", "val_loss", "accuracy"} <= lines[-1].keys()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_metrics_of_all_links_are_those_of_the_uncut_training(
    tmp_path: Path, accumulate: int
) -> None:
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}

    def logged(name: str, *cuts: tuple[int, str]) -> list[Any]:
        training = Linked(tmp_path / name, **options)
        through(training, *cuts)
        links = [training.run.link(number) for number in training.run.link_numbers()]
        return [line for link in links for line in files.read_lines(link.metrics)]

    assert logged("cut", (4, STOP), (9, STOP), (15, STOP)) == logged("uncut")


def test_the_newest_two_of_its_own_checkpoints_stay(tmp_path: Path) -> None:
    training = Linked(tmp_path, every=4)
    training.link()
    assert [path.name for path in checkpoints(training.run)] == ["step-20.ckpt", "step-21.ckpt"]
    assert len(list(training.run.framework.iterdir())) == 4, "each with its digests"


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("spoil", "word"), [(half, "bytes instead of"), (flipped, "digest")])
def test_a_newest_checkpoint_that_is_not_whole_is_passed_over(
    tmp_path: Path, spoil: Callable[[Path], None], word: str
) -> None:
    uncut = through(Training(tmp_path / "uncut"))
    training = Linked(tmp_path / "cut", every=4)
    assert training.link((11, CRASH)) is None
    *_, older, newest = checkpoints(training.run)
    spoil(newest)
    result = training.result(training.link())
    assert result == uncut
    began = training.told("began")[-1]
    assert (began["step"], began["path"]) == (4, str(older))
    assert [path for path, _ in began["passed_over"]] == [str(newest)]
    assert word in began["passed_over"][0][1]


def test_a_run_whose_checkpoints_are_all_gone_does_not_begin_afresh_in_silence(
    tmp_path: Path,
) -> None:
    training = Linked(tmp_path)
    assert training.link((5, STOP)) is None
    record_saves(training)
    shutil.rmtree(training.run.framework)
    assert training.link() is None
    assert training.code == CheckpointError.exit_code
    assert any("had saved step 5" in said for said in training.said)


def record_saves(training: Linked) -> None:
    """As the parent of a command does."""
    from made_run import training as journal_of

    with journal_of(training.run.link(training.run.newest_link())) as journal:
        for record in training.told("saved"):
            path = os.path.relpath(record["path"], training.run.identify()["project"])
            journal.write("saved", step=record["step"], path=path, guest=True, seen="steps")


def saving(**options: Any) -> Callable[[], list[Any]]:
    return lambda: [ModelCheckpoint(save_top_k=-1, **options)]


def test_what_model_checkpoint_saves_is_vouched_for_and_gone_on_from(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    training = Linked(tmp_path, callbacks=saving(dirpath=place, every_n_train_steps=3))
    assert training.link((8, CRASH)) is None
    assert training.link() is not None
    began = training.told("began")[-1]
    assert (Path(began["path"]).name, began["verified"]) == ("epoch=0-step=6.ckpt", True)
    assert len(list(place.glob("*.hpcresume.json"))) == len(list(place.glob("*.ckpt")))


def test_digests_go_with_the_checkpoint_that_model_checkpoint_removes(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    training = Linked(
        tmp_path, callbacks=lambda: [ModelCheckpoint(dirpath=place, every_n_train_steps=3)]
    )
    training.link()
    assert len(list(place.iterdir())) == 2


class AtTheBatch(ModelCheckpoint):
    """Saves where Lightning's own never does: in mid-step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            trainer.save_checkpoint(Path(self.dirpath or "") / "step=6.ckpt")


def test_what_a_callback_saves_within_a_step_is_not_taken_for_exact(tmp_path: Path) -> None:
    uncut = through(Training(tmp_path / "uncut"))
    place = tmp_path / "checkpoints"
    training = Linked(
        tmp_path,
        every=4,
        callbacks=lambda: [AtTheBatch(dirpath=place, save_top_k=0)],
    )
    assert training.link((8, CRASH)) is None
    voucher = read_voucher(place / "step=6.ckpt")
    assert voucher is not None
    assert voucher.about["exact"] is False
    result = training.result(training.link())
    assert training.told("began")[-1]["step"] == 4
    assert result == uncut


class Elsewhere(TorchCheckpointIO):
    """Writes to another place than it was told."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, f"{path}.elsewhere", storage_options)


def test_training_goes_on_where_a_checkpoint_cannot_be_vouched_for(tmp_path: Path) -> None:
    training = Linked(tmp_path, every=4)
    assert training.link((5, STOP)) is None
    first = checkpoints(training.run)
    training.options["plugins"] = [Elsewhere()]
    trainer = training.link()
    assert trainer.global_step == 3 * PER_EPOCH
    assert any("step-8.ckpt is not vouched for" in said for said in training.said)
    assert checkpoints(training.run) == first, "what is verified stays until something newer is"


def test_a_checkpoint_io_that_writes_behind_is_refused_by_name(tmp_path: Path) -> None:
    training = Linked(tmp_path, plugins=[AsyncCheckpointIO()])
    with pytest.raises(ConfigError, match="AsyncCheckpointIO still writes"):
        training.link()


def test_an_optimizer_without_a_learning_rate_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(model: Model) -> Any:
        return Rateless(model.parameters(), {})

    monkeypatch.setattr(Model, "configure_optimizers", without)
    monkeypatch.setattr(Model, "on_train_epoch_end", lambda _: None)
    training = Linked(tmp_path, max_epochs=1, log_every_n_steps=2)
    assert training.link().global_step == PER_EPOCH
    lines = [*files.read_lines(training.run.link(1).metrics)]
    assert "loss_step" in lines[0]
    assert "learning_rate" not in lines[0]


class Rateless(torch.optim.Optimizer):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return closure()


def test_no_checkpoint_goes_because_of_damaged_ones_beyond_it(tmp_path: Path) -> None:
    training = Linked(tmp_path, every=2)
    assert training.link((14, CRASH)) is None
    for path in checkpoints(training.run):
        half(path)
    given = Linked(tmp_path / "given")
    given.link((5, STOP))
    start = shutil.copy(checkpoints(given.run)[-1], training.run.framework)
    vouch(Path(start), 5, {"run": training.run.identify()["id"]})
    assert training.link((8, STOP)) is None
    names = [path.name for path in checkpoints(training.run)]
    assert names == ["step-6.ckpt", "step-8.ckpt", "step-10.ckpt", "step-12.ckpt"]
    assert [why_not(path) is None for path in checkpoints(training.run)] == [1, 1, 0, 0]


def test_what_was_saved_and_not_yet_vouched_for_is_gone_on_from(tmp_path: Path) -> None:
    uncut = through(Training(tmp_path / "uncut"))
    training = Linked(tmp_path)
    assert training.link((5, STOP)) is None
    record_saves(training)
    voucher_path(checkpoints(training.run)[-1]).unlink()
    assert training.result(training.link()) == uncut
    began = training.told("began")[-1]
    assert (began["step"], began["verified"]) == (5, False)


def test_a_place_of_ones_own_is_shared_by_runs_and_not_mixed_up(tmp_path: Path) -> None:
    for name in ("one", "two"):
        training = Linked(tmp_path / name, dirpath=tmp_path / "shared")
        training.run = make_run(tmp_path / name, name)
        assert training.link((5, STOP)) is None
        assert training.told("began")[-1]["step"] == 0
        assert (tmp_path / "shared" / name / "step-5.ckpt").exists()


def test_a_run_does_not_go_on_from_an_earlier_one_of_its_name(tmp_path: Path) -> None:
    for folder in ("earlier", "later"):
        training = Linked(tmp_path / folder, dirpath=tmp_path / "shared")
        assert training.link((5, STOP)) is None
        assert training.told("began")[-1]["path"] is None
    assert training.link((9, STOP)) is None
    assert training.told("began")[-1]["step"] == 5


def test_an_exact_checkpoint_is_preferred_to_a_newer_one_of_a_hook(tmp_path: Path) -> None:
    # At the end of a batch the module's own hook was still to come.
    options = {"callbacks": saving(dirpath=tmp_path / "c", every_n_train_steps=3), "every": 4}
    uncut = through(Training(tmp_path / "uncut"))
    training = Linked(tmp_path, **options)
    assert training.link((8, CRASH)) is None
    result = training.result(training.link())
    assert Path(training.told("began")[-1]["path"]).name == "step-4.ckpt"
    assert result == uncut


def test_a_plain_training_is_gone_on_with_where_the_script_names_its_checkpoint(
    tmp_path: Path,
) -> None:
    place = tmp_path / "checkpoints"
    plain = saving(dirpath=place, every_n_train_steps=3)
    Training(tmp_path, callbacks=plain, ours=False).link((8, CRASH))
    given = place / "epoch=0-step=6.ckpt"
    training = Linked(tmp_path)
    assert training.link((10, STOP), ckpt_path=given) is None
    began = training.told("began")[-1]
    assert (began["step"], began["path"], began["verified"]) == (6, str(given), False)
    assert any("saved without HpcResumeCallback" in said for said in training.said)
    # From then on what this run has saved is newer.
    end = training.link(ckpt_path=given)
    assert training.told("began")[-1]["step"] == 10
    assert end.global_step == 3 * PER_EPOCH
    # Not exact, but once saved by us as good as any: the same cut gives the same end.
    other = Linked(tmp_path / "other")
    other.link((10, STOP), ckpt_path=given)
    other.link((14, STOP), ckpt_path=given)
    result = other.result(other.link(ckpt_path=given))
    assert result["head.weight"] == training.result(end)["head.weight"]


def test_of_a_plain_trainings_checkpoints_a_half_written_one_is_passed_over(
    tmp_path: Path,
) -> None:
    place = tmp_path / "checkpoints"
    plain = saving(dirpath=place, every_n_train_steps=3)
    Training(tmp_path, callbacks=plain, ours=False).link((8, CRASH))
    half(place / "epoch=0-step=6.ckpt")
    training = Linked(tmp_path)
    training.link((5, STOP), ckpt_path=place / "epoch=0-step=6.ckpt")
    began = training.told("began")[-1]
    assert Path(began["path"]).name == "epoch=0-step=3.ckpt"
    assert "cut off" in began["passed_over"][0][1]


def test_a_plain_trainings_checkpoint_that_nobody_names_is_said_and_left(tmp_path: Path) -> None:
    plain = saving(dirpath=tmp_path / "checkpoints", every_n_train_steps=3)
    Training(tmp_path, callbacks=plain, ours=False).link((8, CRASH))
    training = Linked(tmp_path, callbacks=plain)
    training.link((2, STOP))
    assert training.told("began")[-1]["step"] == 0
    assert any("give trainer.fit(ckpt_path=...)" in said for said in training.said)


def test_lightning_neither_requeues_the_job_nor_swallows_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLURM_NTASKS", "1"), ("SLURM_JOB_ID", "7"), ("SLURM_PROCID", "0")):
        monkeypatch.setenv(name, value)
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ntouch '{asked}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = SLURMEnvironment(auto_requeue=True)
    training = Linked(tmp_path, plugins=[environment])
    assert training.link((5, STOP)) is None
    assert training.told("left")[0]["reason"] == "SIGTERM"
    assert environment.auto_requeue is False
    assert sum("auto_requeue is switched off" in said for said in training.said) == 1
    assert not asked.exists()


def test_a_script_that_trains_twice_goes_on_with_the_training_that_was_cut(tmp_path: Path) -> None:
    def script(training: Linked, *cuts: Any) -> list[Any]:
        """Two trainings, one after the other, each cut where told."""
        results = []
        training.new_process = True
        for cut in cuts:
            trainer = training.link(cut)
            training.new_process = False
            if trainer is None:
                return results
            results.append(training.result(trainer)["head.weight"])
        return results

    uncut = script(Linked(tmp_path / "uncut"), None, None)
    training = Linked(tmp_path / "cut")
    assert script(training, (9, STOP), None) == []
    assert script(training, None, (4, STOP)) == uncut[:1]
    assert script(training, None, None) == uncut
    began = [(Path(r["path"]).parent.name, r["step"]) for r in training.told("began") if r["path"]]
    assert began == [("framework", 9), ("framework", 3 * PER_EPOCH), ("fit-2", 4)]


def test_a_second_training_begins_afresh_beside_what_model_checkpoint_saved_of_the_first(
    tmp_path: Path,
) -> None:
    training = Linked(tmp_path, callbacks=saving(dirpath=tmp_path / "checkpoints"))
    training.link()
    training.new_process = False
    training.link()
    assert [r["step"] for r in training.told("began")] == [0, 0]
    assert len(training.told("completed")) == 2


def test_a_strategy_that_spawns_processes_is_refused_by_name(tmp_path: Path) -> None:
    from hpcresume.adapters.lightning_inside import Inside

    trainer = lightning.Trainer(
        accelerator="cpu", strategy="ddp_spawn", devices=2, logger=False, enable_checkpointing=False
    )
    with pytest.raises(ConfigError, match="use strategy='ddp'"):
        Inside(trainer, HpcResumeCallback())


def test_a_training_that_is_complete_is_gone_on_with_where_it_is_asked_for_more(
    tmp_path: Path,
) -> None:
    # Its schedule of learning rates does not depend on how long it is.
    uncut = through(Training(tmp_path / "uncut", plateau="epoch", max_epochs=5))
    training = Training(tmp_path / "longer", plateau="epoch", max_epochs=3)
    training.link()
    training.options["max_epochs"] = 5
    assert training.result(training.link()) == uncut


def test_a_rehearsal_of_lightning_is_left_alone(tmp_path: Path) -> None:
    training = Linked(tmp_path, fast_dev_run=True)
    training.link()
    assert not training.told("completed")


# ---- the place in the data ---------------------------------------------------------------------


def test_the_place_is_that_of_the_batch_that_was_consumed_not_of_those_fetched_ahead() -> None:
    turn = Turn(0, 0)

    def loader() -> ResumableBatches:
        batches = DataLoader(list(range(20)), batch_size=2, shuffle=True)
        return ResumableBatches(
            batches, seed=3, rank=0, world_size=1, turn=lambda: turn, before=lambda: None
        )

    first = loader()
    whole = [batch.tolist() for batch in first]
    assert sorted(itertools.chain(*whole)) == list(range(20))
    ahead = iter(first := loader())
    for _ in range(5):
        next(ahead)
    turn = Turn(0, 4)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed] == whole[4:]


def test_a_loader_that_ends_before_the_epoch_begins_again_in_another_order() -> None:
    loader = ResumableBatches(
        DataLoader(list(range(20)), batch_size=2, shuffle=True),
        seed=3,
        rank=0,
        world_size=1,
        turn=lambda: Turn(0, 0),
        before=lambda: None,
    )
    first, second = ([batch.tolist() for batch in loader] for _ in range(2))
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))
    assert loader.batch_size == 2, "all else is the user's loader"


def test_a_loader_that_ends_before_others_of_its_epoch_stays_at_its_end() -> None:
    turn = Turn(0, 0)

    def loaders() -> CombinedLoader:
        kinds = (
            ResumableBatches(
                DataLoader(list(range(size)), batch_size=2, shuffle=True),
                seed=3,
                rank=0,
                world_size=1,
                turn=lambda: turn,
                before=lambda: None,
            )
            for size in (4, 16)
        )
        return CombinedLoader([*kinds], mode="max_size")

    def read(loader: CombinedLoader) -> list[Any]:
        return [[b if b is None else b.tolist() for b in both] for both, *_ in loader]

    whole = read(loaders())
    assert [both[0] is None for both in whole] == [False] * 2 + [True] * 6
    cut = iter(first := loaders())
    for _ in range(5):
        next(cut)
    turn = Turn(0, 5)
    resumed = loaders()
    resumed._load_state_dicts(json.loads(json.dumps(first._state_dicts())))
    assert read(resumed) == whole[5:]
