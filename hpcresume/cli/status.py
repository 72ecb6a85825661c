"""`hpcresume status`: how the runs stand."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from hpcresume import status as statuses
from hpcresume.cli.options import chosen_run, no_run, root_of, run_argument, runs_option
from hpcresume.errors import NotFound, UsageError
from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.overview import Overview, OverviewTail
from hpcresume.run_dir import RunDir, all_runs, find_run

if TYPE_CHECKING:
    from hpcresume.display.again import Look
    from hpcresume.observe.plan import RunPlan

SCHEMA_VERSION = 1
#: How old squeue's answer may be where the state is shown again and again.
_JOBS_S = 10.0


@click.command()
@run_argument
@click.option("-a", "--all", "everything", is_flag=True, help="All that are complete, too.")
@click.option("--plan", is_flag=True, help="The checkpoints to come: step, time, link.")
@click.option("-w", "--watch", "again", is_flag=True, help="Again every few seconds; q leaves.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option(
    "--exit-code",
    is_flag=True,
    help="0 complete, 10 running, 11 waiting, 12 stopped, 20 failed, 21 stalled.",
)
@runs_option
def status(
    run: str | None,
    everything: bool,
    plan: bool,
    again: bool,
    as_json: bool,
    exit_code: bool,
    runs: str | None,
) -> int:
    """Show unfinished runs and the newest that is complete, or RUN.

    Without RUN, --plan is of the newest unfinished run. -w asks squeue every ten seconds at most;
    where standard output is no terminal, it prints a block every half minute until all runs shown
    are at rest.

    \b
    Examples:
      hpcresume status
      hpcresume status toy --plan
      hpcresume status -w
      hpcresume status toy --json
      hpcresume status toy --exit-code
    """
    if again and (as_json or exit_code):
        raise UsageError("-w shows the state again and again: leave out --json and --exit-code.")
    root = root_of(runs)
    one = chosen_run(run, runs) if plan and run is None else find_run(run, root) if run else None
    chosen = all_runs(root) if one is None else [one]
    if not chosen:
        raise no_run(root)
    jobs = LivingJobs(os.environ, **({"max_age_s": _JOBS_S} if again else {}))
    tail = OverviewTail(
        root, jobs, all_complete=everything or one is not None, add_up=as_json or one is not None
    )
    head = str(one.path if one is not None else root)

    def planned(seen: Overview) -> RunPlan | None:
        return _plan(one, seen, jobs) if plan and one is not None else None

    if again:
        return _show_again(lambda: _again(head, tail, one, planned, everything))
    if not as_json:
        # Said before the scheduler is asked, which may take its time.
        click.echo(head)
    seen = tail.look(chosen)
    rows = _rows(seen)
    if as_json:
        document: dict[str, Any] = {"runs": [row.to_json() for row in rows]}
        if (found := planned(seen)) is not None:
            document["plan"] = found.to_json()
        document["schema_version"] = SCHEMA_VERSION
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        click.echo(_text(rows, one, planned(seen), everything))
    for sentence in seen.damaged:
        click.echo(f"hpcresume: {sentence}", err=True)
    return statuses.EXIT_CODES[rows[0].state] if exit_code else 0


def _rows(seen: Overview) -> list[statuses.RunStatus]:
    """At least one; raises what was in the way where all are damaged, or none is there."""
    if not seen.runs:
        # The folder may be away for a while.
        raise seen.errors[0] if seen.errors else NotFound("No run is there any more.")
    return list(seen.runs.values())


def _plan(run: RunDir, seen: Overview, jobs: LivingJobs) -> RunPlan:
    from hpcresume.observe.plan import plan_of

    return plan_of(run, _rows(seen)[0], jobs.of(run)[0])


def _text(
    rows: Sequence[statuses.RunStatus], one: RunDir | None, plan: RunPlan | None, everything: bool
) -> str:
    if one is None:
        from hpcresume.display.tables import status_table

        return status_table(rows)
    from hpcresume.display.standing import plan_table, standing

    if plan is None:
        return standing(rows[0])
    return f"{standing(rows[0])}\n\n{plan_table(plan, everything=everything)}"


# ---- again and again -----------------------------------------------------------------------


def _again(
    head: str,
    tail: OverviewTail,
    one: RunDir | None,
    planned: Callable[[Overview], RunPlan | None],
    everything: bool,
) -> Look:
    """One look, whose troubles are shown in its place."""
    from hpcresume.display.again import Look
    from hpcresume.errors import HpcResumeError

    try:
        seen = tail.look(None if one is None else [one])
        text = _text(_rows(seen), one, planned(seen), everything)
    except (HpcResumeError, OSError) as error:
        return Look(f"{head}\n{error}")
    alive = any(row.state in ("running", "waiting") for row in seen.runs.values())
    return Look("\n".join([head, text, *seen.damaged]), over=not alive)


def _show_again(look: Callable[[], Look]) -> int:
    import signal

    from hpcresume.display import again
    from hpcresume.display.terminal import can_redraw
    from hpcresume.signals import listen

    with listen() as flags:
        if can_redraw():
            again.screen(look, flags)
        else:
            again.blocks(look, flags, click.echo)
    if flags.count(signal.SIGINT):
        return 130
    return 143 if flags.stop_asked() else 0
