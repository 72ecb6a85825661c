"""A webhook is told how a chain ended; one that is down, slow or angry changes nothing."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from made_run import FakeSlurm, Said, add_link, end_link, make_run
from oracle import ENVIRON

from hpcresume.chain import Cause, Decision
from hpcresume.config import NotifyConfig
from hpcresume.notify import event_of, tell

FINISHED = Decision(kind="finished", reason="training is complete", cause=Cause.COMPLETED)
STOPPED = Decision(kind="stop", reason="cancelled by ada", cause=Cause.CANCELLED)
NO_PROGRESS = Decision(
    kind="stop", reason="3 links, no step", cause=Cause.UNKNOWN, rule="no_progress_links"
)
GOES_ON = Decision(kind="continue", reason="its time was over", cause=Cause.DEADLINE)


class Hook(ThreadingHTTPServer):
    """A webhook: keeps what it is told, and answers as it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told: list[dict[str, Any]] = []
        self.answer = 204
        self.release = threading.Event()
        self.release.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/json"
        self.server.told.append(json.loads(body))
        self.server.release.wait(60)
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A webhook of this machine is reached directly, where others are reached by a proxy."""
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def free_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/secret"


def test_a_webhook_is_told_what_happened_to_which_run_and_why(tmp_path: Path, hook: Hook) -> None:
    tell(make_run(tmp_path), NotifyConfig(url=hook.url), STOPPED, step=7)
    assert hook.told == [
        {
            "event": "stopped",
            "run": "toy",
            "step": 7,
            "cause": "cancelled",
            "reason": "cancelled by ada",
            "text": "toy stops: cancelled by ada",
        }
    ]


@pytest.mark.parametrize(
    ("decision", "event"),
    [(FINISHED, "finished"), (STOPPED, "stopped"), (NO_PROGRESS, "no_progress"), (GOES_ON, None)],
    ids=["finished", "stopped", "no-progress", "goes-on"],
)
def test_only_the_ends_of_a_chain_are_events(decision: Decision, event: str | None) -> None:
    assert event_of(decision) == event


def test_only_the_events_that_are_asked_for_are_told(tmp_path: Path, hook: Hook) -> None:
    config = NotifyConfig(url=hook.url, events=["no_progress"])
    for decision in (FINISHED, STOPPED, GOES_ON, None, NO_PROGRESS):
        tell(make_run(tmp_path / str(id(decision))), config, decision, step=0)
    assert [told["event"] for told in hook.told] == ["no_progress"]


@pytest.mark.parametrize("trouble", ["down", "angry", "slow"])
def test_a_webhook_in_trouble_is_one_line_of_the_log_without_its_secret(
    tmp_path: Path, hook: Hook, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    url = free_url() if trouble == "down" else hook.url
    hook.answer = 500
    if trouble == "slow":
        hook.release.clear()
    caplog.set_level(logging.INFO)
    tell(make_run(tmp_path), NotifyConfig(url=url), FINISHED, step=1, patience_s=1)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("127.0.0.1 was not told that toy finished: ")
    assert "secret" not in record.getMessage()


@pytest.mark.parametrize("there", [True, False], ids=["up", "down"])
def test_a_link_tells_and_ends_as_it_would_whether_somebody_listens_or_not(
    tmp_path: Path, hook: Hook, there: bool
) -> None:
    url = hook.url if there else free_url()
    argv = ["submit", "--name", "toy", "--cluster", "debug", "--set", f"notify.url={url}"]
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", *argv, "--", "true"],
        cwd=tmp_path,
        env={**ENVIRON, "no_proxy": "*"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("finished: ")
    assert [told["event"] for told in hook.told] == (["finished"] if there else [])
    said = (tmp_path / "runs" / "toy" / "train.log").read_text()
    assert said.count("was not told that toy finished") == (0 if there else 1)


def test_who_drives_a_chain_from_a_login_node_tells_where_no_link_is_left_to(
    tmp_path: Path, hook: Hook, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", FakeSlurm(tmp_path / "slurm").path)
    asked = {"chain": {"mode": "drive", "max_links": 1}, "notify": {"url": hook.url}}
    run = make_run(tmp_path, cluster="slurm", **asked)
    end_link(add_link(run), "continue", "deadline", "its time was over")
    code, _, err = said("drive", str(run.path))
    assert code == 8, err
    assert [(told["event"], told["run"]) for told in hook.told] == [("stopped", "toy")]
    assert "max_links" in hook.told[0]["reason"]


def test_who_drives_a_chain_tells_when_slurm_refuses_its_next_job_and_it_is_stalled(
    tmp_path: Path, hook: Hook, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeSlurm(tmp_path / "slurm")
    fake.program("sbatch", "echo 'sbatch: error: Invalid account' >&2; exit 1")
    monkeypatch.setenv("PATH", fake.path)
    run = make_run(tmp_path, cluster="slurm", chain={"mode": "drive"}, notify={"url": hook.url})
    end_link(add_link(run, step=4), "continue", "deadline", "its time was over")
    code, _, err = said("drive", str(run.path))
    assert code == 6, err
    (told,) = hook.told
    assert (told["event"], told["run"], told["step"], told["cause"]) == ("stalled", "toy", 4, None)
    assert told["text"].startswith("toy is stalled: ") and "Invalid account" in told["reason"]
    assert said("status", str(run.path), "--exit-code")[0] == 21
