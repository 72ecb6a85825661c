"""Live progress at the bottom of a terminal, with what is printed scrolling above it.

Of a training in this process (`RankProgress`), and of a chain that is driven from here
(`LocalProgress`), which reads the run's files and disturbs nothing. Where lines cannot be drawn
over, nothing is drawn: the log's lines tell the progress.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from hpcresume import files
from hpcresume.display.bars import progress_lines, spinner
from hpcresume.display.logging import coloured
from hpcresume.display.terminal import can_redraw
from hpcresume.observe.progress import ProgressTail
from hpcresume.run_dir import RunDir
from hpcresume.training.progress import Progress

_LOOK_S = 0.25
_DRAWN_PER_S = 8

Lines = Callable[[int], Sequence[Text]]


class OneAtATime(Console):
    """A console on which a thread draws only when another one has done.

    rich erases as many lines as were drawn when it began to print: where another thread draws
    more or fewer before it writes, lines of the log are lost, and bars stay behind.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.drawing = threading.RLock()

    def __enter__(self) -> OneAtATime:
        self.drawing.acquire()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self.drawing.release()


class Drawn:
    """Lines at the bottom of the terminal, drawn anew some times a second in a thread."""

    def __init__(self, console: OneAtATime, lines: Lines, interrupted: Callable[[], bool]) -> None:
        self._console = console
        self._lines = lines
        self._interrupted = interrupted
        self._live = Live(
            get_renderable=self._draw,
            console=console,
            # Its own thread would take its lock before that of the console.
            auto_refresh=False,
            transient=True,
            vertical_overflow="crop",
        )
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw_on, name="progress", daemon=True)

    def __enter__(self) -> Drawn:
        with self._console.drawing:
            self._live.start(refresh=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        with self._console.drawing:
            self._live.stop()

    def _draw_on(self) -> None:
        while not self._over.wait(1 / _DRAWN_PER_S):
            self.refresh()

    def refresh(self) -> None:
        """Draw anew; from any thread."""
        with self._console.drawing:
            self._live.refresh()

    def _draw(self) -> RenderableType:
        if self._interrupted():
            # A second Ctrl-C ends the process at once, which must not leave a hidden cursor.
            self._console.show_cursor(True)
        # The last column stays free: some terminals begin a new line in it.
        return Group(*self._lines(self._console.width - 1))


class RankProgress:
    """The progress of the training in this process; `show` is what its session is handed."""

    def __init__(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._look: Callable[[], Progress] | None = None
        self._console = OneAtATime(highlight=False)
        self._drawn = Drawn(self._console, self._lines, interrupted)

    def __enter__(self) -> RankProgress:
        self._drawn.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drawn.__exit__(kind, error, trace)

    def show(self, look: Callable[[], Progress]) -> None:
        """Draw what `look` gives from now on; see `Berth.show`."""
        self._look = look

    def _lines(self, width: int) -> Sequence[Text]:
        plain = self._console.options.ascii_only
        if self._look is None:
            return [Text(f"{spinner(plain)} starting", style="cyan")]
        return progress_lines(self._look(), width, plain=plain)


class LocalProgress:
    """Shows what the links of a chain print, and how far they are."""

    def __init__(self, run: RunDir, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._run = run
        self._console = OneAtATime(highlight=False)
        self._looked_at = 0.0
        self._numbers: list[int] = run.link_numbers()
        self._positions = {n: files.size_or_zero(run.link(n).rank_log(0)) for n in self._numbers}
        self._tail = ProgressTail(run)
        self._progress: Progress | None = None
        self._drawn = None
        if can_redraw():
            self._drawn = Drawn(self._console, self._lines, interrupted)

    def __enter__(self) -> LocalProgress:
        if self._drawn is not None:
            self._drawn.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn is not None:
            self._drawn.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """A line of our own."""
        self._print(Text(text))

    def _print(self, text: Text, *, soft_wrap: bool | None = None) -> None:
        try:
            self._console.print(text, soft_wrap=soft_wrap)
        except (BrokenPipeError, SystemExit):
            # The reader of a pipe has seen enough, and rich would leave; but the jobs need us.
            self._console.quiet = True

    def tick(self) -> None:
        """Look at the files, now and then."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self.finish()

    def finish(self) -> None:
        """Show everything that is there."""
        for number in self._run.link_numbers():
            if number not in self._positions:
                self._positions[number] = 0
                self._print(Text(f"── link {number} ──", style="dim"))
        for number in sorted(self._positions)[-2:]:
            self._show_log(number)
        if self._drawn is not None:
            self._progress = self._tail.look()

    def _show_log(self, number: int) -> None:
        try:
            with self._run.link(number).rank_log(0).open("rb") as file:
                file.seek(self._positions[number])
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._positions[number] += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._print(Text.from_ansi(coloured(line)), soft_wrap=True)

    def _lines(self, width: int) -> Sequence[Text]:
        plain = self._console.options.ascii_only
        newest = max(self._positions, default=0)
        if self._progress is None:
            words = f"link {newest} starts" if newest else "the first job starts"
            return [Text(f"{spinner(plain)} {words}", style="cyan")]
        lead = f"{self._run.name} • link {newest}"
        return progress_lines(self._progress, width, plain=plain, lead=lead)
