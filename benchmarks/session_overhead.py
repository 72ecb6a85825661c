"""What a step costs inside `session.steps` with `session.log`, over a bare loop in the same run.

    python benchmarks/session_overhead.py

A list of batches, a loss that is a tensor, a learning rate that is a number; bare loop and session
alternate. Prints microseconds a step, and what one look at the machine costs, which comes every
10 s; with `--ranks 2` what the agreement of two ranks to stop adds, in one process for each.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import hpcresume
from hpcresume.config import from_mapping
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.serving import berth_for, serve
from hpcresume.signals import SignalFlags
from hpcresume.training.clock import Clock
from hpcresume.training.monitor import EVERY_S, Monitor

STEPS = 20_000
ROUNDS = 9


def timed(rounds: list[tuple[float, float]]) -> Callable[[hpcresume.Session], None]:
    """A training function that times bare loops and the session's steps in turn."""

    def train(session: hpcresume.Session) -> None:
        loss, rate = torch.tensor(0.5), 0.1
        batches = list(range(STEPS))
        steps = session.steps(batches)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for _batch in batches:
                pass
            bare = time.perf_counter() - began
            began = time.perf_counter()
            for _ in range(STEPS):
                next(steps)
                session.log(loss=loss, lr=rate)
            rounds.append((bare, time.perf_counter() - began))
        for _ in steps:
            pass

    return train


def measure(place: RankPlace, folder: Path) -> list[tuple[float, float]]:
    """Seconds of (bare loop, session) for each round, of this rank."""
    config = from_mapping(
        {
            "name": "overhead",
            "train": "overhead.py:train",
            "max_steps": STEPS * ROUNDS + 1,
            "checkpoint": {"each_epoch": False, "minutes": None},
            "log": {"level": "ERROR"},
        },
        "the benchmark",
    )
    run = RunDir(folder / "overhead")
    if place.rank == 0:
        run.create("", cluster="local", project=folder, versions={})
        run.claim_link({"t": time.time()})
    while run.newest_link() == 0:
        time.sleep(0.05)
    rounds: list[tuple[float, float]] = []
    clock = Clock(end_time=time.time() + 7200, file=None, lead_s=None, guess_s=0.0)
    how, why, _ = serve(
        lambda ranks: berth_for(run, run.link(1), config, ranks, SignalFlags(), clock, job=None),
        timed(rounds),
        place,
        config,
    )
    assert how == "completed", why
    return rounds


def look_at_machine(folder: Path) -> None:
    """Print what one look of the monitor costs, with a model of a hundred layers."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(100)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    monitor = Monitor(LinkDir(folder), torch.device("cpu"), [model, optimizer])
    took = []
    for step in range(101):
        began = time.perf_counter()
        told = {"train_s": float(step), "waited_s": 0.0, "metrics": {"loss": 0.5}}
        monitor.look(began, step=step, steps_s=[0.1] * 256, **told)
        took.append(time.perf_counter() - began)
    monitor.close()
    first, later = took[0], statistics.median(took[1:])
    share = later / EVERY_S
    print(
        f"a look at the machine: {later * 1e3:.2f} ms ({first * 1e3:.2f} ms the first), every "
        f"{EVERY_S:.0f} s: {share:.4%} of the time"
    )


def report(name: str, rounds: list[tuple[float, float]]) -> float:
    """Print the median and the range of a series; the median, in microseconds a step."""
    bare = statistics.median(b for b, _ in rounds) / STEPS * 1e6
    over = sorted((s - b) / STEPS * 1e6 for b, s in rounds)
    print(
        f"{name}: +{statistics.median(over):.2f} µs a step over a bare loop "
        f"({bare:.3f} µs; {over[0]:.2f} to {over[-1]:.2f} in {len(rounds)} rounds)"
    )
    return statistics.median(over)


def main() -> None:
    """Measure one rank here, or start as many as were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rank is not None:
        place = RankPlace(rank=options.rank, world_size=options.ranks, local_rank=options.rank)
        rounds = measure(place, options.folder)
        if options.rank == 0:
            over = report(f"{options.ranks} ranks", rounds)
            print(f"their agreement to stop: +{over - options.alone:.2f} µs a step of these")
        return
    with tempfile.TemporaryDirectory() as name:
        alone = report("1 rank", measure(RankPlace(), Path(name)))
        look_at_machine(Path(name))
    if options.ranks > 1:
        with socket.socket() as free, tempfile.TemporaryDirectory() as name:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
            free.close()
            environ = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            argv = [
                sys.executable,
                __file__,
                f"--ranks={options.ranks}",
                f"--folder={name}",
                f"--alone={alone}",
            ]
            started = [
                subprocess.Popen([*argv, f"--rank={rank}"], env=environ)
                for rank in range(options.ranks)
            ]
            if any(process.wait() for process in started):
                raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
