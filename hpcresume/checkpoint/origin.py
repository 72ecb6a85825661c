"""What a run begins with, where that is another's state: named at submit, frozen in the run.

Needs no torch: what a source holds is read by `foreign`, in the ranks or in a child of `submit`.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.checkpoint.manifest import NAME, Committed, read_committed
from hpcresume.checkpoint.store import Store
from hpcresume.config import RunConfig
from hpcresume.errors import CheckpointError, ConfigError, NotFound, UsageError
from hpcresume.journal import Lineage, lineage
from hpcresume.run_dir import RunDir, is_run

#: How many names of what is there a message tells.
_TOLD = 8


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source of state, by the absolute path at which it lies."""

    asked: str
    """As it was named: of a run, its directory."""
    path: str
    """What that meant when it was named: of a run, its newest checkpoint."""
    trust: bool = False
    """Whether its pickles may hold anything, because they are the user's own."""

    def to_json(self) -> dict[str, Any]:
        """The content of origin.json."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a look into a source told, without the state itself."""

    layout: str
    global_step: int
    epoch: int
    """Epochs that are done, or left: the next one, counted from 0."""
    notes: tuple[str, ...] = ()


def frozen_origin(run: RunDir) -> Origin | None:
    """What a run was begun with; None where it began by itself. Raises CheckpointError."""
    if not run.origin.exists():
        return None
    content = files.read_json_or_none(run.origin)
    try:
        assert isinstance(content, dict)
        return Origin(
            asked=str(content["asked"]), path=str(content["path"]), trust=content["trust"] is True
        )
    except (AssertionError, LookupError):
        raise CheckpointError(
            f"{run.origin} is damaged, so that nobody knows what {run.name} began with: begin a "
            f"new run."
        ) from None


def find_origin(text: str, root: Path, *, trust: bool = False) -> Origin:
    """The source that a path means, or the name of a run below `root`.

    Raises NotFound with what is there instead, CheckpointError where a run has no checkpoint.
    """
    places = _places(text, root)
    asked = next((path for path in places if path.exists()), None)
    if asked is None:
        raise NotFound(f"There is no {places[0]}: {what_is_there(places[0].parent)}.")
    path = _newest(RunDir(asked)).path if is_run(asked) else asked
    return Origin(asked=str(asked), path=str(path), trust=trust)


def _newest(run: RunDir) -> Committed:
    committed = Store(run, run.identify()["id"]).committed(lineage(run))
    if not committed:
        raise CheckpointError(f"{run.path} is a run that has no checkpoint yet: wait for one.")
    return committed[-1]


def is_own(path: Path) -> bool:
    """Whether a directory is, or was, a checkpoint of ours."""
    return (path / NAME).is_file() and (path / "state.json").is_file()


def read_own(path: Path) -> Committed:
    """A checkpoint of ours, of whatever run. Raises CheckpointError that names it, OSError."""
    try:
        return read_committed(path, Lineage())
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be begun with: {error}.") from None


def what_is_there(folder: Path) -> str:
    """A few words on what a folder holds, or the nearest one above that there is."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        names = sorted((n for n in os.listdir(folder) if n[0] != "."), key=_natural)
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror})"
    # The newest checkpoints come last.
    more = "… " if len(names) > _TOLD else ""
    return f"in {folder} there is {more}{', '.join(names[-_TOLD:]) or 'nothing'}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts checkpoint-900 before checkpoint-1000."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def check_same(run: RunDir, text: str, root: Path) -> None:
    """Raise ConfigError where a run that is gone on with was begun with something else.

    What it was begun with need not be there any more; anything else must (NotFound).
    """
    named = _places(text, root)
    if run.path in named:
        return
    frozen = frozen_origin(run)
    if frozen is None or Path(frozen.asked) not in named:
        find_origin(text, root)
        began = "from scratch" if frozen is None else f"with {frozen.asked}"
        raise ConfigError(
            f"{run.path} was begun {began}, not with {named[0]}: leave --resume out to go on with "
            f"it, or give the new run another name by --name."
        )


def _places(text: str, root: Path) -> list[Path]:
    """What a path, or the name of a run below `root`, may mean; absolute."""
    given = Path(text).expanduser()
    return [Path(os.path.abspath(path)) for path in (given, root / given)]


def check_own_place(run: RunDir, origin: Origin) -> None:
    """Raise UsageError where a run is to begin with something of its own."""
    if run.path in (Path(origin.asked), *Path(origin.asked).parents):
        raise UsageError(
            f"{origin.asked} belongs to {run.name} itself, which goes on from its newest "
            f"checkpoint by `hpcresume resume {run.name}`: to branch off, name the new run by "
            f"--name."
        )


def check_end(config: RunConfig, told: Told, origin: Origin) -> None:
    """Raise ConfigError where a source has trained as far as the configuration goes."""
    limits = (("max_steps", told.global_step, "step"), ("epochs", told.epoch, "epoch"))
    for name, done, word in limits:
        limit = getattr(config, name)
        if limit is not None and done >= limit:
            raise ConfigError(
                f"{name}={limit} leaves nothing to train: {origin.path} stands at {word} {done}, "
                f"and the count goes on from there. Raise {name} above {done}."
            )
