"""What the read commands cost on a login node, against `python -c pass`.

Time (median) and file-system calls (under strace, where it is installed). The scheduler is not
asked: its clients are not on the PATH that the commands get.

    python benchmarks/cli_start.py [--times 20]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hpcresume.config import dump, from_mapping
from hpcresume.run_dir import RunDir

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "status": ["-m", "hpcresume", "status"],
    "logs": ["-m", "hpcresume", "logs", "one"],
    "cancel": ["-m", "hpcresume", "cancel", "--yes", "one"],
}


def make_run(root: Path) -> None:
    """A run with one link that has printed something."""
    config = from_mapping({"name": "one", "train": "x.py", "max_steps": 1}, "benchmark")
    run = RunDir(root / "one")
    run.create(dump(config), cluster="auto", project=root, versions={})
    link = run.claim_link({"host": "nowhere", "pid": 1, "num_tasks": 1})
    link.rank_log(0).write_text("a line\n")


def once(argv: list[str], environ: dict[str, str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *argv], env=environ, capture_output=True, text=True, check=False
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{argv}: {done.stderr}")
    return took


def file_calls(argv: list[str], environ: dict[str, str]) -> int | None:
    """Number of file-system calls, or None without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return None
    command = [strace, "-f", "-c", "-e", "trace=%file", sys.executable, *argv]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    total = re.search(r"^\s*100\.00\s+\S+\s+(?:\S+\s+)?(\d+)\s.*total", done.stderr, re.M)
    return int(total[1]) if total else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_run(Path(name))
        environ = {**os.environ, "HPCRESUME_RUNS": name, "PATH": "/nonexistent"}
        environ["HPCRESUME_SITE"] = os.devnull
        base = 0.0
        print(f"{'command':16} {'median':>9} {'above':>9} {'ratio':>7} {'file calls':>11}")
        for label, argv in COMMANDS.items():
            once(argv, environ)
            median = statistics.median(once(argv, environ) for _ in range(options.times))
            base = base or median
            calls = file_calls(argv, environ)
            print(
                f"{label:16} {1e3 * median:7.1f}ms {1e3 * (median - base):+7.1f}ms "
                f"{median / base:6.1f}x {calls if calls is not None else '-':>11}"
            )


if __name__ == "__main__":
    main()
