"""Scenarios side by side on real Slurm clusters: each one a test, and all of them started at once.

A test that is decorated with `side_by_side` begins with the first of its module, in a thread of
its own; when its turn comes, pytest waits for it. So that all together last no longer than the
longest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from oracle import TRAINING, assert_equivalent, hpcresume, merged, project, train_uncut
from slurm_cluster import SlurmCluster, SlurmClusterError, wait_until
from test_slurm_chain import Chain

from hpcresume.journal import LinkRecords, read_chain

#: For whatever a machine with many others on it takes long for.
PATIENCE_S = 280
#: Each chain trains so many steps, and meets its fault in one of them; a checkpoint every 9.
STEPS, AT, SAVED = 60, 20, 18
SETTINGS: dict[str, Any] = {
    "train": "faulty.py:train",
    "max_steps": STEPS,
    "args": {"fault": "wait", "at": AT},
    # What is to be met at step 20 does not find the save of step 18 unfinished.
    "checkpoint": {"background": False},
    "chain": {"lead_s": 5, "hang_s": 0},
    "scheduler": {"time": "00:10:00", "cluster": "slurm", "mem": "900"},
}
_PAUSE = '        time.sleep(args.get("pause_s", 0.0))\n'
#: What makes noisy.py meet its fault.
_FAULTY = {
    "import random\n": "import faults\nimport random\n",
    _PAUSE: f"{_PAUSE}        fault = faults.meet(session)\n",
    "nn.functional.mse_loss(model(": "fault + nn.functional.mse_loss(model(",
}


class Scene(Chain):
    """A chain of one scenario: submitted, cut, and looked at."""

    def __init__(self, stage: Stage, cluster: SlurmCluster, play: Play) -> None:
        super().__init__(cluster, stage.folder / play.name, play.name)
        self._stage = stage
        self._is_fragile = play.cluster == "bare"
        #: What the user has in the shell besides.
        self.environ: dict[str, str] = {}

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return hpcresume(*argv, cwd=self.folder, **self.cluster.env, **self.environ)

    def begin(self, *, at_once: bool = False, **changes: Any) -> LinkRecords:
        """Submit the chain; its first link, once it has met its fault.

        `at_once`: although others are submitting, because this lasts long, or others wait for it.
        """
        self.prepare(**changes)
        with contextlib.nullcontext() if at_once else self._stage.few_at_a_time:
            self.submit()
        return self.has_met()

    def prepare(self, **changes: Any) -> Path:
        """The project's folder: the training, with its faults, and its configuration."""
        # The other nodes are for those who break them.
        spared = {"scheduler": {"exclude": ",".join(self.cluster.nodes[2:])}}
        own = {"name": self.run.name, **(spared if self._is_fragile else {})}
        project(self.folder, **merged(merged(SETTINGS, own), changes))
        text = (TRAINING / "noisy.py").read_text()
        for old, new in _FAULTY.items():
            assert old in text, old
            text = text.replace(old, new)
        (self.folder / "faulty.py").write_text(text)
        (self.folder / "faults.py").write_text((TRAINING / "faults.py").read_text())
        return self.folder

    def has_met(self) -> LinkRecords:
        """The newest link, once the fault was met."""
        self.wait(lambda links: (self.run.path / "met").exists())
        return self.links()[-1]

    def go(self) -> None:
        """Let a training go on that waits."""
        (self.run.path / "go").touch()

    def links(self) -> list[LinkRecords]:
        return read_chain(self.run)

    def wait(self, what: Callable[[list[LinkRecords]], Any], timeout: float = PATIENCE_S) -> Any:
        def look(links: list[LinkRecords]) -> Any:
            assert not self._stage.over, "the other tests have ended"
            return what(links)

        return super().wait(look, timeout)

    @contextlib.contextmanager
    def breaking_the_controller(self) -> Iterator[None]:
        """While this lasts, nobody submits, and nobody else breaks anything."""
        with self._stage.breaking, self._stage.few_at_a_time, self._stage.few_at_a_time:
            yield

    @contextlib.contextmanager
    def breaking_a_node(self) -> Iterator[str]:
        """The nodes to keep away from, so that the others are there to be broken."""
        with self._stage.breaking:
            yield ",".join(self.cluster.nodes[:2])

    def kill_ranks(self, link: LinkRecords) -> None:
        """SIGKILL to the ranks of a link."""
        _, *started = self.processes(link)
        for pid in started:
            # What a rank was about to start is gone by now, maybe.
            with contextlib.suppress(OSError):
                # srun stays: it sees them end.
                if Path(f"/proc/{pid}/comm").read_text().strip() != "srun":
                    os.kill(pid, signal.SIGKILL)

    def processes(self, link: LinkRecords) -> list[int]:
        """The supervisor of a link, its srun and its ranks."""
        run = str(self.run.path).encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if run in words and b"rank" in words:
                    found.append(int(path.parent.name))
        return [int(link.claim["pid"]), *found]

    def hears_the_supervisor(self, first: LinkRecords) -> None:
        """SIGTERM to the supervisor alone: its ranks save and leave, and the next link goes on."""
        os.kill(int(first.claim["pid"]), signal.SIGTERM)
        first, second = self.ends_like_the_uncut_run(links=2)
        saved = int(first.last("saved")["step"])
        assert first.last("stop_asked")["reason"] == "SIGTERM"
        assert second.last("restored")["step"] == saved >= AT

    def has_restored(self, number: int) -> LinkRecords:
        """Link `number`, once it stands where it goes on from."""

        def look(links: list[LinkRecords]) -> Any:
            return next((k for k in links if k.number == number and k.last("restored")), None)

        found: LinkRecords = self.wait(look)
        return found

    def ends_like_the_uncut_run(self, *, links: int) -> list[LinkRecords]:
        """Wait for completion: the same bytes in so many links, and an empty queue."""
        self.completed(PATIENCE_S)
        found = self.links()
        assert len(found) == links, self.story()
        assert_equivalent(self.run, self._stage.uncut.result())
        return found

    def stops(self) -> dict[str, Any]:
        """Wait for the recorded end of the chain, and an empty queue: the decision."""
        return self.ended(PATIENCE_S)

    def nothing_queued(self) -> None:
        """Wait for an empty queue; of a controller that is away nothing is known."""

        def empty() -> bool:
            with contextlib.suppress(SlurmClusterError):
                return all(job["name"] != self.run.name for job in self.cluster.queue())
            return False

        wait_until(f"an empty queue of {self.run.name}", empty, PATIENCE_S)

    def why(self) -> str:
        done = self.command("why", self.run.name)
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    def causes(self) -> list[str]:
        """Why each link has ended, as recorded by itself or by a later one."""
        links = self.links()
        ended = {
            int(record.get("of", link.number)): str(record["cause"])
            for link in links
            for record in link.all("ended")
            if "cause" in record
        }
        return [ended.get(link.number, "") for link in links]


class Stage:
    """The clusters, and what all scenarios share."""

    def __init__(self, folder: Path, plays: Sequence[Play]) -> None:
        self.folder = folder
        self.over = False
        #: Submitting imports torch, twice.
        self.few_at_a_time = threading.Semaphore(2)
        #: For whoever breaks more than a single job.
        self.breaking = threading.Lock()
        self._threads = ThreadPoolExecutor(max_workers=len(plays) + 8)
        self.uncut = self._threads.submit(self._train_uncut)
        self._clusters = {
            name: self._threads.submit(CLUSTERS[name])
            for name in dict.fromkeys(play.cluster for play in plays)
        }
        self._plays = {play.name: self._threads.submit(self._perform, play) for play in plays}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_error: object) -> None:
        self.over = True
        for cluster in self._clusters.values():
            if cluster.exception() is None:
                cluster.result().stop()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def outcome(self, name: str) -> None:
        """Wait for the end of a scenario; raises what it has raised."""
        self._plays[name].result()

    def _train_uncut(self) -> dict[str, Any]:
        return train_uncut(self.folder / "uncut", max_steps=STEPS)

    def _perform(self, play: Play) -> None:
        play.body(Scene(self, self._clusters[play.cluster].result(), play))


def _ordinary() -> SlurmCluster:
    """Accounting, preemption by partition `high`, and Slurm's own hold of requeued jobs."""
    cluster = SlurmCluster(cred_expire_s=120)
    cluster.start()
    nodes = ",".join(cluster.nodes)
    cluster.run(
        *("scontrol", "create", "PartitionName=low", f"Nodes={nodes}", "State=UP"),
        *("PriorityTier=1", "PreemptMode=CANCEL", "MaxTime=02:00:00"),
    )
    return cluster


def _bare() -> SlurmCluster:
    """Neither accounting nor requeueing, unless a job asks for it."""
    cluster = SlurmCluster(accounting=False, extra_conf={"JobRequeue": "0"})
    cluster.start()
    return cluster


CLUSTERS: dict[str, Callable[[], SlurmCluster]] = {"ordinary": _ordinary, "bare": _bare}


@dataclass(frozen=True)
class Play:
    """A scenario and its cluster."""

    name: str
    cluster: str
    body: Callable[[Scene], None]


def side_by_side(cluster: str = "ordinary") -> Callable[[Callable[[Scene], None]], Any]:
    """Make a function of a scene a test that runs beside the others; see the module's text."""

    def decorated(body: Callable[[Scene], None]) -> Callable[[Stage], None]:
        play = Play(body.__name__.removeprefix("test_"), cluster, body)

        def test(stage: Stage) -> None:
            stage.outcome(play.name)

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        test.play = play  # type: ignore[attr-defined]
        return test

    return decorated


def selected(items: Iterable[pytest.Item]) -> list[Play]:
    """The scenarios among the tests that are going to run."""
    functions = (getattr(item, "function", None) for item in items)
    return [function.play for function in functions if hasattr(function, "play")]
