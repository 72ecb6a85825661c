"""What a checkpoint costs, beside the least that it could cost, and beside other ways to save.

    python benchmarks/checkpoint.py [--gib 1] [--pairs 9] [--peers]

Each figure is a ratio to a baseline that alternates with it in the same run: the median of all
pairs and the quartiles. For one payload in 64 tensors and one in 20,000.

    stall      how long training waits for a save, over one copy of the payload in memory
    write      from there until it would survive a power loss: rate over raw write and fsync
    step       a training step while a save is being written, over an idle one
    restore    verified and in the live tensors, cold and warm: rate over a raw read
    memory     the most that a save adds, beyond the payload

`--peers` adds torch.save, safetensors and torch.distributed.checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.manifest import Committed
from hpcresume.checkpoint.store import Store
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir
from hpcresume.training.saving import give_way

PIECE = 8 << 20


class State:
    """A state of so many tensors of the same size."""

    def __init__(self, count: int, size: int) -> None:
        each = size // count // 4
        generator = torch.Generator().manual_seed(1)
        self.tensors = {
            f"block.{number}.weight": torch.randn(each, generator=generator)
            for number in range(count)
        }
        self.bytes = 4 * each * count

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live tensors."""
        return self.tensors

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy into the live tensors."""
        for name, tensor in state.items():
            self.tensors[name].copy_(tensor)


class Bench:
    """One payload, and a folder on the disk that is measured."""

    def __init__(self, count: int, size: int, folder: Path) -> None:
        self.state = State(count, size)
        self.folder = folder
        self.flat = torch.ones(self.state.bytes // 4)
        self.target = torch.ones(self.state.bytes // 4)
        self.contents = Contents()
        self.contents.add("model", self.state)
        self.run = RunDir(folder / "run")
        self.run.create("", cluster="none", project=folder, versions={})
        self.store = Store(self.run, self.run.identify()["id"])
        self.thread = ThreadPoolExecutor(1, initializer=give_way)
        self.step = 0

    # ---- ours --------------------------------------------------------------------------------

    def stage(self) -> Any:
        """What training waits for."""
        return self.contents.stage({}, [], {})

    def commit(self, staged: Any) -> Committed:
        """What the thread does."""
        self.step += 1
        committed = self.store.commit(
            staged.write,
            step=self.step,
            epoch=0,
            link=1,
            parent=None,
            metric=None,
            lineage=Lineage(),
            fence=lambda: None,
        )
        for step in self.run.checkpoint_steps():
            if step < self.step:
                shutil.rmtree(self.run.checkpoint(step))
        return committed

    def save(self) -> float:
        """A whole save, to its commit."""
        return timed(lambda: self.thread.submit(self.commit, self.stage()).result())

    def restore(self) -> float:
        """A verified checkpoint into the live tensors."""

        def load() -> None:
            found = self.store.latest_verified(Lineage(), lambda step, reason: None)
            assert found is not None
            self.contents.restore("model", found, found.json("state.json"))

        return timed(load)

    # ---- the least that it could take ------------------------------------------------------------

    def copy(self) -> float:
        """One copy of the payload into memory that is there."""
        return timed(lambda: self.target.copy_(self.flat))

    def raw_write(self) -> float:
        """Write and fsync, nothing else."""
        view = memoryview(self.flat.numpy()).cast("B")
        path = self.folder / "raw"

        def write() -> None:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            for start in range(0, view.nbytes, PIECE):
                os.write(fd, view[start : start + PIECE])
            os.fsync(fd)
            os.close(fd)

        path.unlink(missing_ok=True)
        return timed(write)

    def raw_read(self) -> float:
        """Read a file of the payload's size into memory that is there."""
        view = memoryview(self.target.numpy()).cast("B")

        def read() -> None:
            with open(self.folder / "raw", "rb", buffering=0) as file:
                for start in range(0, view.nbytes, PIECE):
                    file.readinto(view[start : start + PIECE])

        return timed(read)

    def forget(self) -> None:
        """Take the files out of the page cache."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)

    def steps(self, seconds: float | None, until: Callable[[], bool]) -> float:
        """Seconds of a training step: products of matrices, on one thread."""
        left = torch.randn(512, 512)
        durations = []
        began = time.perf_counter()
        while not until() and (seconds is None or time.perf_counter() - began < seconds):
            durations.append(timed(lambda: left @ left))
        return statistics.fmean(durations)


def timed(what: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def report(name: str, ratios: list[float], baseline_s: float, first: float | None = None) -> None:
    """One line: median and quartiles of a ratio."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    begun = "" if first is None else f"; first call {first:.2f}"
    spread = f"{low:.2f} to {high:.2f}; baseline {baseline_s:.3f} s{begun}"
    print(f"  {name:<42} {middle:6.2f}  ({spread})", flush=True)


def pairs(
    name: str,
    count: int,
    ours: Callable[[], float],
    baseline: Callable[[], float],
    *,
    rate: bool = False,
) -> None:
    """Measure in turn, and report time over time, or with `rate` rate over rate."""
    first = (ours(), baseline())
    measured = [(ours(), baseline()) if n % 2 else (baseline(), ours())[::-1] for n in range(count)]
    ratios = [(b / a if rate else a / b) for a, b in measured]
    begun = first[1] / first[0] if rate else first[0] / first[1]
    report(name, ratios, statistics.median(b for _, b in measured), begun)


def measure(bench: Bench, count: int) -> None:
    """All figures of one payload."""
    pairs("stall / copy in memory", count, lambda: timed(bench.stage), bench.copy)
    pairs("durable write rate / raw write+fsync", count, bench.save, bench.raw_write, rate=True)
    bench.restore()

    def cold(what: Callable[[], float]) -> float:
        bench.forget()
        return what()

    pairs(
        "verified restore rate / raw read, cold",
        count,
        lambda: cold(bench.restore),
        lambda: cold(bench.raw_read),
        rate=True,
    )
    pairs("verified restore rate / readinto, warm", count, bench.restore, bench.raw_read, rate=True)

    def busy() -> float:
        writing = bench.thread.submit(bench.commit, bench.stage())
        return bench.steps(None, writing.done)

    pairs("step while writing / idle step", count, busy, lambda: bench.steps(0.5, lambda: False))


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def memory(size: int, folder: Path) -> None:
    """Peak memory that saves add, in a process of its own."""
    child = os.fork()
    if child == 0:
        bench = Bench(64, size, folder)
        bench.flat = bench.target = torch.ones(1)
        # From here on the peak counts anew.
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        for _ in range(3):
            bench.save()
        added = resident("VmHWM") - before
        print(
            f"  {'memory that a save adds / payload':<42} {added / bench.state.bytes:6.2f}  "
            f"({(added - bench.state.bytes) / 2**20:+.0f} MiB beyond the payload)",
            flush=True,
        )
        os._exit(0)
    os.waitpid(child, 0)


def peers(bench: Bench) -> Iterator[tuple[str, Callable[[], Any], Callable[[], float]]]:
    """Other ways to save and to load: name, the call, its baseline."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file

    path = bench.folder / "peer"

    def fsynced(save: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            path.unlink(missing_ok=True)
            save()
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

        return call

    tensors = bench.state.tensors
    yield "torch.save + fsync", fsynced(lambda: torch.save(tensors, path)), bench.raw_write
    yield (
        "safetensors.save_file + fsync",
        fsynced(lambda: save_file(tensors, path)),
        bench.raw_write,
    )
    folder = bench.folder / "dcp"
    saved = {"model": tensors}

    def save() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        dcp.save(saved, checkpoint_id=folder, no_dist=True)

    yield "dcp.save", save, bench.raw_write
    yield (
        "dcp.load, warm",
        lambda: dcp.load(saved, checkpoint_id=folder, no_dist=True),
        bench.raw_read,
    )


def main() -> None:
    """Measure on the disk of --folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("."))
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = int(options.gib * 2**30)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        memory(size, Path(name))
    for count in (64, 20_000):
        print(f"{options.gib:g} GiB in {count:,} tensors", flush=True)
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            bench = Bench(count, size, Path(name))
            measure(bench, options.pairs)
            if options.peers:
                for peer, call, baseline in peers(bench):
                    pairs(f"{peer}: rate / raw", 3, lambda: timed(call), baseline, rate=True)  # noqa: B023
            bench.thread.shutdown()


if __name__ == "__main__":
    sys.exit(main())
