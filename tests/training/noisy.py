"""A small training function with every kind of randomness in it, for the exactness tests.

Dropout, shuffling, noise in the dataset from three generators, a warm-up, tied weights, gradient
accumulation with a ragged last group, and an evaluation that reports the metric to watch.
"""

import random
import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import hpcresume


class Noisy(Dataset):
    def __init__(self, size: int) -> None:
        self.points = torch.randn(size, 8, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)) + 0.1 * torch.randn(8)
        point = self.points[index]
        return point + noise.float(), point.sin()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.mix = nn.Linear(32, 32)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(8, 32, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.relu(self.mix(self.norm(self.up(x)))))
        return hidden @ self.down.weight


def train(session: hpcresume.Session) -> None:
    args = session.args
    model: nn.Module = Tied()
    if session.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
    loader = session.loader(
        Noisy(args["size"]), batch_size=8, shuffle=True, num_workers=args.get("workers", 0)
    )
    session.register(model=model, optimizer=optimizer, scheduler=scheduler, config={"width": 32})

    seen = 0.0
    for inputs, targets in session.steps(loader, accumulate=args.get("accumulate", 1)):
        time.sleep(args.get("pause_s", 0.0))
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        if session.sync_gradients:
            optimizer.step()
            if session.global_step == args.get("fail_at", -1):
                # Behind the optimizer's step, so that nothing is left for an emergency save.
                raise ValueError("this step always fails")
            scheduler.step()
            optimizer.zero_grad()
        session.log(loss=loss, lr=scheduler.get_last_lr()[0], noise=random.random())
        seen = float(loss.detach())
        if (session.global_step + 1) % 25 == 0 and session.sync_gradients:
            session.best(loss=seen)


if __name__ == "__main__":
    hpcresume.main(train)
