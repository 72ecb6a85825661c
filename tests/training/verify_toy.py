"""Training functions that a cut leaves as they are, or not: one fault each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

import hpcresume


class Points(Dataset[torch.Tensor]):
    """Points with noise, from a generator of its own where one is given."""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self.points = torch.randn(48, 3, generator=torch.Generator().manual_seed(1))
        self.rng = rng

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.randn(3) if self.rng is None else torch.from_numpy(self.rng.normal(size=3))
        return self.points[index] + 0.1 * noise.float()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))


class Descent:
    """Plain gradient descent: to make one of torch's optimizers imports a second's worth."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def zero_grad(self) -> None:
        self.model.zero_grad()

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.sub_(0.01 * parameter.grad)


def loop(
    session: hpcresume.Session,
    dataset: Points,
    each: Callable[[], Any] = lambda: None,
    model: nn.Module | None = None,
    adam: bool = False,
    **more: Any,
) -> None:
    """Train; `each` is called at every step."""
    model = model or network()
    if session.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer: Any = Descent(model)
    if adam:
        optimizer = more["optimizer"] = torch.optim.Adam(model.parameters(), lr=0.1)
    loader = session.loader(dataset, batch_size=4, shuffle=True)
    session.register(model=model, **more)
    for batch in session.steps(loader):
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        each()
        session.log(loss=loss)


def train(session: hpcresume.Session) -> None:
    """Everything is registered; what is not has no part in it, or is made anew before its use."""
    shown: list[int] = []
    teacher = nn.Linear(3, 1).requires_grad_(False)
    dice = torch.Generator()

    def each() -> None:
        began = time.perf_counter()
        shown.append(session.global_step)
        teacher(torch.randn(3, generator=dice.manual_seed(5)))
        session.log(seconds=time.perf_counter() - began)

    loop(session, Points(), each, adam=True)


def averaged(session: hpcresume.Session) -> None:
    """An average of the model that nobody saves, and nothing in the loop reads."""
    model = network()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    loop(session, Points(), lambda: ema.update_parameters(model), model)


def own_noise(session: hpcresume.Session) -> None:
    """The dataset draws from a seeded generator that nobody saves."""
    loop(session, Points(np.random.default_rng(3)))


def kept_noise(session: hpcresume.Session) -> None:
    """The same, and registered."""
    rng = np.random.default_rng(3)
    loop(session, Points(rng), noise=rng)


def unseeded(session: hpcresume.Session) -> None:
    """The dataset draws from a generator that is new each time."""
    loop(session, Points(np.random.default_rng()))


def by_chance(session: hpcresume.Session) -> None:
    """The fourth step depends on the operating system's random numbers."""
    model = network()

    def each() -> None:
        if session.global_step == 3:
            with torch.no_grad():
                next(model.parameters()).add_(int.from_bytes(os.urandom(2), "big") / 1e3)

    loop(session, Points(), each, model)


def fails(session: hpcresume.Session) -> None:
    """Raises in its third step."""

    def each() -> None:
        if session.global_step == 2:
            raise ValueError("no such luck")

    loop(session, Points(), each)


def blocks(session: hpcresume.Session) -> None:
    """Says which process it is, and never comes to the end of its first step."""

    def each() -> None:
        Path(os.environ["TMPDIR"], "pid").write_text(f"{os.getpid()}\n")
        threading.Event().wait()

    loop(session, Points(), each)
