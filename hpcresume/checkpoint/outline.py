"""What two saves of one training have in common: the outline of a state.

From save to save the bytes of tensors and a few numbers change; names, order and types hardly ever
do. They are worked out once, and only looked over afterwards, so that training waits for little
more than the copy of its tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpcresume import files
from hpcresume.checkpoint import sharded
from hpcresume.checkpoint.tensors import is_scalar, split

#: Stands for a number while the text around it is made.
_HOLE = "\0"
_HOLE_TEXT = files.to_json(_HOLE).strip()


class Leaves:
    """What stands at the ends of a state's tree, in the order of the tree."""

    def __init__(self, state: Any) -> None:
        self.tensors: list[torch.Tensor] = []
        """Of what lies on several ranks, this rank's part."""
        self.numbers: list[Any] = []
        """All that is neither a tensor nor holds others."""
        self.marks: list[Any] = []
        """Types, keys and places: equal for two states that differ in tensors and numbers alone."""
        self._gather(state)
        self.spread: list[tuple[int, Any]] = []
        """Which of the tensors lie on several ranks, and how."""
        for place, tensor in enumerate(self.tensors if sharded.may_be() else ()):
            if sharded.is_sharded(tensor):
                look = tensor.device_mesh, tensor.placements, tensor.shape
                self.spread.append((place, look))
                self.tensors[place] = sharded.local(tensor)

    def _gather(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
        elif isinstance(value, Mapping):
            self.marks += (type(value), tuple(value))
            self._gather_all(value.values())
        elif isinstance(value, (list, tuple)):
            self.marks += (type(value), len(value))
            self._gather_all(value)
        else:
            self.marks.append(len(self.tensors))
            self.numbers.append(value)

    def _gather_all(self, values: Any) -> None:
        tensors = self.tensors
        for value in values:
            # By far the most of them, and so without a call for each.
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            else:
                self._gather(value)


class Outline:
    """Names of a state's tensors, and the text of its tree but for the numbers.

    Raises CheckpointError as `tensors.split` does.
    """

    def __init__(self, state: Any, leaves: Leaves, what: str) -> None:
        whole = split(state, what)
        self.aliases = whole.aliases
        """By name, the tensor that holds the same memory."""
        self.names = list(whole.tensors)
        """Of the tensors, each memory once."""
        spread = {name: whole.spread[name] for name in self.names if name in whole.spread}
        self.parts = {name: sharded.part_of(tensor) for name, tensor in spread.items()}
        """What this rank holds of tensors that lie on several ranks, by name."""
        self.replicas = {name for name, tensor in spread.items() if not sharded.is_first(tensor)}
        """Of which of these another rank writes the part."""
        self.numbers: list[Any] = []
        """Of the state that it was made from, as JSON values."""
        places = {name: place for place, name in enumerate(whole.order)}
        self._places = [places[name] for name in self.names]
        self._marks = leaves.marks
        self._spread = leaves.spread
        self._looks = _looks(leaves)
        self._shared = _shared(leaves)
        self._shared_looks = self._look_at_shared(leaves)
        text = files.to_json(_with_holes(whole.tree, self.numbers)).rstrip()
        self._pieces = text.split(_HOLE_TEXT)
        if len(self._pieces) != len(self.numbers) + 1:
            # A text of the state looks like a hole itself: nothing can be put in afterwards.
            self.numbers, self._pieces, self._marks = [], [files.to_json(whole.tree).rstrip()], []

    def fits(self, leaves: Leaves) -> bool:
        """Whether this is the outline of another state: `leaves` are all that is new in it.

        Its tensors may have other types and shapes.
        """
        return (
            self._marks == leaves.marks
            and self._spread == leaves.spread
            and self._looks == _looks(leaves)
            and self._shared_looks == self._look_at_shared(leaves)
            and all(map(is_scalar, leaves.numbers))
        )

    def tensors(self, leaves: Leaves) -> dict[str, torch.Tensor]:
        """The tensors by name, each memory once."""
        found = leaves.tensors
        return dict(zip(self.names, [found[place] for place in self._places], strict=True))

    def tree(self, numbers: Sequence[Any]) -> bytes:
        """The tree as JSON, with the numbers of a state that it fits."""
        text = [self._pieces[0]]
        for number, piece in zip(numbers, self._pieces[1:], strict=True):
            text += (files.to_json(number).rstrip(), piece)
        return b"".join(text)

    def _look_at_shared(self, leaves: Leaves) -> list[Any]:
        found = [leaves.tensors[place] for place in self._shared]
        return [(t.device, t.shape, t.stride(), t.dtype) for t in found]


def _looks(leaves: Leaves) -> tuple[list[int], list[bool]]:
    """What may change while names stay: which memory is whose, and what is trained."""
    return [t.data_ptr() for t in leaves.tensors], [t.requires_grad for t in leaves.tensors]


def _shared(leaves: Leaves) -> list[int]:
    """Places of the tensors that begin where another one does: whether they are one may change."""
    addresses = [t.data_ptr() for t in leaves.tensors]
    often = {address for address, count in Counter(addresses).items() if address and count > 1}
    return [place for place, address in enumerate(addresses) if address in often]


def _with_holes(tree: Any, numbers: list[Any]) -> Any:
    """A tree with holes where its numbers were, which go to `numbers`."""
    if isinstance(tree, dict) and "$tensor" in tree:
        return tree
    if isinstance(tree, dict) and "$set" not in tree:
        for word in ("$dict", "$counter"):
            if word in tree:
                return {word: [[key, _with_holes(value, numbers)] for key, value in tree[word]]}
        return {key: _with_holes(value, numbers) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_holes(value, numbers) for value in tree]
    numbers.append(tree)
    return _HOLE
