"""Whether what is registered is as it was at a chosen moment.

Used where work may have to be done again: by `retrying` after a failed attempt inside a step, by
`emergency` after an exception. Tensors are not copied but for small buffers: autograd counts what
is done to each. What goes past its counter (`parameter.data.mul_(…)`, the statistics of BatchNorm)
is noticed in a sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hpcresume.training.trace import Unwatchable, check_module, trace

#: Buffers are copied, and can so be given back, as long as all of them are no larger than this.
_SMALL_BYTES = 1 << 20
#: Elements of a tensor in the sample.
_SAMPLE = 16


class Watch:
    """The registered objects, to be looked at (`look`) and later asked whether they are the same.

    Made once for a set of objects. `blind` says of which of them a change would not be noticed.
    """

    def __init__(self, items: Iterable[tuple[str, Any]]) -> None:
        self.blind: dict[str, str] = {}
        """Why an object cannot be watched, by its name."""
        self._modules: list[tuple[str, torch.nn.Module]] = []
        self._optimizers: list[tuple[str, torch.optim.Optimizer]] = []
        self._others: list[tuple[str, Any]] = []
        for name, value in items:
            if isinstance(value, torch.nn.Module):
                with self._or_blind(name):
                    check_module(value)
                    self._modules.append((name, value))
            elif isinstance(value, torch.optim.Optimizer):
                self._optimizers.append((name, value))
            elif hasattr(value, "state_dict") or not hasattr(value, "save_pretrained"):
                # A tokenizer is what it is.
                self._others.append((name, value))
        self._apart = {id(value) for _, value in (*self._modules, *self._optimizers)}
        self._tensors = self._named()
        buffers = [b for _, module in self._modules for b in module.buffers()]
        small = sum(b.numel() * b.element_size() for b in buffers) <= _SMALL_BYTES
        self._small = [b.detach() for b in buffers] if small else []
        self._copies = [buffer.clone() for buffer in self._small]
        given_back = {id(b) for b in buffers} if small else set()
        self._counted = {k: t for k, t in self._tensors.items() if id(t) not in given_back}
        self._places = [tensor.data_ptr() for tensor in self._counted.values()]
        self._samples = _sampled(self._counted.values())
        self._stepped: set[str] = set()
        for name, optimizer in self._optimizers:
            # A default argument, because each hook has a name of its own.
            optimizer.register_step_pre_hook(lambda *_, name=name: self._stepped.add(name))

    @contextlib.contextmanager
    def _or_blind(self, name: str) -> Iterator[None]:
        try:
            yield
        except Unwatchable as error:
            self.blind[name] = f"'{name}' cannot be watched: {error}"

    def _named(self) -> dict[tuple[str, str], torch.Tensor]:
        """The tensors of all modules, by the module's name and their own."""
        return {
            (name, key): tensor
            for name, module in self._modules
            for key, tensor in (*module.named_parameters(), *module.named_buffers())
        }

    def look(self) -> None:
        """Take everything as it is now for the state to compare with."""
        self._stepped.clear()
        self._versions = [tensor._version for tensor in self._counted.values()]
        self._sample = [torch.cat(views) for views in self._samples]
        _copy(self._copies, self._small)
        self._groups = [
            [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for _, optimizer in self._optimizers
        ]
        # A learning rate may be a tensor.
        self._rates = [trace(groups) for groups in self._groups]
        self._flat = {name: value.copy() for name, value in self._others if _is_flat(value)}
        self._traces = {
            name: self._trace(name, value) for name, value in self._others if name not in self._flat
        }

    def _trace(self, name: str, value: Any) -> Any:
        with self._or_blind(name):
            return trace(value, self._apart)

    def changed(self) -> str | None:
        """What is not as it was, in words; None where everything is, or can be given back."""
        if self._stepped:
            return f"the step of {' and '.join(map(repr, sorted(self._stepped)))} had begun"
        now = self._named()
        for name, key in now.keys() ^ self._tensors.keys():
            return f"'{name}' has other parameters or buffers ({key})"
        for (name, key), before in self._tensors.items():
            if now[name, key] is not before:
                return f"the state of '{name}' had changed ({key})"
        pairs = zip(self._counted.items(), self._versions, self._places, strict=True)
        for ((name, key), tensor), version, place in pairs:
            if tensor._version != version or tensor.data_ptr() != place:
                return f"the state of '{name}' had changed ({key})"
        samples = zip(self._sample, self._samples, strict=True)
        if not all(torch.equal(before, torch.cat(views)) for before, views in samples):
            return "tensors had changed past autograd's counters"
        for (name, _), groups, rates in zip(
            self._optimizers, self._groups, self._rates, strict=True
        ):
            if trace(groups) != rates:
                return f"the settings of '{name}' had changed"
        for name, value in self._others:
            if name in self._traces and self._trace(name, value) != self._traces[name]:
                return f"the state of '{name}' had changed"
        return None

    def give_back(self) -> None:
        """Set small buffers, counters and the settings of optimizers to what they were."""
        _copy(self._small, self._copies)
        for (_, optimizer), groups in zip(self._optimizers, self._groups, strict=True):
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.update(before)
        for name, value in self._others:
            if name in self._flat:
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(self._flat[name])

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of registered modules."""
        return [p for _, module in self._modules for p in module.parameters()]


def _is_flat(value: Any) -> bool:
    """Whether it is a dict or a list of plain values: nobody can hold a part of it."""
    if type(value) not in (dict, list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return all(item is None or isinstance(item, (bool, int, float, str)) for item in items)


def _copy(to: list[torch.Tensor], what: list[torch.Tensor]) -> None:
    if to:
        with torch.no_grad():
            torch._foreach_copy_(to, what)


def _sampled(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Views of a few elements of each tensor, together where they can be copied at once."""
    views: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if not tensor.numel() or reach != tensor.numel() - 1:
            continue  # Elements that share memory, or have gaps between them.
        count = min(_SAMPLE, tensor.numel())
        view = tensor.detach().as_strided((count,), (tensor.numel() // count,))
        views.setdefault((tensor.device, tensor.dtype), []).append(view)
    return list(views.values())
