"""State as tensors and a JSON tree, both ways.

What `state_dict()` returns is a tree of dicts, lists, numbers and tensors. `split` takes the
tensors out (they go to safetensors) and leaves JSON (it goes to state.json); `join` puts them
back. Nothing is pickled; what is neither a tensor nor JSON is refused by name.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hpcresume.checkpoint import sharded
from hpcresume.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: What wrappers (torch.compile, DDP, FSDP) put into names, at any depth.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
#: torch's name for what a module's get_extra_state() returns.
_EXTRA = "_extra_state"


@dataclass(frozen=True)
class Split:
    """A state in two halves. `aliases` maps a name to the name that holds the same memory."""

    tree: Any
    tensors: dict[str, torch.Tensor]
    """Of what lies on several ranks, this rank's part."""
    aliases: dict[str, str]
    order: tuple[str, ...] = ()
    """All names, aliases among them, in the order of the tree."""
    spread: Mapping[str, DTensor] = field(default_factory=dict)
    """What lies on several ranks, as it is in the state."""


def split(state: Any, what: str) -> Split:
    """Take the tensors out of a state; `what` names it in errors."""
    found: dict[str, torch.Tensor] = {}
    tree = _strip(state, "", what, found)
    spread = {name: tensor for name, tensor in found.items() if sharded.is_sharded(tensor)}
    tensors = {name: _plain_tensor(tensor, name, what) for name, tensor in found.items()}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        identity: tuple[Any, ...]
        if name in spread:
            # Alike on all ranks, also where this one holds none of its elements.
            identity = (id(spread[name]),)
        elif tensor.numel() == 0:
            continue
        else:
            look = tensor.shape, tensor.stride(), tensor.dtype
            identity = (tensor.device, tensor.data_ptr(), *look)
        if first.setdefault(identity, name) != name:
            aliases[name] = first[identity]
            del tensors[name]
    return Split(tree, tensors, aliases, tuple(found), spread)


def _strip(value: Any, path: str, what: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = path or what
        if name in tensors:
            raise CheckpointError(f"The state of '{what}' has two tensors named '{name}'.")
        tensors[name] = value
        return {"$tensor": name}
    if is_scalar(value):
        return value
    if isinstance(value, Mapping):
        plain = not isinstance(value, Counter)
        if plain and all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _strip(v, _join(path, key), what, tensors) for key, v in value.items()}
        pairs = [
            [_key(k, what), _strip(v, _join(path, k), what, tensors)] for k, v in value.items()
        ]
        # MultiStepLR keeps its milestones in a Counter, and asks for a Counter's methods.
        return {"$dict": pairs} if plain else {"$counter": pairs}
    if isinstance(value, list):
        return [_strip(v, _join(path, i), what, tensors) for i, v in enumerate(value)]
    if isinstance(value, tuple):
        return {"$tuple": [_strip(v, _join(path, i), what, tensors) for i, v in enumerate(value)]}
    if isinstance(value, (set, frozenset)) and all(is_scalar(element) for element in value):
        return {"$set": sorted(value, key=repr)}
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == () and is_scalar(number := item()):
        return number  # a NumPy scalar
    raise CheckpointError(
        f"The state of '{what}' holds a {type(value).__name__} at '{path}', which is neither a "
        f"tensor nor JSON: let its state_dict() return tensors, numbers, texts, lists and dicts."
    )


def is_scalar(value: Any) -> bool:
    """Whether JSON has a word for a value that holds no others."""
    return value is None or isinstance(value, (bool, int, float, str))


def _plain_tensor(tensor: torch.Tensor, name: str, what: str) -> torch.Tensor:
    """A tensor, or its part, with memory of its own. Raises CheckpointError where it has none."""
    own, kind = sharded.local(tensor).detach(), ""
    if own.is_meta:
        kind = "on the meta device"
    elif own.layout is not torch.strided:
        kind = f"stored as {str(own.layout).removeprefix('torch.')}"
    elif own.numel() and not own.data_ptr():
        kind = f"a {type(own).__name__}, whose elements lie in other tensors"
    elif sharded.is_sharded(tensor):
        kind = sharded.obstacle(tensor)
    if kind:
        raise CheckpointError(
            f"The state of '{what}' holds the tensor '{name}', which is {kind}: it cannot be saved "
            f"as it is."
        )
    return own


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _key(key: Any, what: str) -> Any:
    if isinstance(key, (str, int, float, bool)) or key is None:
        return key
    raise CheckpointError(f"The state of '{what}' has a {type(key).__name__} as a key: {key!r}.")


def join(tree: Any, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> Any:
    """The state whose halves `split` made."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            name = tree["$tensor"]
            return tensors[aliases.get(name, name)]
        if "$dict" in tree:
            return {key: join(value, tensors, aliases) for key, value in tree["$dict"]}
        if "$counter" in tree:
            return Counter({key: join(v, tensors, aliases) for key, v in tree["$counter"]})
        if "$tuple" in tree:
            return tuple(join(value, tensors, aliases) for value in tree["$tuple"])
        if "$set" in tree:
            return set(tree["$set"])
        return {key: join(value, tensors, aliases) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join(value, tensors, aliases) for value in tree]
    return tree


@functools.lru_cache(1 << 17)
def plain_name(name: str) -> str:
    """A parameter's name without what wrappers added, at any depth."""
    *modules, last = name.split(".")
    return ".".join([*(part for part in modules if part not in _WRAPPERS), last])


def plain_state(module: torch.nn.Module, what: str) -> dict[str, torch.Tensor]:
    """The live tensors of a module under plain names. Two of one name are an error."""
    return {
        name: value
        for name, value in module_state(module, what).items()
        if isinstance(value, torch.Tensor) and not name.endswith(_EXTRA)
    }


def module_state(module: torch.nn.Module, what: str) -> dict[str, Any]:
    """The live tensors and the extra states of a module under plain names."""
    state = module.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in _plainly(state, what).items()
        if isinstance(value, torch.Tensor) or name.endswith(_EXTRA)
    }


def extra_states(module: torch.nn.Module, what: str) -> dict[str, torch.nn.Module]:
    """The submodules that have an extra state, by its plain name in a state dict."""
    own = torch.nn.Module.get_extra_state
    named = {
        f"{name}.{_EXTRA}" if name else _EXTRA: part
        for name, part in module.named_modules()
        if type(part).get_extra_state is not own
    }
    return _plainly(named, what)


def fleeting_buffers(module: torch.nn.Module, what: str) -> dict[str, tuple[torch.nn.Module, str]]:
    """Where the buffers are that a state dict leaves out (persistent=False), by plain name."""
    named = {
        f"{name}.{buffer}" if name else buffer: (part, buffer)
        for name, part in module.named_modules()
        for buffer in sorted(part._non_persistent_buffers_set)
        if part._buffers.get(buffer) is not None
    }
    return _plainly(named, what)


_Value = TypeVar("_Value")


def _plainly(named: Mapping[str, _Value], what: str) -> dict[str, _Value]:
    plain: dict[str, _Value] = {}
    for name, value in named.items():
        short = plain_name(name)
        if short in plain:
            raise CheckpointError(
                f"'{what}' has two tensors named '{short}' once wrappers are off."
            )
        plain[short] = value
    return plain
