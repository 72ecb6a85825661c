"""The smallest training function that a resume could get wrong: dropout, shuffling, Adam.

`loop` does something of the test's before chosen steps; as a script it trains in the foreground.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpcresume

Action = Callable[[hpcresume.Session], None]


def loop(session: hpcresume.Session, at: Mapping[int, Action] | None = None) -> None:
    """Train; `at` maps a number of finished steps to what is to happen then."""
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    points = torch.randn(48, 3, generator=torch.Generator().manual_seed(1))
    loader = session.loader(TensorDataset(points), batch_size=4, shuffle=True)
    session.register(model=model, optimizer=optimizer, config={"width": 8})
    for (batch,) in session.steps(loader):
        action = (at or {}).get(session.global_step)
        if action is not None:
            action(session)
        time.sleep(session.args.get("pause_s", 0.0))
        loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.log(loss=loss)


def train(session: hpcresume.Session) -> None:
    loop(session)


if __name__ == "__main__":
    hpcresume.main(train)
