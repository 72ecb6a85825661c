"""What a resumed training may have changed about its data: a pure rule.

docs/exact-resume.md has the table. Same everything: exact. Another number of ranks with the same
global batch: goes on, no sample lost or repeated, and is said. Anything else is refused with the
difference, unless the configuration accepts it by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

#: What makes up the number of samples in a step.
_BATCH = ("batch_size", "accumulate", "world_size")


@dataclass(frozen=True)
class Verdict:
    """Where training goes on. `refused`: why not; `said`: what is not the same any more."""

    epoch: int
    position: int
    said: tuple[str, ...] = ()
    refused: str | None = None
    new_data: bool = False
    """Whether a place that the saved feed remembers means nothing in this one."""


def reconcile(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    epoch: int,
    position: int,
    accept: Collection[str],
) -> Verdict:
    """Whether a feed can go on where a saved one was, and at which micro-batch.

    `saved` and `now` are fingerprints with accumulate and world_size; `position` counts
    micro-batches of the saved feed.
    """
    keys = [*saved, *(key for key in now if key not in saved)]
    changed = [key for key in keys if saved.get(key) != now.get(key)]
    said: list[str] = []
    data = [key for key in changed if key not in _BATCH]
    if data:
        words = _difference(data, saved, now)
        if "dataset" not in accept:
            return _refused(epoch, position, f"its data were others ({words})", "dataset")
        if position:
            epoch, position = epoch + 1, 0
        said.append(
            f"the data are others now ({words}): epoch {epoch + 1} begins with the new ones"
        )
    shape = [key for key in changed if key in _BATCH]
    if not shape:
        return Verdict(epoch, position, tuple(said), new_data=bool(data))
    words = _difference(shape, saved, now)
    # Only what has a length and an index can be shared out anew.
    counted = "length" in now and ("batch_size" in now or "world_size" not in shape)
    if not counted and shape != ["accumulate"]:
        text = (
            f"{words}: what each rank reads of a stream cannot be shared out anew, so set it back"
        )
        return Verdict(epoch, position, refused=text)
    before, after = _samples(saved, micro=False), _samples(now, micro=False)
    if before != after and "batch" not in accept:
        text = f"its steps had {before} samples, and would have {after} ({words})"
        return _refused(epoch, position, text, "batch")
    place = position
    if counted:
        place = position * _samples(saved, micro=True) // _samples(now, micro=True)
        place -= place % int(now["accumulate"])
    if before == after:
        said.append(f"{words}, with the same {after} samples a step: not one is lost or repeated")
    else:
        said.append(f"a step had {before} samples and now has {after} ({words})")
    return Verdict(epoch, place, tuple(said), new_data=bool(data))


def _samples(shape: Mapping[str, Any], *, micro: bool) -> int:
    """Samples of one micro-batch, or of one step, of all ranks together."""
    whole = int(shape.get("batch_size", 1)) * int(shape["world_size"])
    return whole if micro else whole * int(shape["accumulate"])


def _refused(epoch: int, position: int, text: str, word: str) -> Verdict:
    advice = f"set it back, or accept it: hpcresume resume --set accept=[{word}]"
    return Verdict(epoch, position, refused=f"{text}; {advice}")


def _difference(keys: list[str], saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {saved.get(key)} -> {now.get(key)}" for key in keys)
