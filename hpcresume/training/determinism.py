"""Makes a process reproducible: seeds, and what torch needs to compute the same bits again."""

from __future__ import annotations

import hashlib
import os
import random
import sys

import torch


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed that is a pure function of its parts, alike on every machine."""
    text = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy (where loaded) and torch, every GPU included."""
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Choose deterministic algorithms; call it before CUDA starts.

    cuBLAS needs its workspace fixed by an environment variable. torch.compile compiles each shape
    for itself: else a second shape leads to code for any shape, and which shape comes second
    depends on where a link begins. The fill of uninitialised memory is off: it only costs time
    here, and has raced with communication on GPUs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["TORCH_DYNAMO_AUTOMATIC_DYNAMIC_SHAPES"] = "0"
    dynamo = sys.modules.get("torch._dynamo.config")
    if dynamo is not None:
        dynamo.automatic_dynamic_shapes = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
