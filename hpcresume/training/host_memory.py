"""The memory of this host that the job uses, and what it may use: the kernel kills beyond that.

A job lives in a control group with a limit (Slurm's ConstrainRAMSpace, a container); without one
the host's own memory is the limit. Formats: cgroups(7), and the kernel's documentation of cgroup
v2's memory controller; procfs(5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

#: A v1 limit that means "none" is a number near 2^63, rounded to pages.
_NO_LIMIT = 1 << 60


def host_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes in use, without what the page cache can give back, and the limit; None if unknown.

    `root` is where proc and sys are mounted.
    """
    whole = _of_host(root)
    groups = [found for found in map(_of_group, _groups(root)) if found is not None]
    if whole is not None:
        groups = [(used, limit) for used, limit in groups if limit < whole[1]]
    return min(groups, key=lambda found: found[1] - found[0], default=whole)


def _groups(root: Path) -> Iterator[Path]:
    """The memory control groups that this process is in, from its own up to the root's."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        # In a container the own group may be mounted as the root: then its path is not there.
        own = top / place.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(top):
                yield group


def _of_group(group: Path) -> tuple[int, int] | None:
    """Use and limit of a control group; None where it has no limit."""
    for use, limit, cache in (
        ("memory.current", "memory.max", "inactive_file"),
        ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most = int((group / limit).read_text())
            if most < _NO_LIMIT:
                used = int((group / use).read_text())
                return max(0, used - _numbers(group / "memory.stat").get(cache, 0)), most
    return None


def _of_host(root: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError, KeyError):
        kilobytes = _numbers(root / "proc/meminfo")
        whole = kilobytes["MemTotal:"] * 1024
        return whole - kilobytes["MemAvailable:"] * 1024, whole
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number" of a file of the kernel's."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            found[words[0]] = int(words[1])
    return found
