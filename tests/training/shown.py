"""A training that stands still where a test wants to look: it goes on as far as the file `go` says.

`go` holds a step: up to the work of the step behind it this training goes. `evaluate` is waited
for in the same way. The test writes both into the folder of the script.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from torch import nn

import hpcresume

HERE = Path(__file__).parent
STEPS_PER_EPOCH = 6


def allowed(name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((HERE / name).read_text())
    return 0


def wait_for(session: hpcresume.Session, name: str) -> None:
    while allowed(name) <= session.global_step:
        time.sleep(0.02)


def train(session: hpcresume.Session) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session.register(model=model, optimizer=optimizer)
    data = torch.utils.data.TensorDataset(torch.ones(8 * STEPS_PER_EPOCH, 4))
    for (points,) in session.steps(session.loader(data, batch_size=8)):
        wait_for(session, "go")
        loss = model(points).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.log(loss=1.0 / (session.global_step + 1), lr=0.01)
        if session.global_step == 3:
            with session.busy("evaluate"):
                print("evaluation begins", flush=True)
                wait_for(session, "evaluate")


if __name__ == "__main__":
    hpcresume.main(train, name="run", epochs=2, log={"every_steps": 2})
