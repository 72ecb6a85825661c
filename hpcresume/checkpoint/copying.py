"""Copies many tensors at once, by several threads where there is much to copy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from hpcresume.checkpoint.threads import how_many

#: What one thread copies before a second one could have begun.
_SHARE_BYTES = 16 << 20


def shares(targets: list[torch.Tensor]) -> list[slice]:
    """The targets in runs of about the same number of bytes, one for each thread."""
    sizes = [target.numel() * target.element_size() for target in targets]
    threads = how_many()
    share = max(_SHARE_BYTES, -(-sum(sizes) // threads))
    found, begin, filled = [], 0, 0
    for place, size in enumerate(sizes):
        filled += size
        if filled >= share or place == len(sizes) - 1:
            found.append(slice(begin, place + 1))
            begin, filled = place + 1, 0
    return found


def copy(targets: list[torch.Tensor], sources: list[torch.Tensor], runs: list[slice]) -> None:
    """Copy sources into targets of the same shapes; `runs` are what `shares` said of these."""
    # Another thread would not wait for what a device is still computing.
    on_cpu = all(tensor.is_cpu for tensor in sources) and all(t.is_cpu for t in targets)
    if len(runs) < 2 or not on_cpu:
        _copy(targets, sources)
        return
    with ThreadPoolExecutor(len(runs) - 1, "copy") as pool:
        others = [pool.submit(_copy, targets[run], sources[run]) for run in runs[1:]]
        _copy(targets[runs[0]], sources[runs[0]])
        for other in others:
            other.result()


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
