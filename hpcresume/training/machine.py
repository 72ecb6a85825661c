"""The machine and libraries that computed a checkpoint: bits are only promised on the same."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_WORDS = {
    "cpu": "processor",
    "capability": "vector instructions",
    "threads": "threads",
    "gpus": "GPUs",
    "torch": "torch",
    "cuda": "CUDA",
    "numpy": "NumPy",
    "python": "Python",
}
_LIBRARIES = ("torch", "cuda", "numpy", "python")


def describe() -> dict[str, Any]:
    """What the bits of a computation depend on, as JSON."""
    import numpy

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": sorted({torch.cuda.get_device_name(number) for number in range(gpus)}),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Sentences: "not the same silicon: …" and "not the same libraries: …", as far as true."""
    found = []
    for title, libraries in (("silicon", False), ("libraries", True)):
        changed = [
            f"{_WORDS[key]} {_shown(saved.get(key))} -> {_shown(now.get(key))}"
            for key in now
            if (key in _LIBRARIES) is libraries and key in saved and saved[key] != now[key]
        ]
        if changed:
            found.append(f"not the same {title}: {', '.join(changed)}")
    return found


def _shown(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def pin_threads(saved: Mapping[str, Any] | None) -> None:
    """Compute with as many threads as the first link: sums are split by their number."""
    threads = (saved or {}).get("threads")
    torch.set_num_threads(threads or torch.get_num_threads())
