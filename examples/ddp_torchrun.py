"""A DDP training that torchrun starts: it saves when hpcresume tells it to leave.

`hpcresume submit --time 02:00:00 --nodes 2 --signal-command none --checkpoints ddp.pt -- torchrun
--nproc-per-node 2 ddp_torchrun.py`. Nothing of hpcresume is imported: a file tells that the job
ends, and all ranks agree on the step.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import distributed, nn

GLOBAL_BATCH = 128


def told_to_leave() -> bool:
    """Whether any rank has seen the file that tells to leave: all ranks get the same answer."""
    seen = torch.tensor(float(os.path.exists(os.environ.get("HPCRESUME_STOP", "STOP"))))
    distributed.all_reduce(seen, op=distributed.ReduceOp.MAX)
    return bool(seen)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--save-every", type=int, default=40)
    parser.add_argument("--out", default="ddp.pt")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each step")
    args = parser.parse_args()
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    torch.use_deterministic_algorithms(True)

    torch.manual_seed(0)
    points = torch.randn(2000, 64)
    labels = (points @ torch.randn(64, 10)).argmax(1)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    first = 0
    if os.path.exists(args.out):
        saved = torch.load(args.out, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["steps"]

    each = len(labels) // GLOBAL_BATCH
    for step in range(first + 1, args.steps + 1):
        epoch, place = divmod(step - 1, each)
        # Order and dropout follow from the step alone, so that a new start repeats them.
        torch.manual_seed(epoch)
        batch = torch.randperm(len(labels)).split(GLOBAL_BATCH)[place][rank::world_size]
        torch.manual_seed(step * world_size + rank)
        loss = nn.functional.cross_entropy(model(points[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(args.pause)
        leaves = told_to_leave()
        if rank == 0 and (leaves or step == args.steps or step % args.save_every == 0):
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "steps": step}, f"{args.out}.tmp")
            # In one step: whoever is killed leaves the old file or the new one.
            os.replace(f"{args.out}.tmp", args.out)
            print(f"step {step} loss {loss.item():.6f}, saved", flush=True)
        if leaves:
            break
    # Whoever left first would have torchrun end the one that still saves, if its end went wrong.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
