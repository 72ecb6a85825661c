"""The figures of one process: stall, writing, steps, restoring, and what is not trained."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from checkpoint_payload import Raw, Training, forget, timed
from checkpoint_rows import PEER_PAIRS, Bar, Call, Row, measure
from checkpoint_saves import Saves, contents_of, restore
from torch import nn

#: More tensors than this are many, and have bars of their own.
_FEW_TENSORS = 1000
#: Steps of which an idle one's time is the mean.
_IDLE_STEPS = 20
#: Of a model on which something small is trained.
_FROZEN = 0.95


def figures(
    wanted: Collection[str], tensors: int, size_bytes: int, pairs: int, peers: bool, folder: Path
) -> Iterator[Row]:
    """Stall, step, write, cold and warm, each with the peers that have the like."""
    few = tensors <= _FEW_TENSORS
    training = Training(tensors, size_bytes)
    saves = Saves(contents_of(training.model, training.optimizer), folder / "figures")
    raw = Raw(training.bytes, folder)
    step = SmallStep()
    rows: dict[str, tuple[Row, Call, Call]] = {}

    def figure(key: str, name: str, bar: Bar, own: Call, baseline: Call) -> None:
        row = Row(figure=key, name=name, tensors=tensors, bar=bar, rate=bar.at_least)
        rows[key] = (row, own, baseline)

    def restored() -> float:
        return restore(training, saves.newest.parent)

    def restored_cold() -> float:
        forget([saves.newest])
        return restored()

    copy = "stall / copy in memory"
    figure("stall", copy, Bar(1.15 if few else 1.4), lambda: timed(saves.stage), raw.copy)
    busy = "step while a save is written / idle"
    figure("step", busy, Bar(1.10), partial(step.while_saving, saves), step.idle)
    write = "durable write rate / raw write+fsync"
    figure("write", write, Bar(0.95 if few else 0.85, at_least=True), saves.save, raw.write)
    cold = "verified restore rate / raw read, cold"
    figure("cold", cold, Bar(0.90, at_least=True), restored_cold, raw.read_cold)
    warm = "verified restore rate / readinto, warm"
    figure("warm", warm, Bar(0.75, at_least=True), restored, raw.read)

    others: dict[str, dict[str, Call]] = {}
    if peers:
        from checkpoint_peers import Peers

        others = Peers(training.tensors(), folder).by_figure()
    for key, (row, own, baseline) in rows.items():
        if key not in wanted:
            continue
        yield measure(row, own, baseline, pairs)
        for name, call in others.get(key, {}).items():
            peer = replace(row, name=name, bar=None, is_peer=True)
            yield measure(peer, call, baseline, min(pairs, PEER_PAIRS))
    saves.close()


class SmallStep:
    """A step of training that takes some milliseconds: Python, products of matrices, AdamW."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Linear(512, 512), nn.GELU()]
        self._model = nn.Sequential(*layers)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), foreach=True)
        self._batch = torch.randn(128, 512)

    def _once(self) -> None:
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def idle(self) -> float:
        """Mean seconds of a step, with nothing besides."""
        return statistics.fmean(timed(self._once) for _ in range(_IDLE_STEPS))

    def while_saving(self, saves: Saves) -> float:
        """Mean seconds of the steps that begin while a save is written."""
        writing = saves.begin()
        durations = [timed(self._once)]
        while not writing.done():
            durations.append(timed(self._once))
        writing.result()
        saves.retire()
        return statistics.fmean(durations)


def frozen(tensors: int, size_bytes: int, pairs: int, folder: Path) -> Iterator[Row]:
    """What a save writes, and how long it takes, where 95% of the bytes are not trained."""
    training = Training(tensors, size_bytes, frozen=_FROZEN)
    contents = contents_of(training.model, training.optimizer)
    # Three stay, so that both copies of what is not trained do.
    linked = Saves(contents, folder / "linked", keep=3)
    whole = Saves(contents, folder / "whole")
    written: list[float] = []

    def after_step(save: Callable[[], float]) -> float:
        training.step()
        return save()

    def save_linked() -> float:
        seconds = after_step(linked.save)
        found = [path.stat() for path in linked.newest.rglob("*") if path.is_file()]
        written.append(sum(file.st_size for file in found if file.st_nlink == 1))
        return seconds

    # The first two saves write what is not trained; from then on it is linked.
    for _ in range(2):
        after_step(linked.save)
    row = Row(figure="frozen", name="95% frozen: time / full save", tensors=tensors, bar=Bar(0.15))
    timing = measure(row, save_linked, lambda: after_step(partial(whole.save, links=False)), pairs)
    ratios = tuple(size / training.changing_bytes for size in written[1:])
    name = "95% frozen: bytes written / changed"
    yield Row(figure="frozen", name=name, tensors=tensors, bar=Bar(1.10), ratios=ratios)
    yield timing
    linked.close()
    whole.close()
