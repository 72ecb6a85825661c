"""The JSON lines of a file that somebody else appends to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcresume import files

#: So much is read at once.
_MOST = 1 << 30


class GrowingLines:
    """Reads each line once, when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.position = 0
        """How many bytes have been read."""

    def look(self, limit_bytes: int | None = None) -> list[Any]:
        """The values that have come since the last look; a torn or foreign line is passed over.

        `limit_bytes` is how much of the file counts. A file that is not there has no lines.
        """
        try:
            size = self._path.stat().st_size
            end = size if limit_bytes is None else min(size, limit_bytes)
            if end <= self.position:
                return []
            data = files.read_bytes(self._path, min(end - self.position, _MOST), self.position)
        except FileNotFoundError:
            return []
        # What has no end in so many bytes is no line.
        whole = data if len(data) == _MOST else data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        return list(files.values_of_lines(whole))
