"""A command behind `--`, and the options that say something of it; for submit and rehearse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from hpcresume.config import default_path
from hpcresume.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

_COMMAND = "hpcresume.command"
#: Between two attempts where only their number is given: as in the shell loop that people write.
_RETRY_S = 15.0


class TakesCommand(click.Command):
    """A command of ours that takes another one behind `--`: `command_of` gives its words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep what follows the first `--` from being read as arguments of ours."""
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_COMMAND] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """The usage line, with the command in it."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


def command_of() -> list[str] | None:
    """The words behind `--`; None where there was none. Raises UsageError where nothing follows."""
    words = click.get_current_context().meta.get(_COMMAND)
    if words is not None and not "".join(words[:1]):
        raise UsageError("A command must follow `--`, as in: hpcresume submit -- python main.py")
    return None if words is None else [*words]


def command_options(command: F) -> F:
    """What is said of a command behind `--`."""
    for option in (
        click.option(
            "--signal-command", "signal_command", metavar="SIGNAL", help="TERM, USR1, all:TERM…"
        ),
        click.option(
            "--retry-delay",
            type=click.FloatRange(min=0),
            metavar="SECONDS",
            help="Start a command that has failed again in the same job, after so long.",
        ),
        click.option(
            "--max-attempts",
            type=click.IntRange(min=1),
            metavar="N",
            help="Give up after N attempts that got no further.",
        ),
        click.option("--checkpoints", metavar="GLOB", help="What the command saves."),
        click.option(
            "--hf",
            "framework",
            flag_value="huggingface",
            help="Give the command's Hugging Face Trainer a callback that stops and resumes it.",
        ),
        click.option(
            "--lightning",
            "framework",
            flag_value="lightning",
            help="Give the command's Lightning Trainer a callback that stops and resumes it.",
        ),
        click.option(
            "--done-when",
            multiple=True,
            metavar="FILE|log:PATTERN",
            help="What tells that a command is done, besides exit code 0; several: any of them.",
        ),
    ):
        command = option(command)
    return command


def settings_of_command(words: list[str] | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What those options mean as configuration; None for what was not given."""
    attempts = flags["max_attempts"]
    retry_s = flags["retry_delay"]
    if attempts is not None and retry_s is None:
        retry_s = _RETRY_S
    settings: dict[str, Any] = {
        "progress": {
            "done_when": list(flags["done_when"]) or None,
            "checkpoints": flags["checkpoints"],
        },
        "chain": {
            "max_crashes": None if attempts is None else attempts - 1,
            "retry_s": retry_s,
            "signal_command": flags["signal_command"],
        },
    }
    settings["framework"] = flags["framework"]
    if words is not None:
        settings |= {"command": words, "train": ""}
    return settings


def default_config(words: list[str] | None) -> Path | None:
    """The configuration that is meant where none is named.

    Of a command only that of its own folder: the example of a first run is none for it.
    """
    path = default_path(Path.cwd())
    own = path is not None and path.parent == Path.cwd()
    return path if words is None or own else None
