"""Training functions for rehearsals: one that chains, and some that a chain would not survive."""

from __future__ import annotations

import time
from typing import Any

import torch


def _parts(session: Any) -> tuple[Any, Any, Any]:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = session.loader(torch.arange(4000.0).reshape(-1, 4) / 4000, batch_size=2)
    return model, optimizer, loader


def good(session: Any) -> None:
    model, optimizer, loader = _parts(session)
    session.register(model=model, optimizer=optimizer)
    for batch in session.steps(loader):
        model(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.05)


def long_step(session: Any) -> None:
    """An evaluation that no stop interrupts, and longer than any grace."""
    model, optimizer, loader = _parts(session)
    session.register(model=model, optimizer=optimizer)
    for number, _batch in enumerate(session.steps(loader)):
        time.sleep(0.05 if number < 3 else 600)


def own_loop(session: Any) -> None:
    """Registers all, and then goes through a loader of its own, without `session.steps`."""
    model, optimizer, _loader = _parts(session)
    session.register(model=model, optimizer=optimizer)
    for _batch in range(20):
        time.sleep(0.05)


def fails_after_a_cut(session: Any) -> None:
    model, optimizer, loader = _parts(session)
    session.register(model=model, optimizer=optimizer)
    for number, _batch in enumerate(session.steps(loader)):
        if session.global_step > number:
            raise RuntimeError("it counts the steps of one link only")
        time.sleep(0.05)
