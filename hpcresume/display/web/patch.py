"""What has changed between two JSON values, so that a page is sent only that.

A patch is one of `{"set": value}`, `{"in": {key: patch}, "drop": [keys]}` for an object, and
`{"keep": [skip, count], "add": values}` for a list: some of its items in a row, and new ones
behind them. `static/live.js` applies it.
"""

from __future__ import annotations

from typing import Any

Patch = dict[str, Any]


def difference(old: Any, new: Any) -> Patch | None:
    """A patch that makes `new` of `old`; None where they are equal."""
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        changed = {
            key: {"set": value} if key not in old else difference(old[key], value)
            for key, value in new.items()
        }
        inside = {key: patch for key, patch in changed.items() if patch is not None}
        return {"in": inside, "drop": [key for key in old if key not in new]}
    if isinstance(old, list) and isinstance(new, list):
        skip = old.index(new[0]) if new and new[0] in old else 0
        count = 0
        for before, after in zip(old[skip:], new, strict=False):
            if before != after:
                break
            count += 1
        if count:
            return {"keep": [skip, count], "add": new[count:]}
    return {"set": new}


def patched(old: Any, patch: Patch) -> Any:
    """What a page makes of a patch."""
    if "set" in patch:
        return patch["set"]
    if "keep" in patch:
        skip, count = patch["keep"]
        return [*old[skip : skip + count], *patch["add"]]
    kept = {key: value for key, value in old.items() if key not in patch["drop"]}
    return kept | {key: patched(kept.get(key), inner) for key, inner in patch["in"].items()}
