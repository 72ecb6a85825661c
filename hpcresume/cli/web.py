"""`hpcresume web`: runs in the browser, live."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hpcresume.cli.options import root_of
from hpcresume.errors import UsageError

_EXTRA = "The page needs two more packages: pip install 'hpcresume[web]'."


@click.command()
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: one of your own.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--uds", type=click.Path(path_type=Path), help="Instead, a unix socket at PATH.")
@click.option(
    "--allow-host", "hosts", metavar="NAME", multiple=True, help="A proxy's name for this server."
)
def web(
    folder: str | None, port: int | None, host: str, uds: Path | None, hosts: tuple[str, ...]
) -> int:
    """Show the runs of DIR [$HPCRESUME_RUNS or ./runs] in the browser, live and read-only.

    The page is for you alone: who opens it must know a token, which is part of the address that
    is printed. It needs no network besides the connection to it. Ctrl-C ends it, and no run.

    \b
    Examples:
      hpcresume web                        # then open the address that it prints
      hpcresume web --uds ~/.hpcresume.sock
    """
    try:
        from hpcresume.display.web.access import Gate, own_token
        from hpcresume.display.web.app import build_app
        from hpcresume.display.web.rooms import Rooms
        from hpcresume.display.web.serve import lines_to_type, listen_at, listen_on, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        raise UsageError(_EXTRA) from None
    if uds is not None and port is not None:
        raise UsageError("--uds is a way of its own: leave --port out.")
    root = root_of(folder)
    token, _ = own_token(os.environ)
    listening = listen_on(host, port) if uds is None else listen_at(uds)
    rooms = Rooms(root, os.environ)
    click.echo(f"runs in {root}")
    for line in lines_to_type(listening, token, os.environ):
        click.echo(line)
    click.echo("Ctrl-C ends it.")
    try:
        serve(build_app(rooms, Gate(token, (host, *hosts))), listening, rooms.end)
    finally:
        if uds is not None:
            uds.unlink(missing_ok=True)
    return 0
