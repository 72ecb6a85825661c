"""How many nodes a job may have: a number, or a range of which the scheduler gives what is free."""

from __future__ import annotations

from hpcresume.errors import ConfigError


def node_range(nodes: int | str) -> tuple[int, int]:
    """The least and the most of `nodes`: 2 and 4 for "2-4", 3 and 3 for 3.

    Raises ConfigError where the least is the larger one.
    """
    least, _, most = str(nodes).partition("-")
    found = int(least), int(most or least)
    if found[0] > found[1]:
        raise ConfigError(f"{nodes}: the least comes first, so write {most}-{least}.")
    return found


def nodes_in_turn(nodes: int | str, number: int) -> int:
    """How many of a range link `number` has where nothing is ever busy: the most, then fewer.

    So that a chain on one machine meets every size that it may get on a cluster.
    """
    least, most = node_range(nodes)
    return most - (number - 1) % (most - least + 1)
