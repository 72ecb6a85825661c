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
            if not 0 <= position <= len(keys):
                # NumPy itself would read from there, beyond its own memory.
                raise ValueError(f"position {position} of {len(keys)}")
            keys = numpy.array(keys, dtype=numpy.uint32)
            numpy.random.set_state((name, keys, position, has_gauss, cached))
        saved = state.get("cuda", [])
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if len(saved) != visible:
            raise CheckpointError(
                f"The checkpoint holds the random state of {len(saved)} GPUs, but {visible} are "
                f"visible: start with as many."
            )
        if saved:
            torch.cuda.set_rng_state_all([_from_text(s) for s in saved])
    except (AttributeError, LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as e:
        raise CheckpointError(
            f"The random state of the checkpoint does not load: {type(e).__name__}: {e}"
        ) from None


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
