"""Python reads this at its start, in every process of a command with a `framework`.

It goes on to the sitecustomize that would have been read without it, and waits for the framework
to be imported: only then is anything of hpcresume loaded.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

#: Of each framework: ours whose `inject` is called when one of the modules behind it is loaded.
_FRAMEWORKS = {
    "huggingface": ("hpcresume.adapters.huggingface", "transformers.trainer"),
    "lightning": (
        "hpcresume.adapters.lightning",
        "lightning.pytorch.trainer.trainer",
        "pytorch_lightning.trainer.trainer",
    ),
}


class _Waiting:
    """A finder of modules that finds none, but is there when one of them is loaded."""

    def __init__(self, awaited: str, ours: str) -> None:
        self._awaited = awaited
        self._ours = ours

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self._awaited:
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_inject(module: ModuleType) -> None:
            execute(module)
            self._inject()

        spec.loader.exec_module = execute_and_inject  # type: ignore[method-assign]
        return spec

    def _inject(self) -> None:
        from importlib import import_module

        try:
            import_module(self._ours).inject()
        except Exception as error:
            # The user's training is worth more than our part in it.
            print(f"hpcresume: no callback in {self._awaited}: {error}", file=sys.stderr)


def _go_on(here: str) -> None:
    """Read the sitecustomize that this one hides."""
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != here]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = ModuleType("sitecustomize")
        module.__file__, module.__spec__ = spec.origin, spec
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("HPCRESUME_FRAMEWORK") in _FRAMEWORKS:
    _ours, *_all_awaited = _FRAMEWORKS[os.environ["HPCRESUME_FRAMEWORK"]]
    sys.meta_path[:0] = [_Waiting(_awaited, _ours) for _awaited in _all_awaited]
_go_on(os.path.dirname(os.path.abspath(__file__)))
