"""Files of `torch.save` and of safetensors, in mapped memory.

A pickle may run any code while it is read. So it is read by torch's restricted loading alone, which
knows tensors and plain values; anything, only where the user has said to trust the file.
"""

from __future__ import annotations

import errno
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hpcresume.errors import CheckpointError

#: How torch names, in its message, what it does not load.
_REFUSED = re.compile(r"\bGLOBAL ([\w.]+)")


def load(source: Path | io.BytesIO, trust: bool, what: str = "") -> Any:
    """What `torch.save` has written, on the CPU; `what` names it, where it is no file of its own.

    Raises CheckpointError, OSError.
    """
    mapped = False
    if isinstance(source, Path):
        what = what or str(source)
        with open(source, "rb") as file:
            begin = file.read(4)
        # Those of torch before 1.6 are no zip, and cannot be mapped.
        mapped = begin == b"PK\x03\x04"
        if not mapped and begin[:1] != pickle.PROTO:
            raise _broken(what, ValueError("it begins as none"))
    try:
        return torch.load(source, map_location="cpu", weights_only=not trust, mmap=mapped)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # What stands in the file would have been sought before its beginning.
        raise _broken(what, error) from None
    except pickle.UnpicklingError as error:
        raise (_broken(what, error) if trust else refused(what, error)) from None
    except Exception as error:
        # torch lets through whatever a damaged file makes of its reader, or a trusted one does.
        raise _broken(what, error) from None


def refused(path: Path | str, error: pickle.UnpicklingError) -> CheckpointError:
    """What torch's restricted loading refuses, in a sentence."""
    text = str(error)
    found = _REFUSED.search(text)
    if found is None and "Weights only" not in text:
        return _broken(path, error)
    what = found[1] if found else "something else than tensors and plain values"
    return CheckpointError(
        f"{path} holds {what}, which torch's restricted loading refuses, because reading it may "
        f"run any code. If the file is your own, add --trust; otherwise have its author save "
        f"state_dict()s alone."
    )


def _broken(path: Path | str, error: Exception) -> CheckpointError:
    words = first_line(error)
    return CheckpointError(
        f"{path} cannot be read by torch: it is damaged, or no checkpoint "
        f"({type(error).__name__}: {words})."
    )


def first_line(error: Exception) -> str:
    """What an exception says of itself, in short."""
    line = (str(error).strip() or "no more is known").splitlines()[0]
    return line.partition(". This is an internal")[0][:200].rstrip(".")


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError, OSError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read: it is damaged, or no safetensors file ({error})."
        ) from None


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises CheckpointError, OSError."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: it is no JSON ({error}).") from None


def load_weights(paths: list[Path], trust: bool) -> dict[str, torch.Tensor]:
    """The tensors of several files, of safetensors or pickled ones, together."""
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        is_plain = path.suffix == ".safetensors"
        content = load_safetensors(path) if is_plain else load(path, trust)
        if not isinstance(content, dict) or found.keys() & content.keys():
            raise CheckpointError(f"{path} does not hold tensors of its own by name.")
        found |= content
    return found
