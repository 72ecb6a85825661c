"""The state of every random number generator of a process, as JSON.

A generator that cannot be restored is an error: training on would be another run.
"""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from hpcresume.errors import CheckpointError

_NONE: Mapping[str, Any] = {}


def is_generator(value: Any) -> bool:
    """Whether `value` is a generator of one's own that can be captured here."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator) or type(value) is random.Random:
        return True
    return numpy is not None and isinstance(
        value, (numpy.random.Generator, numpy.random.RandomState)
    )


def capture(generators: Mapping[str, Any] = _NONE) -> dict[str, Any]:
    """Python, NumPy's global one (where loaded), torch on the CPU and on every visible GPU.

    And `generators` of one's own, by name.
    """
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
    if generators:
        state["generators"] = {name: _captured(value) for name, value in generators.items()}
    return state


def _captured(generator: Any) -> dict[str, Any]:
    if isinstance(generator, torch.Generator):
        return {"torch": _to_text(generator.get_state()), "device": str(generator.device)}
    if isinstance(generator, random.Random):
        version, internal, gauss = generator.getstate()
        return {"python": [version, list(internal), gauss]}
    if hasattr(generator, "bit_generator"):
        return {"numpy": _plain(generator.bit_generator.state)}
    return {"numpy": _plain(generator.get_state(legacy=False))}


def _plain(value: Any) -> Any:
    """A NumPy state as JSON: arrays become lists with their type."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return {"$array": value.tolist(), "dtype": str(value.dtype)}
    return value


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict) and "$array" in value:
        import numpy

        return numpy.array(value["$array"], dtype=value["dtype"])
    if isinstance(value, dict):
        return {key: _from_plain(item) for key, item in value.items()}
    return value


def _put_back(generator: Any, name: str, state: Mapping[str, Any]) -> None:
    if isinstance(generator, torch.Generator):
        if str(generator.device) != state["device"]:
            raise CheckpointError(
                f"The generator '{name}' is on {generator.device} here and was on "
                f"{state['device']}: make it there."
            )
        generator.set_state(_from_text(state["torch"]))
    elif isinstance(generator, random.Random):
        version, internal, gauss = state["python"]
        generator.setstate((version, tuple(internal), gauss))
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _from_plain(state["numpy"])
    else:
        generator.set_state(_from_plain(state["numpy"]))


def restore(state: Mapping[str, Any], generators: Mapping[str, Any] = _NONE) -> list[str]:
    """Set every generator as captured; returns sentences about what could not be the same.

    Raises CheckpointError where a generator does not take its state, or is unknown.
    """
    said: list[str] = []
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
        own = state.get("generators", {})
        if own.keys() != generators.keys():
            raise CheckpointError(
                f"The checkpoint holds the generators {', '.join(own) or '(none)'}, and "
                f"{', '.join(generators) or 'none'} are registered: register the same."
            )
        for name, generator in generators.items():
            _put_back(generator, name, own[name])
        saved = state.get("cuda", [])
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for device, content in enumerate(saved[:visible]):
            torch.cuda.set_rng_state(_from_text(content), device)
        if len(saved) != visible:
            said.append(
                f"the checkpoint holds the random state of {len(saved)} GPUs and {visible} are "
                f"visible: what is drawn on GPUs is not what it would have been"
            )
    except (AttributeError, LookupError, ValueError, TypeError, ArithmeticError, RuntimeError) as e:
        raise CheckpointError(
            f"The random state of the checkpoint does not load: {type(e).__name__}: {e}"
        ) from None
    return said


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
