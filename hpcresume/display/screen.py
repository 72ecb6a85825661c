"""One run as a full screen of any size: a picture in, lines out.

From the top: who and where, progress, what was logged as numbers and curves, the machine, the
checkpoints, and as much of the log as there is room for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from hpcresume.display.bars import progress_lines, spinner
from hpcresume.display.sparkline import chart, sparkline
from hpcresume.display.tables import ago
from hpcresume.display.view import Series, View
from hpcresume.files import size_words
from hpcresume.observe.picture import CheckpointShown
from hpcresume.status import RunStatus
from hpcresume.training.progress import clock, memory_text, metric_text, number

_STATES = {
    "complete": "bold green",
    "running": "bold cyan",
    "waiting": "bold yellow",
    "stopped": "bold magenta",
    "failed": "bold red",
    "stalled": "bold red",
}
_QUIET = "bright_black"
#: What is logged under these names comes first, and the first gets the large curve.
_FIRST = ("loss", "val_loss", "lr", "learning_rate", "grad_norm")
_NAME, _VALUE = 11, 10
#: A screen of fewer lines shows no large curve, and one line of checkpoints.
_TALL = 32
#: A screen of fewer lines has none to spare above its last one.
_ROOMY = 22
_CHART_LINES = 5
_MOST_METRICS = 8
_MOST_CHECKPOINTS = 4


def screen_lines(view: View, width: int, height: int, *, plain: bool = False) -> list[Text]:
    """At most `height` lines of at most `width` columns."""
    drawn = _Screen(view, width, plain)
    tall = height >= _TALL
    top = [*drawn.header(), *drawn.progress()]
    blocks = [drawn.metrics(_MOST_METRICS if tall else 4), drawn.machine()]
    if tall:
        blocks.insert(1, drawn.curve(_CHART_LINES))
    blocks.append(drawn.checkpoints(_MOST_CHECKPOINTS if tall else 1))
    lines = [*top]
    for block in blocks:
        # The log's newest lines matter more than all that stands above them.
        if block and len(lines) + 1 + len(block) <= height - 6:
            lines += [Text(), *block]
    room = height - len(lines) - (3 if height >= _ROOMY else 2)
    log = drawn.log(room - 1)
    if log:
        lines += [Text(), *log]
    del lines[max(0, height - 1) :]
    lines += [Text()] * (height - 1 - len(lines))
    return [*lines, drawn.footer()]


class _Screen:
    """The parts of a screen of some width."""

    def __init__(self, view: View, width: int, plain: bool) -> None:
        self._view = view
        self._width = width
        self._plain = plain
        self._dot = " | " if plain else " · "

    def header(self) -> list[Text]:
        """`quickstart   running · link 2 · job 4711 · gpu017          1:05:09 left in this job`"""
        status = self._view.status
        line = Text(no_wrap=True)
        line.append(f" {self._view.name}  ", style="bold")
        if status is None:
            line.append(f"{spinner(self._plain)} reading", style="cyan")
        else:
            line.append(status.state, style=_STATES.get(status.state, "bold"))
            self._append_place(line, status)
        lines = [self._cut(line), Text(self._rule() * self._width, style=_QUIET)]
        why = self._view.trouble or (status.why if status is not None else "")
        if why:
            lines.append(self._cut(Text(f" {' '.join(why.split())}", style="yellow")))
        return lines

    def _append_place(self, line: Text, status: RunStatus) -> None:
        """Where it runs and, at the right, what is left; of the places as many as there is room."""
        left = status.time_left_s if status.state == "running" else None
        right = "" if left is None else f"{clock(left)} left in this job "
        if self._width < 80:
            right = right.replace(" in this job", "")
        for part in _place(status):
            if line.cell_len + len(self._dot + part) + 2 + len(right) <= self._width:
                line.append(self._dot, style=_QUIET).append(part)
        line.append(" " * max(2, self._width - line.cell_len - len(right)) + right)

    def progress(self) -> list[Text]:
        """The bars; a training that ended has none that runs."""
        progress = self._view.progress
        if progress is None:
            return [Text(" no step yet", style=_QUIET)]
        return progress_lines(progress, self._width - 1, plain=self._plain, logged=False)

    def metrics(self, most: int) -> list[Text]:
        """A table: name, newest value, lowest, highest, curve."""
        names = _ordered(self._view.series)[:most]
        if not names:
            return []
        wide = self._width >= 72
        heads = ["METRIC".ljust(_NAME), "NOW".rjust(_VALUE)]
        heads += ["MIN".rjust(_VALUE), "MAX".rjust(_VALUE)] if wide else []
        lines = [Text(" " + " ".join(heads), style=_QUIET)]
        for name in names:
            series = self._view.series[name]
            line = Text(" " + _fitted(name, _NAME), no_wrap=True)
            line.append(" " + _number(name, series.last), style="bold")
            if wide:
                line.append(f" {_number(name, series.low)} {_number(name, series.high)}", _QUIET)
            room = self._width - line.cell_len - 3
            curve = sparkline(series.values, room, plain=self._plain)
            line.append("  " + curve, style="cyan")
            lines.append(self._cut(line))
        return lines

    def curve(self, height: int) -> list[Text]:
        """The first metric in braille dots, between its extremes."""
        names = _ordered(self._view.series)
        if not names or self._plain:
            return []
        name = names[0]
        values = self._view.series[name].values
        if len(values) < 2:
            return []
        room = self._width - 2 * _NAME - 1
        drawn = chart(values, room, height)
        lines = []
        for at, text in enumerate(drawn):
            label = {0: _number(name, max(values)), height - 1: _number(name, min(values))}
            line = Text(" " + (_fitted(name, _NAME) if at == 0 else " " * _NAME), no_wrap=True)
            line.append(f"{label.get(at, '').rjust(_VALUE)} ", style=_QUIET)
            line.append(text, style="cyan")
            lines.append(self._cut(line))
        return lines

    def machine(self) -> list[Text]:
        """Step times and waits, memory of GPU and host, sizes."""
        progress = self._view.progress
        seen = progress.monitor if progress is not None else {}
        rows = [
            ("step time", _step_times(seen, self._width)),
            ("GPU", self._gpu(seen)),
            ("host memory", self._host(seen)),
            ("state", _state_sizes(seen)),
        ]
        return [
            self._cut(Text.assemble((f" {name.ljust(_NAME)} ", _QUIET), text))
            for name, text in rows
            if text
        ]

    def _gpu(self, seen: Mapping[str, Any]) -> Text | None:
        held, whole = number(seen.get("gpu_reserved_bytes")), number(seen.get("gpu_total_bytes"))
        if held is None or not whole:
            return None
        parts = [memory_text(held, whole)]
        used, busy = number(seen.get("gpu_allocated_bytes")), number(seen.get("gpu_utilization"))
        watts = number(seen.get("gpu_power_w"))
        parts += [] if used is None else [f"{size_words(used)} in tensors"]
        parts += [] if busy is None else [f"{100 * busy:.0f}% busy"]
        parts += [] if watts is None else [f"{watts:.0f} W"]
        return self._meter(held / whole).append(f" {self._dot.join(parts)}")

    def _host(self, seen: Mapping[str, Any]) -> Text | None:
        used, limit = number(seen.get("host_bytes")), number(seen.get("host_limit_bytes"))
        if used is None or not limit:
            return None
        return self._meter(used / limit).append(f" {memory_text(used, limit)}")

    def _meter(self, share: float) -> Text:
        """A short bar that warns where little is left."""
        cells = 10
        full = round(max(0.0, min(1.0, share)) * cells)
        signs = ("#", ".") if self._plain else ("━", "━")
        style = "red" if share > 0.95 else "yellow" if share > 0.85 else "cyan"
        return Text.assemble((signs[0] * full, style), (signs[1] * (cells - full), _QUIET))

    def checkpoints(self, most: int) -> list[Text]:
        """The newest ones, the newest first, and the best."""
        found = list(self._view.checkpoints)
        if not found:
            return []
        shown = found[:most]
        best = next((saved for saved in found if saved.best), None)
        if most > 1 and best is not None and best not in shown:
            shown[-1] = best
        rows = [self._checkpoint(saved) for saved in shown]
        if most == 1:
            more = f"{self._dot}{len(found)} kept" if len(found) > 1 else ""
            text = Text(f" {'checkpoint'.ljust(_NAME)} ", style=_QUIET)
            return [self._cut(text.append(rows[0] + more, style="default"))]
        head = Text(f" CHECKPOINTS  {len(found)} kept", style=_QUIET)
        return [head, *(self._cut(Text(" " + row)) for row in rows)]

    def _checkpoint(self, saved: CheckpointShown) -> str:
        took = "" if saved.seconds is None else f" in {saved.seconds:.1f} s"
        parts = [
            f"step {saved.step}",
            f"{ago(max(0.0, time.time() - saved.created))} ago",
            f"{size_words(saved.bytes)}{took}",
            "verified" if saved.verified else "",
            "best" if saved.best else "",
            "pinned" if saved.pinned else "",
        ]
        return self._dot.join(part for part in parts if part)

    def log(self, most: int) -> list[Text]:
        """The newest lines of the log, as many as there is room for."""
        lines = self._view.log[-most:] if most > 0 else ()
        if not lines:
            return []
        # The day matters less than the words, where there is little room.
        begin = 0 if self._width >= 100 else len("11-30 ")
        return [Text(" LOG", style=_QUIET), *(self._cut(_log_line(x, begin)) for x in lines)]

    def footer(self) -> Text:
        """What keys do."""
        status = self._view.status
        goes_on = status is not None and status.state in ("running", "waiting")
        words = "q leaves, the job goes on" if goes_on else "q leaves"
        return self._cut(Text(f" {words}", style=_QUIET))

    def _rule(self) -> str:
        return "-" if self._plain else "─"

    def _cut(self, line: Text) -> Text:
        line.no_wrap = True
        line.truncate(self._width, overflow="crop" if self._plain else "ellipsis")
        return line


def _place(status: RunStatus) -> list[str]:
    parts = [f"link {status.link}"] if status.link else []
    parts += [f"job {status.job}"] if status.job else []
    parts += [status.node] if status.node else []
    parts += [f"{len(status.queued)} queued"] if status.queued and status.state == "running" else []
    return parts


def _ordered(series: Mapping[str, Series]) -> list[str]:
    first = [name for name in _FIRST if name in series]
    return [*first, *(name for name in series if name not in first)]


def _fitted(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def _number(name: str, value: float) -> str:
    return metric_text(name, float(value)).rjust(_VALUE)


def _step_times(seen: Mapping[str, Any], width: int) -> str:
    parts = [
        f"{name} {_seconds(value)}"
        for name in (("p50", "p95", "p99") if width >= 72 else ("p50", "p99"))
        if (value := number(seen.get(f"step_s_{name}"))) is not None
    ]
    waits = number(seen.get("data_wait"))
    if waits is not None:
        parts.append(f"data wait {100 * waits:.0f}%")
    return "  ".join(parts)


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _state_sizes(seen: Mapping[str, Any]) -> str:
    named = (("model", "parameter_bytes"), ("optimizer", "optimizer_bytes"))
    return "  ".join(
        f"{name} {size_words(size)}" for name, key in named if (size := number(seen.get(key)))
    )


def _log_line(line: str, begin: int) -> Text:
    """A line of the log from a column on, with its time quiet and its troubles loud."""
    tag, bracket, message = line[15:].partition("]")
    if not (tag.startswith("[") and bracket):
        return Text(" " + line)
    style = {"ERROR": "red", "CRITICAL": "red", "WARNING": "yellow"}.get(tag.rpartition("-")[2])
    return Text.assemble(
        " ", (line[begin:15], _QUIET), (tag + bracket, style or "cyan"), (message, style or "")
    )
