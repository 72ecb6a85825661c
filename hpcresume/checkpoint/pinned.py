"""Memory that a GPU writes into by itself, while Python goes on.

A copy is queued on the GPU behind what it computes at present, and before all that it is given
afterwards: the next step waits for the copy, on the GPU, and nobody else does. A stream of its own
would let the GPU compute meanwhile; but then a kernel of the next step might change what is not
taken yet (a clamp of weights, a running mean), and no digest could tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: Of cudaHostRegister: pinned for all devices of this process.
_PORTABLE = 1


class Pinned:
    """Host memory that is pinned until `release`; where that is refused, `holds` is false."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self._address = address
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        refusal = self._runtime.cudaHostRegister(address, size_bytes, _PORTABLE)
        self.holds = int(refusal) == 0

    def release(self) -> None:
        """To be called before the memory is given back."""
        if self.holds:
            self._runtime.cudaHostUnregister(self._address)
            self.holds = False


def take(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Queue copies from GPUs into pinned memory; the result waits until all have arrived."""
    with torch.no_grad():
        torch._foreach_copy_(list(targets), list(sources), non_blocking=True)
    events = []
    for device in {source.device for source in sources if source.is_cuda}:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        events.append(event)

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait
