"""The server of the page, as a process of its own: who may come in, and what it sends."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_chain import MadeChain
from made_run import make_run
from oracle import ENVIRON
from page_server import Served, served

pytest.importorskip("starlette", reason="the extra web is not installed")

from hpcresume.display.web.access import Gate, own_token
from hpcresume.display.web.app import PING_S, stream
from hpcresume.display.web.assets import load_assets
from hpcresume.display.web.patch import patched
from hpcresume.display.web.report import html_report
from hpcresume.display.web.watching import Watched
from hpcresume.errors import HpcResumeError


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("web")
    chain = MadeChain(root / "runs", "toy", total=400)
    chain.link(100)
    chain.link(80, lost=20, cause="node failure", detail="job 2: NODE_FAIL on gpu031")
    with served(root / "runs", state=root / "state") as server:
        yield server


# ---- who may come in -----------------------------------------------------------------------


def test_the_stream_is_refused_to_who_has_not_shown_the_token(page: Served) -> None:
    assert page.ask("/events")[0] == 401
    name = page.cookie().partition("=")[0]
    assert page.ask("/events", headers={"Cookie": f"{name}=0000"})[0] == 401
    assert page.ask("/events", headers={"Cookie": f"{name}={page.token}"})[0] == 401
    assert page.ask("/events", headers={"Cookie": page.cookie()})[0] == 200


@pytest.mark.parametrize("wrong", ["", "x", "é" * 43, "a" * 5000])
def test_a_wrong_token_opens_nothing(page: Served, wrong: str) -> None:
    status, headers, _ = page.ask("/login", method="POST", body=wrong.encode())
    assert status == 403
    assert "set-cookie" not in headers


def test_the_cookie_is_for_no_script_no_other_site_and_no_other_folder(page: Served) -> None:
    _, headers, _ = page.ask("/login", method="POST", body=page.token)
    parts = [part.strip().lower() for part in headers["set-cookie"].split(";")]
    assert "httponly" in parts and "samesite=strict" in parts
    assert not any(part.startswith(("path", "domain")) for part in parts)
    assert page.token not in headers["set-cookie"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil"])
def test_a_request_by_a_name_that_is_not_ours_is_refused(page: Served, host: str) -> None:
    cookie = {"Cookie": page.cookie()}
    assert page.ask("/", host=host)[0] == 421
    assert page.ask("/events", host=host, headers=cookie)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "[::1]:9", "127.0.0.1"])
def test_our_own_names_are_known_with_whatever_port(page: Served, host: str) -> None:
    assert page.ask("/", host=host)[0] == 200


def test_a_proxys_name_is_known_where_it_is_allowed() -> None:
    assert not Gate("t" * 43).knows_host("ondemand.site.edu")
    assert Gate("t" * 43, ["OnDemand.site.edu"]).knows_host("ondemand.site.edu:443")


def test_the_token_is_kept_in_a_file_that_nobody_else_can_read(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    token, path = own_token(environ)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_token(environ) == (token, path)
    path.chmod(0o640)
    with pytest.raises(HpcResumeError, match="can be read by others"):
        own_token(environ)
    path.unlink()
    assert own_token(environ)[0] != token


# ---- what it sends -------------------------------------------------------------------------


def test_every_answer_forbids_the_page_all_but_its_own_files(page: Served) -> None:
    for path in ("/", "/static/main.js", "/events", "/nothing"):
        headers = {name.lower(): value for name, value in page.ask(path)[1].items()}
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    ["/static/../access.py", "/static/%2e%2e/access.py", "/static/", "/etc/passwd", "/docs"],
)
def test_no_path_leads_to_a_file_that_is_not_of_the_page(page: Served, path: str) -> None:
    assert page.ask(path)[0] == 404


@pytest.mark.parametrize("run", ["..", "../toy", "toy", "%2Fetc", "x" * 300])
def test_a_run_is_found_by_its_id_alone(page: Served, run: str) -> None:
    assert page.ask(f"/events?run={run}", headers={"Cookie": page.cookie()})[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_but_the_login_takes_anything(page: Served, method: str) -> None:
    for path in ("/", "/events", "/static/main.js"):
        assert page.ask(path, method=method)[0] == 405


def test_the_pages_files_are_sent_once(page: Served) -> None:
    _, headers, body = page.ask("/static/page.css")
    assert body == load_assets()["page.css"].content
    again = page.ask("/static/page.css", headers={"If-None-Match": headers["etag"]})
    assert (again[0], again[2]) == (304, b"")


def test_all_links_of_the_page_are_relative_and_none_leads_elsewhere() -> None:
    for name, asset in load_assets().items():
        if name.startswith("uPlot"):
            continue
        targets = re.findall(
            r"""(?:href|src|from|fetch\(|import)[ =(]*["'`]([^"'`]+)""", asset.text
        )
        assert not [t for t in targets if t.startswith(("/", "http", "//"))], name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", asset.text), name


def test_a_run_comes_whole_first_and_in_patches_from_then_on(tmp_path: Path) -> None:
    chain = MadeChain(tmp_path / "runs", "toy", total=400)
    chain.link(100)
    run_id = chain.run.identify()["id"]
    with (
        served(tmp_path / "runs", state=tmp_path) as page,
        page.events() as listed,
        page.events(f"?run={run_id}") as events,
    ):
        kind, runs = next(listed)
        assert (kind, runs["order"], runs["runs"][run_id]["step"]) == ("whole", [run_id], 100)
        kind, shown = next(events)
        assert (kind, shown["status"]["step"], len(shown["links"])) == ("whole", 100, 1)
        chain.link(60)
        sent = 0
        while shown["status"]["step"] != 160 or len(shown["curves"]["loss"]["steps"]) != 160:
            kind, patch = next(events)
            assert kind == "patch"
            sent += len(json.dumps(patch))
            shown = patched(shown, patch)
        assert [band[0] for band in shown["bands"]] == [1, 2]
        assert "deadline" in shown["why"]["sentence"] or shown["why"]["sentence"]
        assert sent < len(json.dumps(shown)), "what had been sent was sent again"
        shutil.rmtree(chain.run.path)
        # While its files go one by one, something else may be wrong with it first.
        while "not a run directory" not in shown.get("error", ""):
            shown = patched(shown, next(events)[1])


def test_a_comment_keeps_a_silent_stream_alive() -> None:
    async def whole_and_next() -> tuple[str, str]:
        events = stream(Watched(lambda: {"step": 1}), ping_s=0.01)
        while (first := await anext(events)).startswith(":"):
            pass
        return first, await anext(events)

    whole, silence = asyncio.run(whole_and_next())
    assert (whole, silence) == ('event: whole\ndata: {"step":1}\n\n', ": still here\n\n")
    assert PING_S == 15.0


def test_nothing_is_looked_at_while_nobody_watches() -> None:
    async def watch_and_leave() -> tuple[int, int]:
        looks: list[int] = []

        def look() -> dict[str, int]:
            looks.append(1)
            return {"looks": len(looks)}

        watched = Watched(look)
        for _ in range(2):
            views = watched.views(9)
            await anext(views)
            await views.aclose()  # type: ignore[attr-defined]
        before = len(looks)
        await asyncio.sleep(1.5)
        return before, len(looks)

    before, after = asyncio.run(watch_and_leave())
    assert before == after


def test_who_comes_when_the_last_one_has_just_left_sees_what_changes() -> None:
    async def leave_and_come() -> list[dict[str, int] | None]:
        looks = itertools.count()
        watched = Watched(lambda: {"looks": next(looks)})
        before, after = watched.views(9), watched.views(9)
        await anext(before)
        await before.aclose()  # type: ignore[attr-defined]
        return [await anext(after), await anext(after)]

    assert asyncio.run(leave_and_come()) == [{"looks": 0}, {"looks": 1}]


#: Text and what it stands on.
PAIRS = [
    *[("text", ground) for ground in ("page", "card", "band")],
    *[("dim", ground) for ground in ("page", "card", "band")],
    *[(tone, f"{tone}-soft") for tone in ("accent", "good", "bad", "wait", "calm")],
    *[(tone, "card") for tone in ("accent", "good", "bad", "wait", "calm")],
    ("page", "accent"),
]


@pytest.mark.parametrize("theme", [0, 1, 2], ids=["light", "dark", "dark by the system"])
def test_all_text_has_a_contrast_of_4_5_to_1(theme: int) -> None:
    blocks = re.findall(r":root[^{]*{([^}]*)}", load_assets()["page.css"].text)
    colours = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]
    assert len(colours) == 3 and colours[1] == colours[2]
    for ink, ground in PAIRS:
        found = sorted(luminance(colours[theme][name]) for name in (ink, ground))
        assert (found[1] + 0.05) / (found[0] + 0.05) >= 4.5, (ink, ground)


def luminance(colour: str) -> float:
    """As WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# ---- where it is served --------------------------------------------------------------------


def test_the_line_to_type_is_printed(page: Served) -> None:
    assert f"http://127.0.0.1:{page.port}/#{page.token}" in page.said
    assert f"ssh -N -L {page.port}:127.0.0.1:{page.port} " in page.said


def test_a_unix_socket_serves_its_owner_alone_and_is_gone_afterwards(tmp_path: Path) -> None:
    make_run(tmp_path / "runs")
    path = tmp_path / "page.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with served(tmp_path / "runs", "--uds", str(path), state=tmp_path) as page:
        assert f"ssh -N -L 8080:{path} " in page.said
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost:8080\r\nConnection: close\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        taken = hpcresume_web(tmp_path, "--uds", str(path))
        assert taken.returncode == 2 and "served by another process" in taken.stderr
    assert not path.exists()


def test_it_ends_at_once_and_in_silence_while_somebody_watches(tmp_path: Path) -> None:
    make_run(tmp_path / "runs")
    with (
        served(tmp_path / "runs", state=tmp_path) as page,
        page.events() as events,
    ):
        assert next(events)[0] == "whole"
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(20) == 0
        assert list(events) == []
        assert page.process.stdout is not None
        assert page.process.stdout.read() == ""


def test_a_port_that_is_taken_is_said_in_a_sentence(page: Served, tmp_path: Path) -> None:
    done = hpcresume_web(tmp_path, "--port", str(page.port))
    assert done.returncode == 2
    assert f"127.0.0.1:{page.port} cannot be listened on" in done.stderr


def test_without_the_extra_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    broken = tmp_path / "starlette"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ModuleNotFoundError('no', name='starlette')\n")
    done = hpcresume_web(
        tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith("pip install 'hpcresume[web]'.")


def hpcresume_web(folder: Path, *argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcresume", "web", str(folder), *argv],
        env={**ENVIRON, "XDG_STATE_HOME": str(folder), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# ---- reports -------------------------------------------------------------------------------


def test_a_report_is_one_file_that_names_no_other(tmp_path: Path) -> None:
    chain = MadeChain(tmp_path / "runs", "toy", total=400)
    chain.link(100, detail="</script><script>alert(1)</script>")
    html, md = tmp_path / "toy.html", tmp_path / "toy.md"
    script = (
        "import sys\nfrom hpcresume.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules, 'starlette' in sys.modules, file=sys.stderr)\n"
    )
    argv = ["report", "toy", "--html", str(html), "--md", str(md), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "False False"
    page = html.read_text()
    assert not re.search(r'(src|href)="(?!data:|#|\./")', page)
    assert "<script>alert(1)" not in page
    assert page.count("<script") == 3
    told = md.read_text()
    assert told.startswith("# toy\n") and "100 of 400 (25%)" in told
    assert r"\<script\>alert(1)" in told


def test_a_report_is_printed_where_a_dash_is_asked_for(tmp_path: Path) -> None:
    MadeChain(tmp_path / "runs", "toy", total=400).link(100)
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "report", "toy", "--md", "-"],
        env=ENVIRON,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("# toy\n")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_report_is_asked_where_to() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpcresume", "report", "toy"],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "hpcresume: Say where to: --html FILE, --md FILE, or both.\n",
    )


def test_a_report_holds_the_same_modules_as_the_page() -> None:
    report = html_report({"name": "x"})
    for name, asset in load_assets().items():
        if name.endswith(".js") and not name.startswith("uPlot"):
            first = next(line for line in asset.text.splitlines() if line.startswith("//"))
            assert first in report, name
    assert "\nimport " not in report and "\nexport " not in report
