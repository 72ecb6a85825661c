"""`hpcresume status`: how the runs stand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import click

from hpcresume import status as statuses
from hpcresume.cli.options import no_run, root_of, run_argument, runs_option
from hpcresume.errors import NotFound
from hpcresume.observe.jobs import LivingJobs
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
    rows, damaged = _read_all(chosen)
    if damaged and not rows:
        raise damaged[0]
    for error in damaged:
        click.echo(f"hpcresume: {error}", err=True)
    if not run and not everything:
        rows = _interesting(rows)
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "runs": [row.to_json() for row in rows]}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        from hpcresume.display.tables import status_table

        click.echo(status_table(rows))
    return statuses.EXIT_CODES[rows[0].state] if exit_code and rows else 0


def _read_all(runs: Sequence[RunDir]) -> tuple[list[statuses.RunStatus], list[NotFound]]:
    """How runs stand; a damaged one must not hide the others."""
    rows: list[statuses.RunStatus] = []
    damaged: list[NotFound] = []
    living = LivingJobs(os.environ)
    for run in runs:
        try:
            jobs, note = living.of(run)
            rows.append(statuses.read_status(run, jobs, note))
        except NotFound as error:
            damaged.append(error)
    return rows, damaged


def _interesting(rows: Sequence[statuses.RunStatus]) -> list[statuses.RunStatus]:
    finished = [row for row in rows if row.state == "complete"][:1]
    return [row for row in rows if row.state != "complete" or row in finished]
