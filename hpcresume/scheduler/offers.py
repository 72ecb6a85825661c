"""What a cluster offers to who asks for the first time: partitions, their GPUs, accounts.

Used by `hpcresume init`, which proposes it. Whatever cannot be learned is empty.
"""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from hpcresume.scheduler import process
from hpcresume.scheduler.slurm_text import limit_s

_TIMEOUT_S = 10.0
#: Name, time limit, state, generic resources; a line for each kind of node.
_NODES_FORMAT = "%P|%l|%a|%G"
_GPUS = re.compile(r"gpu(?::[^:,()]+)?:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition that takes jobs."""

    name: str
    is_default: bool = False
    limit_s: int | None = None
    """Longest job, in seconds; None: no limit, or not known."""
    gpus: int = 0
    """GPUs of the node that has most."""


@dataclass(frozen=True, kw_only=True)
class Offers:
    """Partitions as Slurm lists them, and this user's accounts, the default one first."""

    partitions: tuple[Partition, ...] = ()
    accounts: tuple[str, ...] = ()

    def partition(self, name: str | None) -> Partition | None:
        """The one of that name; by default the cluster's default."""
        for one in self.partitions:
            if one.name == name or (name is None and one.is_default):
                return one
        return None


def ask_offers(environ: Mapping[str, str]) -> Offers:
    """What sinfo and sacctmgr tell on this machine."""
    clean = process.scrubbed(environ)

    def told(*argv: str) -> str:
        if not process.available(argv[0], environ):
            return ""
        done = process.run(argv, environ=clean, timeout_s=_TIMEOUT_S)
        return "" if done.code else done.out

    nodes = told("sinfo", "--noheader", "--format", _NODES_FORMAT)
    user = told(
        *("sacctmgr", "--noheader", "--parsable2", "show", "user", getpass.getuser()),
        *("withassoc", "format=DefaultAccount,Account"),
    )
    return Offers(partitions=parse_partitions(nodes), accounts=parse_accounts(user))


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """The partitions that are up in what sinfo printed."""
    found: dict[str, Partition] = {}
    for name, limit, state, resources in _rows(text, 4):
        if state != "up":
            continue
        plain = name.removesuffix("*")
        before = found.get(plain) or Partition(
            name=plain, is_default=name != plain, limit_s=limit_s(limit)
        )
        gpus = sum(int(count) for count in _GPUS.findall(resources))
        found[plain] = replace(before, gpus=max(before.gpus, gpus))
    return tuple(found.values())


def parse_accounts(text: str) -> tuple[str, ...]:
    """The accounts in what sacctmgr printed, the default one first."""
    rows = list(_rows(text, 2))
    names = [*(default for default, _ in rows), *(account for _, account in rows)]
    return tuple(dict.fromkeys(filter(None, names)))


def _rows(text: str, width: int) -> Iterator[list[str]]:
    """The rows of so many columns; what else a client printed is passed over."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == width:
            yield cells
