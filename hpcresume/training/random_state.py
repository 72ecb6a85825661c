"""The random generators of a process at one moment, as they are: cheap enough for every step.

`checkpoint.rng` turns the same generators into JSON, which takes several times as long.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


class RandomState:
    """Python's, NumPy's and torch's generators as they were when this was made.

    And `generators` of one's own, by name. GPUs count once CUDA has begun: before, none has drawn.
    """

    def __init__(self, generators: Mapping[str, Any]) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        numpy = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state(legacy=False)
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = torch.cuda.get_rng_state_all() if begun else []
        self._own = [(generator, _state(generator)) for generator in generators.values()]

    def put_back(self) -> None:
        """Have every generator go on from that moment."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        for generator, state in self._own:
            _put_back(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state()


def _put_back(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
