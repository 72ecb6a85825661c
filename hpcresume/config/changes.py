"""What became different between two configurations of a run, as lines for people to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hpcresume.config.schema import RunConfig, to_mapping
from hpcresume.config.wording import KeyPath, dotted
from hpcresume.config.yaml_text import scalar

_ABSENT = object()


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """A line for each setting that is not the same: "scheduler.time: 01:00:00 -> 02:00:00"."""
    return list(_differences(to_mapping(old), to_mapping(new), ()))


def _differences(old: Any, new: Any, path: KeyPath) -> Iterator[str]:
    sides = [{} if side is None or side is _ABSENT else side for side in (old, new)]
    if all(isinstance(side, dict) for side in sides) and any(sides):
        for key in {**sides[0], **sides[1]}:
            old_below, new_below = (side.get(key, _ABSENT) for side in sides)
            yield from _differences(old_below, new_below, (*path, key))
    elif _ABSENT in (old, new) or _json(old) != _json(new):
        yield f"{dotted(path)}: {_word(old)} -> {_word(new)}"


def _word(value: Any) -> str:
    """A value as one would write it in YAML: text has quotes only where it needs them."""
    if value is _ABSENT:
        return "(not set)"
    if isinstance(value, str) and scalar(value) is value and value.isprintable():
        return value
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
