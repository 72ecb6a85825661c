"""Two ranks that hold the same state and write one checkpoint together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from checkpoint_payload import Raw, Training
from checkpoint_rows import Bar, Row, measure
from checkpoint_saves import Saves
from torch.nn.parallel import DistributedDataParallel

from hpcresume.checkpoint.contents import Contents
from hpcresume.scheduler.environment import RankPlace
from hpcresume.training.distributed import TIMEOUT, Ranks
from hpcresume.training.saving import give_way
from hpcresume.training.shares import Shares


class Rank:
    """One of the two: a state that DistributedDataParallel keeps alike, and its share."""

    def __init__(self, rank: int, tensors: int, size_bytes: int, folder: Path) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group(
            "gloo",
            # A file instead of a port, which another program might take meanwhile.
            init_method=f"file://{folder}/ranks-meet",
            rank=rank,
            world_size=2,
            timeout=TIMEOUT,
        )
        self.ranks = Ranks(RankPlace(rank=rank, world_size=2, local_rank=rank))
        self.training = Training(tensors, size_bytes)
        self.contents = Contents(rank, 2)
        self.contents.add("model", DistributedDataParallel(self.training.model))
        self.contents.add("optimizer", self.training.optimizer)
        self.shares = Shares(self.ranks)

    def close(self) -> None:
        """Leave together: what one of them still asks for, the other still holds."""
        self.ranks.barrier()
        self.ranks.close()
        dist.destroy_process_group()


def two_ranks(tensors: int, size_bytes: int, pairs: int, folder: Path) -> Iterator[Row]:
    """The rate of both together over that of one raw writer, which alternates with them."""
    # Before anything is begun here that a forked process should not inherit.
    other = multiprocessing.get_context("fork").Process(
        target=_partner, args=(tensors, size_bytes, folder)
    )
    other.start()
    own = Rank(0, tensors, size_bytes, folder)
    saves = Saves(own.contents, folder / "ranks")
    raw = Raw(own.training.bytes, folder)

    def save() -> float:
        own.ranks.broadcast(True)
        return saves.save(shares=own.shares)

    row = Row(
        figure="ranks",
        name="two ranks: write rate / one raw writer",
        tensors=tensors,
        bar=Bar(0.90, at_least=True),
        rate=True,
    )
    yield measure(row, save, raw.write, pairs)
    own.ranks.broadcast(False)
    saves.close()
    own.close()
    other.join()
    if other.exitcode:
        raise SystemExit("Rank 1 failed; its error stands above.")


def _partner(tensors: int, size_bytes: int, folder: Path) -> None:
    """Rank 1: writes its share of each save that rank 0 announces."""
    own = Rank(1, tensors, size_bytes, folder)
    with ThreadPoolExecutor(1, "checkpoint", initializer=give_way) as thread:
        while own.ranks.broadcast(None):
            number, staged = own.shares.next(), own.contents.stage_share()
            if staged.images:
                thread.submit(own.shares.deliver, number, staged.write).result()
    own.close()
