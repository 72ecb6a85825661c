"""A small BERT on handwritten digits, trained with Hugging Face's Trainer.

Each pixel is a token. Samples are shifted and masked at random, as augmentation does, and the model
has dropout: all of it comes out the same however often the training is cut. Nothing is downloaded;
the data come with scikit-learn.

    hpcresume submit --time 02:00:00 -- python hf_trainer.py
    hpcresume submit --time 02:00:00 -- torchrun --standalone --nproc-per-node 2 hf_trainer.py
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hpcresume.adapters.huggingface import HpcResumeCallback

MASK = 17


class Digits(Dataset):
    """Pixels as tokens 0 to 16, never twice the same."""

    def __init__(self, num_samples: int) -> None:
        digits = load_digits()
        self.pixels = torch.tensor(digits.data[:num_samples], dtype=torch.long)
        self.labels = torch.tensor(digits.target[:num_samples])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = torch.roll(self.pixels[index], random.choice((-8, -1, 0, 1, 8)))
        masked = pixels.masked_fill(torch.rand(64) < 0.1, MASK)
        return {"input_ids": masked, "labels": self.labels[index]}


class Pause(TrainerCallback):
    """Waits in each step: a large model, in small."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, args, state, control, **_) -> None:
        time.sleep(self.seconds)
        print(f"step {state.global_step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="out")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1797)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each step")
    args = parser.parse_args()

    set_seed(0)
    torch.use_deterministic_algorithms(True)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=MASK + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            num_labels=10,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=args.accumulate,
            dataloader_num_workers=args.workers,
            learning_rate=1e-3,
            logging_steps=3,
            save_steps=args.save_steps,
            save_total_limit=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Digits(args.samples),
        callbacks=[Pause(args.pause), HpcResumeCallback()],
    )
    trainer.train()
    # Reached when training is complete, and not before.
    trainer.save_model(f"{args.out}/final")


if __name__ == "__main__":
    main()
