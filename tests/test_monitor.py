"""What a look at the machine sees, and what it writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import PER_EPOCH, link, make_run, ordinary
from torch import nn

import hpcresume
from hpcresume import files
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.training.host_memory import host_memory
from hpcresume.training.monitor import EVERY_S, Monitor

GIB = 1 << 30


def write(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   50331648 kB\n"


# ---- the host's memory ---------------------------------------------------------------------


def test_memory_is_that_of_the_nearest_full_control_group(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/system.slice/job_12"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/system.slice/job_12/step_0\n",
            f"{group}/step_0/memory.max": "max\n",
            f"{group}/step_0/memory.current": f"{3 * GIB}\n",
            f"{group}/memory.max": f"{8 * GIB}\n",
            f"{group}/memory.current": f"{6 * GIB}\n",
            f"{group}/memory.stat": f"anon {5 * GIB}\ninactive_file {GIB}\n",
        },
    )
    assert host_memory(root) == (5 * GIB, 8 * GIB)


def test_memory_of_a_first_version_control_group_is_read_too(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/slurm/uid_1/job_7"
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/slurm/uid_1/job_7\n",
            f"{group}/memory.limit_in_bytes": f"{4 * GIB}\n",
            f"{group}/memory.usage_in_bytes": f"{3 * GIB}\n",
            f"{group}/memory.stat": f"total_inactive_file {GIB}\n",
        },
    )
    assert host_memory(root) == (2 * GIB, 4 * GIB)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", str(128 * GIB), "what"])
def test_without_a_limit_below_it_the_host_is_the_limit(tmp_path: Path, limit: str) -> None:
    root = write(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/job\n",
            "sys/fs/cgroup/job/memory.max": limit,
            "sys/fs/cgroup/job/memory.current": "1",
            "sys/fs/cgroup/job/memory.stat": "",
        },
    )
    assert host_memory(root) == (16 * GIB, 64 * GIB)


def test_memory_that_nobody_tells_is_not_known(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


def test_memory_of_this_host_is_read() -> None:
    found = host_memory()
    assert found is not None
    assert 0 < found[0] < found[1]


# ---- looks ---------------------------------------------------------------------------------


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(10, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    return model, optimizer


def looked(folder: Path, objects: Any, **more: Any) -> dict[str, Any]:
    monitor = Monitor(LinkDir(folder), torch.device("cpu"), objects)
    told = {"step": 3, "steps_s": [0.2] * 99 + [9.0], "train_s": 10.0, "waited_s": 2.5}
    monitor.look(time.monotonic(), **{**told, "metrics": {}, **more})
    monitor.close()
    (line,) = files.read_lines(LinkDir(folder).monitor)
    assert line == monitor.latest
    return dict(line)


def test_a_look_is_one_line_of_sizes_times_and_shares(
    tmp_path: Path, trained: tuple[Any, ...]
) -> None:
    seen = looked(tmp_path, trained, metrics={"loss": 0.5, "grad_norm": 1.5, "lr": 0.1})
    assert seen["step"] == 3
    assert (seen["loss"], seen["grad_norm"], seen["lr"]) == (0.5, 1.5, 0.1)
    assert seen["parameter_bytes"] == 4 * 110
    # Two moments of each parameter, and a step for each tensor.
    assert seen["optimizer_bytes"] == 2 * 4 * 110 + 2 * 4
    assert (seen["step_s_p50"], seen["step_s_p99"]) == (0.2, 0.2)
    assert seen["data_wait"] == 0.25
    assert 0 < seen["host_bytes"] < seen["host_limit_bytes"]


def test_the_learning_rate_is_the_optimizers_where_none_is_logged(
    tmp_path: Path, trained: tuple[Any, ...]
) -> None:
    assert looked(tmp_path, trained)["lr"] == 0.003


def test_what_is_not_finite_or_not_known_is_left_out(tmp_path: Path) -> None:
    seen = looked(tmp_path, [], metrics={"loss": float("nan"), "grad_norm": "?"}, train_s=0.0)
    assert not {"loss", "grad_norm", "lr", "data_wait"} & seen.keys()
    json.dumps(seen, allow_nan=False)


def test_looks_are_some_seconds_apart(tmp_path: Path) -> None:
    monitor = Monitor(LinkDir(tmp_path), torch.device("cpu"), [])
    assert monitor.due(EVERY_S)
    monitor.look(100.0, step=1, steps_s=[], train_s=0.0, waited_s=0.0, metrics={})
    assert not monitor.due(100.0 + EVERY_S - 1)
    assert monitor.due(100.0 + EVERY_S)
    monitor.close()


def test_the_share_of_waiting_counts_from_one_look_to_the_next(tmp_path: Path) -> None:
    monitor = Monitor(LinkDir(tmp_path), torch.device("cpu"), [])
    for train_s, waited_s in ((10.0, 5.0), (20.0, 6.0)):
        told: dict[str, Any] = {"step": 1, "steps_s": [], "metrics": {}}
        monitor.look(0.0, train_s=train_s, waited_s=waited_s, **told)
    assert monitor.latest["data_wait"] == 0.1
    monitor.close()


# ---- in a training -------------------------------------------------------------------------


class Slow(torch.utils.data.Dataset[Any]):
    """Data that take far longer than the steps."""

    def __init__(self) -> None:
        self.took_s = 0.0

    def __len__(self) -> int:
        return 4 * PER_EPOCH

    def __getitem__(self, index: int) -> torch.Tensor:
        began = time.monotonic()
        time.sleep(0.05)
        self.took_s += time.monotonic() - began
        return torch.ones(4)


def test_a_training_that_waits_for_its_data_is_seen_to(tmp_path: Path) -> None:
    data, told = Slow(), list[tuple[float, float]]()

    def waiting(session: hpcresume.Session) -> None:
        session.register(model=nn.Linear(4, 1))
        began = time.monotonic()
        for _ in session.steps(session.loader(data, batch_size=4)):
            told.append((data.took_s, time.monotonic() - began))
            session.log(loss=1.0)

    run = make_run(tmp_path / "run", max_steps=2)
    assert link(run, waiting).how == "completed"
    # The first step has waited so long, and was over when the second one's data were there.
    (waited_s, _), (_, over_s) = told
    (seen, *_) = files.read_lines(run.link(1).monitor)
    assert seen["step"] == 1
    assert waited_s / over_s - 1e-4 <= seen["data_wait"] <= 1


def test_what_is_published_holds_the_newest_look_in_front_of_the_progress(tmp_path: Path) -> None:
    run: RunDir = make_run(tmp_path / "run", max_steps=2)
    assert link(run, ordinary).how == "completed"
    text = run.trainer_state.read_text()
    progress = json.loads(text)["progress"]
    assert progress["monitor"]["parameter_bytes"] > 0
    assert progress["step"] == progress["total_steps"] == 2
    tail = "\n".join(text.splitlines()[-10:])
    assert [word in tail for word in ("epoch", "global_step", "total_steps", "completed")] == [
        *[True] * 4
    ]
