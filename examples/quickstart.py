"""A small transformer language model on real English text: Python's own reference topics.

`make quickstart` trains it as a chain of short jobs on this machine. The text comes with every
CPython (`pydoc_data.topics`), so nothing is downloaded.
"""

from __future__ import annotations

import logging
from pydoc_data import topics

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import hpcresume

log = logging.getLogger("hpcresume.quickstart")


class Text(Dataset[torch.Tensor]):
    """Windows of `length` + 1 characters of the text, as indices into its alphabet."""

    def __init__(self, length: int) -> None:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
        text = "".join(c if c.isascii() else " " for c in text)
        self.alphabet = sorted(set(text))
        number = {c: i for i, c in enumerate(self.alphabet)}
        self.codes = torch.tensor([number[c] for c in text])
        self.length = length

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * self.length
        return self.codes[start : start + self.length + 1]


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.norm2(x))


class Model(nn.Module):
    """A GPT of a few layers; the output layer shares the embedding's weights."""

    def __init__(
        self, size: int, length: int, *, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.length = length
        self.tokens = nn.Embedding(size, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        hidden = self.blocks(self.tokens(codes) + self.places(places))
        return self.head(self.norm(hidden))

    @torch.no_grad()
    def write(self, codes: list[int], count: int, generator: torch.Generator) -> list[int]:
        """Continue a text by `count` characters."""
        self.eval()
        for _ in range(count):
            logits = self(torch.tensor([codes[-self.length :]]))[0, -1] / 0.7
            codes.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        return codes


def train(session: hpcresume.Session) -> None:
    """Train; then let the finished model write a few lines."""
    args = session.args
    torch.set_num_threads(args.threads)
    text = Text(args.context)
    sizes = {"width": args.width, "layers": args.layers, "heads": args.heads}
    model = Model(len(text.alphabet), args.context, dropout=args.dropout, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.horizon)
    loader = session.loader(text, batch_size=args.batch_size, shuffle=True)
    session.register(model=model, optimizer=optimizer, scheduler=scheduler)
    session.register(config={"alphabet": "".join(text.alphabet), "context": args.context, **sizes})

    for batch in session.steps(loader):
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        session.log(loss=loss, lr=scheduler.get_last_lr()[0])

    if session.rank == 0:
        start = [text.alphabet.index(c) for c in "\nThe "]
        codes = model.write(start, 240, torch.Generator().manual_seed(session.global_step))
        lines = "".join(text.alphabet[code] for code in codes).strip().splitlines()
        log.info(
            "the model writes:\n%s", "\n".join(f"    {line}" for line in lines if line.strip())
        )


if __name__ == "__main__":
    hpcresume.main(train)
