"""Makes a Python where no extra of hpcresume is installed: `python -m pytest -p without_extras`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

#: What pyproject.toml's extras install, by the names that are imported.
EXTRAS = frozenset(
    {
        *("transformers", "accelerate", "datasets", "lightning", "pytorch_lightning"),
        *("starlette", "uvicorn", "tensorboardX", "sklearn", "pynvml", "playwright"),
    }
)


class _WithoutExtras(PathFinder):
    """Finds modules as Python does, but for the extras."""

    @classmethod
    def find_spec(cls, fullname: str, *where: Any) -> ModuleSpec | None:
        name = fullname.partition(".")[0]
        return None if name in EXTRAS else PathFinder.find_spec(fullname, *where)


sys.meta_path[:] = [_WithoutExtras if f is PathFinder else f for f in sys.meta_path]
