"""The checkpoints of a run as a table, and what is said below it.

Written without rich, like the table of `status`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hpcresume.checkpoint.listing import Listing
from hpcresume.checkpoint.manifest import Manifest
from hpcresume.display.tables import ago
from hpcresume.display.terminal import styled, terminal_width, wrapped
from hpcresume.files import size_words
from hpcresume.story import read_story

_COLUMNS = ("STEP", "EPOCH", "AGE", "LINK", "METRIC", "SIZE", "NOTE")
#: What a narrow terminal can do without, the first first.
_DROPPED = ("LINK", "EPOCH", "AGE")


def checkpoints_table(listing: Listing) -> str:
    """One row a checkpoint; what does not count, and what the run will need, below."""
    lines = _table(listing) if listing.found else []
    lines += [
        wrapped(f"{listing.run.checkpoint(step).name} does not count: {reason}.")
        for step, reason in listing.left_out.items()
    ]
    lines += [wrapped(line) for line in _totals(listing)]
    return "\n".join(lines)


def _table(listing: Listing) -> list[str]:
    rows = [
        dict(zip(_COLUMNS, _cells(manifest, listing), strict=True))
        for manifest in listing.manifests
    ]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in _COLUMNS}
    shown = [column for column in _COLUMNS if any(row[column] for row in rows)]
    for column in _DROPPED:
        if sum(widths[c] + 2 for c in shown) - 2 > terminal_width():
            shown.remove(column)

    def line(row: dict[str, str]) -> str:
        cells = [
            row[column].ljust(widths[column])
            if column == "NOTE"
            else row[column].rjust(widths[column])
            for column in shown
        ]
        return "  ".join(cells).rstrip()

    head = line({column: column for column in _COLUMNS})
    return [styled(head, "dim"), *map(line, rows)]


def _cells(manifest: Manifest, listing: Listing) -> list[str]:
    metric = manifest.metric
    return [
        str(manifest.step),
        str(manifest.epoch + 1),
        ago(max(0.0, time.time() - manifest.created)),
        str(manifest.link),
        "" if metric is None else f"{metric['name']} {metric['value']:.4f}",
        size_words(manifest.payload_bytes),
        _note(manifest.step, listing),
    ]


def _note(step: int, listing: Listing) -> str:
    reasons = listing.kept().get(step)
    words = [word for word in reasons or () if word != "last"]
    if step == listing.best and "best" not in words:
        words.insert(0, "best")
    if reasons is None:
        words.append("may go")
    return ", ".join(words)


def _totals(listing: Listing) -> list[str]:
    if not listing.found:
        name = listing.run.name
        if read_story(listing.run).seen:
            return [f"{name} runs a command, which saves by itself: see `hpcresume why {name}`."]
        return [f"{name} has no checkpoint yet."]
    free = f"{size_words(listing.free_bytes)} are free"
    number = len(listing.found)
    held = f"{number} checkpoint{'s hold' if number > 1 else ' holds'} "
    held += size_words(listing.total_bytes)
    if not listing.more_bytes:
        return [f"{held}; {free}."]
    each = f"{size_words(listing.each_bytes)} each"
    lines = [
        f"{held}. The run will need about {size_words(listing.more_bytes)} more: up to "
        f"{listing.most} at a time ({_rules(listing)}), {each}; {free}."
    ]
    if listing.more_bytes > listing.free_bytes:
        lines.append(
            styled("That is more than is free.", "bad")
            + " Make room, or keep fewer: hpcresume resume "
            f"{listing.run.name} --set checkpoint.keep_last=N."
        )
    return lines


def _rules(listing: Listing) -> str:
    """What makes up the number of checkpoints that the run may hold."""
    policy = listing.policy
    rules = [f"keep_last {policy.last}"]
    if policy.best and listing.best is not None:
        rules.append(f"keep_best {policy.best}")
    if policy.every:
        rules.append(f"keep_every {policy.every}")
    pinned = len(listing.pinned & {found.step for found in listing.found})
    if pinned:
        rules.append(f"{pinned} pinned")
    return " + ".join([*rules, "1 while saving"])


def steps_in_words(steps: Sequence[int]) -> str:
    """100, 200 and 300"""
    words = [str(step) for step in steps]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
