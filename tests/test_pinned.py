"""What is taken from a GPU without waiting is what was there at that time."""

from __future__ import annotations

import pytest
import torch

from hpcresume.checkpoint.arena import Arena
from hpcresume.checkpoint.reader import METADATA, held_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

_SIZE = 1 << 22


def _staged(arena: Arena, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    (image,) = arena.stage({"model.safetensors": tensors}, METADATA)
    for tensor in tensors.values():
        # Queued at once, as the next step's kernels are.
        tensor.fill_(7.0)
    arena.arrived()
    return held_in("model.safetensors", image.content).tensors


def test_what_the_next_kernels_change_is_staged_as_it_was() -> None:
    arena = Arena()
    for _ in range(5):
        parts = {str(place): torch.rand(_SIZE, device="cuda") for place in range(8)}
        parts["step"] = torch.rand(3)
        before = {name: tensor.cpu().clone() for name, tensor in parts.items()}
        found = _staged(arena, parts)
        assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_what_is_still_being_computed_is_staged_when_it_is_there() -> None:
    matrix = torch.rand(2048, 2048, device="cuda")
    product = matrix
    for _ in range(50):
        product = product @ matrix / 1024
    expected = product.clone()
    assert torch.equal(_staged(Arena(), {"product": product})["product"], expected.cpu())


def test_memory_that_became_too_small_is_pinned_anew() -> None:
    arena = Arena()
    for size in (1 << 10, 1 << 24, 1 << 10):
        ones = torch.ones(size, device="cuda")
        assert _staged(arena, {"ones": ones})["ones"].sum().item() == size
