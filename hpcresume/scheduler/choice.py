"""Which scheduler a run's jobs are given to.

It is chosen once, when the run is made, and stands in run.json: a compute node without Slurm's
clients must not take the run for a local one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import Scheduler
from hpcresume.scheduler.process import available, scrubbed

if TYPE_CHECKING:
    from hpcresume.config import SchedulerConfig


def chosen_cluster(cluster: str, environ: Mapping[str, str]) -> str:
    """slurm, local or debug; "auto" is Slurm where sbatch is found, else this machine."""
    if cluster != "auto":
        return cluster
    return "slurm" if available("sbatch", environ) else "local"


def scheduler_of(
    run: RunDir,
    cluster: str,
    environ: Mapping[str, str],
    config: SchedulerConfig | None = None,
    callable_of: Callable[[Path], Any] | None = None,
) -> Scheduler:
    """The scheduler of a chosen cluster, slurm or local.

    To submit it needs the run's `config`, and for Slurm `callable_of`, which makes what a job
    executes from the run's path; without them it answers questions and cancels.
    """
    if cluster == "slurm":
        from hpcresume.config import SchedulerConfig
        from hpcresume.scheduler.slurm import SlurmScheduler

        launcher = None
        if callable_of is not None:
            from hpcresume.scheduler.launcher import SubmititLauncher

            launcher = SubmititLauncher(callable_of)
        return SlurmScheduler(config or SchedulerConfig(), environ=environ, launcher=launcher)
    from hpcresume.scheduler.local import LocalScheduler

    grace = {"grace_s": config.grace_s} if config else {}
    return LocalScheduler(run, local_command(run), **grace)


def local_command(run: RunDir) -> list[str]:
    """What each job of a run executes on this machine."""
    return [sys.executable, "-m", "hpcresume", "link", str(run.path)]


def asking_scheduler(run: RunDir, environ: Mapping[str, str]) -> Scheduler | None:
    """The scheduler of a run, to ask and to cancel; None where its links need none (debug)."""
    cluster = str(run.identify()["cluster"])
    if cluster == "debug":
        return None
    return scheduler_of(run, cluster, scrubbed(environ))
