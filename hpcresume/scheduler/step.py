"""Starts the ranks of a link, and ends them: with srun on Slurm, as plain processes elsewhere.

The supervisor tells the ranks to save and leave through the link's STOP file, which reaches them
in containers and behind wrappers as well. Signals are the second way: srun turns SIGTERM, SIGHUP
and SIGQUIT into SIGKILL for its tasks, so that `stop` goes through Slurm and never through srun.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hpcresume.config import SchedulerConfig, node_range
from hpcresume.errors import ConfigError, Unavailable
from hpcresume.scheduler import process, slurm_text
from hpcresume.scheduler.environment import PLACE_VARIABLES, Allocation
from hpcresume.scheduler.script import container_prefix, output_pattern
from hpcresume.scheduler.slurm_clients import SlurmClients

log = logging.getLogger(__name__)

#: The step's name in Slurm's records.
_STEP_NAME = "hpcresume"
#: Between SIGTERM and SIGKILL for the other ranks, when one has failed.
_KILL_AFTER_S = 2.0
_POLL_S = 0.02
_STDERR = 2


class _Child(Protocol):
    """What is used of the processes that `process.spawn` starts."""

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


class Step(Protocol):
    """The ranks of one link, running."""

    def poll(self) -> int | None:
        """The largest exit code (128 + signal) when all have ended, None before.

        When one rank fails the others are ended: they would wait for it for ever.
        """

    def stop(self) -> None:
        """Send SIGTERM to the ranks, who then save and leave; no error if that fails."""

    def show_stacks(self) -> None:
        """Send SIGQUIT to the ranks, who print what all their threads are at; no error if not."""

    def kill(self) -> None:
        """End all ranks now; nothing if they have ended."""

    def wait(self, timeout_s: float) -> int | None:
        """`poll` until the ranks have ended, or the time is over."""


def start(
    allocation: Allocation,
    config: SchedulerConfig,
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    log: Callable[[int | str], Path],
    num_tasks: int,
    run: Path,
) -> Step:
    """Start `num_tasks` ranks that execute `argv`, each with a log of its own.

    They get this process's environment and, besides, `environ`. `log` names the log of a rank,
    and with "%t" srun's pattern for all of them. Raises ConfigError.
    """
    srun_options, prefix = container_prefix(config.container, run)
    inherited = {k: v for k, v in os.environ.items() if k not in PLACE_VARIABLES}
    environment = {**inherited, **environ}
    command = [*prefix, *argv]
    if allocation.scheduler != "slurm":
        if srun_options:
            raise ConfigError("scheduler.container.runtime: pyxis needs Slurm; try apptainer.")
        return _LocalStep(_start_processes(command, environment, log, num_tasks))
    output = output_pattern(log("%t"))
    least, most = node_range(config.nodes)
    each = config.tasks_per_node if least != most else None
    srun = srun_command(allocation, environment, output, num_tasks, each)
    # srun's own words go where this process's do: into the log of the job.
    spawned = process.spawn([*srun, *srun_options, *command], environ=environment, output=_STDERR)
    assert allocation.job_id is not None
    return _SrunStep(spawned, allocation.job_id, SlurmClients(environment))


def srun_command(
    allocation: Allocation,
    environ: Mapping[str, str],
    output: str,
    num_tasks: int,
    each: int | None = None,
) -> list[str]:
    """srun and its options, but for the container's.

    `each`: how many ranks a node gets, where the job itself could not name them.

    Memory, GPUs and tasks per node are the job's: srun takes them from the environment of the
    batch script, as it does all that is not said here. So no SLURM_* variable is removed for it.
    """
    options = {
        "job-name": _STEP_NAME,
        "kill-on-bad-exit": 1,
        "input": "none",
        "export": "ALL",
        "output": output,
        "open-mode": "append",
        "nodes": min(allocation.num_nodes, num_tasks),
        "ntasks": num_tasks,
    }
    # From 22.05 on srun does not inherit this one, and would give every rank a single CPU.
    if environ.get("SLURM_CPUS_PER_TASK"):
        options["cpus-per-task"] = environ["SLURM_CPUS_PER_TASK"]
    if each is not None:
        options["ntasks-per-node"] = each
    return ["srun", "--unbuffered", *(f"--{name}={value}" for name, value in options.items())]


def _start_processes(
    command: Sequence[str],
    environ: Mapping[str, str],
    log: Callable[[int | str], Path],
    num_tasks: int,
) -> list[_Child]:
    ranks: list[_Child] = []
    try:
        for rank in range(num_tasks):
            place = {
                "HPCRESUME_RANK": str(rank),
                "HPCRESUME_WORLD_SIZE": str(num_tasks),
                "HPCRESUME_LOCAL_RANK": str(rank),
                "HPCRESUME_NODE_RANK": "0",
            }
            with log(rank).open("ab") as output:
                # In this process group, because the local driver ends a job by killing its group.
                ranks.append(process.spawn(command, environ={**environ, **place}, output=output))
    except BaseException:
        for started in ranks:
            started.kill()
            started.wait()
        raise
    return ranks


class _SrunStep:
    """Ranks under srun, which ends them all when one fails."""

    def __init__(self, srun: _Child, job_id: str, clients: SlurmClients) -> None:
        self._srun = srun
        self._job_id = job_id
        self._clients = clients

    def poll(self) -> int | None:
        return _exit_code(self._srun)

    def stop(self) -> None:
        self._signal("TERM")

    def show_stacks(self) -> None:
        self._signal("QUIT")

    def _signal(self, name: str) -> None:
        # Through the controller, which hands it to the tasks: srun itself would kill them for it.
        try:
            listed = self._clients.call(
                *("squeue", "--noheader", "--steps", f"--jobs={self._job_id}", "--format=%i|%j")
            )
            ids = slurm_text.parse_step_ids(listed.out, _STEP_NAME)
            if ids:
                self._clients.call("scancel", f"--signal={name}", *ids)
        except Unavailable as error:
            log.warning("The ranks got no SIG%s: %s", name, error)

    def kill(self) -> None:
        # The first SIGTERM makes srun kill its tasks, on every node, without the controller.
        if self._srun.poll() is None:
            self._srun.terminate()

    def wait(self, timeout_s: float) -> int | None:
        return _wait(self, timeout_s)


class _LocalStep:
    """Ranks as children of this process, with srun's --kill-on-bad-exit rebuilt."""

    def __init__(self, ranks: Sequence[_Child]) -> None:
        self._ranks = ranks
        self._kill_at: float | None = None

    def poll(self) -> int | None:
        codes = [_exit_code(rank) for rank in self._ranks]
        if any(codes) and self._kill_at is None:
            self._kill_at = time.monotonic() + _KILL_AFTER_S
            self.stop()
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self.kill()
        ended = [code for code in codes if code is not None]
        return max(ended) if len(ended) == len(codes) else None

    def stop(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.terminate()

    def show_stacks(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGQUIT)

    def kill(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()

    def wait(self, timeout_s: float) -> int | None:
        return _wait(self, timeout_s)


def _exit_code(started: _Child) -> int | None:
    code = started.poll()
    return 128 - code if code is not None and code < 0 else code


def _wait(step: Step, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while (code := step.poll()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return code
