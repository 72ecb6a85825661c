"""FSDP2: a small transformer whose weights and optimizer state lie in parts on the ranks.

`hpcresume submit configs/fsdp.yaml` trains it on two nodes, or on as many as are free (`-N 1-4`).
Each rank saves its own parts; another number of ranks puts them together anew.
"""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from train import windows

import hpcresume

GLOBAL_BATCH = 96


class Model(nn.Module):
    """The next character after sixteen."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.place = nn.Parameter(torch.zeros(16, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(width, 128)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(codes) + self.place
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden[:, -1])


def train(session: hpcresume.Session) -> None:
    with torch.random.fork_rng():
        # Each rank draws numbers of its own; the weights must be the same before they are divided.
        torch.manual_seed(0)
        model = Model().to(session.device)
    if session.world_size > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
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
