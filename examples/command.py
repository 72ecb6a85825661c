"""A classifier of handwritten digits in plain PyTorch, which knows nothing of hpcresume.

It saves after every epoch and begins with what it has saved, as scripts do. That alone makes it
chain: `hpcresume submit --time 02:00:00 -- python command.py`, or with two processes `-- torchrun
--nproc-per-node 2 command.py`. Needs scikit-learn, which comes with the data.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", default="out.pt")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each epoch")
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    trained = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if os.path.exists(args.out):
        saved = torch.load(args.out, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]

    for epoch in range(first, args.epochs):
        # Order and dropout follow from the epoch alone, so that a new start repeats them.
        torch.manual_seed(epoch)
        order = torch.randperm(len(labels))
        torch.manual_seed(1000 * epoch + rank)
        for batch in order.split(128):
            own = batch[rank::world_size]
            loss = nn.functional.cross_entropy(trained(images[own]), labels[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        time.sleep(args.pause)
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, f"{args.out}.tmp")
            # In one step: whoever is killed leaves the old file or the new one.
            os.replace(f"{args.out}.tmp", args.out)
            print(f"epoch {epoch + 1} loss {loss.item():.6f}", flush=True)
    if world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
