"""The cells of the exactness oracle: one value of each factor, and how its chain is cut.

The default suite takes cells that together hold every pair of values of different factors; the
long suite takes them all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

FACTORS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("sgd", "adamw", "adafactor"),
    "precision": ("fp32", "bf16", "scaled"),
    "noise": ("dropout", "batchnorm", "workers-0", "workers-1", "workers-3"),
    "accumulate": (1, 3, 4),
    "ema": (False, True),
    "compile": (False, True),
    "ranks": (1, 2),
}
STEPS_PER_EPOCH = 7
EPOCHS = 2
STEPS = STEPS_PER_EPOCH * EPOCHS
#: The training function evaluates within every so many-th step.
EVALUATE_EVERY = 3


@dataclass(frozen=True)
class Cell:
    """One value of each factor; the names are those of FACTORS."""

    optimizer: str = "adamw"
    precision: str = "fp32"
    noise: str = "dropout"
    accumulate: int = 1
    ema: bool = False
    compile: bool = False
    ranks: int = 1

    @property
    def name(self) -> str:
        """As a test's id."""
        parts = [self.optimizer, self.precision, self.noise, f"accumulate-{self.accumulate}"]
        flags = [name for name in ("ema", "compile") if getattr(self, name)]
        return " ".join([*parts, *flags, f"ranks-{self.ranks}"])

    @property
    def cost(self) -> int:
        """What a cell takes, roughly, in units of the cheapest."""
        return (4 if self.compile else 1) * (2 if self.ranks > 1 else 1)

    def pairs(self) -> frozenset[tuple[Any, ...]]:
        """Its pairs of values of different factors."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return frozenset(itertools.combinations(values, 2))


def product() -> list[Cell]:
    """All cells, in the order of FACTORS."""
    return [Cell(*values) for values in itertools.product(*FACTORS.values())]


def pairwise() -> list[Cell]:
    """Few and cheap cells that hold every pair: again and again the one with the most new pairs
    for its cost, the first of them where several have as many."""
    candidates = product()
    missing = set().union(*(cell.pairs() for cell in candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda cell: len(cell.pairs() & missing) / cell.cost)
        chosen.append(best)
        missing -= best.pairs()
    return chosen
