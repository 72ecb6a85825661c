"""A run as Markdown, for a lab notebook."""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcresume.files import size_words
from hpcresume.training.progress import clock

#: What Markdown would take for something else than text.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40
_LOG_LINES = 30
_CURVES = ("metric", "over the run", "first", "last", "lowest", "highest")
_LINKS = ("link", "job", "node", "began", "time", "steps", "ended by")
_CHECKPOINTS = ("step", "size", "saved", "verified", "note")


def markdown_report(shown: Mapping[str, Any]) -> str:
    """A run's picture and its explanation (`display.web.explained`) as Markdown."""
    status = shown["status"]
    total = status["total_steps"]
    percent = f" ({100 * status['step'] / total:.0f}%)" if total else ""
    facts = [
        ("state", status["state"]),
        ("step", f"{status['step']}{f' of {total}' if total else ''}{percent}"),
        ("loss", "" if status["loss"] is None else f"{status['loss']:.4f}"),
        ("links", str(len(shown["links"]))),
        ("training time", clock(sum(link["seconds"] for link in shown["links"]))),
        ("run", f"{shown['path']} (id {shown['run_id']})"),
        ("as of", _utc(shown["made"])),
    ]
    parts = [
        f"# {_text(shown['name'])}",
        _text(shown["why"]["sentence"]),
        _table(("", ""), [(term, _text(value)) for term, value in facts if value]),
        *_section("Curves", _CURVES, _curves(shown)),
        *_section("Links", _LINKS, _links(shown)),
        *_section("Checkpoints", _CHECKPOINTS, _checkpoints(shown)),
    ]
    if shown["log"]:
        lines = shown["log"][-_LOG_LINES:]
        # Longer than any run of backticks in it.
        inside = max(map(len, re.findall("`+", "\n".join(lines))), default=0)
        fence = "`" * max(3, inside + 1)
        parts += ["## Log", "\n".join([fence, *lines, fence])]
    return "\n\n".join(parts) + "\n"


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"## {title}", _table(head, rows)] if rows else []


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _curves(shown: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, curve in shown["curves"].items():
        values = [value for value in curve["mean"] if value is not None]
        if not values:
            continue
        low = min(v for v in curve.get("low", values) if v is not None)
        high = max(v for v in curve.get("high", values) if v is not None)
        numbers = (values[0], curve["latest"][1], low, high)
        rows.append((_text(name), spark(values), *(f"{number:.4g}" for number in numbers)))
    return rows


def _links(shown: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            str(link["link"]),
            _text(link["job"]),
            _text(link["node"]),
            "" if link["began"] is None else _utc(link["began"]),
            clock(link["seconds"]) if link["ended"] is not None else "",
            f"{link['first_step']} → {link['last_step']}",
            _text(link["detail"] if link["detail"].startswith(link["cause"]) else _end(link)),
        )
        for link in shown["links"]
    ]


def _end(link: Mapping[str, Any]) -> str:
    return f"{link['cause']}: {link['detail']}" if link["detail"] else str(link["cause"])


def _checkpoints(shown: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for saved in shown["checkpoints"]:
        notes = [word for word in ("best", "pinned") if saved[word]]
        size, when = size_words(saved["bytes"]), _utc(saved["created"])
        rows.append((str(saved["step"]), size, when, saved["verified"], ", ".join(notes)))
    return rows


def spark(values: Sequence[float]) -> str:
    """A curve as a row of blocks, the mean of a stretch each."""
    width = min(_SPARK_WIDTH, len(values))
    edges = [round(at * len(values) / width) for at in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    step = (high - low) / (len(_SPARKS) - 1) or 1.0
    return "".join(_SPARKS[min(len(_SPARKS) - 1, round((mean - low) / step))] for mean in means)


def _text(value: str) -> str:
    """Plain text, whatever a name or a message holds."""
    return _SPECIAL.sub(r"\\\1", " ".join(value.split()))


def _utc(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
