"""The processes of this machine, as /proc tells of them: who lives, and who belongs to a job.

Used by the local driver and by everyone who asks whether it, or a job of its, is still there.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume.errors import Unavailable

PROC = Path("/proc")


@dataclass(frozen=True)
class Stat:
    """The fields of /proc/PID/stat that matter here."""

    state: str
    group: int
    session: int
    ticks: int
    """When it began, in clock ticks since boot."""

    @property
    def ended(self) -> bool:
        """Whether only the record of its end is left."""
        return self.state in ("Z", "X")


def parse_stat(text: str) -> Stat:
    """Read a line of /proc/PID/stat. The program's name in it may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    return Stat(fields[0], int(fields[2]), int(fields[3]), int(fields[19]))


def read_stat(pid: int) -> Stat | None:
    """What /proc tells of a process; None where there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return parse_stat(text)


@functools.cache
def _boot() -> str:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class ProcessId:
    """One process and no other: a pid is given again after a while, with another `born`."""

    pid: int
    born: str
    """The boot that it belongs to, and its start within that."""
    host: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this pid now, ended ones included."""
        stat = read_stat(pid)
        return cls(pid, f"{_boot()}:{stat.ticks}", os.uname().nodename) if stat else None

    @classmethod
    def own(cls) -> ProcessId:
        """This process. Raises Unavailable on a system without /proc."""
        found = cls.of(os.getpid())
        if found is None:
            raise Unavailable(
                "The local scheduler needs Linux: it finds the processes of a job through /proc, "
                "which is not there. Start the training without a scheduler instead."
            )
        return found

    @classmethod
    def read(cls, value: Any) -> ProcessId:
        """The process in a JSON value. Raises what a foreign value makes Python raise."""
        return cls(int(value["pid"]), str(value["born"]), str(value["host"]))

    @property
    def here(self) -> bool:
        """Whether it belongs to this machine, so that its life can be known."""
        return self.host == os.uname().nodename

    def alive(self) -> bool:
        """Whether it runs. Of another machine's process nothing is known: it counts as alive."""
        if not self.here:
            return True
        stat = read_stat(self.pid)
        return bool(stat and not stat.ended and self.born == f"{_boot()}:{stat.ticks}")


def family(leader: ProcessId | None, mark: str) -> list[ProcessId]:
    """The living processes of a job: its session, its group, and whoever inherited its mark.

    The mark is a line NAME=value of the environment that only this job has. A child may leave the
    group, or the session, or wipe its environment, and is found by what it kept. As long as one
    process of a session lives the kernel gives its number to nobody else, so that where the
    leader's pid has a new owner, nothing is left of the session.
    """
    number = leader.pid if leader and leader.here and not _reused(leader) else 0
    mine = os.getuid()
    found = []
    for entry in os.listdir(PROC):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        with suppress(OSError):
            if (PROC / entry).stat().st_uid != mine:
                continue
            stat = read_stat(int(entry))
            if stat is None or stat.ended:
                continue
            kin = number > 0 and number in (stat.session, stat.group)
            if kin or mark.encode() in (PROC / entry / "environ").read_bytes():
                process = ProcessId.of(int(entry))
                found += [process] if process else []
    return found


def _reused(leader: ProcessId) -> bool:
    now = ProcessId.of(leader.pid)
    return leader.born.partition(":")[0] != _boot() or (now is not None and now != leader)


def session_leader(processes: Iterable[ProcessId]) -> ProcessId | None:
    """The process that began a session, the oldest if there are more: a job's first process."""
    leaders = [
        process
        for process in processes
        if (stat := read_stat(process.pid)) and stat.session == process.pid
    ]
    return min(leaders, key=lambda process: process.pid, default=None)


def send(processes: Iterable[ProcessId], number: signal.Signals) -> None:
    """Signal each process; one that has gone meanwhile is passed over.

    A stopped process would sleep through SIGTERM, so that SIGCONT goes before it.
    """
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGTERM:
                os.kill(process.pid, signal.SIGCONT)
            os.kill(process.pid, number)
