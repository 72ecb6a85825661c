"""Which checkpoint a Lightning training goes on from, by names and digests; none is unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcresume.adapters.guest import Guest, nothing_left
from hpcresume.adapters.vouched import Newest, newest, voucher_or_none, voucher_path

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_STEP = re.compile(r"step[=-](\d+)")


def look(guest: Guest, trainer: Trainer, folder: Path, given: Any) -> tuple[Newest, str]:
    """The newest of this run that is whole, or what the script has `given`; why there is none.

    `folder` is the callback's own. Raises CheckpointError where a run has lost all it had saved.
    """
    found = newest(_candidates(guest, trainer, folder))
    if found.path is not None:
        return found, ""
    known = guest.known_step(folder)
    if known and guest.run is not None:
        raise nothing_left(guest.run, known, folder)
    if given and not is_local(given):
        return found, f"Lightning loads {given}"
    if given:
        older = newest([Path(given), *_plain(Path(given).parent, but=Path(given))])
        passed_over = [*found.passed_over, *older.passed_over]
        found = Newest(path=older.path, voucher=older.voucher, passed_over=passed_over)
        if found.path is None:
            # Lightning says better what is wrong with what the script names.
            found = Newest(path=Path(given), passed_over=found.passed_over)
        return found, ""
    left = [path for place in _folders(trainer) for path in _plain(place)]
    words = f"no checkpoint of this run in {folder}"
    if left:
        words += (
            f"; {left[0]} is another training's: give trainer.fit(ckpt_path=...) to go on from it"
        )
    return found, words


def _candidates(guest: Guest, trainer: Trainer, folder: Path) -> list[Path]:
    """This training's files: those that continue exactly before all others, the newest first."""
    found = [(True, number_of(path), path) for path in own(guest, folder)]
    for path in (path for other in _folders(trainer) for path in saved_in(other)):
        voucher = voucher_or_none(path)
        # What a script has trained before in the same run lies in the same folders.
        if voucher and guest.owns(voucher) and voucher.about.get("place") == folder.name:
            found.append((bool(voucher.about.get("exact")), voucher.step, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def own(guest: Guest, folder: Path) -> list[Path]:
    """The checkpoints in the callback's own folder, the highest step first.

    Without those of another run of the same name, which may lie in a `dirpath` that both have.
    """
    vouchers = ((path, voucher_or_none(path)) for path in saved_in(folder))
    return [path for path, v in vouchers if v is None or v.about.get("run") == guest.run_id]


def is_local(path: Any) -> bool:
    """Whether a path of Lightning's is one of a file system, and no address."""
    return "://" not in str(path)


def _folders(trainer: Trainer) -> list[Path]:
    """Where the Trainer's own callbacks save, and where they did in links before.

    A logger numbers its folders anew in each process: lightning_logs/version_3/checkpoints.
    """
    found: dict[Path, None] = {}
    for callback in trainer.checkpoint_callbacks:
        dirpath = getattr(callback, "dirpath", None)
        if not dirpath or not is_local(dirpath):
            continue
        folder = Path(dirpath)
        found[folder] = None
        if folder.parent.name.startswith("version_"):
            siblings = folder.parent.parent.glob(f"version_*/{folder.name}")
            found |= dict.fromkeys(sorted(siblings))
    return list(found)


def saved_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the highest step first."""
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".ckpt")]
    except OSError:
        return []
    return sorted(
        (folder / n for n in names), key=lambda path: (number_of(path), path), reverse=True
    )


def _plain(folder: Path, but: Path | None = None) -> Iterator[Path]:
    """Files without a voucher, the newest first."""
    for path in saved_in(folder):
        if path != but and not voucher_path(path).exists():
            yield path


def number_of(path: Path) -> int:
    """The step in a file's name; 0 where there is none."""
    found = _STEP.findall(path.name)
    return int(found[-1]) if found else 0
