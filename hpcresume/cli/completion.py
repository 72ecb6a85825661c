"""`hpcresume completion`: what a shell needs to complete commands, options and names of runs."""

from __future__ import annotations

import click

_SHELLS = ("bash", "zsh", "fish")
#: How a shell's question reaches us; click makes it of the program's name.
_VARIABLE = "_HPCRESUME_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> int:
    """Print what SHELL needs to complete commands, options and the names of runs.

    Let the shell read it at its start. The names come from the folder of runs alone: the
    scheduler is not asked.

    \b
    Examples:
      hpcresume completion bash >> ~/.bashrc
      hpcresume completion zsh >> ~/.zshrc
      hpcresume completion fish > ~/.config/fish/completions/hpcresume.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    own = kind(click.get_current_context().find_root().command, {}, "hpcresume", _VARIABLE)
    click.echo(own.source_template % own.source_vars())
    return 0
