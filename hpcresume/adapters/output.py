"""What a command prints, as it is kept: progress bars collapsed, and no more than a disk bears.

A bar goes back to the start of its line (`\\r`) for each of its states. Of those the first is kept,
then one every half a minute, and the last. Pure but for the `write` that it is given.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

#: Between two states of a bar that are kept, in seconds.
BAR_S = 30.0
#: How much is kept of what one command of one link prints, in bytes...
LIMIT_BYTES = 256 << 20
#: ...and how many lines of the rest, when it has ended.
_TAIL_LINES = 200
#: A line is cut in pieces of this length, in bytes: dots without an end come in time.
_LONGEST_LINE = 1 << 16
_ENDS = re.compile(rb"(\r\n|\n|\r)")


class Output:
    """Takes bytes as they come, and writes whole lines."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        look: Callable[[str], None] = lambda line: None,
        *,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """`look` is shown every line and every state of a bar, kept or not."""
        self._write = write
        self._look = look
        self._left_bytes = limit_bytes
        self._limit_bytes = limit_bytes
        self._part = b""
        """What has come since the last end of a line."""
        self._state: bytes | None = None
        """A bar's newest state, while it is not written."""
        self._bar_at: float | None = None
        """When a state of the bar that stands now was written."""
        self.last: deque[bytes] = deque(maxlen=_TAIL_LINES)
        """The newest lines, with those that were not kept."""
        self._dropped = 0

    def feed(self, data: bytes, now: float) -> None:
        """Take what was printed; `now` is the monotonic clock's time in seconds."""
        data = self._part + data
        # A return at the very end may be the first half of an end of line.
        self._part, held = b"", b"\r" if data.endswith(b"\r") else b""
        parts = _ENDS.split(data.removesuffix(b"\r") if held else data)
        for text, end in zip(parts[0::2], parts[1::2], strict=False):
            if end == b"\r":
                self._note_state(text, now)
            else:
                self._end_line(text)
        self._part = parts[-1] + held
        while len(self._part) > _LONGEST_LINE:
            self._keep(self._part[:_LONGEST_LINE])
            self._part = self._part[_LONGEST_LINE:]

    def close(self) -> None:
        """Write what is left, and the last of what was too much."""
        if self._part or self._state is not None:
            self._end_line(self._part.rstrip(b"\r"))
        self._part = b""
        if self._dropped:
            words = f"[hpcresume: {self._dropped} lines are left out; the last of them:]\n"
            shown = [*self.last][-min(self._dropped, _TAIL_LINES) :]
            self._write(words.encode() + b"".join(line + b"\n" for line in shown))
            self._dropped = 0

    def last_lines(self, count: int) -> list[str]:
        """The newest lines as text."""
        return [line.decode(errors="replace") for line in [*self.last][-count:]]

    def _note_state(self, text: bytes, now: float) -> None:
        if not text:
            return
        self._look(text.decode(errors="replace"))
        if self._bar_at is None or now - self._bar_at >= BAR_S:
            self._bar_at, self._state = now, None
            self._keep(text)
        else:
            self._state = text

    def _end_line(self, text: bytes) -> None:
        if text:
            self._look(text.decode(errors="replace"))
        line = text or self._state
        # Of a bar whose last state is written already only the end of its line comes.
        if line or self._bar_at is None:
            self._keep(line or b"")
        self._state = self._bar_at = None

    def _keep(self, line: bytes) -> None:
        self.last.append(line)
        if self._left_bytes > 0:
            self._left_bytes -= len(line) + 1
            self._write(line + b"\n")
            if self._left_bytes <= 0:
                size = self._limit_bytes >> 20
                self._write(f"[hpcresume: {size} MiB are kept of this output]\n".encode())
        else:
            self._dropped += 1
