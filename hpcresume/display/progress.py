"""Live progress of a run that is driven from this terminal.

On a terminal a bar at the bottom, with the log lines scrolling above it; elsewhere the log lines
alone. It reads the run's files and disturbs nothing.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hpcresume import files
from hpcresume.run_dir import RunDir

_LOOK_S = 0.25


class LocalProgress:
    """Shows what the links print, and how far they are."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._console = Console(highlight=False)
        self._looked_at = 0.0
        self._numbers: list[int] = run.link_numbers()
        self._positions = {n: files.size_or_zero(run.link(n).rank_log(0)) for n in self._numbers}
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeElapsedColumn(),
                TextColumn("<"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(run.name, total=None, loss="")

    def __enter__(self) -> LocalProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

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
        if self._bar is not None:
            self._show_bar()

    def _show_log(self, number: int) -> None:
        try:
            with self._run.link(number).rank_log(0).open("rb") as file:
                file.seek(self._positions[number])
                data = file.read()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._positions[number] += len(whole)
        if whole:
            self._print(Text(whole.decode(errors="replace").rstrip("\n")), soft_wrap=True)

    def _show_bar(self) -> None:
        assert self._bar is not None
        state = files.read_json_or_none(self._run.trainer_state)
        if not isinstance(state, dict):
            return
        history = state.get("log_history")
        last = history[-1] if isinstance(history, list) and history else None
        loss = last.get("loss") if isinstance(last, dict) else None
        self._bar.update(
            self._task,
            completed=state.get("global_step", 0),
            total=state.get("total_steps"),
            description=f"{self._run.name} · link {state.get('link', 1)}",
            loss=f"loss {loss:.4f}" if isinstance(loss, float) else "",
        )
