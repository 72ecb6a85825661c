"""`hpcresume doctor`: what a chain meets on this cluster, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hpcresume import files
from hpcresume.cli.options import root_of, runs_option
from hpcresume.config import RunConfig, default_path, load, node_range, parse_time
from hpcresume.display.terminal import WIDEST, styled, terminal_width, wrapped
from hpcresume.scheduler.choice import chosen_cluster
from hpcresume.scheduler.doctor import disk, questions
from hpcresume.scheduler.doctor.checks_machine import judge_files, judge_local, judge_python
from hpcresume.scheduler.doctor.checks_node import judge_probe
from hpcresume.scheduler.doctor.checks_slurm import judge_slurm, submit_slots
from hpcresume.scheduler.doctor.facts import Finding, ProbeFacts, SlurmFacts, Wishes
from hpcresume.scheduler.doctor.questions import Pending
from hpcresume.scheduler.doctor.verdict import judge_way, tally
from hpcresume.scheduler.doctor.way import Way, choose_way, circumstances

SCHEMA_VERSION = 1
_NAME_WIDTH = 15
_MARKS = {"good": "✔", "warning": "▲", "failure": "✖"}
_ASCII = {"good": "+", "warning": "!", "failure": "x"}
_STYLES = {"good": "good", "warning": "warning", "failure": "bad"}


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("-p", "--partition", help="Partition, or several with commas.")
@click.option("-A", "--account", help="Account that is charged.")
@click.option("-q", "--qos", help="Quality of service.")
@click.option(
    "--cluster", type=click.Choice(["auto", "slurm", "local", "debug"]), help="Where jobs run."
)
@click.option("--time", "time", metavar="TIME", help="Time limit of each job, as for submit.")
@click.option(
    "--set", "sets", multiple=True, metavar="a.b=VALUE", help="Set a configuration value."
)
@click.option(
    "--sbatch", "extra", multiple=True, metavar="KEY=VALUE", help="Goes to sbatch untouched."
)
@runs_option
@click.option("--probe", "probing", is_flag=True, help="Have a small job look at a compute node.")
@click.option(
    "--wait",
    "wait_s",
    type=click.IntRange(min=1),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="How long that job may take to start.",
)
@click.option("--strict", is_flag=True, help="Exit code 1 where there are warnings.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(
    config: Path | None,
    runs: str | None,
    probing: bool,
    wait_s: int,
    strict: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    """Check what matters to a chain here: Slurm, the folder of runs, torch.

    CONFIG is a configuration as for submit; by default the same one, or none. Ends with the way in
    which the next job would be queued. Exit code 4 for failures.

    \b
    Examples:
      hpcresume doctor
      hpcresume doctor --partition gpu --probe
    """
    here = Path.cwd()
    path = config or default_path(here)
    settings = load(path, sets=flags["sets"], options=_options(flags), environ=os.environ)
    root = root_of(runs)
    report = _Report(silent=as_json)
    # Said before anything is asked, which may take its time.
    report.say(f"{root}" + (f", as {_short(path, here)} asks" if path else ""))
    wishes = _wishes(settings, root)
    way = _examine(settings, root, wishes, report, wait_s if probing else None)
    count = tally(report.findings())
    report.say("\n" + count.words())
    if as_json:
        document = report.document(way, wishes)
        click.echo(files.to_json(document, indent=2).decode(), nl=False)
    return count.exit_code(strict=strict)


def _short(path: Path, here: Path) -> Path:
    return path.relative_to(here) if path.is_relative_to(here) else path


# ---- asking ------------------------------------------------------------------------------


def _examine(
    settings: RunConfig, root: Path, wishes: Wishes, report: _Report, wait_s: float | None
) -> Way:
    """Report section by section, and return the way that suits.

    All questions are asked at once, and the quickest answers shown first. A compute node is looked
    at where `wait_s` says how long that may take to begin.
    """
    on_slurm = wishes.cluster == "slurm"
    asked_slurm = Pending(lambda: questions.ask_slurm(os.environ)) if on_slurm else None
    asked_python = Pending(lambda: questions.ask_python(os.environ))
    place = disk.ask_files(root, os.environ)
    report.add("Files", judge_files(place, wishes))
    slurm = (asked_slurm.answer() if asked_slurm else None) or SlurmFacts(missing=("sbatch",))
    report.add("Scheduler", judge_slurm(slurm, wishes))
    if not on_slurm:
        report.add("Scheduler", judge_local(questions.ask_local(os.environ), wishes))
    python = asked_python.answer()
    assert python is not None
    report.add("Python", judge_python(python, wishes))
    probe = None
    if wait_s is not None and on_slurm:
        if "sbatch" in slurm.missing or "config" in slurm.complaints:
            probe = ProbeFacts(complaint="not tried: Slurm gives no answer")
        else:
            probe = _probe(settings, place.base or root, wishes, wait_s)
        report.add("Compute node", judge_probe(probe, wishes))
    slots = submit_slots(slurm, wishes)
    way = choose_way(wishes, circumstances(slurm, probe, slots[0] if slots else None, wishes))
    report.add("Chain", judge_way(way, wishes))
    return way


def _probe(settings: RunConfig, base: Path, wishes: Wishes, wait_s: float) -> ProbeFacts:
    from hpcresume.scheduler.doctor.probe import Probe, ask_node

    probe = Probe(
        root=base,
        python=sys.executable,
        wait_s=wait_s,
        with_torch=wishes.gpus and not wishes.container,
    )
    with _interruptible():
        try:
            return ask_node(probe, settings.scheduler, os.environ, _wait_for)
        finally:
            if sys.stderr.isatty():
                click.echo("\r\x1b[K", err=True, nl=False)


def _wait_for(line: str) -> None:
    """What is waited for; on a terminal until it is there, in its last line."""
    click.echo(line, err=True, nl=not sys.stderr.isatty())


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make being told to leave an exception, so that the job is taken back."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _options(flags: dict[str, Any]) -> dict[str, Any]:
    names = ("cluster", "time", "partition", "account", "qos")
    scheduler = {name: flags[name] for name in names}
    pairs = (pair.partition("=") for pair in flags["extra"])
    sbatch = {key.lstrip("-"): value if equals else True for key, equals, value in pairs}
    return {"scheduler": {**scheduler, **({"sbatch": sbatch} if sbatch else {})}}


def _wishes(settings: RunConfig, root: Path) -> Wishes:
    """What the configuration asks for, and what the first job of a run would."""
    from hpcresume.run_dir import RunDir
    from hpcresume.submit import FIRST_LEAD_S
    from hpcresume.successors import job_spec

    scheduler = settings.scheduler
    lead_s = settings.chain.lead_s
    job = job_spec(
        RunDir(root / "doctor"),
        settings,
        lead_s=FIRST_LEAD_S if lead_s is None else lead_s,
        project=root,
        run_id="doctor",
    )
    return Wishes(
        cluster=chosen_cluster(scheduler.cluster, os.environ),
        chosen=scheduler.cluster != "auto",
        mode=settings.chain.mode,
        ahead=settings.chain.ahead,
        time_s=None if scheduler.time is None else parse_time(scheduler.time),
        nodes=node_range(scheduler.nodes)[0],
        partition=scheduler.partition,
        account=scheduler.account,
        qos=scheduler.qos,
        gpus=bool(scheduler.gpus_per_node) or "gres" in scheduler.sbatch,
        container="" if scheduler.container is None else scheduler.container.image,
        lead_s=lead_s,
        signal_s=job.signal_s,
    )


# ---- showing -----------------------------------------------------------------------------


class _Report:
    """The findings as they come, section by section."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._found: list[tuple[str, Finding]] = []

    def say(self, line: str) -> None:
        """Show a line, unless nothing is to be shown before the end."""
        if not self._silent:
            click.echo(line)

    def add(self, title: str, findings: Iterable[Finding]) -> None:
        """Show findings, below their title where that is new."""
        for finding in findings:
            if not self._found or self._found[-1][0] != title:
                self.say("\n" + styled(title, "strong"))
            self.say(_line(finding))
            self._found.append((title, finding))

    def findings(self) -> list[Finding]:
        """All of them."""
        return [finding for _, finding in self._found]

    def document(self, way: Way, wishes: Wishes) -> dict[str, Any]:
        """The same as one value for --json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "findings": [{"section": title, **asdict(finding)} for title, finding in self._found],
            "way": {
                **asdict(way),
                "signal": wishes.signal if wishes.cluster == "slurm" else None,
                "lead_s": wishes.lead_s,
            },
        }


def _line(finding: Finding) -> str:
    """A finding in one line; on a terminal that is too narrow, in a few, each under its like."""
    mark, arrow = _marks()
    name = finding.name.ljust(_NAME_WIDTH)
    start = f"  {styled(mark[finding.grade], _STYLES[finding.grade])} {name} "
    indent = " " * (_NAME_WIDTH + 5)
    whole = f"{finding.what}  {arrow} {finding.remedy}" if finding.remedy else finding.what
    if len(indent) + len(whole) <= min(terminal_width(), WIDEST) or not sys.stdout.isatty():
        return start + whole
    remedy = _wrapped(finding.remedy, indent + "  ").strip()
    lines = [_wrapped(finding.what, indent).strip()]
    lines += [f"{indent}{arrow} {remedy}"] if remedy else []
    return start + "\n".join(lines)


def _wrapped(text: str, indent: str) -> str:
    # An option stays with its value.
    kept = text.replace("--set ", "--set\xa0").replace("--time ", "--time\xa0")
    return wrapped(kept, indent=indent, hang=indent).replace("\xa0", " ")


def _marks() -> tuple[dict[str, str], str]:
    """The marks and the arrow that this terminal can show."""
    return (_MARKS, "→") if _speaks_utf8() else (_ASCII, "->")


def _speaks_utf8() -> bool:
    """Whether the locale is one of UTF-8, which Python pretends for the locale C as well."""
    if "utf" not in (sys.stdout.encoding or "").lower():
        return False
    names = ("LC_ALL", "LC_CTYPE", "LANG")
    said = [os.environ.get(name, "") for name in names]
    if said[1] == "C.UTF-8":  # It may be Python's own doing (PEP 538).
        said[1] = ""
    return "utf" in next((word for word in said if word), "").lower()
