"""Links of a run in this process and in children of it, for the tests of known resume bugs.

A run is cut after chosen steps, as the end of a job would cut it; what it leaves in the end is
compared part by part with the same run without a break.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.manifest import NAME, Committed, hash_stream
from hpcresume.checkpoint.staged import STATE
from hpcresume.checkpoint.store import Store
from hpcresume.config import dump, from_mapping, read_frozen
from hpcresume.journal import lineage, read_metrics
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.serving import berth_for, serve
from hpcresume.signals import SignalFlags, listen
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks

Train = Callable[[hpcresume.Session], None]
#: Epoch and samples of each micro-batch.
Seen = list[tuple[int, list[int]]]
ALONE = RankPlace()
#: Batches of an epoch of `ordinary`, each of four samples.
PER_EPOCH = 7
#: What a checkpoint says about the way that led to it.
THE_WAY = ("train_seconds", "lineage", "history")
#: Children of a process that has imported torch already, and has no threads.
CHILDREN = multiprocessing.get_context("forkserver")
# The first optimizer of a process imports the third, which takes longer than any of these links.
CHILDREN.set_forkserver_preload(["torch", "hpcresume.rank", "torch._dynamo"])


# Training


class Noisy(Dataset[Any]):
    """Points that move each time they are read, by all three generators; they know their index."""

    def __init__(self, length: int = 4 * PER_EPOCH) -> None:
        self.points = torch.randn(length, 4, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        noise = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)) + 0.1 * torch.randn(4)
        return index, self.points[index] + noise


class Net(nn.Module):
    """Dropout, running statistics, and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.down = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.drop(torch.relu(self.norm(self.up(x)))))
        return out


def loss_of(model: nn.Module, points: torch.Tensor) -> torch.Tensor:
    return (model(points) - points.sin().sum(1, keepdim=True)).square().mean()


def ordinary(
    session: hpcresume.Session,
    seen: Seen | None = None,
    each: Callable[[hpcresume.Session], None] = lambda session: None,
    batch: int = 4,
    accumulate: int | None = None,
) -> None:
    """What most people train: everything that a resume has to bring back is in it.

    `seen` is given epoch and samples of each micro-batch; `each` is called at the beginning of
    each. `batch` is the number of samples of all ranks together.
    """
    accumulate = accumulate or session.args.get("accumulate", 1)
    model: nn.Module = Net()
    if session.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    loader = session.loader(
        Noisy(session.args.get("size", 4 * PER_EPOCH)),
        batch_size=batch // session.world_size,
        shuffle=True,
        num_workers=session.args.get("workers", 0),
    )
    session.register(model=model, optimizer=optimizer, scheduler=scheduler)
    for ids, points in session.steps(loader, accumulate=accumulate):
        if seen is not None:
            seen.append((session.epoch, ids.tolist()))
        each(session)
        loss = loss_of(model, points)
        loss.backward()
        if session.sync_gradients:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        session.log(loss=loss, lr=scheduler.get_last_lr()[0], noise=random.random(), ids=ids)


# Links


class Ended(NamedTuple):
    """How a link ended: completed, stopped or failed; why; its exit code."""

    how: str
    why: str
    code: int


def make_run(path: Path, **config: Any) -> RunDir:
    """A run in which no link has been begun."""
    settings: dict[str, Any] = {
        "name": "run",
        "train": "train.py:train",
        "seed": 5,
        "deterministic": True,
    }
    run = RunDir(path)
    settings |= {"max_steps": 3 * PER_EPOCH, **config}
    # So that it is known at each step what is committed.
    settings["checkpoint"] = {"background": False, **config.get("checkpoint", {})}
    text = dump(from_mapping(settings, "test"))
    run.create(text, cluster="none", project=path.parent, versions={})
    return run


def link(
    run: RunDir,
    train: Train = ordinary,
    stop_at: int | None = None,
    *,
    place: RankPlace = ALONE,
    flags: SignalFlags | None = None,
) -> Ended:
    """One link: it saves and leaves after step `stop_at`, by default when training is complete."""
    config = read_frozen(run.config)
    berths: list[Any] = []

    def berth_of(ranks: Ranks) -> Any:
        claim = {"job": None, "num_tasks": ranks.world_size, "foreground": True}
        number = run.claim_link(claim).number if ranks.rank == 0 else None
        berth = berth_for(
            run,
            run.link(ranks.broadcast(number)),
            config,
            ranks,
            flags or SignalFlags(),
            Clock(end_time=None, file=None, lead_s=None, guess_s=0.0),
            job=None,
            stop_at=stop_at,
        )
        berths.append(berth)
        return berth

    with _switches_put_back():
        # As in the children: the sums of two threads are others.
        torch.set_num_threads(1)
        ended = Ended(*serve(berth_of, train, place, config))
    for berth in berths:
        if berth.journal is not None:
            berth.journal.close()
    return ended


@contextlib.contextmanager
def _switches_put_back() -> Iterator[None]:
    """A deterministic link leaves no trace in the tests that follow in this process."""
    cudnn, fill = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    flags = cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory
    environ = dict(os.environ)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
        cudnn.deterministic, cudnn.benchmark, fill.fill_uninitialized_memory = flags
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]


def cut(run: RunDir, step: int, train: Train = ordinary) -> None:
    """A link that saves and leaves after a step, as it must."""
    ended = link(run, train, step)
    assert ended.how == "stopped", ended
    assert files.read_json(run.trainer_state)["global_step"] == step


def through(run: RunDir, *stops: int, train: Train = ordinary) -> RunDir:
    """Links that are cut after each of the steps, and one that completes the run."""
    for step in stops:
        cut(run, step, train)
    ended = link(run, train)
    assert ended.how == "completed", ended
    return run


# What is left


def newest(run: RunDir) -> Committed:
    """The newest checkpoint, without looking at its bytes."""
    return checkpoints(run)[-1]


def checkpoints(run: RunDir) -> list[Committed]:
    return Store(run, run.identify()["id"]).committed(lineage(run))


def steps_kept(run: RunDir) -> list[int]:
    return [found.step for found in checkpoints(run)]


def log_lines(run: RunDir) -> list[dict[str, Any]]:
    """The metric log, each step once."""
    return list(read_metrics(run))


def series(run: RunDir, name: str) -> list[Any]:
    """One metric of all steps; floats by all their bits."""
    values = [line[name] for line in log_lines(run)]
    return [value.hex() if isinstance(value, float) else value for value in values]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(run: RunDir) -> dict[str, Any]:
    """Everything of a finished run that must not depend on where it was cut, part by part."""
    last = newest(run)
    names = [entry.name for entry in last.manifest.files]
    parts: dict[str, Any] = {
        name: digest(last.path / name)
        for name in names
        if name not in (STATE, "trainer_state.json")
    }
    state = files.read_json(last.path / STATE)
    for key in THE_WAY:
        state["progress"].pop(key)
    parts["state"] = json.dumps(state, sort_keys=True)
    # A float's text holds all its bits; NaN equals itself as text.
    parts["log"] = [json.dumps(line) for line in log_lines(run)]
    weights = sorted(run.final_model.glob("*.safetensors"))
    assert weights
    parts["final model"] = {path.name: digest(path) for path in weights}
    parts["completed"] = files.read_json(run.trainer_state)["completed"]
    return parts


def assert_same(run: RunDir, uncut: RunDir) -> None:
    """What two finished runs left is the same, bit for bit."""
    left, expected = outcome(run), outcome(uncut)
    assert left.keys() == expected.keys()
    for part, value in expected.items():
        assert left[part] == value, f"{part} is not that of the run without a break"


def ids_of(seen: Seen, epoch: int) -> list[int]:
    """The samples of an epoch, in order."""
    return [id for own, batch in seen if own == epoch for id in batch]


def changes_said(run: RunDir) -> list[str]:
    """What the links have journalled as not being as in a run without a break."""
    records = [
        r for number in run.link_numbers() for r in files.read_lines(run.link(number).training)
    ]
    return [record["change"] for record in records if record["kind"] == "changed"]


def assert_exact(
    folder: Path, *chains: tuple[int, ...], train: Train = ordinary, **config: Any
) -> RunDir:
    """However the run is cut, it leaves what it leaves without a break; returns the uncut run."""
    uncut = through(make_run(folder / "uncut", **config), train=train)
    for stops in chains:
        run = make_run(folder / f"cut at {stops}", **config)
        assert_same(through(run, *stops, train=train), uncut)
        assert changes_said(run) == []
    return uncut


def rewrite(found: Committed, name: str, content: Any) -> None:
    """Change a JSON file of a checkpoint, with a manifest to fit: what no accident can do."""
    data = files.to_json(content, indent=1)
    (found.path / name).write_bytes(data)
    size, chunks = hash_stream([data])
    entries = tuple(
        replace(entry, bytes=size, chunks=chunks) if entry.name == name else entry
        for entry in found.manifest.files
    )
    (found.path / NAME).write_bytes(replace(found.manifest, files=entries).to_bytes())


# Kills at a call that changes the disk


class Call(NamedTuple):
    """A call to the system: its name, and its first argument as text (or a part of that)."""

    name: str
    first: str


CALLS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")


@contextlib.contextmanager
def watched(before: Callable[[Call], None]) -> Iterator[None]:
    """Tell `before` each of these calls of this process, before it is made."""
    real = {name: getattr(os, name) for name in CALLS}

    def watching(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(Call(name, str(args[0])))
            return real[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, watching(name))
    try:
        yield
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


class Killable:
    """A run at step 5 whose next link, from 5 to 8, can be killed at any call.

    Only one checkpoint is kept: that of step 5, until that of step 8 is committed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = {"checkpoint": {"keep_last": 1, "keep_best": 0, "each_epoch": False}}
        self.uncut = through(make_run(folder / "uncut", **settings))
        self.run = make_run(folder / "run", **settings)
        cut(self.run, 5)

    def kill(self, call: Call, later: int = 0) -> RunDir:
        """The run after the link was killed in front of the first such call, or so many later."""
        path = self.folder / f"killed {sum(1 for _ in self.folder.iterdir())}"
        run = RunDir(Path(shutil.copytree(self.run.path, path)))
        assert in_child(killed_link, run.path, call, later) == -signal.SIGKILL
        return run


# Children


def in_child(target: Callable[..., None], *args: Any) -> int | None:
    """Run a function of a module in a process of its own; its exit code, negative for a signal."""
    return in_children([(target, args)])[0]


def in_children(tasks: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> list[int | None]:
    """Run functions in processes of their own at the same time; None for one that hung."""
    children = [CHILDREN.Process(target=target, args=args) for target, args in tasks]
    for child in children:
        child.start()
    deadline = time.monotonic() + 200
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        if any((child.exitcode or 0) < 0 for child in children):
            # One was killed: the others may wait for it as long as they are let.
            deadline = min(deadline, time.monotonic() + 5)
            break
        time.sleep(0.01)
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    return codes


def killed_link(path: Path, call: Call, later: int) -> None:
    """A link to step 8 that is killed in front of a call: see Killable."""
    torch.set_num_threads(1)
    since: int | None = None

    def before(made: Call) -> None:
        nonlocal since
        if since is not None:
            since += 1
        elif made.name == call.name and call.first in made.first:
            since = 0
        if since == later:
            os.kill(os.getpid(), signal.SIGKILL)

    with watched(before):
        link(RunDir(path), stop_at=8)


def listening_link(path: Path, report: Path, awaited: Sequence[signal.Signals]) -> None:
    """A link that notes signals as a rank does; reports afterwards how many came.

    Beyond step 40 it goes only when ten of each have come.
    """
    torch.set_num_threads(1)
    with listen() as flags:

        def stand(session: hpcresume.Session) -> None:
            while session.global_step == 40 and min(map(flags.count, awaited)) < 10:
                time.sleep(0.001)

        ended = link(RunDir(path), partial(ordinary, each=stand), flags=flags)
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)
        files.write_json(report, {"how": ended.how, **{n.name: flags.count(n) for n in numbers}})


def storm(run: RunDir, *numbers: signal.Signals, from_step: int) -> dict[str, Any]:
    """A link in a child, under a thousand signals a second as soon as a step is saved.

    Returns what it reports; nothing where it hung or was ended.
    """
    report = run.path.with_name(f"storm {run.newest_link()}.json")
    training = run.link(run.newest_link() + 1).training
    child = CHILDREN.Process(target=listening_link, args=(run.path, report, numbers))
    child.start()
    assert child.pid is not None
    deadline = time.monotonic() + 60
    sent = 0
    while child.exitcode is None and time.monotonic() < deadline:
        if sent or _saved(training, from_step):
            with contextlib.suppress(ProcessLookupError):
                # It may end between the question and the signal.
                os.kill(child.pid, numbers[sent % len(numbers)])
            sent += 1
        time.sleep(0.001)
    child.kill()
    child.join()
    told = files.read_json_or_none(report)
    return told if isinstance(told, dict) else {}


def _saved(journal: Path, step: int) -> bool:
    return any(r["kind"] == "saved" and r["step"] >= step for r in files.read_lines(journal))


# Two ranks


class Ranked(NamedTuple):
    """What one rank tells of its links: how each ended, and the samples that each trained on."""

    ends: list[Ended]
    seen: list[Seen]


def two_ranks(*plan: tuple[RunDir, int | None]) -> list[Ranked]:
    """Links of two ranks, one after the other: each of a run, up to a step or to its end."""
    run = plan[0][0]
    base = run.path.with_name(f"{run.name} ranks {run.newest_link()}")
    reports = [base.with_name(f"{base.name} {rank}.json") for rank in range(2)]
    paths = [(run.path, stop) for run, stop in plan]
    in_children(
        [(links_of_rank, (rank, base, report, paths)) for rank, report in enumerate(reports)]
    )
    told = [files.read_json_or_none(report) or {"ends": [], "seen": []} for report in reports]
    return [Ranked([Ended(*end) for end in t["ends"]], t["seen"]) for t in told]


def links_of_rank(
    rank: int, meeting: Path, report: Path, plan: Sequence[tuple[Path, int | None]]
) -> None:
    """What one of two ranks does; they meet by a file instead of a port."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    method, patience = f"file://{meeting}", timedelta(seconds=50)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=patience)
    place = RankPlace(rank=rank, world_size=2, local_rank=rank)
    told = Ranked([], [])
    for path, stop in plan:
        seen: Seen = []
        told.ends.append(link(RunDir(path), partial(ordinary, seen=seen), stop, place=place))
        told.seen.append(seen)
        files.write_json(report, told._asdict())
        if told.ends[-1].how == "failed":
            # The other rank may wait for this one: it sees that the process is gone.
            os._exit(1)
    dist.destroy_process_group()
