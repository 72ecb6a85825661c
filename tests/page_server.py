"""The server of the page as a process of its own, for the tests that ask it and look at it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import ENVIRON

TOKEN = re.compile(r"#([\w-]{40,})")


@dataclass
class Served:
    """A server of the page."""

    port: int
    token: str
    said: str
    runs: Path
    process: subprocess.Popen[str]

    def ask(
        self, path: str, *, host: str | None = None, method: str = "GET", **more: Any
    ) -> tuple[int, Mapping[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Host": host or f"127.0.0.1:{self.port}", **more.pop("headers", {})}
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers, **more)
            answer = connection.getresponse()
            endless = answer.headers.get("Content-Type", "").startswith("text/event-stream")
            body = b"" if endless else answer.read()
            return answer.status, dict(answer.headers), body

    def cookie(self) -> str:
        status, headers, _ = self.ask("/login", method="POST", body=self.token)
        assert status == 204
        return headers["set-cookie"].partition(";")[0]

    @contextlib.contextmanager
    def events(self, query: str = "") -> Iterator[Iterator[tuple[str, Any]]]:
        """The stream of events: (whole or patch, value), and ("", None) for a comment."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", f"/events{query}", headers={"Cookie": self.cookie()})
            answer = connection.getresponse()
            assert answer.status == 200
            assert answer.headers["X-Accel-Buffering"] == "no"
            yield self._read(answer)

    @staticmethod
    def _read(answer: http.client.HTTPResponse) -> Iterator[tuple[str, Any]]:
        kind = ""
        for raw in answer:
            line = raw.decode().rstrip("\n")
            if line.startswith(":"):
                yield "", None
            elif line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def served(runs: Path, *argv: str, state: Path) -> Iterator[Served]:
    """A server at the port that it takes by itself: a free one that was looked for before may be
    taken by the time it starts.
    """
    environ = {**ENVIRON, "XDG_STATE_HOME": str(state), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "hpcresume", "web", str(runs), *argv]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            said = ""
            while "Ctrl-C" not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            token = TOKEN.search(said)
            port = re.search(r":(\d+)/#", said)
            assert token and port
            yield Served(int(port[1]), token[1], said, runs, process)
        finally:
            process.terminate()
            process.wait(20)
