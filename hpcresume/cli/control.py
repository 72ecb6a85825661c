"""`hpcresume cancel`, `hpcresume resume` and `hpcresume drive`."""

from __future__ import annotations

import os
import signal
import sys

import click

from hpcresume.cli.options import chosen_run, run_argument, runs_option
from hpcresume.errors import ChainStopped


@click.command()
@run_argument
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option(
    "--save", is_flag=True, help="Let the running link save first, however long it takes."
)
@runs_option
def cancel(run: str | None, yes: bool, save: bool, runs: str | None) -> int:
    """End the chain of RUN: its waiting jobs first, then the running one.

    That one has the scheduler's grace to save in (often half a minute), or with --save the time
    that it needs.

    \b
    Examples:
      hpcresume cancel toy
      hpcresume cancel toy --save --yes
    """
    from hpcresume.cancel import cancel as end_chain
    from hpcresume.scheduler.job import JobState

    chosen = chosen_run(run, runs)
    if not yes and sys.stdin.isatty():
        click.confirm(f"End the chain of {chosen.name}?", abort=True)
    jobs = end_chain(chosen, os.environ, save=save)
    words = ", ".join(f"{job.id} ({job.state.value})" for job in jobs) or "none was queued"
    click.echo(f"{chosen.name} is cancelled; jobs: {words}.")
    saving = [job.id for job in jobs if job.state is not JobState.PENDING] if save else []
    if saving:
        click.echo(f"Job {', '.join(saving)} saves, and leaves then: hpcresume status shows it.")
    click.echo(f"What is saved stays: hpcresume resume {chosen.name} goes on with it.")
    return 0


@click.command()
@run_argument
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

    \b
    Examples:
      hpcresume resume toy
      hpcresume resume toy --set lr=0.0001 --time 08:00:00
    """
    from hpcresume.cli.submit import begin
    from hpcresume.resumption import ready_to_resume

    chosen = chosen_run(run, runs)
    if time is not None:
        sets = (*sets, f"scheduler.time={time!r}")
    config = ready_to_resume(chosen, sets=sets, environ=os.environ)
    return begin(chosen, config, detach=detach)


@click.command()
@run_argument
@click.option(
    "--every",
    "every_s",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="How often the scheduler is asked.",
)
@runs_option
def drive(run: str | None, every_s: int, runs: str | None) -> int:
    """Keep RUN going from this login node: submit its next job whenever it has none.

    For clusters whose compute nodes may not submit (submit with --set chain.mode=drive). It may be
    ended and started again at any time, on any login node; Ctrl-C leaves the run as it is.

    \b
    Examples:
      hpcresume drive toy
      hpcresume drive toy --every 60
    """
    from hpcresume.chain import Cause
    from hpcresume.display.logging import logging_to
    from hpcresume.drive import drive as keep_going
    from hpcresume.signals import listen

    chosen = chosen_run(run, runs)
    with listen(second_interrupt_kills=True) as flags, logging_to(chosen.train_log):
        click.echo(f"Driving {chosen.name}: its next job is submitted when it has none.")
        over = keep_going(
            chosen,
            os.environ,
            every_s=every_s,
            interrupted=lambda: flags.stop_asked() is not None,
        )
    if over is None:
        click.echo(
            f"{chosen.name} is as it was, and its job goes on; the next one is submitted by: "
            f"hpcresume drive {chosen.name}"
        )
        return 130 if flags.count(signal.SIGINT) else 143
    click.echo(
        f"{chosen.name} {'is finished' if over.kind == 'finished' else 'stops'}: {over.reason}"
    )
    calm = over.kind == "finished" or over.cause in (Cause.CANCELLED, Cause.STOPPED)
    return 0 if calm else ChainStopped.exit_code
