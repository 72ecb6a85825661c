"""Gives one registered object the state that a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcresume.checkpoint import reader, registered, sharded
from hpcresume.checkpoint.images import Images
from hpcresume.checkpoint.parts import Saved
from hpcresume.checkpoint.reader import Held
from hpcresume.checkpoint.sharded import Part
from hpcresume.checkpoint.tensors import extra_states, fleeting_buffers, join, plain_state, split
from hpcresume.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def load(name: str, value: Any, found: Sequence[Held], saved: Mapping[str, Any]) -> None:
    """Give an object the tensors that were found, and the rest of its state.

    `saved` is what state.json says of it. Raises CheckpointError where it does not fit.
    """
    tensors = {key: tensor for held in found for key, tensor in held.tensors.items()}
    aliases = saved["aliases"]
    if isinstance(value, torch.nn.Module):
        extra = extra_states(value, name)
        full = {**tensors, **{alias: tensors[target] for alias, target in aliases.items()}}
        named = {
            key: tensor
            for key, tensor in full.items()
            if not any(key == e or key.startswith(f"{e}.") for e in extra)
        }
        live = {k: sharded.local(t) for k, t in plain_state(value, name).items()}
        reader.copy_into(live, named, name)
        for key, part in extra.items():
            copies = reader.clones({k: t for k, t in tensors.items() if k.startswith(key)})
            part.set_extra_state(join(saved["tree"][key], copies, aliases))
        return
    own: dict[str, torch.Tensor] = {}
    for held in found:
        # Against the digests of a whole file it shows what has arrived, else against this memory.
        own |= (reader.kept if held.is_whole else reader.clones)(held.tensors)
        own |= {key: sharded.like(live, own[key]) for key, live in held.like.items()}
    state = join(saved["tree"], own, aliases)
    value.load_state_dict(state)
    if isinstance(value, torch.optim.Optimizer):
        reader.keep_dtypes(value, state)


def load_buffers(name: str, value: Any, images: Images) -> None:
    """Put back the buffers that the module's own state dict leaves out."""
    file = registered.buffers_file(name)
    if file not in images.names():
        return
    places = fleeting_buffers(value, name)
    for key, saved in reader.clones(reader.held_in(file, images.take(file)).tensors).items():
        if key not in places:
            raise CheckpointError(f"'{name}' has no buffer '{key}', which the checkpoint holds.")
        part, buffer = places[key]
        live = getattr(part, buffer)
        if live.shape == saved.shape and live.dtype == saved.dtype:
            with torch.no_grad():
                live.copy_(saved)
        else:
            # A cache that has grown.
            setattr(part, buffer, saved.to(live.device))


def live_like(
    name: str, value: Any, saved: Mapping[str, Any], tensors: Mapping[str, Saved]
) -> Mapping[str, DTensor]:
    """By name of a saved tensor, the live one which lies on several ranks as it is to lie.

    That is itself, or the parameter of an optimizer that the state belongs to.
    """
    if not isinstance(value, torch.optim.Optimizer):
        return split(registered.state_of(name, value), name).spread
    numbers = [n for group in saved["tree"]["param_groups"] for n in group["params"]]
    params = dict(zip(map(str, numbers), registered.params_of(value), strict=False))
    # Where no tensor was split, one of the parameter's shape is to be.
    never = not any(tensor.is_split for tensor in tensors.values())
    found = {}
    for key, tensor in tensors.items():
        param = params.get(key.split(".")[1]) if key.startswith("state.") else None
        if param is None or not sharded.is_sharded(param):
            continue
        if tensor.is_split or (never and tensor.shape == tuple(param.shape)):
            found[key] = param
    return found


def check_parts(name: str, optimizer: torch.optim.Optimizer, held: Mapping[str, Part]) -> None:
    """Raise CheckpointError where the state of a parameter lies otherwise than the parameter."""
    params = registered.params_of(optimizer)
    for key, part in held.items():
        param = params[int(key.split(".")[1])]
        if not sharded.is_sharded(param) or sharded.part_of(param) != part:
            raise CheckpointError(
                f"'{name}' keeps '{key}' on other ranks than the parameter that it belongs to, "
                f"where it would not be found again: choose an optimizer whose state has the "
                f"shapes of the parameters."
            )
