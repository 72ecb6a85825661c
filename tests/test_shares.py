"""Two ranks that write one checkpoint together, each its share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import (
    ALONE,
    Ended,
    assert_same,
    checkpoints,
    in_children,
    link,
    links_of_rank,
    make_run,
    newest,
    outcome,
    steps_kept,
)
from safetensors.torch import load_file
from torch import nn

from hpcresume import files
from hpcresume.checkpoint import layout, staged, writer
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.images import verify
from hpcresume.run_dir import RunDir

EACH = {"steps": 2, "each_epoch": False, "keep_last": 9}
Plan = Sequence[tuple[Path, int | None]]


def sharing(rank: int, meeting: Path, report: Path, plan: Plan, trouble: str) -> None:
    """`links_of_rank` where even the smallest model is divided, and with trouble on rank 1."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    layout._DIVIDED_BYTES = 0
    if rank and trouble:
        real, count = writer.write_file, 0

        def write_file(path: Path, content: Any) -> Any:
            nonlocal count
            count += 1
            if count == 2 and trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if count in (2, 3) and trouble == "full":
                raise OSError(28, "No space left on device", str(path))
            return real(path, content)

        staged.writer.write_file = write_file
    links_of_rank(rank, meeting, report, plan)


def share(run: RunDir, *stops: int | None, trouble: str = "") -> list[list[Ended]]:
    """Links of two ranks, each to a step or to the end; how they ended, by rank."""
    base = run.path.with_name(f"{run.name} {run.newest_link()}")
    reports = [base.with_name(f"{base.name} {rank}.json") for rank in range(2)]
    plan = [(run.path, stop) for stop in stops]
    in_children([(sharing, (n, base, report, plan, trouble)) for n, report in enumerate(reports)])
    told = [files.read_json_or_none(report) or {"ends": []} for report in reports]
    return [[Ended(*end) for end in each["ends"]] for each in told]


def records(run: RunDir, number: int, kind: str) -> list[dict[str, Any]]:
    return [r for r in files.read_lines(run.link(number).training) if r["kind"] == kind]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("uncut") / "run", max_steps=8, checkpoint=EACH)
    assert [ends[0].how for ends in share(run, None)] == ["completed"] * 2
    return run


def test_each_rank_writes_its_share_and_together_they_are_whole(uncut: RunDir) -> None:
    entries = {entry.name: entry for entry in newest(uncut).manifest.files}
    model = layout.files_of("model", entries)
    optimizer = layout.files_of("optimizer", entries)
    assert [entries[name].rank for name in model] == [0, 1]
    assert [entries[name].rank for name in optimizer] == [0, 1]
    assert {entry.rank for name, entry in entries.items() if name not in model + optimizer} == {0}
    held = [load_file(newest(uncut).path / name) for name in model]
    assert not held[0].keys() & held[1].keys()
    assert held[0].keys() | held[1].keys() >= {"up.weight", "down.weight", "norm.running_mean"}
    for found in checkpoints(uncut):
        verify(found)
    assert steps_kept(uncut) == [2, 4, 6, 8]


def test_a_buffer_that_each_rank_has_of_its_own_is_rank_0_s(uncut: RunDir) -> None:
    (first,) = newest(uncut).path.glob("model-00001-*.safetensors")
    assert {"norm.running_mean", "norm.running_var"} <= load_file(first).keys()


def test_a_chain_of_shared_checkpoints_gives_the_bytes_of_the_uncut_run(
    tmp_path: Path, uncut: RunDir
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=EACH)
    ended = share(run, 3, 5, None)
    assert [[end.how for end in ends] for ends in ended] == [
        ["stopped", "stopped", "completed"]
    ] * 2
    assert_same(run, uncut)


def test_one_rank_goes_on_from_what_two_have_written(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=EACH)
    share(run, 4)
    weights = {
        key: tensor
        for path in newest(run).path.glob("model*.safetensors")
        for key, tensor in load_file(path).items()
    }
    assert link(run, stop_at=4, place=ALONE).how == "stopped"
    assert link(run, place=ALONE).how == "completed"
    assert (run.final_model / "model.safetensors").exists()
    assert load_file(run.final_model / "model.safetensors").keys() == weights.keys()


def test_a_share_that_cannot_be_written_means_no_checkpoint_at_that_step(
    tmp_path: Path, uncut: RunDir
) -> None:
    # Two files a save: the first save is whole, the second one lacks a share.
    run = make_run(tmp_path / "run", max_steps=8, checkpoint={**EACH, "background": False})
    ended = share(run, None, trouble="full")
    assert [ends[0].how for ends in ended] == ["completed"] * 2
    refused = records(run, 1, "save_failed")
    assert [record["step"] for record in refused] == [2, 4]
    assert "rank 1 could not write its share: No space left on device" in refused[0]["reason"]
    assert steps_kept(run) == [6, 8]
    assert not list(run.path.glob(".*.partial"))
    assert outcome(run)["final model"] == outcome(uncut)["final model"]


def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(
    tmp_path: Path, uncut: RunDir
) -> None:
    run = make_run(tmp_path / "run", max_steps=8, checkpoint=EACH)
    share(run, 5, trouble="killed")
    assert steps_kept(run) in ([], [2])
    assert [ends[-1].how for ends in share(run, None)] == ["completed"] * 2
    assert_same(run, uncut)


def test_a_model_that_no_wrapper_keeps_alike_is_not_divided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(layout, "_DIVIDED_BYTES", 0)
    contents = Contents(rank=0, world_size=2)
    model = nn.Linear(4, 4)
    contents.add("model", model)
    contents.add("optimizer", torch.optim.SGD(model.parameters(), momentum=0.9))
    assert not contents.is_divided()
    saved: Callable[..., Any] = contents.stage
    assert [image.name for image in saved({}, [], {}).images] == ["model.safetensors"]
