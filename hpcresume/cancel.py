"""Ends a run's chain: the request first, then its waiting jobs, then the running one."""

from __future__ import annotations

import time
from collections.abc import Mapping

from hpcresume import files
from hpcresume.errors import NotFound
from hpcresume.journal import Journal
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.choice import asking_scheduler
from hpcresume.scheduler.job import JobInfo, JobState
from hpcresume.story import find_jobs, read_story, user_name


def cancel(run: RunDir, environ: Mapping[str, str], *, save: bool = False) -> list[JobInfo]:
    """End a run's chain: the request first, then its waiting jobs, then the running one.

    A job that is cancelled has the scheduler's grace to save in, often half a minute. With `save`
    the running one is left alone: its link sees the request, saves however long that takes, and
    ends the chain. Returns the jobs that were alive. Raises NotFound where nothing was, or
    Unavailable: the request stands all the same, and the links obey it.
    """
    story = read_story(run)
    if story.completed:
        raise NotFound(f"{run.name} is complete: there is nothing to cancel.")
    by = user_name()
    files.write_json(run.cancel, {"by": by, "t": round(time.time(), 3)})
    journal = Journal(run.submissions, link=0, job=None)
    journal.write("cancelled", by=by, save=save)
    journal.close()
    scheduler = asking_scheduler(run, environ)
    if scheduler is None:
        return []
    jobs = find_jobs(scheduler, story.run_id)
    # A job that starts at this very moment finds the request before it trains.
    doomed = [job.id for job in jobs if not save or job.state is JobState.PENDING]
    scheduler.cancel(doomed)
    return jobs
