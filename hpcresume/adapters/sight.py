"""What can be seen of a command from outside: how far it is, what it has saved, whether it is done.

Nothing is opened but small JSON files, and nothing is imported of what wrote them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.config import ProgressConfig

#: What Hugging Face's Trainer, and we, write next to a checkpoint.
_STATE = "trainer_state.json"
_LOG = "log:"
#: How a file that is being written is called.
_UNFINISHED = (".tmp", ".partial", ".incomplete", ".part")
#: A file that holds a number and nothing else has no more bytes than these.
_NUMBER_BYTES = 32
_INTEGER = re.compile(r"\d{1,15}")
_WILD = re.compile(r"(\*\*|\*|\?|\[[^\]]*\])")
#: `step 12`, `global_step=12`, `Step: 12/100`
_USUAL_STEP = r"(?i)(?:\b|_)steps?\b[\s:=#]{0,3}(\d+)"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The newest of what a command has saved."""

    path: Path
    stamp: str
    """Another one when it is saved anew."""
    step: int | None = None
    """As its trainer_state.json, its name or its content tells; None where none of them does."""
    total: int | None = None
    """The last step of the training, where that is told."""


class Sight:
    """Looks at what a command, run in `root`, leaves there and prints."""

    def __init__(self, config: ProgressConfig, root: Path) -> None:
        self._config = config
        self._root = root
        states = [e for e in config.done_when if Path(e).name == _STATE]
        self._pattern = config.checkpoints or next(iter(states), None)
        self._words = [e.removeprefix(_LOG) for e in config.done_when if e.startswith(_LOG)]
        self._patterns = [re.compile(word) for word in self._words]
        self._step = re.compile(config.step_pattern or _USUAL_STEP)
        self._found_word = ""
        self.counts_log = config.step_pattern is not None
        """Whether the step in what it prints is its progress."""
        self.first_logged: int | None = None
        """The first and the last step that it printed."""
        self.last_logged: int | None = None

    @property
    def blind(self) -> bool:
        """Whether no progress can be seen, so that only time passes."""
        return self._pattern is None and not self.counts_log

    def start_anew(self) -> None:
        """The command is started again: what it printed before is another one's."""
        self.first_logged = self.last_logged = None
        self._found_word = ""

    def look_at(self, line: str) -> None:
        """Find the step, and what says that it is done, in a line that it printed."""
        for pattern in self._patterns:
            if pattern.search(line):
                self._found_word = pattern.pattern
        found = self._step.search(line)
        if found is None:
            return
        number = _INTEGER.search(found[1] if found.re.groups else found[0])
        if number is not None:
            self.last_logged = int(number[0])
            if self.first_logged is None:
                self.first_logged = self.last_logged

    # ---- what it saved ---------------------------------------------------------------------

    def newest(self) -> Saved | None:
        """The newest that it saved: by step where that is known, else by time."""
        if self._pattern is None:
            return None
        found = [saved for path in self._matches(self._pattern) if (saved := self._saved(path))]
        known = [saved for _, saved in found if saved.step is not None]
        if known:
            return max(known, key=lambda saved: (saved.step or 0, saved.stamp))
        return max(found, key=lambda item: item[0])[1] if found else None

    def _matches(self, pattern: str) -> Iterator[Path]:
        for name in glob.glob(pattern, root_dir=self._root, recursive=True):
            if not name.endswith(_UNFINISHED):
                yield self._root / name

    def _saved(self, path: Path) -> tuple[int, Saved] | None:
        try:
            stat = path.stat()
        except OSError:
            return None
        if not (stat.st_size or path.is_dir()):
            return None
        state = _state_of(path)
        step = _whole(state.get("global_step"))
        if step is None:
            step = self._number_in_name(path) if path.name != _STATE else None
        if step is None and stat.st_size <= _NUMBER_BYTES and path.is_file():
            step = _number_in(path)
        total = _whole(state.get("max_steps")) or _whole(state.get("total_steps"))
        stamp = f"{stat.st_mtime_ns}:{stat.st_size}:{path.name}"
        return stat.st_mtime_ns, Saved(path=path, stamp=stamp, step=step, total=total)

    def _number_in_name(self, path: Path) -> int | None:
        """The last number that stands where the pattern has a wildcard: 5000 of checkpoint-5000."""
        parts = _WILD.split(self._pattern or "")
        text = "".join(
            f"({'.*' if part in ('*', '**') else '.'})" if at % 2 else re.escape(part)
            for at, part in enumerate(parts)
        )
        found = re.fullmatch(text, os.path.relpath(path, self._root))
        groups = found.groups() if found else ()
        numbers = [number for group in groups for number in _INTEGER.findall(group)]
        return int(numbers[-1]) if numbers else None

    # ---- whether it is done ----------------------------------------------------------------

    def done(self) -> str:
        """What says that it is done, as words; empty where nothing does."""
        if self._found_word:
            return f"it printed what matches {self._found_word}"
        for entry in self._config.done_when:
            if entry.startswith(_LOG):
                continue
            for path in self._matches(entry):
                if path.name == _STATE:
                    if _is_complete(_state_of(path)):
                        return f"{_shown(path, self._root)} says so"
                elif self._saved(path):
                    return f"{_shown(path, self._root)} is there"
        return ""

    def missing(self) -> str:
        """What it still lacks to be done, as words."""
        return f"none of these is true yet: {', '.join(self._config.done_when)}"


def _shown(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


def _state_of(path: Path) -> dict[str, Any]:
    """The trainer_state.json that a path is, or has in it; empty where there is none."""
    state = files.read_json_or_none(path if path.name == _STATE else path / _STATE)
    return state if isinstance(state, dict) else {}


def _is_complete(state: dict[str, Any]) -> bool:
    if isinstance(state.get("completed"), bool):
        return bool(state["completed"])
    total = _whole(state.get("max_steps")) or _whole(state.get("total_steps"))
    return bool(total) and (_whole(state.get("global_step")) or 0) >= (total or 0)


def _number_in(path: Path) -> int | None:
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        return None
    return int(text) if _INTEGER.fullmatch(text) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None
