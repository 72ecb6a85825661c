"""The folders `checkpoint-N` of a Trainer: which one a run goes on from, which of them go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcresume.adapters.guest import Guest, nothing_left
from hpcresume.adapters.vouched import Newest, newest, numbered, voucher_or_none, why_not
from hpcresume.errors import CheckpointError


def choose(guest: Guest, folder: Path, asked: Any) -> tuple[Newest, str]:
    """The newest whole checkpoint of the guest's run, else what its script has `asked` for.

    With the reason for a fresh start, where the script gave one. Raises CheckpointError where what
    was saved or asked for is not whole.
    """
    folders = numbered(folder)
    own = [path for path in folders if guest.owns(voucher_or_none(path))]
    known = guest.known_step(folder)
    if own or known:
        found = newest(own)
        if found.path is None and guest.run is not None:
            raise nothing_left(guest.run, known, folder)
        return _with_strangers(found, folders, own), ""
    if asked is False:
        return Newest(), "resume_from_checkpoint=False"
    if isinstance(asked, (str, os.PathLike)):
        path = Path(asked)
        wrong = why_not(path)
        if wrong is not None:
            raise CheckpointError(
                f"resume_from_checkpoint={path}: {wrong}. Name another one, or none."
            )
        return Newest(path=path, voucher=voucher_or_none(path)), ""
    return newest(folders), ""


def superseded(
    folders: Sequence[Path], newest: Path, limit: int | None, best: str | None
) -> list[Path]:
    """Which checkpoints a limit of their number has go, now that `newest` is verified.

    By step, never by file time: those that are no part of this training any more first (their
    step is beyond the newest), then the oldest. `newest` and `best` always stay.
    """
    if not limit or limit < 1:
        return []
    kept = {newest, *([newest.parent / Path(best).name] if best else [])}
    ascending = [*reversed(folders)]
    at = ascending.index(newest)
    order = [*ascending[at + 1 :], *ascending[:at]]
    excess = len(ascending) - max(limit, len(kept & {*ascending}))
    return [path for path in order if path not in kept][: max(0, excess)]


def _with_strangers(found: Newest, folders: Sequence[Path], own: Sequence[Path]) -> Newest:
    """What was found, with the newer ones that nobody of this run vouched for."""
    assert found.path is not None
    newer = folders[: folders.index(found.path)]
    stranger = "this run did not vouch for it"
    others = [(path, why_not(path) or stranger) for path in newer if path not in own]
    return Newest(path=found.path, voucher=found.voucher, passed_over=[*found.passed_over, *others])
