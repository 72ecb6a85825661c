"""What a run remembers of a tracker: the tracker run's id, and the last step that it was told."""

from __future__ import annotations

from typing import Any

from hpcresume import files
from hpcresume.run_dir import RunDir


class Memory:
    """`trackers/wandb.json` of a run. Written by the tracker's process of the newest link alone."""

    def __init__(self, run: RunDir, name: str) -> None:
        self._path = run.tracker(name)
        known = files.read_json_or_none(self._path)
        known = known if isinstance(known, dict) else {}
        id, told = known.get("id"), known.get("told")
        self.id: str | None = id if isinstance(id, str) else None
        """The tracker run that all links share; None before there is one."""
        self.told = told if type(told) is int and told > 0 else 0
        """The last step that was told; a process that was killed may have told a little more."""

    def keep_id(self, id: str) -> str:
        """Remember the id, so that it survives a power loss, and return it."""
        if id != self.id:
            self.id = id
            self._write(sync=True)
        return id

    def reached(self, step: int, *, sync: bool = False) -> None:
        """Remember the last step that was told."""
        self.told = step
        self._write(sync=sync)

    def _write(self, *, sync: bool) -> None:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        content: dict[str, Any] = {"id": self.id, "told": self.told}
        files.write_json(self._path, content, sync=sync)
