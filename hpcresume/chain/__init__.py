"""What follows a link: a pure policy. Records of the past in, a decision with its reason out.

No disk, no clock, no scheduler: `history` gathers what is known of a link, `cause_of` says why it
ended, `decide` reads the table of causes from top to bottom (first match wins), `link` applies
what it says.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcresume.chain.causes import (
        COMMAND,
        CRASHES,
        HANG,
        MEMORY,
        NODE_CAUSES,
        NON_FINITE,
        PLANNED,
        Cause,
        Evidence,
        Failure,
        cause_named,
        cause_of,
    )
    from hpcresume.chain.decisions import Budgets, Decision, decide
    from hpcresume.chain.past import MOST_EXCLUDED, PastLink, Spent, bad_nodes, spent

__all__ = [
    "COMMAND",
    "CRASHES",
    "HANG",
    "MEMORY",
    "MOST_EXCLUDED",
    "NODE_CAUSES",
    "NON_FINITE",
    "PLANNED",
    "Budgets",
    "Cause",
    "Decision",
    "Evidence",
    "Failure",
    "PastLink",
    "Spent",
    "bad_nodes",
    "cause_named",
    "cause_of",
    "decide",
    "spent",
]

_HOMES = {
    "Budgets": "decisions",
    "Decision": "decisions",
    "decide": "decisions",
    "MOST_EXCLUDED": "past",
    "PastLink": "past",
    "Spent": "past",
    "bad_nodes": "past",
    "spent": "past",
}


def __getattr__(name: str) -> Any:
    # `status` needs the calendar alone, and is to answer at once.
    if name not in __all__:
        raise AttributeError(f"module 'hpcresume.chain' has no attribute '{name}'")
    home = importlib.import_module(f"hpcresume.chain.{_HOMES.get(name, 'causes')}")
    return getattr(home, name)
