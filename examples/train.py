"""An ordinary PyTorch loop that chains: a next-character model on one of Python's reference topics.

`python examples/train.py` trains in the foreground and goes on where it was when run again;
`hpcresume submit configs/train.yaml` trains the same function as a chain of Slurm jobs.
"""

import pydoc_data.topics

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpcresume


def windows(length: int) -> TensorDataset:
    """Each run of `length` characters of the text, with the character that follows."""
    text = pydoc_data.topics.topics["types"].encode("ascii", "replace")
    codes = torch.tensor(list(text))
    return TensorDataset(codes.unfold(0, length, 1)[:-1], codes[length:])


def train(session: hpcresume.Session) -> None:
    """Predict the next character from the sixteen before it."""
    model = nn.Sequential(
        nn.Embedding(128, 16),
        nn.Flatten(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 128),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = session.loader(windows(16), batch_size=64, shuffle=True)
    session.register(model=model, optimizer=optimizer)

    for codes, following in session.steps(loader):
        loss = nn.functional.cross_entropy(model(codes), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.log(loss=loss)


if __name__ == "__main__":
    hpcresume.main(train, epochs=3)
