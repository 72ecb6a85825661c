"""One run on the whole terminal, four times a second, through all its links; elsewhere as lines.

Reads the run's files and keys, and touches no job. `watch` looks on from any machine; `Dashboard`
is the same screen in the process that trains (`python train.py --dashboard`).
"""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live

from hpcresume.display.keys import listening
from hpcresume.display.progress import RankProgress
from hpcresume.display.screen import screen_lines
from hpcresume.display.view import View, Viewer
from hpcresume.run_dir import RunDir
from hpcresume.signals import SignalFlags
from hpcresume.training.progress import Progress, progress_line

_FRAME_S = 0.25
_LEAVE_KEYS = frozenset("qQ")
#: Without a terminal: the longest silence while steps are done, and the pause between two looks.
_LINE_S, _LOOK_S = 30.0, 1.0
#: How many printed lines a dashboard keeps for when it is left.
_HELD_LINES = 2000


def watch_screen(run: RunDir, flags: SignalFlags) -> None:
    """Show a run until a key or a signal ends it."""
    viewer = Viewer(run)
    viewer.start()
    try:
        _show(viewer, Console(highlight=False), lambda: flags.stop_asked() is not None)
    finally:
        viewer.stop()


def watch_lines(run: RunDir, flags: SignalFlags, say: Callable[[str], None]) -> None:
    """Print a line at every event and, while steps are done, every half minute, to the end."""
    viewer = Viewer(run)
    told: tuple[object, ...] = ()
    step, told_at = -1, 0.0
    while flags.stop_asked() is None:
        view = viewer.look()
        now = time.monotonic()
        event = _event(view)
        moved = view.progress is not None and view.progress.step != step
        if event != told or (moved and now - told_at >= _LINE_S):
            told, told_at = event, now
            step = view.progress.step if view.progress is not None else step
            say(_line(view))
        if view.over:
            return
        time.sleep(_LOOK_S)


def _event(view: View) -> tuple[object, ...]:
    """What is worth a line when it changes."""
    status = view.status
    newest = view.checkpoints[0].step if view.checkpoints else None
    return (status.state, status.link, status.job, newest) if status is not None else ()


def _line(view: View) -> str:
    """`11-21 22:10:03 [watch] running · link 2 · job 4711 · gpu017 · step 75/500 (15%): …`"""
    status = view.status
    parts = [status.state] if status is not None else ["not known yet"]
    if status is not None:
        parts += [f"link {status.link}"] if status.link else []
        parts += [f"job {status.job}"] if status.job else []
        parts += [status.node] if status.node else []
        parts += [status.why] if status.why else []
    if view.progress is not None:
        parts.append(progress_line(view.progress))
    if view.checkpoints:
        parts.append(f"saved step {view.checkpoints[0].step}")
    return f"{time.strftime('%m-%d %H:%M:%S')} [watch] {' · '.join(parts)}"


def _show(viewer: Viewer, console: Console, leave: Callable[[], bool]) -> None:
    """Draw until a key or `leave` ends it; the terminal is as it was afterwards."""

    def draw() -> Group:
        width, height = console.size
        plain = console.options.ascii_only
        return Group(*screen_lines(viewer.view, width, height, plain=plain))

    live = Live(
        get_renderable=draw,
        console=console,
        screen=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with listening() as pressed, live:
        while not leave():
            live.refresh()
            if pressed(_FRAME_S) & _LEAVE_KEYS:
                return


class Dashboard:
    """The screen in the process that trains; when it is left, bars and lines take its place.

    What is printed meanwhile is held, and shown then.
    """

    def __init__(self, run: RunDir, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted
        self._bars = RankProgress(interrupted)
        self._viewer = Viewer(run)
        self._stdout = sys.stdout
        self._held = _Held()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)
        self._look: Callable[[], Progress] | None = None

    def __enter__(self) -> Dashboard:
        sys.stdout = self._held
        self._viewer.start()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._held.is_open:
            self._release()
        else:
            self._bars.__exit__(kind, error, trace)

    def show(self, look: Callable[[], Progress]) -> None:
        """Draw what `look` gives from now on; see `Berth.show`."""
        self._viewer.look_here = look
        self._bars.show(look)

    def _run(self) -> None:
        console = Console(file=self._stdout, highlight=False)
        _show(self._viewer, console, lambda: self._done.is_set() or self._interrupted())
        if not self._done.is_set():
            self._release()
            self._bars.__enter__()

    def _release(self) -> None:
        self._viewer.stop()
        sys.stdout = self._stdout
        self._held.release(self._stdout)


class _Held(io.TextIOBase):
    """Standard output while a screen is drawn; the newest lines are kept."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=_HELD_LINES)
        self.is_open = True

    def write(self, text: str) -> int:
        """Keep the text."""
        self._lines.append(text)
        return len(text)

    def isatty(self) -> bool:
        """As it will be shown."""
        return True

    def release(self, stream: TextIO) -> None:
        """Write what was kept."""
        self.is_open = False
        with contextlib.suppress(OSError):
            stream.write("".join(self._lines))
            stream.flush()
