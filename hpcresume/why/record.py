"""One record of a run, found by the short name that a log line has told."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.errors import NotFound
from hpcresume.journal import Record, record_id
from hpcresume.run_dir import RunDir
from hpcresume.why.advice import Advice

#: What is shown at another place than among the facts.
_ELSEWHERE = frozenset({"v", "t", "kind", "link", "job", "traceback", "pace", "segments"})


@dataclass(frozen=True, kw_only=True)
class Found:
    """A record, and where it stands."""

    id: str
    called: str
    """What its run is called in commands."""
    path: Path
    record: Record

    @property
    def kind(self) -> str:
        """What it tells of."""
        return str(self.record.get("kind", "failed"))

    @property
    def facts(self) -> list[tuple[str, str]]:
        """A word each, and what it stands for."""
        told = {k: v for k, v in self.record.items() if k not in _ELSEWHERE and v not in (None, "")}
        return [*((k, str(v)) for k, v in told.items()), ("file", str(self.path))]

    @property
    def advice(self) -> Advice:
        """What to do about it: why, and the exact command."""
        checkpoints = f"hpcresume checkpoints {shlex.quote(self.called)}"
        if self.kind == "save_failed":
            return "the next save tries again; what takes the room", checkpoints
        if self.kind == "quarantined":
            return "an older checkpoint was used; those that are left", checkpoints
        return "the whole story, and what to do", f"hpcresume why {shlex.quote(self.called)}"

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"id": self.id, "file": str(self.path), "record": self.record}


def find_record(run: RunDir, wanted: str, called: str) -> Found:
    """The record of that name, the newest first, also of links that were overtaken.

    Raises NotFound.
    """
    for path in _places(run):
        for record in _records(path):
            if isinstance(record, dict) and record_id(record) == wanted:
                return Found(id=wanted, called=called, path=path, record=record)
    raise NotFound(
        f"{run.name} has no record '{wanted}': the log line that told it names its run as well."
    )


def _places(run: RunDir) -> Iterator[Path]:
    for number in reversed(run.link_numbers()):
        link = run.link(number)
        yield from link.rank_failures()
        yield from (link.training, link.journal)


def _records(path: Path) -> list[Any]:
    return (
        list(files.read_lines(path)) if path.suffix == ".jsonl" else [files.read_json_or_none(path)]
    )
