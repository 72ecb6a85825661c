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
_HIDDEN = frozenset({"link", "origin", "rank", "local-driver", "tracker", "verify-link"})


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _COMMANDS if name not in _HIDDEN]

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
        if words and words[0] in _HIDDEN:
            # Nobody watches these; the log of the job is to tell the whole.
            raise
        told = unavailable(error if isinstance(error, OSError) else OSError("No memory is left"))
        print(f"hpcresume: {told}", file=sys.stderr)
        code = told.exit_code
    sys.exit(code if isinstance(code, int) else 0)
