"""The training that a cell describes: small, and with everything in it that a resume could lose.

Beside what the cell names, each micro-batch draws from every kind of generator, the learning rate
follows a schedule, and an evaluation within some steps reports the metric to watch.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cells import EVALUATE_EVERY, STEPS_PER_EPOCH, Cell
from torch import nn
from torch.utils.data import Dataset

import hpcresume

#: Called in places where a link may be cut, with the place's name and the step in progress.
Interrupt = Callable[[str, int], None]
PER_RANK = 4


class Points(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Points and what is to be learned of them; `noisy` adds noise from three generators."""

    def __init__(self, length: int, *, noisy: bool) -> None:
        self._points = torch.randn(length, 8, generator=torch.Generator().manual_seed(7))
        self._noisy = noisy

    def __len__(self) -> int:
        return len(self._points)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        point = self._points[index]
        target = point[:4].sin()
        if not self._noisy:
            return point, target
        noise = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)) + 0.1 * torch.randn(8)
        return point + noise, target


class Net(nn.Module):
    """Two layers, with dropout or BatchNorm between them where the cell has it."""

    def __init__(self, noise: str) -> None:
        super().__init__()
        between = {"dropout": nn.Dropout(0.3), "batchnorm": nn.BatchNorm1d(16)}
        self.up = nn.Linear(8, 16)
        self.between = between.get(noise, nn.Identity())
        self.down = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.between(self.up(x))))


def with_fp32_moments(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer that computes in fp32 and keeps its state so, whatever the parameters are."""

    class WithFp32Moments(kind):
        def step(self, closure: None = None) -> None:
            twins = {p: self._twin(p) for group in self.param_groups for p in group["params"]}
            self._exchange(twins)
            super().step(closure)
            self._exchange({twin: p for p, twin in twins.items()})
            for p, twin in twins.items():
                p.data.copy_(twin)

        def _twin(self, p: torch.Tensor) -> torch.Tensor:
            # Not p itself for a while: DDP would lose sight of a parameter that changes its type.
            twin = p.detach().float()
            twin.grad = p.grad.float()
            return twin

        def _exchange(self, by: Mapping[torch.Tensor, torch.Tensor]) -> None:
            for group in self.param_groups:
                group["params"] = [by[p] for p in group["params"]]
            for p, other in by.items():
                self.state[other] = self.state.pop(p, {})

    return WithFp32Moments


def make_optimizer(cell: Cell, model: nn.Module) -> torch.optim.Optimizer:
    """The cell's optimizer."""
    kind, options = {
        "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        "adamw": (torch.optim.AdamW, {"lr": 0.02}),
        "adafactor": (torch.optim.Adafactor, {"lr": 0.05}),
    }[cell.optimizer]
    if cell.precision == "bf16":
        kind = with_fp32_moments(kind)
    return kind(model.parameters(), **options)


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """What an optimizer keeps is in fp32, restored or not."""
    for state in optimizer.state.values():
        for key, value in state.items():
            assert not torch.is_tensor(value) or value.dtype == torch.float32, key


def make_generators() -> dict[str, Any]:
    """Generators of the program's own, one of each kind."""
    return {
        "dice": random.Random(1),
        "numpy_draws": np.random.default_rng(2),
        "torch_draws": torch.Generator().manual_seed(3),
    }


def draw(own: Mapping[str, Any]) -> dict[str, float]:
    """One number from each generator, global or the program's own."""
    return {
        "python": random.gauss(0, 1),
        "numpy": float(np.random.normal()),
        "torch": float(torch.randn(())),
        "dice": own["dice"].gauss(0, 1),
        "numpy_draws": float(own["numpy_draws"].normal()),
        "torch_draws": float(torch.randn((), generator=own["torch_draws"])),
    }


def evaluate(net: nn.Module, ranks: int, interrupt: Callable[[], None]) -> float:
    """The loss on points chosen at random; `interrupt` is called in the middle."""
    points = Points(16, noisy=False)
    dtype = next(net.parameters()).dtype
    net.eval()
    total = torch.zeros(())
    for number in range(4):
        if number == 2:
            interrupt()
        point, target = points[random.randrange(len(points))]
        with torch.no_grad():
            total += nn.functional.mse_loss(net(point[None].to(dtype)).float(), target[None])
    net.train()
    if ranks > 1:
        dist.all_reduce(total)
    return float(total)


def num_points(cell: Cell) -> int:
    """So many that the epoch's last group is a single micro-batch, and that one short.

    With several ranks it is filled up to three samples for each.
    """
    whole = STEPS_PER_EPOCH * cell.accumulate - cell.accumulate
    return PER_RANK * cell.ranks * whole + 2 * cell.ranks + 1


def train(session: hpcresume.Session, interrupt: Interrupt = lambda place, step: None) -> None:
    """Train as `session.args["cell"]` says."""
    cell = Cell(**session.args["cell"])
    workers = int(cell.noise[-1]) if cell.noise.startswith("workers") else 0
    loader = session.loader(
        Points(num_points(cell), noisy=cell.noise.startswith("workers")),
        batch_size=PER_RANK,
        shuffle=True,
        num_workers=workers,
        # Within a process that was spawned, the workers would be as well, a second each.
        multiprocessing_context="fork" if workers else None,
    )
    dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
    net = Net(cell.noise).to(dtype)
    model: nn.Module = nn.parallel.DistributedDataParallel(net) if cell.ranks > 1 else net
    no_sync = model.no_sync if cell.ranks > 1 else contextlib.nullcontext
    if cell.compile:
        model = torch.compile(model, backend=session.args["backend"])
    optimizer = make_optimizer(cell, net)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**12, growth_interval=3, enabled=cell.precision == "scaled"
    )
    generators = make_generators()
    session.register(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    session.register(**generators)
    ema = None
    if cell.ema:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=average)
        session.register(ema=ema)
    check_moments(optimizer)

    for inputs, targets in session.steps(loader, accumulate=cell.accumulate):
        step = session.global_step + 1
        draws = draw(generators)
        factor = 1 + 0.01 * sum(draws.values())
        syncs = contextlib.nullcontext() if session.sync_gradients else no_sync()
        with syncs:
            with torch.autocast("cpu", torch.float16, enabled=cell.precision == "scaled"):
                outputs = model((inputs * factor).to(dtype))
            loss = nn.functional.mse_loss(outputs.float(), targets)
            scaler.scale(loss / cell.accumulate).backward()
        interrupt("step", step)
        session.log(loss=loss, lr=scheduler.get_last_lr()[0], scale=scaler.get_scale(), **draws)
        if not session.sync_gradients:
            continue
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update_parameters(net)
        if step % EVALUATE_EVERY == 0:
            with session.busy("evaluate"):
                middle = functools.partial(interrupt, "evaluation", step)
                loss_now = evaluate(ema or net, cell.ranks, middle)
            session.log(val_loss=loss_now)
            session.best(val_loss=loss_now)
    interrupt("end", session.global_step)
