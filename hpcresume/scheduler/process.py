"""The one place that starts other programs.

Scheduler clients run with a time-out, a scrubbed environment and closed standard input: what a
job inherited from its own scheduler must not leak into questions and submissions (memory and CPU
variables exclude each other, format variables change the answers).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_SCRUBBED = (
    "SLURM_",
    "SBATCH_",
    "SRUN_",
    "SQUEUE_",
    "SACCT_",
    "SCANCEL_",
    "SINFO_",
    "SALLOC_",
    "PMI",
    "PMIX_",
    "SUBMITIT_",
)
_SCRUBBED_NAMES = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
_KEPT = frozenset({"SLURM_CONF"})


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a running job's scheduler put there; SLURM_CONF stays."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not (name.startswith(_SCRUBBED) or name in _SCRUBBED_NAMES)
    }


def available(program: str, environ: Mapping[str, str]) -> bool:
    """Whether a program is found on an environment's PATH."""
    return shutil.which(program, path=environ.get("PATH", os.defpath)) is not None


@dataclass(frozen=True, kw_only=True)
class Completed:
    """What a program left behind. `timed_out`: it gave no answer and was killed."""

    code: int
    out: str
    err: str
    timed_out: bool = False


def run(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    timeout_s: float,
    cwd: Path | None = None,
    text: str | None = None,
) -> Completed:
    """Run a program to its end; a missing one gives code 127, a silent one `timed_out`."""
    try:
        done = subprocess.run(
            list(argv),
            env=dict(environ),
            cwd=cwd,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            timeout=timeout_s,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Completed(code=-1, out="", err=f"no answer in {timeout_s:g} s", timed_out=True)
    except OSError as error:
        return Completed(code=127, out="", err=f"{argv[0]}: {error.strerror}")
    return Completed(code=done.returncode, out=done.stdout, err=done.stderr)


def spawn(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    output: IO[bytes] | int,
    cwd: Path | None = None,
    new_session: bool = False,
    dies_with_us: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program whose standard output and error go to `output`; nobody waits for it here.

    With `dies_with_us` the kernel kills it when the calling thread ends, however that comes.
    """
    return subprocess.Popen(
        list(argv),
        env=dict(environ),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=new_session,
        # Its one system call needs no lock that a thread could hold.
        preexec_fn=_die_with_parent() if dies_with_us else None,  # noqa: PLW1509
    )


_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> Callable[[], object]:
    """What is called between fork and exec: one system call, for which all is loaded before."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def pid_alive(pid: int) -> bool:
    """Whether a process of this machine exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
