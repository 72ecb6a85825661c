"""`hpcresume report`: one run as a file, to keep, to send, or for a lab notebook."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from hpcresume import files
from hpcresume.cli.options import chosen_run, run_argument, runs_option
from hpcresume.errors import UsageError
from hpcresume.observe.jobs import LivingJobs


@click.command()
@run_argument
@click.option("--html", type=click.Path(path_type=Path), help="The page, as one file; - prints it.")
@click.option(
    "--md", type=click.Path(path_type=Path), help="Markdown, for a lab notebook; - prints it."
)
@runs_option
def report(run: str | None, html: Path | None, md: Path | None, runs: str | None) -> int:
    """Write how RUN stands into a file: curves, links, checkpoints, journal, the log's end.

    The page needs no server and no network; a file of that name is replaced.

    \b
    Examples:
      hpcresume report toy --html toy.html
      hpcresume report toy --md toy.md
    """
    from hpcresume.display.notebook import markdown_report
    from hpcresume.display.web.explained import ExplainedView
    from hpcresume.display.web.report import html_report

    if html is None and md is None:
        raise UsageError("Say where to: --html FILE, --md FILE, or both.")
    chosen = chosen_run(run, runs)
    shown = ExplainedView(chosen).look(*LivingJobs(os.environ).of(chosen))
    shown["made"] = round(time.time())
    for path, write in ((html, html_report), (md, markdown_report)):
        if path is None:
            continue
        text = write(shown)
        if str(path) == "-":
            click.echo(text.encode(errors="replace"), nl=False)
            continue
        files.write_durably(path.absolute(), text.encode(errors="replace"), 0o644)
        click.echo(path)
    return 0
