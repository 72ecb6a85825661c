"""What a checkpoint costs, beside the least that it could cost, and beside other ways to save.

    python benchmarks/checkpoint.py [--gib 1] [--pairs 9] [--only stall,write] [--no-peers]

A model and its AdamW with filled state, once in 64 tensors and once in 20,000. Each figure is a
ratio to a baseline that alternates with it in the same run: the median of all pairs, the quartiles,
and separately the first call. A figure whose bar is nearer than its noise is measured 25 times.

    stall    how long training waits for a save, over one copy of the same bytes in memory
    step     a training step while a save is being written, over an idle one; one compute thread
    write    from the call until it would survive a power loss: rate over raw write and fsync
    cold     restore, verified, into the live state: rate over a raw read, both from the disk
    warm     the same from the page cache
    memory   the most that a save or a restore adds to the live state
    growth   the process's memory after 200 saves, over that after 5
    frozen   where 95% of the bytes are not trained: what is written, and for how long
    ranks    two ranks that write together: rate over one raw writer

Other libraries stand indented below the figure that is like theirs. Needs seven times the payload
in memory, and as much on the disk of --folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from checkpoint_figures import figures, frozen
from checkpoint_memory import growth, memory_of_restore, memory_of_saves
from checkpoint_ranks import two_ranks
from checkpoint_rows import (
    FEWEST,
    MARKDOWN_HEAD,
    Row,
    as_markdown,
    as_text,
)

FIGURES = ("stall", "step", "write", "cold", "warm", "memory", "growth", "frozen", "ranks")
#: What all files of one payload take at most, in payloads.
_DISK = 7
#: A process for each part, so that nothing of one is left in the next one's memory. Forked before
#: anything but torch is here: its threads are not begun yet.
_FORK = multiprocessing.get_context("fork")

Part = Callable[[Path], Iterator[Row]]


def parts(options: argparse.Namespace) -> Iterator[list[Part]]:
    """What is measured one after the other; the parts of a list on the same folder."""
    size, pairs, wanted = int(options.gib * 2**30), options.pairs, options.only
    few = options.tensors[0]
    for tensors in options.tensors:
        if {"stall", "step", "write", "cold", "warm"} & wanted:
            yield [partial(figures, wanted, tensors, size, pairs, options.peers)]
        if "memory" in wanted:
            yield [
                partial(memory_of_saves, tensors, size),
                partial(memory_of_restore, tensors, size),
            ]
        if "frozen" in wanted:
            yield [partial(frozen, tensors, size, pairs)]
    if "growth" in wanted:
        yield [partial(growth, few, size, options.saves)]
    if "ranks" in wanted:
        yield [partial(two_ranks, few, size, pairs)]


def in_child(part: Part, folder: Path) -> Iterator[Row]:
    """The rows of a part, as they come. Raises SystemExit where its process fails."""
    receiving, sending = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_send_rows, args=(part, folder, sending))
    child.start()
    sending.close()
    with suppress(EOFError):
        while True:
            yield receiving.recv()
    child.join()
    if child.exitcode:
        raise SystemExit("A part of the benchmark failed; its error stands above.")


def _send_rows(part: Part, folder: Path, sending: Connection) -> None:
    for row in part(folder):
        sending.send(row)


def machine(folder: Path) -> str:
    """What the figures depend on, without names of hosts."""
    processor = _value(Path("/proc/cpuinfo"), "model name") or platform.machine()
    memory = int((_value(Path("/proc/meminfo"), "MemTotal") or "0").split()[0]) / 2**20
    facts = [
        processor,
        f"{len(os.sched_getaffinity(0))} cores",
        f"{memory:.0f} GiB memory",
        f"{_file_system(folder)} on the disk",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"load {os.getloadavg()[0]:.1f}",
        time.strftime("%Y-%m-%d"),
    ]
    return "; ".join(facts)


def _value(path: Path, key: str) -> str | None:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on: ext4, nfs4, lustre."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number:
            return kind.split()[0]
    return "unknown file system"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="figures: " + ", ".join(FIGURES),
    )
    add = parser.add_argument
    add("--gib", type=float, default=1.0, help="size of the payload")
    add("--tensors", default="64,20000", help="in how many tensors; several payloads")
    add("--pairs", type=int, default=FEWEST, help=f"of a figure; below {FEWEST} it is but a look")
    add("--saves", type=int, default=200, help="over which memory is not to grow")
    add("--only", default=",".join(FIGURES), help="some figures, with commas")
    add("--peers", action=argparse.BooleanOptionalAction, default=True)
    add("--markdown", action="store_true", help="print a table for docs/performance.md")
    add("--folder", type=Path, default=Path("."), help="on the disk that is measured")
    options = parser.parse_args()
    options.only = set(options.only.split(","))
    options.tensors = [int(count) for count in options.tensors.split(",")]
    unknown = sorted(options.only - set(FIGURES))
    needed, free = _DISK * options.gib, shutil.disk_usage(options.folder).free / 2**30
    if unknown:
        parser.error(f"no such figure: {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    if options.pairs < 2 or options.saves < 5:
        parser.error("at least 2 pairs and 5 saves are needed")
    if min(options.tensors) < 32:
        parser.error("at least 32 tensors are needed")
    if free < needed:
        parser.error(f"{needed:.0f} GiB are needed in {options.folder}, {free:.0f} are free")
    return options


def main() -> None:
    """Measure, and print each row as soon as it is known, or all of them as a table."""
    options = arguments()
    torch.set_num_threads(1)
    lines = sys.stderr if options.markdown else sys.stdout
    began = time.perf_counter()
    head = f"{options.gib:g} GiB; {machine(options.folder)}"
    print(head, file=lines, flush=True)
    if options.pairs < FEWEST:
        print(f"fewer than {FEWEST} pairs: a look, and no measurement", file=lines)
    rows = []
    for group in parts(options):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-") as name:
            for part in group:
                for row in in_child(part, Path(name)):
                    print(f"{row.tensors:>6,} tensors  {as_text(row)}", file=lines, flush=True)
                    rows.append(row)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes", file=lines)
    if options.markdown:
        rows.sort(key=lambda row: (FIGURES.index(row.figure), row.tensors))
        print("\n".join([head, "", MARKDOWN_HEAD, *map(as_markdown, rows)]))


if __name__ == "__main__":
    main()
