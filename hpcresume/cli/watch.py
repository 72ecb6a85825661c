"""`hpcresume watch`: one run on the whole terminal, through all its jobs."""

from __future__ import annotations

import signal

import click

from hpcresume.cli.options import chosen_run, run_argument, runs_option
from hpcresume.display.terminal import can_redraw


@click.command()
@run_argument
@runs_option
def watch(run: str | None, runs: str | None) -> int:
    """Watch RUN, by default the newest unfinished one, on the whole terminal.

    It follows into the next jobs. q or Ctrl-C leaves it; the job goes on. Where standard output is
    no terminal, it prints a line at every event until the run is over.

    \b
    Examples:
      hpcresume watch
      hpcresume watch quickstart
      hpcresume watch quickstart > events.txt
    """
    from hpcresume.display.watch import watch_lines, watch_screen
    from hpcresume.signals import listen

    chosen = chosen_run(run, runs)
    # So that a run which is none is told before the screen is taken.
    chosen.identify()
    with listen() as flags:
        if can_redraw():
            watch_screen(chosen, flags)
        else:
            watch_lines(chosen, flags, click.echo)
    if flags.count(signal.SIGINT):
        return 130
    return 143 if flags.stop_asked() else 0
