"""What the read commands cost on a login node, against `python -c pass`.

The bare interpreter takes its turn before each command, so that a ratio compares what the machine
did at the same time; told are medians. File-system calls are counted under strace, where it is
installed. The scheduler is a squeue that answers at once from a file.

    python benchmarks/cli.py [--times 20]
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli_runs import Folder

_BARE = ("-c", "pass")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A command and the folder that it reads."""

    name: str
    argv: Sequence[str]
    folder: Folder
    most_s: float | None = None
    """What it may take beyond the bare interpreter."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a command took."""

    row: Row
    bare_s: float
    took_s: float
    file_calls: int | None

    @property
    def verdict(self) -> str:
        """Whether it keeps to its bar."""
        if self.row.most_s is None:
            return ""
        kept = self.took_s - self.bare_s <= self.row.most_s
        return f"{'met' if kept else 'missed'} (at most +{1e3 * self.row.most_s:.0f} ms)"


def rows(path: Path) -> Iterator[Row]:
    """The commands, from what people type all day to what they should not have to wait for."""
    usual, crowd, open_ones, long, wide = (
        Folder(path / name) for name in ("usual", "crowd", "open", "long", "wide")
    )
    for n in range(20):
        usual.add(f"run-{n:02}", ("waiting", "failed", "complete", "complete")[n % 4])
    for n in range(1000):
        crowd.add(f"run-{n:03}", "complete" if n % 50 else "waiting")
        open_ones.add(f"run-{n:03}", "waiting" if n % 50 == 0 else "failed")
    long.add("long", "waiting", links=4, saves=25_000)
    wide.add("wide", "waiting", links=200, saves=500)
    yield Row(name="status, 20 runs", argv=["status"], folder=usual, most_s=0.1)
    yield Row(name="status RUN", argv=["status", "run-00"], folder=usual, most_s=0.1)
    yield Row(name="why RUN", argv=["why", "run-01"], folder=usual)
    yield Row(name="logs RUN", argv=["logs", "run-00"], folder=usual)
    yield Row(name="status, 1,000 runs", argv=["status"], folder=crowd, most_s=0.5)
    yield Row(name="status, 1,000 unfinished", argv=["status"], folder=open_ones)
    yield Row(name="status, 100,000 lines, 4 links", argv=["status"], folder=long, most_s=0.5)
    yield Row(name="status, 100,000 lines, 200 links", argv=["status"], folder=wide, most_s=0.5)


def measure(row: Row, times: int) -> Figure:
    """Alternate the bare interpreter and the command; the first pair warms the caches up."""
    pairs = [
        (_once(_BARE, row.folder), _once(("-m", "hpcresume", *row.argv), row.folder))
        for _ in range(times + 1)
    ][1:]
    return Figure(
        row=row,
        bare_s=statistics.median(bare for bare, _ in pairs),
        took_s=statistics.median(took for _, took in pairs),
        file_calls=_file_calls(("-m", "hpcresume", *row.argv), row.folder),
    )


def _once(argv: Sequence[str], folder: Folder) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *argv], env=folder.environ, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{argv}: {done.stderr}")
    return took


def _file_calls(argv: Sequence[str], folder: Folder) -> int | None:
    strace = shutil.which("strace")
    if strace is None:
        return None
    command = [strace, "-f", "-c", "-e", "trace=%file", sys.executable, *argv]
    done = subprocess.run(command, env=folder.environ, capture_output=True, text=True, check=False)
    total = re.search(r"^\s*100\.00\s+\S+\s+(?:\S+\s+)?(\d+)\s.*total", done.stderr, re.M)
    return int(total[1]) if total else None


def as_line(figure: Figure) -> str:
    """One line of the table."""
    calls = "-" if figure.file_calls is None else str(figure.file_calls)
    above = figure.took_s - figure.bare_s
    line = f"{figure.row.name:34} {1e3 * figure.bare_s:7.1f}ms {1e3 * figure.took_s:7.1f}ms "
    ratio = figure.took_s / figure.bare_s
    return f"{line}{1e3 * above:+8.1f}ms {ratio:6.1f}x {calls:>7}  {figure.verdict}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(f"{'command':34} {'python':>9} {'median':>9} {'above':>10} {'ratio':>7}   files")
        for row in rows(Path(name)):
            print(as_line(measure(row, options.times)), flush=True)


if __name__ == "__main__":
    main()
