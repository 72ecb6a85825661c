"""Runs a cell as a chain of links that are cut as told: in this process, each link in processes of
its own, or in a pool of rank processes that serves one chain after another.

A link here is what a foreground link is: a claim, a berth, `rank.serve`. The supervisor is left
out: what it adds has tests of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import program
import torch
import torch.distributed as dist
from cells import EPOCHS, STEPS, Cell
from cuts import Cut

from hpcresume.config import dump, from_mapping, read_frozen
from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.serving import berth_for, serve
from hpcresume.session import Berth
from hpcresume.signals import SignalFlags, listen
from hpcresume.training import distributed
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks

#: Carries out one link of a run: cut as told, or to the run's end.
Link = Callable[[RunDir, Cut | None], None]
_SPAWN = multiprocessing.get_context("spawn")


class Killed(BaseException):
    """Stands for SIGKILL in a process that must live on."""


def make_run(
    path: Path, cell: Cell, backend: str = "aot_eager", *, background: bool = False
) -> RunDir:
    """A run directory for a cell; `backend` is torch.compile's.

    Without `background`, it is known at each step what is committed.
    """
    config = {
        "name": path.name,
        "train": "program.py:train",
        "args": {"cell": dataclasses.asdict(cell), "backend": backend},
        "seed": 5,
        "epochs": EPOCHS,
        "deterministic": True,
        "checkpoint": {"steps": 4, "minutes": None, "background": background},
        "log": {"every_steps": 5},
    }
    run = RunDir(path)
    frozen = dump(from_mapping(config, "the test"))
    run.create(frozen, cluster="local", project=Path(program.__file__).parent, versions={})
    return run


def run_chain(run: RunDir, cuts: Iterable[Cut], link: Link) -> RunDir:
    """Cut a run as told, then let it train to its end; each cut is seen to have happened."""
    for cut in cuts:
        link(run, cut)
        check_cut(run, cut)
    link(run, None)
    assert read_chain(run)[-1].last("completed"), story(run)
    return run


def check_cut(run: RunDir, cut: Cut) -> None:
    """The newest link ended as it was to end."""
    link = read_chain(run)[-1]
    ended, saved, began = link.last("ended"), link.last("saved"), link.last("restored")
    assert began is not None, story(run)
    committed = began["step"] if saved is None else saved["step"]
    if cut.kills:
        # A killed process has no last word, an exception in its place has.
        assert ended is None or ended["reason"].startswith("Killed"), story(run)
    else:
        assert ended is not None and ended["how"] == "stopped", story(run)
    if cut.kind == "zero steps":
        assert saved is None, story(run)
    elif cut.kind == "evaluation":
        # Two ranks agree a step or two later.
        assert cut.step <= committed < STEPS, story(run)
    elif cut.kind == "crash":
        assert committed < cut.step - 1, f"no step was lost; {story(run)}"
    elif cut.kind == "epoch end":
        assert committed == cut.step - 1, story(run)
    else:
        assert committed == cut.step, story(run)


def story(run: RunDir) -> str:
    """What the journals say, for a failed test."""
    records = [str(record) for link in read_chain(run) for record in link.records]
    failures = [json.loads(path.read_text()) for path in sorted(run.links.glob("*/*.failure.json"))]
    return "\n".join([*records, *(failure["traceback"] for failure in failures)])


# ---- in this process -------------------------------------------------------------------------


def link_here(
    run: RunDir,
    cut: Cut | None,
    place: RankPlace | None = None,
    train: Callable[..., None] = program.train,
) -> None:
    """One link in this process, which lives on."""
    flags = SignalFlags()

    def end(cut: Cut) -> None:
        if cut.kills:
            raise Killed
        flags.note(signal.SIGTERM)

    _serve(run, cut, place or RankPlace(), flags, end, train)


def _serve(
    run: RunDir,
    cut: Cut | None,
    place: RankPlace,
    flags: SignalFlags,
    end: Callable[[Cut], None],
    train: Callable[..., None] = program.train,
) -> None:
    """Train one rank of one link; `end` cuts it, where the cut says."""
    config = read_frozen(run.config)
    clock = Clock(end_time=None, file=None, lead_s=None, guess_s=0.0)
    berths: list[Berth] = []

    def berth_of(ranks: Ranks) -> Berth:
        number = run.claim_link({"job": None}).number if ranks.rank == 0 else None
        link = run.link(ranks.broadcast(number))
        stop_at = None if cut is None else cut.stop_at
        berths.append(berth_for(run, link, config, ranks, flags, clock, job=None, stop_at=stop_at))
        return berths[-1]

    def interrupt(at: str, step: int) -> None:
        if cut is not None and (at, step) == (cut.place, cut.step):
            end(cut)

    try:
        serve(berth_of, functools.partial(train, interrupt=interrupt), place, config)
    finally:
        # A new process would begin without what a link left behind: no more may the next one here.
        for berth in berths:
            if berth.journal is not None:
                berth.journal.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch._dynamo.reset()
        gc.collect()


# ---- in processes of its own -----------------------------------------------------------------


def link_alone(run: RunDir, cut: Cut | None) -> None:
    """One link in new processes, one for each rank, which really get the signals."""
    ranks = num_ranks(run)
    meeting = _meeting_place(run)
    processes = [
        _SPAWN.Process(target=_rank_alone, args=(run, cut, rank, ranks, meeting))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    expected = -signal.SIGKILL if cut is not None and cut.kills else 0
    assert [process.exitcode for process in processes] == [expected] * ranks, story(run)


def _rank_alone(run: RunDir, cut: Cut | None, rank: int, ranks: int, meeting: Path) -> None:
    def end(cut: Cut) -> None:
        os.kill(os.getpid(), signal.SIGKILL if cut.kills else signal.SIGTERM)

    torch.set_num_threads(1)
    with _meeting(meeting, rank, ranks), listen() as flags:
        _serve(run, cut, RankPlace(rank=rank, world_size=ranks), flags, end)


# ---- in rank processes -----------------------------------------------------------------------


class RankPool:
    """Processes that are the ranks of one link after another; each link has its own group."""

    def __init__(self) -> None:
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def link(self, run: RunDir, cut: Cut | None) -> None:
        """One link; the processes live on. Raises EOFError where one has died."""
        ranks = num_ranks(run)
        while len(self._pipes) < ranks:
            self._add()
        meeting = _meeting_place(run)
        for pipe in self._pipes[:ranks]:
            pipe.send((run, cut, ranks, meeting))
        failures = [pipe.recv() for pipe in self._pipes[:ranks]]
        assert not any(failures), "\n".join(filter(None, failures))

    def _add(self) -> None:
        ours, theirs = _SPAWN.Pipe()
        # Not a daemon: it has data workers of its own.
        process = _SPAWN.Process(target=_serve_links, args=(len(self._pipes), theirs))
        process.start()
        theirs.close()
        self._pipes.append(ours)
        self._processes.append(process)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve_links(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()
    while (request := pipe.recv()) is not None:
        run, cut, ranks, meeting = request
        try:
            with _meeting(meeting, rank, ranks):
                link_here(run, cut, RankPlace(rank=rank, world_size=ranks))
        except BaseException:
            pipe.send(traceback.format_exc())
        else:
            pipe.send(None)


def num_ranks(run: RunDir) -> int:
    """As the run's cell has them."""
    ranks: int = read_frozen(run.config).args["cell"]["ranks"]
    return ranks


def _meeting_place(run: RunDir) -> Path:
    """The file by which the ranks of the next link find each other."""
    return run.path.with_name(f"{run.name}.{run.newest_link() + 1}.meeting")


@contextlib.contextmanager
def _meeting(place: Path, rank: int, ranks: int) -> Iterator[None]:
    """The process group of a link. It meets by a file: a free port may be taken the next moment."""
    if ranks > 1:
        # Whatever this machine calls itself, and whether that leads anywhere.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        # A whole run is over before ranks would exchange their first wish.
        distributed.EXCHANGE_S = 0.0
        store = dist.FileStore(str(place), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    yield
