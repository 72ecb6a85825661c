"""hpcresume: one training run, many Slurm jobs, the same result.

The public names; everything else may change. torch is loaded when the first of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcresume.errors import HpcResumeError
    from hpcresume.foreground import main
    from hpcresume.link import Link, LinkOutcome
    from hpcresume.session import Session

__version__ = "0.1.0"
__all__ = ["HpcResumeError", "Link", "LinkOutcome", "Session", "__version__", "main"]

_HOMES = {
    "HpcResumeError": "hpcresume.errors",
    "Link": "hpcresume.link",
    "LinkOutcome": "hpcresume.link",
    "Session": "hpcresume.session",
    "main": "hpcresume.foreground",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'hpcresume' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
