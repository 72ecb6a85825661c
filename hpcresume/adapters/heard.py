"""What a guest has told: the growing `guest.jsonl` of a link, as the command's parent reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcresume.journal import Record, is_record
from hpcresume.observe.growing import GrowingLines


class Heard:
    """What the training framework in a command has told so far."""

    def __init__(self, path: Path) -> None:
        self._lines = GrowingLines(path)
        self.any = False
        """Whether there is a guest at all."""
        self.step: int | None = None
        self.max_steps: int | None = None
        self.epoch = 0.0
        self.epochs: int | None = None
        self.completed = ""
        """Why training is complete; empty while it is not."""
        self.left = ""
        """Why it has left, having been asked to stop."""

    def start_anew(self) -> None:
        """The command is started again: how it ended before is another one's."""
        self.completed = self.left = ""

    def look(self) -> list[Record]:
        """What it has told since the last look."""
        records = [record for record in self._lines.look() if is_record(record)]
        for record in records:
            self._take(record)
        return records

    def _take(self, record: Record) -> None:
        self.any = True
        self.step = int(record.get("step", self.step or 0))
        if record["kind"] == "began":
            # A script may train several times: each has an end of its own.
            self.start_anew()
        elif record["kind"] == "progress":
            self.max_steps = _whole(record.get("max_steps"))
            self.epochs = _whole(record.get("epochs"))
            epoch = record.get("epoch")
            self.epoch = epoch if isinstance(epoch, (int, float)) else 0.0
        elif record["kind"] == "completed":
            self.completed = str(record.get("judged") or "the framework says so")
        elif record["kind"] == "left":
            self.left = str(record.get("reason") or "it was asked to stop")

    def missing(self) -> str:
        """What is still to be done, as words; empty where nothing is."""
        if not self.any or self.completed:
            return ""
        return f"training is at step {self.step} of {self.max_steps or 'an unknown number'}"


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None
