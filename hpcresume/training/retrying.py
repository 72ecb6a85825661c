"""Attempts at something in a step that fails for a while: a slow disk, a network, a full GPU."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hpcresume.errors import HpcResumeError, UsageError
from hpcresume.training.random_state import RandomState
from hpcresume.training.watch import Watch

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
#: What may pass by itself. A RuntimeError is not among them: torch raises it for every mistake.
TRANSIENT: tuple[type[Exception], ...] = (OSError, torch.OutOfMemoryError)
#: The first and the longest wait before another attempt, in seconds.
_FIRST_S, _LONGEST_S = 2.0, 10.0


def retried(
    fn: Callable[[], _Result],
    attempts: int,
    on: type[Exception] | tuple[type[Exception], ...],
    *,
    watch: Watch,
    generators: Mapping[str, Any],
    wait: Callable[[float], str | None],
) -> _Result:
    """What `fn()` returns, in up to so many attempts, each with the same random numbers.

    `wait` waits so many seconds, and returns why it was cut short, or None; there is no further
    wait then. Raises the last exception where all attempts fail, and HpcResumeError where a
    failed one has changed what is registered, or has taken part in a collective operation.
    """
    if attempts < 1:
        raise UsageError(f"session.retry: attempts is {attempts}, and must be 1 or more.")
    watch.look()
    gradients = _Gradients(watch.parameters())
    state = RandomState(generators)
    collectives = _collectives()
    hurried = None
    for attempt in range(1, attempts + 1):
        try:
            return fn()
        except on as error:
            left = attempts - attempt
            told = f"{type(error).__name__}: {error}"
            if not left or hurried is not None:
                log.error("%s (attempt %d of %d, the last)", told, attempt, attempts)
                raise
            harm = watch.changed() or gradients.changed()
            if harm is None and _collectives() != collectives:
                harm = "it took part in a collective operation, in which the other ranks are on"
            if harm is not None:
                raise HpcResumeError(
                    f"session.retry makes no further attempt after {told}: {harm}. Leave out of "
                    f"the function what changes the training, and do that after it."
                ) from error
            wait_s = min(_FIRST_S * 2 ** (attempt - 1), _LONGEST_S)
            log.warning(
                "%s (attempt %d of %d); again in %.0f s, %d left; %s",
                told,
                attempt,
                attempts,
                wait_s,
                left,
                _advice(error),
            )
        # The exception is gone by now, and with it what its frames held of the memory.
        hurried = wait(wait_s)
        if hurried is not None:
            log.warning("the last attempt is made at once: %s", hurried)
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        watch.give_back()
        gradients.give_back()
        state.put_back()
    raise AssertionError("the last attempt neither returned nor raised")


class _Gradients:
    """Gradients that a failed backward pass has begun are dropped; added ones stay added."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._before = [(p.grad, -1 if p.grad is None else p.grad._version) for p in parameters]

    def changed(self) -> str | None:
        for parameter, (grad, version) in zip(self._parameters, self._before, strict=True):
            if grad is not None and (parameter.grad is not grad or grad._version != version):
                return "gradients from before the attempt had been added to"
        return None

    def give_back(self) -> None:
        for parameter, (grad, _) in zip(self._parameters, self._before, strict=True):
            parameter.grad = grad


def _collectives() -> int:
    """How many collective operations the ranks have begun on torch's default group."""
    group: Any = dist.group.WORLD if dist.is_available() else None
    if group is None:
        return 0
    # Not every backend counts.
    with contextlib.suppress(RuntimeError):
        return int(group._get_sequence_number_for_group())
    return 0


def _advice(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "where it comes again, take a smaller batch and accumulate more"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return "where it comes often, ask whether compute nodes may use this network"
    return "where it comes often, copy the data to a local disk ($TMPDIR) first"
