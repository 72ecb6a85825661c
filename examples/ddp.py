"""The loop of train.py over several ranks: each takes its share of a global batch.

`hpcresume submit configs/ddp.yaml` trains it on two nodes, or on as many as are free (`-N 1-4`): a
step has the same 96 samples on one rank, on two, three and four. torch.distributed is initialised
before the function is called: gloo on CPUs, NCCL on GPUs.
"""

import torch
from torch import nn
from train import windows

import hpcresume

GLOBAL_BATCH = 96


def train(session: hpcresume.Session) -> None:
    """Predict the next character from the sixteen before it."""
    model: nn.Module = nn.Sequential(
        nn.Embedding(128, 16),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 128),
    ).to(session.device)
    if session.world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = session.loader(
        windows(16), batch_size=GLOBAL_BATCH // session.world_size, shuffle=True
    )
    session.register(model=model, optimizer=optimizer)

    for batch in session.steps(loader):
        codes, following = (part.to(session.device) for part in batch)
        loss = nn.functional.cross_entropy(model(codes), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.log(loss=loss)


if __name__ == "__main__":
    hpcresume.main(train, epochs=3)
