"""The page in a real browser: it follows a real chain, asks nobody else, and fits a phone."""

from __future__ import annotations

import http.client
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from made_chain import MadeChain
from oracle import Chain
from page_server import Served, served

from hpcresume.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cli_runs import Folder

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
    # One browser for all, in one worker.
    pytest.mark.xdist_group("browser"),
]
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 780}
WAIT_MS = 60_000
HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


class Watched:
    """A page of the browser, with everything that it asked for and complained of."""

    def __init__(self, browser: Any, size: dict[str, int], **options: Any) -> None:
        self.context = browser.new_context(viewport=size, **options)
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def hosts(self) -> set[str]:
        found = {urlsplit(url) for url in self.asked}
        return {url.netloc for url in found if url.scheme not in ("data", "blob")}

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        wide = self.page.evaluate("document.documentElement.scrollWidth")
        return bool(wide <= self.page.viewport_size["width"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def desktop(browser: Any) -> Iterator[Watched]:
    watched = Watched(browser, DESKTOP)
    yield watched
    watched.context.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three links, and one whose names and messages are markup."""
    root = tmp_path_factory.mktemp("browser") / "runs"
    chain = MadeChain(root, "toy", total=2400)
    chain.link(500)
    chain.link(400, lost=60, cause="node failure", detail="job 2: NODE_FAIL on gpu031")
    chain.link(700)
    bad = MadeChain(root, "bad", total=100)
    bad.link(50, detail=HOSTILE, node=HOSTILE, log=f"{HOSTILE}\n" + "y" * 3000 + "\n")
    bad.run.path.rename(root / (HOSTILE.replace("/", "") + "n" * 100))
    return root


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[Served]:
    with served(runs, state=runs.parent) as found:
        yield found


def test_the_page_follows_a_chain_from_one_link_into_the_next(
    desktop: Watched, tmp_path: Path
) -> None:
    chain = Chain(tmp_path, args={"pause_s": 0.05}, max_steps=4000)
    try:
        first = chain.wait_started(1)
        assert first is not None
        state = tmp_path / "state"
        with served(tmp_path / "runs", state=state) as server:
            page = desktop.page
            page.goto(f"http://127.0.0.1:{server.port}/#{server.token}")
            page.get_by_role("link", name="run").click()
            page.get_by_role("heading", name="run", exact=True).wait_for()
            page.get_by_text("running", exact=True).first.wait_for()
            page.locator("figure canvas").first.wait_for()
            rows = page.get_by_role("region", name="Table of links").locator("tbody tr")
            assert rows.count() == 1
            step = page.locator("[role=progressbar]").get_attribute("aria-valuenow")
            # It moves on by itself, and stays the same page.
            page.evaluate("window.same = true")
            page.wait_for_function(
                "before => document.querySelector('[role=progressbar]')"
                ".getAttribute('aria-valuenow') > before",
                arg=int(step),
            )
            chain.cut(first, "kill rank")
            rows.nth(1).wait_for()
            page.get_by_role("log").get_by_text("link 2 · ").wait_for()
            page.locator("tbody tr", has_text="killed").first.wait_for()
            page.wait_for_function(
                "document.querySelector('figure .plot').ariaLabel.match(/step (\\d+)/)?.[1] > 0"
            )
            assert page.evaluate("window.same")
            assert desktop.complaints == []
    finally:
        chain.stop_driver()


def test_the_token_leaves_the_address_and_the_page_asks_nobody_else(
    desktop: Watched, server: Served
) -> None:
    page = desktop.page
    page.goto(f"http://127.0.0.1:{server.port}/#{server.token}")
    page.get_by_role("link", name="toy").click()
    page.locator("figure canvas").first.wait_for()
    assert server.token not in page.url
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.get_by_role("link", name="toy").wait_for()
    assert desktop.hosts() == {f"127.0.0.1:{server.port}"}
    assert desktop.complaints == []
    assert desktop.context.cookies()[0]["httpOnly"]
    assert page.evaluate("document.cookie") == ""


def test_without_the_token_the_page_shows_nothing_and_takes_it_by_hand(
    desktop: Watched, server: Served
) -> None:
    page = desktop.page
    page.goto(f"http://127.0.0.1:{server.port}/#{'x' * 43}")
    page.get_by_role("heading", name="This page is locked").wait_for()
    assert page.get_by_text("toy").count() == 0
    page.get_by_label("Token").fill("nonsense")
    page.keyboard.press("Enter")
    page.get_by_text("This is not the token.").wait_for()
    page.get_by_label("Token").fill(f"http://127.0.0.1/#{server.token}")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="toy").wait_for()


def test_the_page_works_behind_a_proxy_below_a_path(desktop: Watched, server: Served) -> None:
    with proxied(server.port, "/rnode/gpu017/8123/") as url:
        page = desktop.page
        page.goto(f"{url}#{server.token}")
        page.get_by_role("link", name="toy").click()
        page.locator("figure canvas").first.wait_for()
        assert page.url.startswith(f"{url}?run=")
        assert all(asked.startswith((url, "data:")) for asked in desktop.asked)
        assert desktop.context.cookies()[0]["path"] == "/rnode/gpu017/8123"
        page.get_by_role("link", name="hpcresume").click()
        page.get_by_role("heading", name="Runs").wait_for()
        # Before the proxy leaves, of which the page would complain.
        assert desktop.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone_and_no_name_is_markup(
    browser: Any, server: Served, scheme: str
) -> None:
    phone = Watched(browser, PHONE, color_scheme=scheme)
    page = phone.page
    page.goto(f"http://127.0.0.1:{server.port}/#{server.token}")
    page.get_by_role("link", name="toy").wait_for()
    assert phone.fits()
    for name in ("toy", "nnnn"):
        page.get_by_role("link", name=name).click()
        page.locator("figure canvas").first.wait_for()
        page.get_by_role("log").locator("div").first.wait_for()
        assert phone.fits(), name
        assert page.locator("main img, main script").count() == 0
        page.get_by_role("link", name="hpcresume").click()
    page.get_by_role("heading", name="Runs").wait_for()
    assert page.title() == "Runs · hpcresume"
    assert phone.complaints == []
    phone.context.close()


def test_the_page_is_used_by_the_keyboard_alone(desktop: Watched, server: Served) -> None:
    page = desktop.page
    page.goto(f"http://127.0.0.1:{server.port}/#{server.token}")
    page.get_by_role("link", name="toy").wait_for()
    page.get_by_role("link", name="toy").focus()
    page.keyboard.press("Enter")
    page.locator("figure canvas").first.wait_for()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className").startswith("plot"):
            break
    page.keyboard.press("Home")
    readout = page.locator("figure .readout").first
    assert readout.inner_text().startswith("step 1 · link 1")
    page.keyboard.press("ArrowRight")
    assert not readout.inner_text().startswith("step 1 ·")
    page.keyboard.press("Escape")
    assert "step" not in readout.inner_text()
    assert desktop.complaints == []


def test_the_filter_and_the_colours_are_as_they_are_chosen(
    desktop: Watched, server: Served
) -> None:
    page = desktop.page
    page.goto(f"http://127.0.0.1:{server.port}/#{server.token}")
    page.get_by_role("link", name="toy").wait_for()
    page.get_by_role("searchbox").fill("TOY")
    assert page.get_by_role("listitem").count() == 1
    page.get_by_role("searchbox").fill("no such run")
    page.get_by_text("No run is called so.").wait_for()
    shades = set()
    for _ in range(3):
        page.get_by_role("button", name="Colours").click()
        shades.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(shades) == 2


def test_a_report_opens_from_a_file_and_asks_for_nothing(
    desktop: Watched, runs: Path, tmp_path: Path
) -> None:
    target = tmp_path / "toy.html"
    with pytest.raises(SystemExit) as left:
        main(["report", "toy", "--html", str(target), "--runs", str(runs)])
    assert left.value.code == 0
    page = desktop.page
    page.goto(target.as_uri())
    page.get_by_role("heading", name="toy", exact=True).wait_for()
    page.locator("figure canvas").first.wait_for()
    assert page.get_by_role("region", name="Table of links").locator("tbody tr").count() == 3
    assert desktop.hosts() == {""}
    assert len([url for url in desktop.asked if not url.startswith("data:")]) == 1
    assert desktop.complaints == []


def test_the_page_says_when_a_run_will_be_complete_and_why_its_job_waits(
    desktop: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    run = folder.add("one", "waiting", links=3, saves=3)
    monkeypatch.setenv("PATH", folder.environ["PATH"])
    page, bar = desktop.page, desktop.page.get_by_role("progressbar")
    page.goto(report_of(run.path, tmp_path / "one.html"))
    assert bar.get_attribute("aria-valuenow") is not None
    facts = page.locator("dl", has_text="Complete").first.inner_text()
    assert re.search(r"Complete\s+about .*\d", facts, re.I) and "2 more links" in facts
    assert "because other jobs are before it (Priority)" in page.locator("main").inner_text()
    # Without a known end there is no share, and no end to reckon with.
    run.trainer_state.write_text('{"global_step": 6000000}')
    page.goto(report_of(run.path, tmp_path / "open.html"))
    assert bar.get_attribute("aria-valuenow") is None
    assert "no end set" in str(bar.get_attribute("aria-label"))
    widths = bar.locator("i").evaluate_all("parts => parts.map(p => parseFloat(p.style.width))")
    assert 0 < sum(widths) < 90
    assert page.locator("dl", has_text="Complete").count() == 0
    assert desktop.complaints == []


def report_of(run: Path, target: Path) -> str:
    with pytest.raises(SystemExit) as left:
        main(["report", str(run), "--html", str(target)])
    assert left.value.code == 0
    return target.as_uri()


# ---- a reverse proxy -----------------------------------------------------------------------


class proxied:
    """A small reverse proxy that takes a path off, as Open OnDemand's /rnode does."""

    def __init__(self, port: int, path: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if not self.path.startswith(path):
                    self.send_error(404)
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                behind = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
                headers = {name: value for name, value in self.headers.items() if name != "Host"}
                headers["Connection"] = "close"
                target = "/" + self.path.removeprefix(path)
                behind.request(self.command, target, body=body, headers=headers)
                answer = behind.getresponse()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    while part := answer.read1(65536):
                        self.wfile.write(part)
                        self.wfile.flush()
                except OSError:
                    pass
                finally:
                    behind.close()
                self.close_connection = True

            do_POST = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}{path}"

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
