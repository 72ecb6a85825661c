"""What goes wrong in a simulated chain: drawn from a seed, once for the chain, once a link."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

#: What may befall a link, with how often it does.
LINK_FAULTS = {
    "": 40,
    "supervisor killed": 6,
    "killed at any moment": 8,
    "node failure": 6,
    "node lost and back": 6,
    "rank killed": 5,
    "host memory": 3,
    "exception": 5,
    "hang": 2,
    "preempted": 5,
    "preempted and requeued": 4,
    "scancel": 1.5,
    "scancel of a waiting job": 1,
    "cancel": 1.5,
    "STOP": 1.5,
    "dies before its first line": 5,
    "broken checkpoint": 1,
}
#: The job and all its processes are gone without a warning.
ABRUPT = frozenset({"supervisor killed", "killed at any moment", "node failure"})


@dataclass(frozen=True)
class Window:
    """A time in which something does not work, in seconds of the simulation."""

    begin: float = 0.0
    end: float = 0.0

    def holds(self, now: float) -> bool:
        return self.begin <= now < self.end


@dataclass(frozen=True)
class Plan:
    """What a whole chain meets."""

    max_steps: int
    step_s: float
    save_s: float
    save_steps: int
    job_s: int
    grace_s: float
    mode: str
    max_links: int | None
    no_progress_links: int
    max_crashes: int
    raises_at: int | None
    """The code raises in this step, whenever it comes there."""
    raises_anew: bool
    """...and each time with other words."""
    nan_at: int | None
    memory_at: int | None
    hangs_at: int | None
    full_disk: Window
    silent: tuple[Window, ...]
    """The scheduler answers nothing."""
    refuses: Window
    """The scheduler takes no job."""
    loses_answers: float
    """How many submissions are accepted, and never answered."""
    accounting_lag_s: float
    """How long after a job's end it is told what became of it; infinite without accounting."""
    dice: random.Random = field(compare=False, repr=False)

    @property
    def reachable(self) -> bool:
        """Whether the scheduler always answers, in a time for which links have patience."""
        dead = (*self.silent, self.refuses)
        return (
            self.accounting_lag_s < 50 and not self.loses_answers and not any(w.end for w in dead)
        )


def plan(seed: int) -> Plan:
    """The chain of a seed."""
    dice = random.Random(seed)
    max_steps = dice.randint(20, 130)

    def rarely(share: float) -> int | None:
        return dice.randint(1, max_steps) if dice.random() < share else None

    def window(share: float, longest: float) -> Window:
        if dice.random() >= share:
            return Window()
        begin = dice.uniform(0, 400)
        return Window(begin, begin + dice.uniform(5, longest))

    strict = dice.random() < 0.4
    return Plan(
        max_steps=max_steps,
        step_s=dice.uniform(1, 3),
        save_s=dice.uniform(0.5, 5),
        save_steps=dice.randint(4, 15),
        job_s=dice.randint(70, 150),
        grace_s=dice.choice((30.0, 30.0, 5.0)),
        mode=dice.choice(("prequeue", "drive", *("prequeue",) * 6, "resubmit", "requeue")),
        max_links=dice.randint(2, 6) if dice.random() < 0.25 else None,
        no_progress_links=5 if strict else 3,
        max_crashes=1 if strict else 3,
        raises_at=rarely(0.15),
        raises_anew=dice.random() < 0.5,
        nan_at=rarely(0.06),
        memory_at=rarely(0.08),
        hangs_at=rarely(0.05),
        full_disk=window(0.1, 300),
        silent=tuple(window(0.3, 90) for _ in range(2)),
        refuses=window(0.2, 200),
        loses_answers=dice.choice((0.0, 0.0, 0.0, 0.3)),
        accounting_lag_s=dice.choice((0.0, 0.0, 2.0, 20.0, 45.0, math.inf)),
        dice=dice,
    )


def draw(dice: random.Random) -> str:
    """What befalls one link."""
    return dice.choices(list(LINK_FAULTS), list(LINK_FAULTS.values()))[0]
