"""What benchmarks that start a real Slurm of their own have in common."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from slurm_cluster import SlurmCluster  # noqa: E402

__all__ = ["SlurmCluster", "bare", "environ", "lines", "python"]


def environ(cluster: SlurmCluster) -> dict[str, str]:
    """For a process whose jobs go to this cluster."""
    return {**os.environ, **cluster.env, "OMP_NUM_THREADS": "1", "HPCRESUME_SITE": os.devnull}


def python(cluster: SlurmCluster, folder: Path, *argv: str) -> str:
    """What Python wrote, run in a folder and in that environment."""
    command = [sys.executable, *argv]
    done = subprocess.run(
        command, cwd=folder, env=environ(cluster), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


def bare(cluster: SlurmCluster, folder: Path, pairs: int) -> list[float]:
    """Seconds from the last word of a job to torch imported in the one that depends on it."""
    gaps = []
    for number in range(pairs):
        times = folder / f"bare-{number}"
        command = f"exec '{sys.executable}' -c"
        note = f"open({str(times)!r}, 'a').write(f'{{time.time()}}\\n')"
        first = _sbatch(cluster, folder, f'{command} "import torch, time; time.sleep(2); {note}"')
        _sbatch(cluster, folder, f'{command} "import torch, time; {note}"', first)
        ended, imported = lines(times, 2)
        gaps.append(imported - ended)
    return gaps


def _sbatch(cluster: SlurmCluster, folder: Path, command: str, after: str | None = None) -> str:
    script = folder / "bare.sh"
    script.write_text(f"#!/bin/bash\n{command}\n")
    depends = [f"--dependency=afterany:{after}"] if after else []
    output = f"--output={folder}/bare.log"
    return cluster.run("sbatch", "--parsable", "--time=1", output, *depends, str(script)).strip()


def lines(path: Path, count: int, timeout_s: float = 400) -> list[float]:
    """The last words of a file's lines, once there are so many."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists():
            found = [float(line.split()[-1]) for line in path.read_text().splitlines()]
            if len(found) >= count:
                return found
        time.sleep(0.1)
    raise SystemExit(f"{path} did not get {count} lines in {timeout_s:g} s")
