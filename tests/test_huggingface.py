"""Hugging Face's Trainer with our callback: stopped, killed, and exactly what it was without."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from made_run import make_run
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from hpcresume.adapters.folders import superseded
from hpcresume.adapters.keyed import Reading, make_keyed
from hpcresume.adapters.notes import Notes
from hpcresume.adapters.sight import Sight
from hpcresume.adapters.vouched import NAME, numbered, vouch, why_not
from hpcresume.config import ProgressConfig
from hpcresume.journal import read_metrics
from hpcresume.run_dir import LinkDir, RunDir

transformers = pytest.importorskip("transformers")
if not transformers.utils.is_accelerate_available():
    pytest.skip("Trainer needs accelerate", allow_module_level=True)

from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler  # noqa: E402
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hpcresume.adapters import huggingface  # noqa: E402
from hpcresume.adapters.heard import Heard  # noqa: E402
from hpcresume.adapters.huggingface import HpcResumeCallback  # noqa: E402

# What transformers and accelerate warn of in themselves is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
EXAMPLE = Path(__file__).parent.parent / "examples" / "hf_trainer.py"


class Noisy(Dataset[dict[str, torch.Tensor]]):
    """Samples that are never twice the same, by three generators."""

    def __init__(self, num_samples: int = 22) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self._num_samples:
            raise IndexError
        points = torch.randn(6) + random.random() + float(numpy.random.rand()) + index
        return {"input_ids": points, "labels": torch.tensor(index % 3), "length": torch.tensor(1)}


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """The same samples, one after the other."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (Noisy(10**9)[index] for index in itertools.count())


def noisy_batch(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch that is masked at random, as for a masked language model."""
    points = torch.stack([sample["input_ids"] for sample in samples])
    mask = torch.rand(points.shape) < 0.2
    return {
        "input_ids": points.masked_fill(mask, 0),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(input_ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class CutAt(TrainerCallback):
    """Has this process be asked to stop, or killed as far as Trainer is concerned, at a step."""

    def __init__(self, step: int | None, *, killed: bool = False) -> None:
        self.step = step
        self.killed = killed

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            if self.killed:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


class Training:
    """A training in an output folder, of which each call of `link` is one process of a run."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.out = folder / "out"
        folder.mkdir(parents=True, exist_ok=True)
        self.run = make_run(folder, command=["python", "x.py"], train="", max_steps=None)
        self.dataset: Any = settings.pop("dataset", None) or Noisy()
        self.callbacks: Callable[[], list[Any]] = settings.pop("callbacks", list)
        self.collate = settings.pop("collate", None)
        self.settings = settings

    def trainer(self, *callbacks: Any) -> Trainer:
        torch.manual_seed(1)
        random.seed(1)
        settings: dict[str, Any] = {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **self.settings,
        }
        args = TrainingArguments(output_dir=str(self.out), **settings)
        more = {} if self.collate is None else {"data_collator": self.collate}
        trainer = Trainer(
            model=Small(),
            args=args,
            train_dataset=self.dataset,
            eval_dataset=Noisy(6),
            callbacks=[*self.callbacks(), *callbacks],
            **more,
        )
        return trainer

    def link(
        self,
        monkeypatch: pytest.MonkeyPatch,
        stop: int | None = None,
        *,
        asked: Any = None,
        killed: bool = False,
    ) -> Trainer | None:
        """Train in a new link; None where it was cut."""
        link = self.run.claim_link({"job": "1"})
        with monkeypatch.context() as patch:
            patch.setenv("HPCRESUME_RUN", str(self.run.path))
            patch.setenv("HPCRESUME_LINK", str(link.number))
            trainer = self.trainer(CutAt(stop, killed=killed), HpcResumeCallback())
            try:
                trainer.train(resume_from_checkpoint=asked)
            except (SystemExit, KeyboardInterrupt) as left:
                self.code = left.code if isinstance(left, SystemExit) else None
                return None
            finally:
                self.record(link)
        return trainer

    def record(self, link: LinkDir) -> None:
        """As the command's parent would."""
        root = Path(self.run.identify()["project"])
        notes = Notes(self.run, link, Sight(ProgressConfig(), root), root, job="1")
        notes.hear()
        self.heard = notes.heard

    def told(self, kind: str) -> list[dict[str, Any]]:
        path = self.run.link(self.run.newest_link()).guest
        return [r for r in Heard(path).look() if r["kind"] == kind]


def outcome(trainer: Trainer | None) -> dict[str, Any]:
    """All that a training leaves: weights, optimizer, schedule, random numbers, log."""
    assert trainer is not None
    optimizer = trainer.optimizer.state_dict()
    log = [
        {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
        for line in trainer.state.log_history
        if "train_loss" not in line
    ]
    return {
        "weights": {n: p.tolist() for n, p in trainer.model.state_dict().items()},
        "optimizer": json.loads(json.dumps(optimizer, default=lambda tensor: tensor.tolist())),
        "schedule": trainer.lr_scheduler.state_dict(),
        "random": [torch.rand(2).tolist(), random.random()],
        "log": log,
    }


def assert_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...], **settings: Any
) -> Training:
    """A chain that is cut after some steps ends as the uncut training does."""
    uncut = outcome(Training(tmp_path / "uncut", **settings).link(monkeypatch))
    cut = Training(tmp_path / "cut", **settings)
    for stop in stops:
        assert cut.link(monkeypatch, stop) is None
        assert cut.code == 0
    assert outcome(cut.link(monkeypatch)) == uncut
    return cut


# ---- exact, wherever it is cut -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "settings"),
    [
        # 22 samples are 6 batches an epoch, the last one ragged.
        pytest.param((1, 2, 13), {}, id="mid-epoch"),
        pytest.param((6, 12, 18), {}, id="epoch-ends"),
        pytest.param((2, 3, 5), {"gradient_accumulation_steps": 4}, id="accumulation"),
        pytest.param((5, 8), {"dataloader_num_workers": 2, "num_train_epochs": 2}, id="workers"),
        pytest.param((3, 9, 15), {"collate": noisy_batch}, id="collate"),
        pytest.param((4, 11), {"dataset": Stream(), "max_steps": 15}, id="stream"),
        pytest.param(
            (8, 14),
            {"train_sampling_strategy": "group_by_length", "length_column_name": "length"},
            id="grouped",
        ),
        pytest.param(
            (8, 14), {"accelerator_config": {"use_seedable_sampler": False}}, id="plain-sampler"
        ),
        pytest.param((4, 6, 12), {"eval_strategy": "epoch"}, id="evaluation"),
        pytest.param((3, 10), {"max_steps": 15, "logging_steps": 7}, id="max-steps"),
    ],
)
def test_a_training_that_is_cut_ends_as_the_uncut_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stops: tuple[int, ...],
    settings: dict[str, Any],
) -> None:
    assert_exact(tmp_path, monkeypatch, stops, **settings)


def test_without_its_keys_the_same_cut_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "make_keyed", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="weights"):
        assert_exact(tmp_path, monkeypatch, (8, 14))


def with_own_generator() -> Any:
    return BatchSampler(RandomSampler(Noisy(), generator=torch.Generator()), 4, drop_last=False)


def of_two_processes() -> Any:
    """As accelerate shares batches out: its wrapper passes no epoch on to the sampler in it."""
    sampler = SeedableRandomSampler(Noisy(), data_seed=5)
    return BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, 0)


@pytest.mark.parametrize("sampler", [with_own_generator, of_two_processes])
def test_the_batches_of_an_epoch_are_the_same_whether_or_not_those_before_were_read(
    sampler: Callable[[], Any],
) -> None:
    def read(*epochs: int) -> list[Any]:
        reading = Reading()
        loader = DataLoader(Noisy(), batch_sampler=sampler())
        assert make_keyed(loader, 3, reading) is None
        seen = []
        for reading.epoch in epochs:
            seen.append([batch["input_ids"].tolist() for batch in loader])
        return seen

    assert read(0, 1, 2)[2] == read(2)[0]
    first, second = read(0, 1)
    assert first != second


@pytest.mark.parametrize("data", [Noisy(), Stream()], ids=["map", "stream"])
def test_a_loader_that_is_kept_for_a_second_training_reads_as_in_the_first(data: Any) -> None:
    loader = DataLoader(data, batch_size=4)
    read = []
    for _ in range(2):
        assert make_keyed(loader, 3, Reading()) is None
        read.append([batch["input_ids"].tolist() for batch in itertools.islice(loader, 3)])
    assert read[0] == read[1]


def test_the_metrics_of_all_links_are_those_of_the_uncut_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between two lines of the log, so that the first one of the next link needs what was before.
    cut = assert_exact(tmp_path, monkeypatch, (3, 9), logging_steps=2)
    names = ("step", "loss", "grad_norm", "learning_rate")
    both = [
        [tuple(line[name] for name in names) for line in read_metrics(run)]
        for run in (cut.run, RunDir(tmp_path / "uncut" / "toy"))
    ]
    assert both[0] == both[1]
    assert [line[0] for line in both[0]] == list(range(2, 25, 2))


# ---- what it goes on from ------------------------------------------------------------------------


def killed_after_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    """A training that was killed in step 11, and had saved steps 5 and 10."""
    training = Training(tmp_path / "cut", save_strategy="steps", save_steps=5)
    assert training.link(monkeypatch, 11, killed=True) is None
    assert [path.name for path in numbered(training.out)] == ["checkpoint-10", "checkpoint-5"]
    return training


def uncut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    training = Training(tmp_path / "uncut", save_strategy="steps", save_steps=5)
    return outcome(training.link(monkeypatch))


def begun(training: Training) -> tuple[int, list[str]]:
    """The step that the newest link has begun with, and the checkpoints that it passed over."""
    (record,) = training.told("began")
    return record["step"], [Path(path).name for path, _ in record["passed_over"]]


def test_a_half_written_newest_checkpoint_is_passed_over_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = killed_after_saves(tmp_path, monkeypatch)
    half = training.out / "checkpoint-15"
    shutil.copytree(training.out / "checkpoint-10", half)
    (half / NAME).unlink()
    (half / "trainer_state.json").unlink()
    os.truncate(half / "optimizer.pt", 100)
    logging.getLogger("hpcresume").propagate = True
    with caplog.at_level(logging.WARNING, "hpcresume"):
        ended = training.link(monkeypatch)
    assert begun(training) == (10, ["checkpoint-15"])
    assert any(
        "checkpoint-15 is passed over: optimizer.pt is cut off" in m for m in caplog.messages
    )
    assert outcome(ended) == uncut(tmp_path, monkeypatch)


def test_a_flipped_byte_in_the_weights_is_found_and_the_checkpoint_before_it_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = killed_after_saves(tmp_path, monkeypatch)
    weights = training.out / "checkpoint-10" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    ended = training.link(monkeypatch)
    assert begun(training) == (5, ["checkpoint-10"])
    assert outcome(ended) == uncut(tmp_path, monkeypatch)
    assert why_not(training.out / "checkpoint-10") is None, "it is saved anew"


def test_a_run_of_which_nothing_whole_is_left_fails_instead_of_beginning_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = killed_after_saves(tmp_path, monkeypatch)
    shutil.rmtree(training.out)
    trainer = training.trainer(HpcResumeCallback())
    link = training.run.claim_link({"job": "1"})
    monkeypatch.setenv("HPCRESUME_RUN", str(training.run.path))
    monkeypatch.setenv("HPCRESUME_LINK", str(link.number))
    with pytest.raises(SystemExit) as failed:
        trainer.train()
    assert failed.value.code == 7
    assert trainer.state.global_step == 0


def plain(tmp_path: Path) -> Path:
    """The output of a plain Trainer, without a callback of ours, that was cut at step 9."""
    training = Training(tmp_path / "plain", save_strategy="steps", save_steps=4)
    with pytest.raises(KeyboardInterrupt):
        training.trainer(CutAt(9, killed=True)).train()
    assert {path.name for path in (training.out / "checkpoint-8").iterdir()} >= {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"),
        *("training_args.bin", "rng_state.pth"),
    }
    return training.out


@pytest.mark.parametrize("asked", [None, True], ids=str)
def test_what_an_earlier_plain_trainer_has_left_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool | None
) -> None:
    earlier = plain(tmp_path)
    ends = []
    for stops in ((), (10, 17)):
        training = Training(tmp_path / f"then-{len(stops)}")
        shutil.copytree(earlier, training.out)
        for stop in stops:
            assert training.link(monkeypatch, stop, asked=asked) is None
        ends.append(outcome(training.link(monkeypatch, asked=asked)))
        if not stops:
            assert begun(training) == (8, [])
            (record,) = training.told("began")
            assert record["verified"] is False
    assert ends[0] == ends[1]
    assert ends[0]["log"][0]["step"] == 2


def test_what_the_script_asks_for_counts_until_the_run_has_a_checkpoint_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = plain(tmp_path)
    training = Training(tmp_path / "then")
    shutil.copytree(earlier, training.out)
    training.link(monkeypatch, 1, asked=False)
    assert begun(training) == (0, [])
    training.link(monkeypatch, 3, asked=False)
    assert begun(training) == (1, ["checkpoint-8", "checkpoint-4"])
    training.link(monkeypatch, 5, asked=str(earlier / "checkpoint-4"))
    assert begun(training)[0] == 3
    other = Training(tmp_path / "other")
    other.link(monkeypatch, 6, asked=str(earlier / "checkpoint-4"))
    assert begun(other) == (4, [])
    other.link(monkeypatch, 9, asked=str(earlier / "checkpoint-4"))
    assert begun(other) == (6, [])


def test_a_checkpoint_that_the_script_names_and_that_is_not_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = plain(tmp_path)
    os.truncate(earlier / "checkpoint-4" / "model.safetensors", 50)
    trainer = Training(tmp_path / "then").trainer(HpcResumeCallback())
    with pytest.raises(SystemExit) as failed:
        trainer.train(resume_from_checkpoint=str(earlier / "checkpoint-4"))
    assert failed.value.code == 7


def test_looking_for_a_checkpoint_unpickles_nothing(tmp_path: Path) -> None:
    names: list[str] = []
    listening = True
    earlier = plain(tmp_path)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "pickle.find_class":
            names.append(str(arguments))

    sys.addaudithook(note)
    assert why_not(earlier / "checkpoint-8") is None
    vouch(earlier / "checkpoint-8", 8)
    assert why_not(earlier / "checkpoint-8") is None
    listening = False
    assert not names


def test_another_batch_size_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(tmp_path / "cut")
    training.link(monkeypatch, 3)
    training.settings["per_device_train_batch_size"] = 2
    logging.getLogger("hpcresume").propagate = True
    with caplog.at_level(logging.WARNING, "hpcresume"):
        training.link(monkeypatch, 5)
    assert any("per_device_train_batch_size 4 -> 2: it goes on" in m for m in caplog.messages)


# ---- how it ends ---------------------------------------------------------------------------------


def test_a_link_that_must_leave_before_its_first_step_neither_trains_nor_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "cut")
    training.link(monkeypatch, 3)
    before = (training.out / "checkpoint-3" / NAME).stat().st_mtime_ns
    training.run.stop.touch()
    assert training.link(monkeypatch) is None
    assert training.told("left")[0]["step"] == 3
    assert not training.told("saved")
    training.run.stop.unlink()
    assert (training.out / "checkpoint-3" / NAME).stat().st_mtime_ns == before
    assert outcome(training.link(monkeypatch)) == outcome(
        Training(tmp_path / "uncut").link(monkeypatch)
    )


@pytest.mark.parametrize("last", [12, 15], ids=["epoch-end", "mid-epoch"])
def test_a_training_that_is_complete_trains_no_further_when_its_script_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    training = Training(tmp_path / "cut", max_steps=last, save_strategy="steps", save_steps=5)
    first = outcome(training.link(monkeypatch))
    assert training.told("completed")[0]["judged"] == f"step {last} of {last}"
    voucher = (training.out / f"checkpoint-{last}" / NAME).read_bytes()
    again = training.link(monkeypatch)
    assert again is not None
    assert again.state.global_step == last
    assert outcome(again)["weights"] == first["weights"]
    assert training.told("completed")
    assert not training.told("saved")
    assert (training.out / f"checkpoint-{last}" / NAME).read_bytes() == voucher


def early() -> list[Any]:
    return [EarlyStoppingCallback(early_stopping_patience=3)]


#: With so large a rate it never gets better after a few evaluations.
EARLY = {
    "callbacks": early,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "num_train_epochs": 30,
    "learning_rate": 0.3,
}


def test_early_stopping_counts_on_over_links_and_is_a_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Training(tmp_path / "uncut", **EARLY).link(monkeypatch)
    assert expected is not None
    ended = expected.state.global_step
    assert 6 < ended < 100
    training = Training(tmp_path / "cut", **EARLY)
    # One step each, where the patience is running out: a link alone never sees three evaluations.
    for stop in range(ended - 5, ended):
        assert training.link(monkeypatch, stop) is None
    again = training.link(monkeypatch)
    assert again is not None
    assert again.state.global_step == ended
    assert outcome(again)["weights"] == outcome(expected)["weights"]
    assert "ended early" in training.told("completed")[0]["judged"]
    third = training.link(monkeypatch)
    assert third is not None
    assert third.state.global_step == ended
    assert outcome(third)["weights"] == outcome(expected)["weights"]


def test_trainers_limit_of_checkpoints_holds_and_a_verified_one_is_always_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = 9

    class Count(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal least
            whole = [p for p in numbered(training.out) if (p / NAME).is_file() and not why_not(p)]
            if state.global_step > 2:
                least = min(least, len(whole))

        on_save = on_step_begin = on_log

    training = Training(
        tmp_path / "cut",
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        logging_steps=1,
        callbacks=lambda: [Count()],
    )
    training.link(monkeypatch, 7)
    # Left by nobody that is known, and beyond where the training is: it never counts as the newest.
    shutil.copytree(training.out / "checkpoint-7", training.out / "checkpoint-900")
    (training.out / "checkpoint-900" / NAME).unlink()
    ended = training.link(monkeypatch)
    assert ended is not None
    assert least == 1
    assert [path.name for path in numbered(training.out)] == ["checkpoint-24"]
    assert ended.args.save_total_limit == 1


@pytest.mark.parametrize(
    ("steps", "newest", "limit", "best", "gone"),
    [
        ((1, 2, 3), 3, None, None, []),
        ((1, 2, 3), 3, 2, None, [1]),
        ((1, 2, 3), 3, 1, None, [1, 2]),
        ((1, 2, 3), 3, 1, 1, [2]),
        ((1, 2, 3, 9), 3, 2, None, [9, 1]),
        ((1, 2, 3, 9), 3, 3, None, [9]),
        ((3,), 3, 1, None, []),
    ],
    ids=str,
)
def test_what_goes_is_chosen_by_step_and_never_the_verified_or_the_best(
    steps: tuple[int, ...], newest: int, limit: int | None, best: int | None, gone: list[int]
) -> None:
    folder = Path("out")
    folders = [folder / f"checkpoint-{step}" for step in sorted(steps, reverse=True)]
    kept_best = None if best is None else f"elsewhere/out/checkpoint-{best}"
    found = superseded(folders, folder / f"checkpoint-{newest}", limit, kept_best)
    assert [int(path.name.rpartition("-")[2]) for path in found] == gone
