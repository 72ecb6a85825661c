"""Removes a test cluster: its processes, its cgroups, its folder. SlurmCluster starts it.

It waits in a process of its own for its parent's word or its parent's end, because a pytest that
gets SIGKILL can clean up nothing.
"""

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def processes(folder: Path, nodes: list[str]) -> set[int]:
    """The living processes of these nodes' steps, and all that have the SLURM_CONF of folder.

    The cgroups find the tasks that cleared their environment; the environment finds the daemons,
    and everything where Slurm runs without cgroups.
    """
    found = step_processes(nodes)
    wanted = b"SLURM_CONF=" + os.fsencode(folder / "slurm.conf")
    for process in Path("/proc").glob("[0-9]*"):
        if wanted in _read(process / "environ").split(b"\0"):
            found.add(int(process.name))
    return found - {os.getpid(), os.getppid()}


def step_processes(nodes: list[str]) -> set[int]:
    """The tasks on these nodes and the slurmstepd of each step; none without cgroups."""
    found: set[int] = set()
    for cgroup in _cgroups(nodes):
        for members in cgroup.rglob("cgroup.procs"):
            found.update(int(line) for line in _read(members).split())
    return found


def kill(living: Callable[[], set[int]], nodes: list[str], timeout_s: float = 20) -> None:
    """SIGKILL what living() finds on these nodes until it finds nothing more."""
    deadline = time.monotonic() + timeout_s
    while left := living():
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # Slurm freezes a step while it kills it; left frozen, the step would outlive SIGKILL.
        for cgroup in _cgroups(nodes):
            for state in cgroup.rglob("freezer.state"):
                with contextlib.suppress(OSError):
                    state.write_text("THAWED")
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes of a test cluster survive SIGKILL: {sorted(left)}")
        time.sleep(0.02)


def clean(folder: Path, nodes: list[str], timeout_s: float = 20) -> None:
    """Leave nothing of the cluster in folder; what could not be removed in time is an error."""
    kill(lambda: processes(folder, nodes), nodes, timeout_s)
    deadline = time.monotonic() + timeout_s
    while cgroups := _cgroups(nodes):
        for cgroup in cgroups:
            _remove_cgroup(cgroup)
        if time.monotonic() > deadline:
            raise TimeoutError(f"cgroups of a test cluster are still in use: {cgroups}")
    shutil.rmtree(folder)


def _cgroups(nodes: list[str]) -> list[Path]:
    """What slurmd made for these nodes: one folder in each controller of cgroup v1."""
    return [path for node in nodes for path in CGROUPS.glob(f"*/slurm_{node}")]


def _remove_cgroup(cgroup: Path) -> None:
    """Remove cgroup and those below it, as far as their last processes are gone."""
    for folder, _, _ in os.walk(cgroup, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            time.sleep(0.01)


def _read(path: Path) -> bytes:
    """What the file holds; nothing if its process or cgroup is gone or closed to us."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def main(folder: str, *nodes: str) -> None:
    """Wait for a byte on stdin, its end, or the parent's end; then clean."""
    parent = os.getppid()
    # A forked child of pytest may keep the pipe open for longer than pytest lives.
    while os.getppid() == parent and not select.select([sys.stdin], [], [], 1)[0]:
        pass
    clean(Path(folder), list(nodes))


if __name__ == "__main__":
    main(*sys.argv[1:])
