"""Chains of one-minute links on a real Slurm of its own: hpcresume's, and submitit's by requeue.

Both train the same steps (`chain_training`) to the same end, one after the other. Starts of jobs
are Slurm's own, to the second; saves are as the tools themselves tell.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import chain_training
from chain_model import ChainPlayed, Inputs, LinkPlayed
from slurm_runs import SlurmCluster, bare, python

from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir

LIMIT_S = 60.0
#: More than any chain here takes.
TIMEOUT_S = 3 * 3600.0
CONFIG = """
name: chain
train: chain_training.py:train
max_steps: {num_steps}
args: {{payload_bytes: {payload_bytes}}}
scheduler: {{cluster: slurm, time: "00:01:00", mem: 3G}}
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both tools are given to do."""

    num_steps: int
    payload_bytes: int
    signal_s: int
    """How long before the end of a job submitit asks for its signal."""
    hold_s: int
    """For how long Slurm's credentials live, and so a requeued job is held."""


@dataclass
class Life:
    """One start of a job; times in Unix seconds."""

    start: float
    steps: dict[int, float] = field(default_factory=dict)
    """What each step took, in seconds."""
    first_step_at: float = 0.0
    saved_step: int = 0
    save_s: float = 0.0
    stall_s: float = 0.0
    saved_at: float = 0.0

    @property
    def start_up_s(self) -> float:
        """From the start to the first step; 0 where it did not come so far."""
        return self.first_step_at - self.start if self.first_step_at else 0.0

    @property
    def committed_s(self) -> float:
        """Seconds of training that the last save of this life holds, and none before."""
        return sum(took for step, took in self.steps.items() if step <= self.saved_step)


@dataclass(frozen=True)
class Chain:
    """A real chain, and what it tells of its machine: the inputs of a model of it."""

    played: ChainPlayed
    inputs: Inputs


def measure(task: Task) -> tuple[Chain, Chain]:
    """hpcresume's chain and submitit's, on a cluster that ends with this call."""
    with tempfile.TemporaryDirectory() as name, SlurmCluster(cred_expire_s=task.hold_s) as cluster:
        folder = Path(name)
        shutil.copy(chain_training.__file__, folder)
        bare(cluster, folder, 1)  # the first start reads everything from the disk
        own = _by_hpcresume(cluster, folder, task)
        cluster.wait_idle(90)
        other = _by_submitit(cluster, folder, task)
        return _chain(own, task), _chain(other, task)


def _by_hpcresume(cluster: SlurmCluster, folder: Path, task: Task) -> list[Life]:
    (folder / "chain.yaml").write_text(
        CONFIG.format(num_steps=task.num_steps, payload_bytes=task.payload_bytes)
    )
    python(cluster, folder, "-m", "hpcresume", "submit", "chain.yaml")
    run = RunDir(folder / "runs" / "chain")
    _wait(cluster, run.train_log, lambda: any(link.last("completed") for link in read_chain(run)))
    lives: dict[str, Life] = {}
    for link in read_chain(run):
        job = str(link.claim["job"])
        lives[f"{job}.0"] = life = Life(_starts(cluster, job)[0])
        saved = link.last("saved")
        if saved is not None:
            life.saved_step, life.saved_at = saved["step"], saved["t"]
            life.save_s, life.stall_s = saved["seconds"], saved["stall"]
    _read_notes(run.path, lives)
    return list(lives.values())


def _by_submitit(cluster: SlurmCluster, folder: Path, task: Task) -> list[Life]:
    work = folder / "submitit"
    work.mkdir()
    arguments = (str(work), str(task.payload_bytes), str(task.num_steps), str(task.signal_s))
    job = python(cluster, folder, "chain_training.py", *arguments).strip()
    notes = work / chain_training.NOTES
    log = work / f"{job}_0_log.err"
    _wait(cluster, log, lambda: notes.exists() and " completed " in notes.read_text())
    lives = {f"{job}.{number}": Life(start) for number, start in enumerate(_starts(cluster, job))}
    _read_notes(work, lives)
    return list(lives.values())


def _read_notes(folder: Path, lives: dict[str, Life]) -> None:
    for line in (folder / chain_training.NOTES).read_text().splitlines():
        name, word, step, seconds, t = line.split()
        life = lives[name]
        if word == "step":
            life.first_step_at = life.first_step_at or float(t) - float(seconds)
            life.steps[int(step)] = float(seconds)
        elif word == "saved":
            life.saved_step, life.save_s, life.saved_at = int(step), float(seconds), float(t)
            life.stall_s = life.save_s


def _wait(cluster: SlurmCluster, log: Path, done: Callable[[], bool]) -> None:
    """Until a chain is complete; with the end of its log where it leaves the queue before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not done():
        time.sleep(2)
        empty = not cluster.queue()
        if (empty and not done()) or time.monotonic() > deadline:
            words = log.read_text()[-2000:] if log.exists() else "no log"
            raise SystemExit(f"the chain did not reach its end: {words}")


def _starts(cluster: SlurmCluster, job: str) -> list[float]:
    """When each life of a job began."""
    rows = cluster.sacct(job, "JobIDRaw", "Start")
    starts = {row["Start"] for row in rows if row["JobIDRaw"] == job}
    return sorted(datetime.fromisoformat(start).timestamp() for start in starts if start[:1] == "2")


def _chain(lives: list[Life], task: Task) -> Chain:
    first, last = lives[0], lives[-1]
    saved = [life for life in lives if life.saved_at]
    gaps = [
        after.start - before.saved_at
        for before, after in itertools.pairwise(lives)
        if before.saved_at
    ]
    inputs = Inputs(
        start_up_s=statistics.median(life.start_up_s for life in lives if life.first_step_at),
        step_s=statistics.median(took for life in lives for took in life.steps.values()),
        save_s=statistics.median(life.save_s for life in saved),
        first_stall_s=statistics.median(life.stall_s for life in saved),
        stall_s=statistics.median(life.stall_s for life in saved),
        gap_s=statistics.median(gaps),
        payload_bytes=task.payload_bytes,
    )
    links = [
        LinkPlayed(
            life.committed_s,
            # By its own start and save: they differ more than those of a model.
            LIMIT_S - (life.start_up_s or inputs.start_up_s) - life.save_s - inputs.step_s,
            (life.saved_at or life.start) - life.start,
            life.saved_at > life.start + LIMIT_S,
        )
        for life in lives
    ]
    played = ChainPlayed(
        limit_s=LIMIT_S,
        links=links,
        wall_s=last.saved_at - first.start,
    )
    return Chain(played, inputs)
