"""A classifier of handwritten digits in plain PyTorch, which knows nothing of hpcresume.

It saves after every epoch and begins with what it has saved, as scripts do. That alone makes it
chain: `hpcresume submit --time 02:00:00 --checkpoints out.pt -- python command.py`. Needs
scikit-learn, which comes with the data.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from sklearn.datasets import load_digits
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", default="out.pt")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each epoch")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
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
        for batch in torch.randperm(len(labels)).split(128):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        time.sleep(args.pause)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "epoch": epoch + 1}, f"{args.out}.tmp")
        # In one step: whoever is killed leaves the old file or the new one.
        os.replace(f"{args.out}.tmp", args.out)
        print(f"epoch {epoch + 1} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
