"""What training does to its machine, looked at now and then: step times, waits, memory, the GPU.

Never at every step, and never by a call that waits for the device. The looks of rank 0 are the
lines of `links/NNNN/monitor.jsonl`; the newest goes into trainer_state.json. Sizes are bytes,
times seconds, `gpu_power_w` watts, shares and the GPU's utilisation numbers from 0 to 1.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from hpcresume import files
from hpcresume.run_dir import LinkDir
from hpcresume.training.host_memory import host_memory
from hpcresume.training.progress import learning_rate, number

log = logging.getLogger(__name__)

#: The pause between two looks.
EVERY_S = 10.0


class Monitor:
    """Looks at one rank's machine; what a look sees is a line, and in `latest`."""

    def __init__(self, link: LinkDir, device: torch.device, objects: Iterable[Any]) -> None:
        self._lines = files.LineWriter(link.monitor)
        self._device = device
        self._objects = list(objects)
        self._sizes: dict[str, int] = {}
        self._driver = device.type == "cuda"
        """Whether the GPU's driver may be asked; it is not again where it cannot answer."""
        self._looked_at = 0.0
        self._train_s = self._waited_s = 0.0
        self.latest: dict[str, Any] = {}

    def due(self, now: float) -> bool:
        """Whether it is time for a look, by the monotonic clock."""
        return now - self._looked_at >= EVERY_S

    def look(
        self,
        now: float,
        *,
        step: int,
        steps_s: Sequence[float],
        train_s: float,
        waited_s: float,
        metrics: Mapping[str, Any],
    ) -> None:
        """Write a line on how it stands.

        `steps_s` are the durations of the last steps; `train_s` and `waited_s` count what was
        trained so far, and how much of it was waiting for data; `metrics` were logged last.
        """
        self._looked_at = now
        trained_s = train_s - self._train_s
        share = (waited_s - self._waited_s) / trained_s if trained_s > 0 else None
        self._train_s, self._waited_s = train_s, waited_s
        seen = {
            "t": round(time.time(), 3),
            "step": step,
            "loss": number(metrics.get("loss")),
            "lr": self.learning_rate()
            if learning_rate(metrics) is None
            else learning_rate(metrics),
            "grad_norm": number(metrics.get("grad_norm")),
            **_percentiles(steps_s),
            "data_wait": None if share is None else round(min(1.0, share), 4),
            **self._own_sizes(),
            **self._gpu(),
            **_host(),
        }
        self.latest = {name: value for name, value in seen.items() if value is not None}
        try:
            self._lines.append(self.latest)
        except OSError as error:
            log.debug("%s cannot be written: %s", self._lines.path, error)

    def learning_rate(self) -> float | None:
        """The optimizer's, of its first group."""
        groups = (o.param_groups for o in self._objects if isinstance(o, torch.optim.Optimizer))
        return next((number(group[0].get("lr")) for group in groups if group), None)

    def close(self) -> None:
        """Give the file back."""
        self._lines.close()

    def _own_sizes(self) -> dict[str, int]:
        """Measured once, after the first step: only then an optimizer has its state."""
        if not self._sizes:
            self._sizes = {
                "parameter_bytes": _bytes_of(_parameters(self._objects)),
                "optimizer_bytes": _bytes_of(_optimizer_state(self._objects)),
            }
        return self._sizes

    def _gpu(self) -> dict[str, Any]:
        if self._device.type != "cuda":
            return {}
        # Counters of torch's allocator, on the host: nothing here waits for the device.
        return {
            "gpu_allocated_bytes": torch.cuda.memory_allocated(self._device),
            "gpu_reserved_bytes": torch.cuda.memory_reserved(self._device),
            "gpu_peak_bytes": torch.cuda.max_memory_allocated(self._device),
            "gpu_total_bytes": torch.cuda.get_device_properties(self._device).total_memory,
            **self._of_driver(),
        }

    def _of_driver(self) -> dict[str, float]:
        """What the driver tells, where nvidia-ml-py is installed; parts of a GPU tell nothing."""
        if not self._driver:
            return {}
        try:
            # As many as torch has seen: it maps CUDA_VISIBLE_DEVICES to the driver's numbers.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return {
                    "gpu_utilization": torch.cuda.utilization(self._device) / 100,
                    "gpu_power_w": torch.cuda.power_draw(self._device) / 1000,
                }
        except Exception as error:
            # NVML's errors have no common base with those of a missing module or an AMD GPU.
            log.debug("GPU utilisation and power are not known: %s", error)
            self._driver = False
            return {}


def _percentiles(steps_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(steps_s)
    if not ordered:
        return {}
    last = len(ordered) - 1
    ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {f"step_s_{name}": round(ordered[round(rank * last)], 6) for name, rank in ranks.items()}


def _host() -> dict[str, int]:
    found = host_memory()
    return {} if found is None else {"host_bytes": found[0], "host_limit_bytes": found[1]}


def _parameters(objects: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in objects:
        if isinstance(value, torch.nn.Module):
            yield from value.parameters()


def _optimizer_state(objects: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in objects:
        if isinstance(value, torch.optim.Optimizer):
            for state in value.state.values():
                yield from (t for t in state.values() if isinstance(t, torch.Tensor))


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """On this rank; what is shared counts once."""
    total = 0
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        local = getattr(tensor, "to_local", None)
        own = tensor if local is None else local()
        with contextlib.suppress(RuntimeError, NotImplementedError):
            total += own.numel() * own.element_size()
    return total
