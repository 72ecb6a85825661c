"""Run directories in every state, made through the library and without any training."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpcresume.config import dump, from_mapping
from hpcresume.journal import Journal
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.driver_file import only_driver
from hpcresume.scheduler.job import JobSpec
from hpcresume.scheduler.local import LocalScheduler
from hpcresume.story import this_process, token_prefix

#: Runs a command line in this process: exit code, output, errors.
Said = Callable[..., tuple[int, str, str]]
#: A host that this machine is not: what runs there is not known here.
ELSEWHERE = "gpu017"


def readable(file: Any, seconds: float) -> bool:
    """Whether there is something to read in a file or descriptor within so many seconds."""
    # Not `select`: it knows no descriptor above 1023, and a long row of tests may hold that many.
    poll = select.poll()
    poll.register(file, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(seconds * 1000))


def make_run(root: Path, name: str = "toy", *, cluster: str = "local", **config: Any) -> RunDir:
    """A run that was submitted and has no link yet."""
    settings = {"name": name, "train": "toy.py:train", "max_steps": 10, **config}
    run = RunDir(root / name)
    run.create(
        dump(from_mapping(settings, "test")), cluster=cluster, project=root.parent, versions={}
    )
    journal = Journal(run.submissions, link=0, job=None)
    journal.write("submitted", after_link=0, token="t", by="ada", host="login1")
    journal.close()
    return run


def add_link(run: RunDir, *, step: int = 0, lines: int = 1, **claim: Any) -> LinkDir:
    """A link that has begun to train and printed something; by default on another host."""
    link = run.claim_link({"job": "1", "host": ELSEWHERE, "pid": 7, "num_tasks": 1, **claim})
    with training(link) as journal:
        journal.write("restored", step=step, segments=[])
        journal.write("started", step=step, max_steps=10)
    text = "".join(f"line {n} of link {link.number}\n" for n in range(1, lines + 1))
    link.rank_log(0).write_text(text)
    return link


@contextlib.contextmanager
def training(link: LinkDir) -> Iterator[Journal]:
    """The journal of a link's rank 0."""
    journal = Journal(link.training, link=link.number, job="1")
    yield journal
    journal.close()


def end_link(link: LinkDir, decision: str, cause: str, reason: str, rule: str = "") -> None:
    """What a supervisor writes at the end of a link."""
    journal = Journal(link.journal, link=link.number, job="1")
    journal.write("ended", cause=cause, detail=reason, failure=None, who="", seconds=1.0, nodes=[])
    journal.write("decided", decision=decision, reason=reason, cause=cause, rule=rule)
    journal.close()


def complete(run: RunDir) -> RunDir:
    """Let a run be complete."""
    link = add_link(run)
    with training(link) as journal:
        journal.write("completed", step=10, epoch=1)
    run.final_model.mkdir()
    end_link(link, "finished", "completed", "training is complete at step 10")
    return run


def queue_job(run: RunDir) -> str:
    """A local job that waits; it starts when a driver looks at it, which no test lets happen."""
    spec = JobSpec(
        name=run.name,
        token=f"{token_prefix(run.identify()['id'])}1",
        run=run.path,
        log=run.job_log,
        workdir=run.path,
        environment={},
    )
    return LocalScheduler(run, ["true"]).submit(spec)


@contextlib.contextmanager
def state_complete(run: RunDir) -> Iterator[None]:
    complete(run)
    yield


@contextlib.contextmanager
def state_running(run: RunDir) -> Iterator[None]:
    add_link(run, **this_process(), job=None, foreground=True)
    yield


@contextlib.contextmanager
def state_waiting(run: RunDir) -> Iterator[None]:
    queue_job(run)
    with only_driver(run):
        yield


@contextlib.contextmanager
def state_stopped(run: RunDir) -> Iterator[None]:
    end_link(add_link(run), "stop", "cancelled", "cancelled by ada")
    yield


@contextlib.contextmanager
def state_failed(run: RunDir) -> Iterator[None]:
    end_link(add_link(run), "stop", "exception", "it is the code")
    yield


@contextlib.contextmanager
def state_stalled(run: RunDir) -> Iterator[None]:
    add_link(run)
    yield


STATES: dict[str, Callable[[RunDir], contextlib.AbstractContextManager[None]]] = {
    "complete": state_complete,
    "running": state_running,
    "waiting": state_waiting,
    "stopped": state_stopped,
    "failed": state_failed,
    "stalled": state_stalled,
}


class FakeSlurm:
    """Programs named like Slurm's clients, each a few lines of shell."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.path = f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin"
        for name in ("sbatch", "squeue", "scontrol", "sacct", "scancel"):
            self.program(name, "exit 0")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
