"""`hpcresume init`: the files that a project begins with, from a few questions."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from hpcresume import files
from hpcresume.config import format_time, from_mapping
from hpcresume.errors import UsageError
from hpcresume.scheduler.offers import Offers, ask_offers
from hpcresume.scheduler.starter import (
    Answers,
    conda_line,
    run_name,
    sbatch_text,
    venv_line,
    yaml_text,
)

_CONFIG, _SCRIPT = Path("hpcresume.yaml"), Path("slurm", "train.sbatch")
_JOB_S = 4 * 3600
#: Question, proposal, what there is to choose from.
_Asker = Callable[[str, str, Sequence[str]], str]


@click.command()
@click.option("--name", help="Name of the run [this folder's].")
@click.option("--train", metavar="FILE:FUNCTION", help="The training function [train.py:train].")
@click.option("-p", "--partition", help="Partition of the jobs [the cluster's default].")
@click.option("-A", "--account", help="Account that is charged [your default one].")
@click.option(
    "--gpus-per-node",
    "gpus",
    type=click.IntRange(min=0),
    help="GPUs on each node [the partition's].",
)
@click.option("--time", metavar="TIME", help="Time limit of each job [04:00:00 at most].")
@click.option("--venv", metavar="DIR", help="Virtual environment of the jobs [the active one].")
@click.option("--conda", metavar="NAME", help="Instead, a conda environment.")
@click.option("-y", "--yes", is_flag=True, help="Ask nothing: take what is found.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
def init(yes: bool, force: bool, **given: Any) -> int:
    """Write a commented hpcresume.yaml and slurm/train.sbatch for the project in this folder.

    It asks a few questions, with what Slurm tells about partitions, accounts and GPUs as
    proposals. Options answer them beforehand; --yes takes all proposals. A file that is there is
    left alone without --force.

    \b
    Examples:
      hpcresume init
      hpcresume init --yes --partition gpu --gpus-per-node 4 --conda ml
    """
    there = " and ".join(str(path) for path in (_CONFIG, _SCRIPT) if os.path.lexists(path))
    if there and not force:
        raise UsageError(f"There is {there} already, left as it was: remove it, or add --force.")
    if given["venv"] is not None and given["conda"] is not None:
        raise UsageError("Jobs have one environment: name --venv or --conda.")
    if not yes and not sys.stdin.isatty():
        raise UsageError("init asks questions, and there is no terminal: add --yes.")
    offers = ask_offers(os.environ)
    answers = _answers(offers, given, _ask if not yes else _take)
    _SCRIPT.parent.mkdir(exist_ok=True)
    files.write_durably(_CONFIG.absolute(), yaml_text(answers).encode(), 0o644)
    files.write_durably(_SCRIPT.absolute(), sbatch_text(answers, str(_CONFIG)).encode(), 0o755)
    click.echo(f"{_CONFIG}\n{_SCRIPT}\n")
    click.echo("Look at them, then:")
    click.echo("  hpcresume doctor            what matters to a chain here")
    click.echo("  hpcresume submit --dry-run  the job, and when it would start")
    click.echo("  hpcresume submit            begin")
    return 0


def _ask(question: str, proposal: str, choices: Sequence[str]) -> str:
    """The answer of who sits there; the proposal for Enter, nothing for "-"."""
    shown = f"{question} ({', '.join(choices)})" if len(choices) > 1 else question
    answer: str = click.prompt(shown, default=proposal, show_default=bool(proposal)).strip()
    return "" if answer == "-" else answer


def _take(_question: str, proposal: str, _choices: Sequence[str]) -> str:
    return proposal


def _answers(offers: Offers, given: Mapping[str, Any], ask: _Asker) -> Answers:
    """What was given, else what is answered. Raises ConfigError, UsageError."""

    def known(name: str, question: str, proposal: str, choices: Sequence[str] = ()) -> str:
        return str(given[name]) if given[name] is not None else ask(question, proposal, choices)

    name = known("name", "Name of the run", run_name(Path.cwd().name))
    train = known("train", "Training function", "train.py:train")
    usual = offers.partition(None)
    names = [one.name for one in offers.partitions]
    partition = known("partition", "Partition", usual.name if usual else "", names) or None
    chosen = offers.partition(partition)
    accounts = offers.accounts
    account = known("account", "Account", accounts[0] if accounts else "", accounts) or None
    gpus = known("gpus", "GPUs on each node", str(chosen.gpus if chosen else 0))
    if not gpus.isdecimal():
        raise UsageError(f"{gpus!r} is no number of GPUs; expected 0, 1, 2, …")
    limit = chosen.limit_s if chosen else None
    proposal = format_time(min(_JOB_S, limit or _JOB_S))
    time = known("time", "Time limit of each job", proposal)
    setup = _environment(given, ask)
    asked = {"time": time, "partition": partition, "account": account, "setup": setup}
    # Before anything is written: the name, the time and all lines are such as a run can have.
    from_mapping({"name": name, "train": train, "scheduler": asked}, "init")
    return Answers(
        name=name,
        train=train,
        time=time,
        partition=partition,
        account=account,
        gpus=int(gpus),
        setup=setup,
    )


def _environment(given: Mapping[str, Any], ask: _Asker) -> list[str]:
    """The shell lines that enter the jobs' Python environment."""
    if given["conda"] is not None:
        return [conda_line(given["conda"])]
    if given["venv"] is not None:
        return [venv_line(os.path.abspath(given["venv"]))]
    venv = os.environ.get("VIRTUAL_ENV") or (os.path.abspath(".venv") if _has_venv() else "")
    conda = os.environ.get("CONDA_DEFAULT_ENV", "")
    found = f"venv {venv}" if venv else f"conda {conda}" if conda else "none"
    answer = ask("Python environment: venv DIR, conda NAME or none", found, ())
    kind, _, where = answer.partition(" ")
    if kind in ("", "none"):
        return []
    if kind == "venv" and where:
        return [venv_line(os.path.abspath(where))]
    if kind == "conda" and where:
        return [conda_line(where)]
    raise UsageError(f"{answer!r} is no environment; expected venv DIR, conda NAME or none.")


def _has_venv() -> bool:
    return Path(".venv", "bin", "activate").is_file()
