"""How the messages of a configuration name values and places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Where a setting stands: keys, and numbers in lists.
KeyPath = tuple[str | int, ...]


def show(value: Any) -> str:
    """A value in a message: short, printable, recognisable."""
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower()[:60]
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def printable(text: str) -> str:
    """The text, with escapes where it has characters that a terminal should not get."""
    return text if text.isprintable() else repr(text)[1:-1]


def dotted(path: KeyPath) -> str:
    """The path as one writes it: "scheduler.setup[0]"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part[:60])}"
    return text.lstrip(".")
