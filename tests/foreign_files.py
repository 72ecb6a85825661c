"""What other programs leave: a small training of theirs, and runs that begin with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bug_links import Ended, Net, Noisy, link, loss_of, make_run
from torch import nn

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.origin import Origin
from hpcresume.run_dir import RunDir

Objects = dict[str, Any]


def built(seed: int = 0, **names: str) -> Objects:
    """A model, its optimizer and schedule, as another program has them."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def averaged(seed: int = 0) -> Objects:
    """The same with an average of its weights, which is a plain module."""
    objects = built(seed)
    return {**objects, "ema": copy.deepcopy(objects["model"])}


def trained(objects: Objects, steps: int = 5) -> Objects:
    """Train like that other program does, without anything of ours."""
    points = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        loss_of(objects["model"], points).backward()
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()
        if "scheduler" in objects:
            objects["scheduler"].step()
    if "ema" in objects:
        for own, average in zip(
            objects["model"].parameters(), objects["ema"].parameters(), strict=True
        ):
            average.data = 0.9 * average.data + 0.1 * own.data
    return objects


def states(objects: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value.state_dict()) for name, value in objects.items()}


def save_directory(path: Path, objects: Objects, told: Mapping[str, Any] | None = None) -> Path:
    """The layout of state files: model.pt, optimizer.pt…, training_state.json."""
    path.mkdir(parents=True)
    for name, value in objects.items():
        torch.save(value.state_dict(), path / f"{'ema_model' if name == 'ema' else name}.pt")
    if told is not None:
        (path / "training_state.json").write_text(json.dumps(told))
    return path


class Take:
    """A training function that remembers what it was given, and where it began."""

    def __init__(self, build: Callable[[], Objects], wrap: Callable[[Objects], Objects] = dict):
        self.build = build
        self.wrap = wrap
        self.given: dict[str, Any] = {}
        self.began = (-1, -1)
        self.epochs: list[int] = []

    def __call__(self, session: hpcresume.Session) -> None:
        objects = self.wrap(self.build())
        model, optimizer = objects["model"], objects.get("optimizer")
        loader = session.loader(Noisy(), batch_size=4, shuffle=True)
        session.register(**objects)
        self.given = states(objects)
        self.began = session.global_step, session.epoch
        self.live = objects
        for _, points in session.steps(loader):
            self.epochs.append(session.epoch)
            loss = loss_of(model, points)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            session.log(loss=loss)


def begun(path: Path, source: Path, trust: bool = False, **config: Any) -> RunDir:
    """A run that is to begin with something, and in which no link has been begun."""
    run = make_run(path, **{"max_steps": 6_000, **config})
    files.write_json(run.origin, Origin(asked=str(source), path=str(source), trust=trust).to_json())
    return run


def takes(
    folder: Path, source: Path, take: Take, *, stop_after: int = 1, trust: bool = False
) -> RunDir:
    """A run through its first link, of some steps, that begins with a source."""
    run = begun(folder / "run", source, trust)
    from hpcresume.checkpoint.foreign import look

    told = look(Origin(asked=str(source), path=str(source), trust=trust))
    ended = link(run, take, told.global_step + stop_after)
    assert ended.how == "stopped", ended
    return run


def refusal(folder: Path, source: Path, take: Take, trust: bool = False) -> str:
    """What the first link says of a source that it cannot begin with, after its name's kind."""
    ended: Ended = link(begun(folder / "refused", source, trust), take, 0)
    assert ended.how == "failed", ended
    return ended.why


def same(one: Any, other: Any) -> bool:
    """Whether two states hold the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Bare(nn.Module):
    """A module that keeps another one under a name, as Lightning modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
