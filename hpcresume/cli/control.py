"""`hpcresume cancel` and `hpcresume resume`."""

from __future__ import annotations

import os
import sys

import click

from hpcresume.cli.options import chosen_run, runs_option


@click.command()
@click.argument("run", required=False)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@runs_option
def cancel(run: str | None, yes: bool, runs: str | None) -> int:
    """End the chain of RUN: its waiting jobs first, then the running one, which saves."""
    from hpcresume.cancel import cancel as end_chain

    chosen = chosen_run(run, runs)
    if not yes and sys.stdin.isatty():
        click.confirm(f"End the chain of {chosen.name}?", abort=True)
    jobs = end_chain(chosen, os.environ)
    words = ", ".join(f"{job.id} ({job.state.value})" for job in jobs) or "none was queued"
    click.echo(f"{chosen.name} is cancelled; jobs: {words}.")
    click.echo(f"What is saved stays: hpcresume resume {chosen.name} goes on with it.")
    return 0


@click.command()
@click.argument("run", required=False)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="a.b=VALUE",
    help="Change a value from here on; lr=0.01 and the like are the optimizer's.",
)
@click.option("--time", "time", metavar="TIME", help="Time limit of the further jobs.")
@click.option("--detach", is_flag=True, help="Local backend: do not wait, survive the terminal.")
@runs_option
def resume(
    run: str | None, sets: tuple[str, ...], time: str | None, detach: bool, runs: str | None
) -> int:
    """Go on with RUN from its newest verified checkpoint.

    One that is complete goes on where its end is raised: --set epochs=200, or --set max_steps=N.
    """
    from hpcresume import submit as verbs
    from hpcresume.cli.submit import begin

    chosen = chosen_run(run, runs)
    if time is not None:
        sets = (*sets, f"scheduler.time={time!r}")
    config = verbs.ready_to_resume(chosen, sets=sets, environ=os.environ)
    return begin(chosen, config, detach=detach)
