"""Curves of a few letters: blocks in one line, braille dots in several.

Pure: numbers in, text out. Braille patterns: Unicode 2800-28FF, two columns of four dots a letter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

#: Without the full block, so that curves in neighbouring lines do not touch.
_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇", "_.-=+*#"
#: The bits of a letter's dots, by column and row from the top.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """One line of blocks, at most `width` letters; empty where there are no finite numbers."""
    signs = _PLAIN if plain else _BLOCKS
    points = condensed(values, width)
    if not points:
        return ""
    low, high = min(points), max(points)
    if high <= low:
        return signs[len(signs) // 2] * len(points)
    top = len(signs) - 1
    return "".join(signs[round((point - low) / (high - low) * top)] for point in points)


def chart(values: Sequence[float], width: int, height: int) -> list[str]:
    """A curve of braille dots in `height` lines of `width` letters, from the lowest value up."""
    points = stretched(condensed(values, 2 * width), 2 * width)
    if not points:
        return [""] * height
    low, high = min(points), max(points)
    rows = 4 * height
    # At an even value the curve lies at the bottom.
    scale = (rows - 1) / (high - low) if high > low else 0.0
    at = [rows - 1 - round((point - low) * scale) for point in points]
    cells = [[0] * width for _ in range(height)]
    for column, row in enumerate(at):
        # Half of a jump is drawn at each of its ends, so that the curve is in one piece.
        halves = [(row + other) / 2 for other in at[max(0, column - 1) : column + 2]]
        for dot in range(math.ceil(min(halves)), math.floor(max(halves)) + 1):
            cells[dot // 4][column // 2] |= _DOTS[column % 2][dot % 4]
    return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]


def condensed(values: Sequence[float], count: int) -> list[float]:
    """At most `count` means of neighbours; what is no finite number is left out."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) <= count:
        return finite
    edges = [round(at * len(finite) / count) for at in range(count + 1)]
    parts = (finite[begin:end] for begin, end in pairwise(edges))
    return [sum(part) / len(part) for part in parts]


def stretched(values: Sequence[float], count: int) -> list[float]:
    """So many values, those between two given ones on the line between them."""
    if len(values) < 2 or len(values) >= count:
        return list(values)
    found = []
    for at in range(count):
        place = at * (len(values) - 1) / (count - 1)
        left = min(int(place), len(values) - 2)
        share = place - left
        found.append((1 - share) * values[left] + share * values[left + 1])
    return found
