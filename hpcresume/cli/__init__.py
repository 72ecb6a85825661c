"""The command line: argv in, one library call, text and an exit code out.

Commands are imported when they are called: a login node's file system is slow.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from hpcresume.display.terminal import forgive, let_go_of_stdout
from hpcresume.errors import HpcResumeError, unavailable

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Command -> module below this package; the function has the command's name.
_COMMANDS = {
    "submit": "submit",
    "status": "status",
    "watch": "watch",
    "logs": "logs",
    "cancel": "control",
    "resume": "control",
    "drive": "control",
    "why": "why",
    "verify": "verify",
    "rehearse": "rehearse",
    "checkpoints": "checkpoints",
    "web": "web",
    "report": "report",
    "doctor": "doctor",
    "init": "init",
    "completion": "completion",
    "link": "hidden",
    "rank": "hidden",
    "local-driver": "hidden",
    "tracker": "hidden",
    "origin": "hidden",
    "verify-link": "verify",
}
#: What they do, in the order in which they are shown; the others are no user's.
_SHOWN = {
    "submit": "Begin a run: its first job, and all that follow.",
    "status": "How runs stand, when they will be complete, why they wait.",
    "watch": "One run on the whole terminal, through all its jobs.",
    "logs": "What a run prints, over all its jobs.",
    "cancel": "End a run's chain; what is saved stays.",
    "resume": "Go on with a run that rests, with other values if wished.",
    "drive": "Submit a run's next jobs from here, where jobs may not.",
    "why": "Why a run stands as it does, and what to do next.",
    "verify": "Check that cutting a training changes no bit of it.",
    "rehearse": "Try here whether a training survives a chain of jobs.",
    "checkpoints": "What a run has saved; verify, prune and pin it.",
    "web": "All runs in the browser, live.",
    "report": "One run as a file, for a browser or a lab notebook.",
    "doctor": "Check what a chain needs here, with a remedy for each fault.",
    "init": "Write hpcresume.yaml and a batch script from a few questions.",
    "completion": "Let the shell complete commands, options and runs.",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_SHOWN)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What the commands do, without importing one of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_SHOWN.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"hpcresume.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands by their names alone: to import them all would be felt at each Tab."""
        from click.shell_completion import CompletionItem

        names = [CompletionItem(n) for n in self.list_commands(ctx) if n.startswith(incomplete)]
        return names or click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            known = ", ".join(self.list_commands(ctx))
            ctx.fail(f"No command '{args[0]}'.{hint} Commands: {known}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            let_go_of_stdout()
            return 0


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hpcresume")
def cli() -> None:
    """One training run, many Slurm jobs, the same result."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code; errors are one sentence on stderr."""
    forgive()
    try:
        code: Any = cli.main(args=argv, prog_name="hpcresume", standalone_mode=False)
    except HpcResumeError as error:
        print(f"hpcresume: {error}", file=sys.stderr)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except (OSError, MemoryError) as error:
        words = sys.argv[1:] if argv is None else argv
        if words and words[0] in _COMMANDS.keys() - _SHOWN.keys():
            # Nobody watches these; the log of the job is to tell the whole.
            raise
        told = unavailable(error if isinstance(error, OSError) else OSError("No memory is left"))
        print(f"hpcresume: {told}", file=sys.stderr)
        code = told.exit_code
    sys.exit(code if isinstance(code, int) else 0)
