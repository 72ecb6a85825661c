"""The run of a user's own batch script, which ends in `hpcresume link CONFIG`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcresume import files
from hpcresume.checkpoint.origin import check_same, find_origin
from hpcresume.config import RunConfig, difference, read_frozen
from hpcresume.errors import ConfigError, RunLive
from hpcresume.resumption import ready_to_resume
from hpcresume.run_dir import RunDir, is_run
from hpcresume.scheduler import process
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.story import live_jobs, read_story
from hpcresume.submit import (
    check_origin,
    check_takes_origin,
    first_spec,
    prepare,
    read_config,
    record_submitted,
)


def adopt_batch(
    path: Path | None,
    *,
    sets: Sequence[str],
    root: Path,
    environ: Mapping[str, str],
    resume: str | None = None,
    trust: bool = False,
) -> RunDir:
    """The run that a job of a user's own batch script works on: a new one, or one that rests.

    The script and the job's real options are frozen into the run, so that every further link gets
    the same job, whatever stood on sbatch's command line. A new run begins with `resume`, if that
    names anything. Raises RunLive where it is live.
    """
    config = read_config(path, sets=sets, options={}, environ=environ)
    assert config.name is not None
    run = RunDir(root / config.name)
    job = environ.get("SLURM_JOB_ID")
    if is_run(run.path):
        if resume is not None:
            check_same(run, resume, root)
        _check_rests(run, config, environ)
        if read_story(run).completed:
            return run
        ready_to_resume(run, sets=(), environ=environ, me=job)
    else:
        origin = None if resume is None else find_origin(resume, root, trust=trust)
        if origin is not None:
            check_takes_origin(config)
            check_origin(origin, config, environ)
        run = prepare(config, root, project=Path.cwd(), environ=environ, origin=origin)
    if job:
        clean = process.scrubbed(environ)
        scheduler = SlurmScheduler(config.scheduler, environ=clean, launcher=None)
        text, options = scheduler.frozen_script(job)
        files.write_durably(run.script, text.encode(), mode=0o700)
        files.write_json(run.script_options, list(options))
        # From here on `status` and `cancel` find this job like those that we submit.
        scheduler.mark(job, first_spec(run, read_frozen(run.config)).token)
    record_submitted(run, None, job)
    return run


def _check_rests(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Let a further job of a user's script go on with a run, unless that is live or another one.

    What the script asks of Slurm, and who is notified, is no difference.
    """
    where = live_jobs(run, environ, me=environ.get("SLURM_JOB_ID"))
    if where:
        raise RunLive(f"{run.name} is live: {where}. `hpcresume status` shows it.")
    changed = difference(read_frozen(run.config), config)
    changed = [line for line in changed if not line.startswith(("scheduler.", "notify"))]
    if changed:
        lines = "\n  ".join(changed)
        raise ConfigError(
            f"{run.path} belongs to another configuration:\n  {lines}\nGo on with the old one by "
            f"`hpcresume resume {run.name}`, or give the new run another name."
        )
