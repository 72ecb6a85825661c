"""Makes the pictures of the documentation anew: `python docs/images/make.py [NAME...]`.

NAME is terminal, status or web. Needs what the tests need. The terminal's are of real trainings on
this machine; those of `status` and the page are of runs written as links write them
(`tests/made_chain.py`), because they show days. Look at each picture before you commit it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("PYTHONPATH", str(ROOT))

from made_chain import MadeChain  # noqa: E402
from made_run import FakeSlurm, make_run  # noqa: E402
from oracle import ENVIRON, hpcresume  # noqa: E402
from page_server import served  # noqa: E402
from terminal import Terminal  # noqa: E402

from hpcresume.journal import Journal  # noqa: E402
from hpcresume.story import token_prefix  # noqa: E402

# ---- the terminal ----------------------------------------------------------------------------

CELL_W, CELL_H, PAD = 8.4, 18, 12
PALETTES = {
    "": {
        "paper": "#16181d",
        "default": "#d7dae0",
        "cyan": "#56b6c2",
        "green": "#98c379",
        "red": "#e06c75",
        "brown": "#e5c07b",
        "magenta": "#c678dd",
        "brightblack": "#6b7280",
    },
    "-light": {
        "paper": "#ffffff",
        "default": "#24292f",
        "cyan": "#0b7285",
        "green": "#2b7a3d",
        "red": "#b3261e",
        "brown": "#8a5a00",
        "magenta": "#8250a8",
        "brightblack": "#8a929c",
    },
}
HOME = "/home/ada"
#: A training by hand, with all that its progress may show.
TRAIN = """
import time, torch, hpcresume
from torch import nn

def train(session):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    session.register(model=model, optimizer=optimizer, schedule=schedule)
    x = torch.randn(480, 16)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True) / 4)
    for points, target in session.steps(session.loader(data, batch_size=8, shuffle=True)):
        time.sleep(0.06)
        loss = ((model(points) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        session.log(loss=loss, grad_norm=norm, lr=schedule.get_last_lr()[0], tokens=8192)
        if session.global_step % 45 == 44:
            with session.busy("evaluate"):
                time.sleep(1)
            session.best(val_loss=1.3 / (1 + session.global_step / 900))

if __name__ == "__main__":
    hpcresume.main(train, epochs=10)
"""


def draw(terminal: Terminal, folder: Path, name: str, *palettes: str) -> None:
    """What stands on a screen, as a picture for each palette; `folder` looks like a home."""
    screen = terminal._screen
    rows = [
        _at_home([screen.buffer[y][x] for x in range(screen.columns)], folder)
        for y in range(screen.lines)
    ]
    while rows and all(cell.data == " " for cell in rows[-1]):
        rows.pop()
    width, height = round(screen.columns * CELL_W + 2 * PAD), len(rows) * CELL_H + 2 * PAD
    for palette in palettes:
        colours = PALETTES[palette]
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}"><rect width="100%" height="100%" rx="8" '
            f'fill="{colours["paper"]}"/><g font-family="DejaVu Sans Mono, Menlo, Consolas, '
            f'monospace" font-size="14">'
        ]
        shapes: dict[str, list[str]] = {}
        for y, row in enumerate(rows):
            for x, cell in enumerate(row):
                shape = _shape(cell.data, PAD + x * CELL_W, PAD + y * CELL_H)
                if shape:
                    shapes.setdefault(colours.get(cell.fg, colours["default"]), []).append(shape)
            for x, text, fg, bold in _stretches(row):
                weight = ' font-weight="bold"' if bold else ""
                lines.append(
                    f'<text xml:space="preserve" x="{PAD + x * CELL_W:.1f}" '
                    f'y="{PAD + y * CELL_H + 13.3:.1f}" textLength="{len(text) * CELL_W:.1f}" '
                    f'lengthAdjust="spacingAndGlyphs" fill="{colours.get(fg, colours["default"])}"'
                    f"{weight}>{escape(text)}</text>"
                )
        lines += [f'<path fill="{fill}" d="{"".join(d)}"/>' for fill, d in shapes.items()]
        lines.append("</g></svg>\n")
        (HERE / f"{name}{palette}.svg").write_text("\n".join(lines))
        print(f"{name}{palette}.svg")


def _at_home(row: list[Any], folder: Path) -> list[Any]:
    """A row in which the scratch folder is called as a user's would be."""
    begin = "".join(cell.data for cell in row).find(str(folder))
    if begin < 0:
        return row
    name = [row[begin]._replace(data=letter) for letter in HOME]
    rest = row[begin + len(str(folder)) :]
    return [*row[:begin], *name, *rest, *row[-1:] * (len(str(folder)) - len(HOME))]


#: Part of a cell that a sign of bars covers: from x, to x, thickness.
_BARS = {"━": (0, 1, 2.6), "╸": (0, 0.5, 2.6), "╺": (0.5, 1, 2.6), "─": (0, 1, 1)}


def _shape(sign: str, x: float, y: float) -> str:
    """A sign that fonts draw each in its way (blocks, bars, braille) as a path; else nothing."""
    if sign in _BARS:
        begin, end, thick = _BARS[sign]
        return _box(x + begin * CELL_W, y + (CELL_H - thick) / 2, (end - begin) * CELL_W, thick)
    if "\u2581" <= sign <= "\u2588":
        high = (ord(sign) - 0x2580) / 8 * (CELL_H - 2)
        return _box(x, y + CELL_H - 1 - high, CELL_W, high)
    if "\u2800" <= sign <= "\u28ff":
        dots = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
        there = [dot for n, dot in enumerate(dots) if ord(sign) >> n & 1]
        return "".join(_box(x + 1.2 + 4.2 * a, y + 1.4 + 4.5 * b, 2, 2) for a, b in there)
    return ""


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z"


def _stretches(row: list[Any]) -> Iterator[tuple[int, str, str, bool]]:
    """The words of a row in one colour, with single spaces between: column, text, colour, bold."""
    kinds = [(cell.fg, cell.bold) for cell in row]
    letters = [
        " " if _shape(cell.data, 0, 0) or cell.data == "\u2800" else cell.data for cell in row
    ]
    begin = 0
    while begin < len(row):
        end = begin
        while end < len(row) and kinds[end] == kinds[begin]:
            end += 1
        for words in re.finditer(r"\S+(?: \S+)*", "".join(letters[begin:end])):
            yield begin + words.start(), words[0], *kinds[begin]
        begin = end


def terminal(folder: Path) -> None:
    """A chain that is watched, and a training by hand."""
    lm = folder / "lm"
    (lm / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "quickstart.py", lm / "examples")
    shutil.copy(ROOT / "configs" / "quickstart.yaml", lm / "lm.yaml")
    options = ("--time=00:00:40", "--set=chain.lead_s=8", "--set=max_steps=1200")
    done = hpcresume("submit", "lm.yaml", "--cluster=local", "--detach", *options, cwd=lm)
    assert done.returncode == 0, done.stderr
    watch = ("-m", "hpcresume", "watch", "quickstart")
    # The first look at the machine is a line of its own, and tells that the link has begun well.
    deep = (r"link [3-9] · job", r"(step time|checkpoint)", r"host memory", r"steps/s • ")
    sizes = {
        "terminal-watch": (110, 36),
        "terminal-watch-80": (80, 26),
        "terminal-watch-narrow": (60, 20),
    }
    try:
        for name, (columns, lines) in sizes.items():
            with Terminal(watch, lm, width=columns, height=lines) as seen:
                seen.wait_for(*deep, timeout=400)
                _settle(seen, 2)
                palettes = ("-light",) if columns == 80 else ("",)
                draw(seen, folder, name.removesuffix("-80"), *palettes)
    finally:
        hpcresume("cancel", "--yes", "quickstart", cwd=lm)
    (lm / "train.py").write_text(TRAIN)
    with Terminal(("train.py",), lm, width=122, height=20) as seen:
        seen.wait_for(r"Epoch 3/10.*\n.*all steps", r"\b(2\d|3\d)%")
        _settle(seen, 1)
        draw(seen, folder, "terminal-progress", "", "-light")


def status(folder: Path) -> None:
    """All runs, and one with its plan."""
    made_runs(folder / "runs")
    for name, words, width, palettes in (
        ("terminal-status", ["status"], 120, ("", "-light")),
        ("terminal-status-plan", ["status", "lm-1b-fineweb", "--plan"], 80, ("",)),
    ):
        argv = ("-m", "hpcresume", *words)
        runs = str(folder / "runs")
        with Terminal(argv, folder, width=width, height=40, HPCRESUME_RUNS=runs) as seen:
            assert seen.end() == 0, seen.screen
            prompt = f"\x1b[32m$\x1b[0m hpcresume {' '.join(words)}\r\n".encode()
            # pyte knows no dim letters.
            shown = prompt + seen.raw.replace(b"\x1b[2m", b"\x1b[90m")
            seen._screen.reset()
            seen._stream.feed(shown)
            draw(seen, folder, name, *palettes)


def _settle(seen: Terminal, seconds: float) -> None:
    """Read on for a while, up to the end of a picture: one that has just begun is not all there."""
    deadline = time.monotonic() + seconds
    known = -1
    while time.monotonic() < deadline or len(seen.raw) > known:
        known = len(seen.raw)
        seen._read()


# ---- the page --------------------------------------------------------------------------------


def made_runs(root: Path) -> None:
    """A run over nine jobs, and others in each state; a `squeue` that tells of their jobs."""
    now = time.time()
    begins = now - 27.5 * 3600
    lm = MadeChain(root, "lm-1b-fineweb", total=12_000, begins=begins, cluster="slurm")
    for steps, more in (
        (1200, {}),
        (1180, {}),
        (
            560,
            {
                "lost": 30,
                "cause": "node failure",
                "detail": "job 48121: NODE_FAIL on gpu031",
                "seconds": 3900.0,
            },
        ),
        (1210, {"seconds": 7000.0}),
        (1210, {}),
        (420, {"cause": "preempted", "detail": "job 48142: PREEMPTED", "seconds": 2500.0}),
        (1205, {"queued_s": 9800.0, "node": "gpu022"}),
        (1195, {"node": "gpu022"}),
    ):
        lm.link(steps, **{"seconds": 7000.0, **more})
    lm.link(560, queued_s=now - lm.now - 3300, seconds=3300.0, node="gpu022", cause=None)
    journal = Journal(lm.run.submissions, link=0, job=None)
    journal.write("queued", queued_job="48107", after_link=0, time_s=7200.0, lead_s=90.0)
    journal.close()
    bad = MadeChain(root, "lm-1b-ablation-no-warmup", total=8000, begins=now - 13 * 3600)
    bad.link(900)
    reason = "loss was not finite in step 1281 (nan); the last finite checkpoint, step 1280, is "
    reason += "kept"
    end = {"cause": "non-finite", "detail": reason, "decision": ("stop", reason)}
    with bad.link(380, seconds=2400.0, **end).metrics.open("a") as metrics:
        metrics.write('{"step": 1281, "epoch": 0, "loss": NaN}\n')
    done = MadeChain(root, "sft-8b", total=2400, begins=now - 26 * 3600)
    done.link(1300)
    done.link(1100, cause="completed", detail="training is complete at step 2400")
    done.complete()
    rests = MadeChain(root, "tokenizer-sweep", total=5000, begins=now - 78 * 3600)
    rests.link(1300)
    reason = "cancelled by ada, saved at step 2400"
    rests.link(1100, cause="cancelled", detail=reason, decision=("stop", reason))
    MadeChain(root, "vit-large", total=50_000, begins=now - 55 * 3600).link(5800)
    dpo = make_run(root, "dpo-8b", cluster="slurm", max_steps=3000)
    queue = [
        (48163, "RUNNING|None|gpu022", now - 3300, now + 3900, lm.run),
        (48170, "PENDING|Dependency|", 0, 0, lm.run),
        (48177, "PENDING|Dependency|", 0, 0, lm.run),
        (48190, "PENDING|Priority|", 0, 0, dpo),
    ]
    rows = [
        f"{job}|{words}|{begin or 'N/A'}|{end or 'N/A'}|{token_prefix(run.identify()['id'])}1"
        for job, words, begin, end, run in ((j, w, int(b), int(e), r) for j, w, b, e, r in queue)
    ]
    # It trains, and so it is the first of all.
    lm.run.trainer_state.touch()
    slurm = FakeSlurm(root.parent / "slurm")
    slurm.program("squeue", "cat <<'END'\n" + "\n".join(rows) + "\nEND")
    ENVIRON["PATH"] = slurm.path


def web(folder: Path) -> None:
    """The page in Debian's Chromium, on a desktop and on a phone."""
    from playwright.sync_api import sync_playwright

    runs = folder / "runs"
    made_runs(runs)
    with served(runs, state=folder) as server, sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])

        def shot(
            name: str, run: str | None, at: str = "", *, dark: bool = False, phone: bool = False
        ) -> None:
            size = {"width": 390, "height": 780} if phone else {"width": 1280, "height": 800}
            scheme = "dark" if dark else "light"
            context = browser.new_context(viewport=size, color_scheme=scheme)
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{server.port}/#{server.token}")
            page.get_by_role("link", name="lm-1b-fineweb").wait_for()
            if run is not None:
                page.get_by_role("link", name=run).click()
                page.locator("figure canvas").first.wait_for()
            if at:
                page.get_by_role("heading", name=at).evaluate(
                    "it => window.scrollBy(0, it.getBoundingClientRect().top - 64)"
                )
            page.wait_for_timeout(1500)
            page.get_by_text(str(runs)).evaluate_all(
                "all => all.forEach(it => { it.textContent = '/scratch/ada/runs' })"
            )
            page.screenshot(path=str(HERE / f"{name}.png"))
            context.close()
            print(f"{name}.png")

        shot("web-runs", None, dark=True)
        shot("web-run", "lm-1b-fineweb")
        shot("web-links", "lm-1b-fineweb", "Links", dark=True)
        shot("web-phone", "lm-1b-fineweb", phone=True)
        shot("web-failed", "lm-1b-ablation-no-warmup")
        browser.close()


def main() -> None:
    """Make those that are named, by default all."""
    made = {"terminal": terminal, "status": status, "web": web}
    for name in sys.argv[1:] or made:
        with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
            made[name](Path(folder))


if __name__ == "__main__":
    main()
