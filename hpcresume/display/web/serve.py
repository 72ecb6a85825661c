"""Where the page is served, and what to type to see it."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from hpcresume.errors import UsageError

_FIRST_PORT = 20000
_PORTS = 20000
LOOPBACK = "127.0.0.1"


def listen_on(host: str, port: int | None) -> socket.socket:
    """A socket for a host and a port. Raises UsageError where it is taken or no address of ours.

    Without a port it is the user's own, the same each day, so that the line to type stays; where
    somebody has that one, any that is free.
    """
    own = _FIRST_PORT + os.getuid() % _PORTS
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in (own, 0) if port is None else (port,):
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, wanted))
            found.listen(64)
        except OSError as error:
            found.close()
            if wanted == 0 or port is not None:
                words = error.strerror or str(error)
                raise UsageError(
                    f"{host}:{wanted} cannot be listened on ({words}): give another --host or "
                    f"--port."
                ) from None
        else:
            return found
    raise AssertionError("unreachable")


def listen_at(path: Path) -> socket.socket:
    """A unix socket that only its owner can use. Raises UsageError where the path is taken."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise UsageError(f"{path} is there and no socket: give another --uds.")
        try:
            found.connect(str(path))
        except ConnectionRefusedError:
            # Left behind by a server that was killed.
            path.unlink()
        else:
            raise UsageError(f"{path} is served by another process: give another --uds.")
    before = os.umask(0o177)
    try:
        found.bind(str(path))
    except OSError as error:
        found.close()
        raise UsageError(f"{path} cannot be made a socket: {error.strerror or error}.") from None
    finally:
        os.umask(before)
    found.listen(64)
    return found


class _Server(uvicorn.Server):
    """Ends what never ends by itself, a stream of events, before it waits for all to end."""

    def __init__(self, config: uvicorn.Config, ending: Callable[[], None]) -> None:
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer nobody any more."""
        self._ending()
        await super().shutdown(sockets)


def serve(app: ASGIApp, listening: socket.socket, ending: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; then call `ending`, in the event loop."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=60,
        ws="none",
    )
    server = _Server(config, ending)

    def end(*_: object) -> None:
        server.should_exit = True

    # When it has ended, uvicorn raises the signal again: by then there is nothing left to do.
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lines_to_type(listening: socket.socket, token: str, environ: Mapping[str, str]) -> list[str]:
    """What to do to see the page: here, and from another machine."""
    address = listening.getsockname()
    if isinstance(address, str):
        port = 8080
        return [
            "on your own machine, type",
            f"  ssh -N -L {port}:{Path(address).absolute()} {_here(environ)}",
            "and open there",
            f"  http://localhost:{port}/#{token}",
        ]
    host, port = address[0], address[1]
    shown = f"[{host}]" if ":" in host else host
    if host not in (LOOPBACK, "::1"):
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else shown
        return [
            "open",
            f"  http://{shown}:{port}/#{token}",
            "or behind Open OnDemand, started with --allow-host and its name",
            f"  https://YOUR-ONDEMAND/rnode/{socket.gethostname()}/{port}/#{token}",
        ]
    return [
        "open",
        f"  http://{shown}:{port}/#{token}",
        "or from your own machine, after",
        f"  ssh -N -L {port}:{shown}:{port} {_here(environ)}",
    ]


def _here(environ: Mapping[str, str]) -> str:
    """This machine as ssh reaches it: a compute node through the node that submitted the job."""
    me = f"{getpass.getuser()}@{socket.gethostname()}"
    login = environ.get("SLURM_SUBMIT_HOST")
    if environ.get("SLURM_JOB_ID") and login and login != socket.gethostname():
        return f"-J {getpass.getuser()}@{login} {me}"
    return me
