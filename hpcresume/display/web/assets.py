"""The files of the page, by the names that they are asked for with.

They are read once: no name from a request ever becomes a path.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).with_name("static")
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
#: uPlot first; then ours, each behind those that it imports from.
STYLES = ("uPlot.css", "page.css")
MODULES = (
    "dom.js",
    "words.js",
    "live.js",
    "theme.js",
    "chart.js",
    "charts.js",
    "chain.js",
    "tables.js",
    "logview.js",
    "run.js",
    "runs.js",
    "main.js",
)
LIBRARY = "uPlot.js"
PAGE = "page.html"


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    content: bytes
    media_type: str
    tag: str
    """Changes with the content."""

    @property
    def text(self) -> str:
        """The content of a text file."""
        return self.content.decode()


def load_assets() -> dict[str, Asset]:
    """All files of the page by name."""
    found = {}
    for name in (PAGE, LIBRARY, *STYLES, *MODULES):
        content = (_FOLDER / name).read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        media_type = _TYPES[Path(name).suffix] + "; charset=utf-8"
        found[name] = Asset(content, media_type, tag)
    return found
