"""The metric log: what was logged stands in it, a line a step, whatever the disk does meanwhile."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcresume import files
from hpcresume.errors import UsageError
from hpcresume.run_dir import LinkDir
from hpcresume.training.record import MetricLog, trainer_state


@pytest.fixture
def link(tmp_path: Path) -> LinkDir:
    path = tmp_path / "a 'run'\nof it" / "0001"
    path.mkdir(parents=True)
    return LinkDir(path)


def lines(link: LinkDir) -> list[Any]:
    return list(files.read_lines(link.metrics))


def logged(link: LinkDir, *values: dict[str, Any]) -> dict[str, Any]:
    """The line of a step in which these were logged, one after the other."""
    log = MetricLog(link)
    for some in values:
        log.add(some)
    log.end_step(1, 0)
    log.close()
    (line,) = lines(link)
    assert isinstance(line, dict)
    return line


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, 3),
        (0.1, 0.1),
        (True, True),
        ("warm-up", "warm-up"),
        (None, None),
        ([1, 2], [1, 2]),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5]), 0.5),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.array(0.25), 0.25),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (math.inf, math.inf),
    ],
    ids=repr,
)
def test_value_is_logged_as_json(link: LinkDir, value: Any, text: Any) -> None:
    assert logged(link, {"x": value}) == {"step": 1, "epoch": 0, "x": text}


def test_nan_is_logged_as_nan(link: LinkDir) -> None:
    assert math.isnan(logged(link, {"loss": torch.tensor(math.nan)})["loss"])


@pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, 1j, {"a": object()}])
def test_value_that_is_no_json_is_refused_where_it_is_logged(link: LinkDir, value: Any) -> None:
    with pytest.raises(UsageError, match=r"session\.log\(x=…\)"):
        MetricLog(link).add({"x": value})


@pytest.mark.parametrize("name", ["step", "epoch"])
def test_step_and_epoch_cannot_be_logged_by_hand(link: LinkDir, name: str) -> None:
    with pytest.raises(UsageError, match="without asking"):
        MetricLog(link).add({name: 5})


def test_values_of_one_step_are_averaged(link: LinkDir) -> None:
    assert logged(link, {"loss": 1.0}, {"loss": torch.tensor(2.0)}, {"loss": 6})["loss"] == 3.0


def test_last_text_of_a_step_counts(link: LinkDir) -> None:
    assert logged(link, {"phase": "a"}, {"phase": "b"})["phase"] == "b"


def test_tensor_that_is_changed_after_it_was_logged_keeps_its_value(link: LinkDir) -> None:
    log = MetricLog(link)
    loss = torch.tensor(1.0)
    log.add({"loss": loss})
    loss.add_(5.0)
    log.end_step(1, 0)
    log.close()
    assert lines(link)[0]["loss"] == 1.0


def test_step_without_values_has_no_line(link: LinkDir) -> None:
    log = MetricLog(link)
    log.end_step(1, 0)
    log.close()
    assert lines(link) == []


def test_length_of_what_is_written_is_that_of_all_lines(link: LinkDir) -> None:
    log = MetricLog(link)
    log.add({"x": 1})
    log.end_step(1, 0)
    assert log.written() == link.metrics.stat().st_size > 0


def test_rank_without_a_log_writes_nothing() -> None:
    log = MetricLog(None)
    log.add({"x": object()})
    log.end_step(1, 0)
    assert log.written() == 0


def test_every_step_has_one_whole_line_after_a_disk_was_full(link: LinkDir) -> None:
    log = MetricLog(link)
    for step in range(1, 8):
        log.add({"x": step * 1.5})
        log.end_step(step, 0)
        with full_disk(15 * step):
            log.flush()
    log.written()
    assert [line["step"] for line in lines(link)] == list(range(1, 8))


def test_full_disk_does_not_end_training_at_a_flush(
    link: LinkDir, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricLog(link)
    log.add({"x": 1})
    log.end_step(1, 0)
    with full_disk(5):
        log.flush()
    assert "metrics wait in memory" in caplog.text


def test_full_disk_is_an_error_before_a_save(link: LinkDir) -> None:
    log = MetricLog(link)
    log.add({"x": 1})
    log.end_step(1, 0)
    with full_disk(5), pytest.raises(OSError, match="File too large"):
        log.written()


def test_look_at_what_is_written_writes_what_a_full_disk_refused_before(link: LinkDir) -> None:
    log = MetricLog(link)
    log.add({"x": 1})
    log.end_step(1, 0)
    with full_disk(5):
        log.flush()
    assert log.written() == link.metrics.stat().st_size
    assert [line["step"] for line in lines(link)] == [1]


def state(**fields: Any) -> dict[str, Any]:
    return trainer_state(
        **{
            "global_step": 500,
            "total_steps": 1000,
            "epoch": 1.25,
            "num_train_epochs": 2,
            "best_metric": 0.5,
            "best_step": 400,
            "history": [{"step": n} for n in range(250)],
            "completed": False,
            "train_seconds": 12.34567,
            "link": 3,
            "num_ranks": 2,
            **fields,
        }
    )


def test_last_ten_lines_of_the_trainer_state_show_the_progress(tmp_path: Path) -> None:
    files.write_json(tmp_path / "trainer_state.json", state())
    tail = "\n".join((tmp_path / "trainer_state.json").read_text().splitlines()[-10:])
    assert all(f'"{key}": ' in tail for key in ("epoch", "global_step", "total_steps", "completed"))


def test_history_in_the_trainer_state_is_bounded() -> None:
    assert [line["step"] for line in state()["log_history"]] == list(range(150, 250))


def test_best_checkpoint_is_named_relative_to_the_run() -> None:
    assert state()["best_model_checkpoint"] == "checkpoint-400"


def test_max_steps_and_total_steps_are_the_same() -> None:
    assert state()["max_steps"] == state()["total_steps"] == 1000
