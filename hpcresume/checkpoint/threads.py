"""How many threads share work that waits for a disk or for the memory. Needs no torch."""

from __future__ import annotations

import os

#: More do not make either faster; fewer leave one processor to wait for it.
_MOST = 4


def how_many() -> int:
    """As many as there are processors for this process, within reason."""
    return min(_MOST, len(os.sched_getaffinity(0)))
