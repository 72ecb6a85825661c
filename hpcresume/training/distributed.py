"""The ranks of a link: torch.distributed from the scheduler's environment, and agreement.

Our own messages go over a gloo group on the CPU, apart from the user's collectives, and as JSON.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpcresume.scheduler.environment import RankPlace

#: Longer than any step: a peer that is silent for so long is gone, and the link ends.
TIMEOUT = timedelta(minutes=10)
#: How often the ranks exchange their wishes...
EXCHANGE_S = 0.5
#: ...and after how many steps at the latest: batches that a loop skips take no time, and the steps
#: behind them may take seconds.
_MOST_STEPS = 64


class Ranks:
    """This process among the ranks of its link. With one rank, nothing is initialised."""

    def __init__(self, place: RankPlace) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self.device = _device(place.local_rank)
        self._group: dist.ProcessGroup | None = None
        self._owner = False
        if self.world_size > 1:
            if not dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(
                    backend,
                    init_method=_address(),
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=TIMEOUT,
                )
                self._owner = True
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value, on every rank."""
        if self._group is None:
            return value
        data = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._group)
        content = _to_tensor(data, int(size))
        dist.broadcast(content, 0, group=self._group)
        return json.loads(_to_bytes(content, int(size)))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in order of rank, on rank 0; elsewhere an empty list."""
        if self._group is None:
            return [value]
        data = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._group)
        longest = max(int(size) for size in sizes)
        content = _to_tensor(data, longest)
        if self.rank != 0:
            dist.gather(content, None, 0, group=self._group)
            return []
        parts = [torch.empty_like(content) for _ in range(self.world_size)]
        dist.gather(content, parts, 0, group=self._group)
        return [json.loads(_to_bytes(p, int(s))) for p, s in zip(parts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def reduce_max_async(self, values: torch.Tensor) -> dist.Work:
        """Begin an element-wise maximum over the ranks; `values` holds it once it is done."""
        work: dist.Work = dist.all_reduce(
            values, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return work

    def close(self) -> None:
        """Leave the process group, if it was made here."""
        if self._owner and dist.is_initialized():
            dist.destroy_process_group()
        self._group = None


class Agreement:
    """Lets the ranks act on one rank's wish at the same step, without waiting for each other.

    At a step boundary, every k steps, a reduction of the wishes begins; at the next boundary each
    rank reads the same result. k follows from the slowest rank's step time, which travels along,
    so that all ranks know it alike.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._next_step = 0

    def exchange(self, step: int, *, stop: bool, save: bool, step_s: float) -> tuple[bool, bool]:
        """What all ranks are to do at this boundary: (stop, save)."""
        if self._ranks.world_size == 1:
            return stop, save
        agreed = (False, False)
        if self._pending is not None:
            work, values = self._pending
            work.wait()
            self._pending = None
            agreed = (bool(values[0]), bool(values[1]))
            apart = int(EXCHANGE_S / max(float(values[2]) / 1e6, 1e-4))
            self._next_step = step + min(max(1, apart), _MOST_STEPS)
        if step >= self._next_step:
            values = torch.tensor([int(stop), int(save), int(step_s * 1e6)], dtype=torch.int64)
            self._pending = (self._ranks.reduce_max_async(values), values)
        return agreed

    def settle(self) -> None:
        """Read a reduction that is still under way, so that none is left when the ranks end."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None


def _address() -> str:
    return f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # With one GPU bound to each task, every task sees its own as number 0.
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _to_tensor(data: bytes, size: int) -> torch.Tensor:
    content = torch.zeros(max(size, 1), dtype=torch.uint8)
    if data:
        content[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return content


def _to_bytes(content: torch.Tensor, size: int) -> bytes:
    return bytes(content[:size].tolist())
