"""The state of every random number generator of a process, as JSON.

A generator that cannot be restored is an error: training on would be another run.
"""

from __future__ import annotations

import base64
import random
import sys
from typing import Any

import torch

from hpcresume.errors import CheckpointError


def capture() -> dict[str, Any]:
    """Python, NumPy's global one (where loaded), torch on the CPU and on every visible GPU."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": _to_text(torch.get_rng_state()),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
        state["numpy"] = [
            name,
            [int(k) for k in keys],
            int(position),
            int(has_gauss),
            float(cached),
        ]
    if torch.cuda.is_available():
        state["cuda"] = [_to_text(s) for s in torch.cuda.get_rng_state_all()]
    return state


def restore(state: dict[str, Any]) -> None:
    """Set every generator as captured. Raises CheckpointError where one cannot be."""
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(_from_text(state["torch"]))
        if "numpy" in state:
            import numpy

            name, keys, position, has_gauss, cached = state["numpy"]
            keys = numpy.array(keys, dtype=numpy.uint32)
            numpy.random.set_state((name, keys, position, has_gauss, cached))
        if torch.cuda.is_available():
            saved = state.get("cuda", [])
            if len(saved) != torch.cuda.device_count():
                raise CheckpointError(
                    f"The checkpoint holds the random state of {len(saved)} GPUs, but "
                    f"{torch.cuda.device_count()} are visible: start with as many."
                )
            torch.cuda.set_rng_state_all([_from_text(s) for s in saved])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"The random state of the checkpoint does not load: {error}"
        ) from None


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
