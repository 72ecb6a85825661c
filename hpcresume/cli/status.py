"""`hpcresume status`: how the runs stand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import click

from hpcresume import status as statuses
from hpcresume.cli.options import no_run, root_of, run_argument, runs_option
from hpcresume.errors import NotFound
from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.overview import Overview, OverviewTail
from hpcresume.run_dir import RunDir, all_runs, find_run

SCHEMA_VERSION = 1


@click.command()
@run_argument
@click.option("-a", "--all", "everything", is_flag=True, help="Finished runs too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--exit-code",
    is_flag=True,
    help="0 complete, 10 running, 11 waiting, 12 stopped, 20 failed, 21 stalled.",
)
@runs_option
def status(
    run: str | None, everything: bool, as_json: bool, exit_code: bool, runs: str | None
) -> int:
    """Show unfinished runs and the newest finished one, or RUN.

    \b
    Examples:
      hpcresume status
      hpcresume status toy --json
      hpcresume status toy --exit-code
    """
    root = root_of(runs)
    chosen = [find_run(run, root)] if run else all_runs(root)
    if not chosen:
        raise no_run(root)
    if not as_json:
        # Said before the scheduler is asked, which may take its time.
        click.echo(f"{chosen[0].path if run else root}", nl=True)
    seen = _look(root, chosen, everything=everything or bool(run), add_up=as_json or bool(run))
    rows, damaged = list(seen.runs.values()), seen.damaged
    if not rows:
        raise NotFound(damaged[0])
    for sentence in damaged:
        click.echo(f"hpcresume: {sentence}", err=True)
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "runs": [row.to_json() for row in rows]}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        from hpcresume.display.tables import status_table

        click.echo(status_table(rows))
    return statuses.EXIT_CODES[rows[0].state] if exit_code and rows else 0


def _look(root: Path, runs: Sequence[RunDir], *, everything: bool, add_up: bool) -> Overview:
    """How runs stand; a damaged one does not hide the others."""
    jobs = LivingJobs(os.environ)
    tail = OverviewTail(root, jobs, all_complete=everything, add_up=add_up)
    return tail.look(runs)
