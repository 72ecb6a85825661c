"""`hpcresume drive` on a login node of the simulation: it looks, is killed, and is started again.

Its looks fall between the moments of jobs' lives, or into one another's: where squeue is slow, jobs
begin and end before it has answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from cluster import Cluster, Job, Killed, Life, SimulatedScheduler, Violation

from hpcresume import drive
from hpcresume.chain import Decision
from hpcresume.config import read_frozen
from hpcresume.errors import SubmissionRejected, Unavailable
from hpcresume.journal import Journal
from hpcresume.link import Surroundings
from hpcresume.run_dir import RunDir

KILLED, SLOW = "the driver is killed", "squeue is slow"
#: More looks than any chain here can need.
_MOST_LOOKS = 2000


class SimulatedDriver:
    """Whoever sits on the login node, and types the command again when it has died."""

    def __init__(self, run: RunDir, cluster: Cluster, journal: Callable[..., Journal]) -> None:
        self._run = run
        self._cluster = cluster
        self._journal = journal
        self._every_s = cluster.dice.uniform(5, 60)
        self._driver: drive.Driver | None = None
        self._looks = 0
        #: It is a process as those of jobs are, and claims a link to say why the chain has ended.
        self._process = Job("of the driver", "", (), 0.0)
        self.looks_at = cluster.dice.uniform(0, 100)
        """When it looks next; infinite while it does so, and when it has left for good."""
        self.met: list[str] = []
        """What has befallen it."""
        self.over: Decision | None = None
        """The end of the chain, as it has told its user."""

    def look(self) -> bool:
        """Look now, or be killed at that; whether it has seen to a job."""
        cluster, dice = self._cluster, self._cluster.dice
        cluster.elapsed = max(cluster.elapsed, self.looks_at)
        self.looks_at = math.inf
        self._looks += 1
        if self._looks > _MOST_LOOKS:
            raise Violation("the driver neither ends nor gets the chain to its end")
        life = Life(self._process, dice.choices(("", KILLED, SLOW), (75, 10, 15))[0], began=0.0)
        # The first moment is the look into the queue, which most looks end with.
        life.fault_moment = dice.choice((1, dice.randint(1, 8)))
        cluster.lives.append(life)
        known = len(cluster.jobs)
        try:
            if self._driver is None:
                self._driver = self._started()
            self.over = self._driver.look()
        except Unavailable:
            pass
        except (Killed, SubmissionRejected) as error:
            cluster.tell(f"the driver is gone: {error}")
            self._driver = None
        finally:
            cluster.lives.pop()
        if self.over is not None:
            cluster.tell(f"the driver leaves: {self.over.kind}, {self.over.reason}")
        else:
            gone_s = 0.0 if self._driver else dice.uniform(0, 200)
            self.looks_at = cluster.elapsed + self._every_s + gone_s
        return self._driver is not None and len(cluster.jobs) > known

    def _started(self) -> drive.Driver:
        cluster = self._cluster
        around = Surroundings(
            journal=self._journal,
            now=cluster.now,
            monotonic=cluster.monotonic,
            chance=cluster.dice.random,
        )
        config = read_frozen(self._run.config)
        return drive.Driver(self._run, config, SimulatedScheduler(cluster), around)
