"""Who may see the page: a token that only its owner knows, and the names it may be called by.

On a login node everybody reaches a port of the loopback interface, so that being local proves
nothing. The token is handed over once, in the fragment of the address, which no browser sends to
a server; a cookie that no script can read stands for it from then on.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from hpcresume.errors import HpcResumeError

_TOKEN_BYTES = 32
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def own_token(environ: Mapping[str, str]) -> tuple[str, Path]:
    """The user's token and its file, which nobody else can read; made where there is none.

    It is kept, so that an open page goes on when the server is started again.
    """
    state = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "hpcresume" / "web-token"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
    known = path.stat()
    if known.st_uid != os.getuid() or stat.S_IMODE(known.st_mode) & 0o077:
        raise HpcResumeError(
            f"{path} holds the key of the page and can be read by others: remove it, and start "
            f"the page again for a new one."
        )
    token = path.read_text().strip()
    if len(token) < _TOKEN_BYTES:
        raise HpcResumeError(f"{path} holds no token: remove it, and start the page again.")
    return token, path


class Gate:
    """Tells who may come in."""

    def __init__(self, token: str, hosts: Iterable[str] = ()) -> None:
        """`hosts` are names besides the local ones that the page may be asked for by."""
        self._token = token.encode()
        self._cookie = hmac.new(self._token, b"cookie", hashlib.sha256).hexdigest()
        # Cookies know no ports: two pages of one host must not throw out each other's visitors.
        self.cookie_name = f"hpcresume-{hashlib.sha256(self._token).hexdigest()[:8]}"
        own = (socket.gethostname(), socket.getfqdn())
        self._hosts = {name.lower() for name in (*_LOCAL, *own, *hosts)}

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this server: a stranger's page cannot pass itself off."""
        name, colon, port = header.lower().rpartition(":")
        return (name if colon and port.isdigit() else header.lower()) in self._hosts

    def opens(self, token: str) -> str | None:
        """The cookie for who knows the token; None for anybody else."""
        return self._cookie if hmac.compare_digest(token.encode(), self._token) else None

    def admits(self, cookies: Mapping[str, str]) -> bool:
        """Whether a request comes from somebody who has shown the token."""
        shown = cookies.get(self.cookie_name, "")
        return hmac.compare_digest(shown.encode(), self._cookie.encode())
