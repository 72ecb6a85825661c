"""What submitting a run would do, without doing it: `hpcresume submit --dry-run`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hpcresume.config import RunConfig, format_time, parse_time
from hpcresume.display.tables import ago, day_and_hour
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import process
from hpcresume.scheduler.choice import chosen_cluster, local_command
from hpcresume.scheduler.job import JobSpec
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.submit import FIRST_LEAD_S, check_limits
from hpcresume.successors import job_spec


def first_job(config: RunConfig, root: Path, *, project: Path, environ: Mapping[str, str]) -> str:
    """The exact batch script of a run's first job; on this machine, what would run instead."""
    cluster = chosen_cluster(config.scheduler.cluster, environ)
    if cluster == "slurm":
        from hpcresume.scheduler.launcher import command_line, prepare_lines
        from hpcresume.scheduler.script import render

        spec = _spec(config, root, project, environ)
        return render(spec, config.scheduler, command_line(spec), prepare=prepare_lines(spec))
    run = _run(config, root)
    command = shlex.join(local_command(run))
    if cluster == "debug":
        how = "within this very process, one link after the other"
    else:
        limit = None if config.scheduler.time is None else parse_time(config.scheduler.time)
        most = "without a time limit" if limit is None else f"for {format_time(limit)} at most"
        how = f"on this machine, {most}, again and again until training is complete"
    return f"# {how}, in {project}:\n{command}\n"


def first_start(
    config: RunConfig,
    root: Path,
    *,
    project: Path,
    environ: Mapping[str, str],
    now: float,
) -> str | None:
    """When Slurm would start the first job, as a sentence; None where Slurm has no say.

    `now` is Unix time. Raises ConfigError for what sbatch --test-only does not look at,
    SubmissionRejected with Slurm's words, and Unavailable.
    """
    if chosen_cluster(config.scheduler.cluster, environ) != "slurm":
        return None
    check_limits(_run(config, root), config, environ)
    clean = process.scrubbed(environ)
    scheduler = SlurmScheduler(config.scheduler, environ=clean, launcher=None)
    spec = replace(_spec(config, root, project, environ), environment=clean)
    found = scheduler.test_only(spec)
    if found.at is None:
        return f"Slurm says: {found.words}"
    wait_s = max(0.0, found.at - now)
    when = f"in {ago(wait_s)}, at {day_and_hour(found.at, now)}" if wait_s >= 60 else "at once"
    where = f", on {found.nodes}" if found.nodes else ""
    return f"Slurm would start the first job {when}{where}, as the queue is now."


def _run(config: RunConfig, root: Path) -> RunDir:
    assert config.name is not None
    return RunDir(root / config.name)


def _spec(config: RunConfig, root: Path, project: Path, environ: Mapping[str, str]) -> JobSpec:
    return job_spec(
        _run(config, root),
        config,
        lead_s=config.chain.lead_s or FIRST_LEAD_S,
        project=project,
        run_id="RUN-ID",
    )
