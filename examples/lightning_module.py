"""A classifier of handwritten digits in Lightning, which chains by one line: the callback's.

It shuffles, it draws random numbers for each image, and it drops out: what a resume gets wrong if
random state and the place in the data are not saved. Needs scikit-learn, which comes with the data.
"""

from __future__ import annotations

import argparse
import time

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hpcresume.adapters.lightning import HpcResumeCallback


class Digits(Dataset):
    """Images of digits, each shifted a little and made noisy whenever it is read."""

    def __init__(self, count: int) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[:count], dtype=torch.float32) / 16
        self.labels = torch.tensor(digits.target[:count])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = tuple(torch.randint(-1, 2, (2,)).tolist())
        image = torch.roll(self.images[index], shift, dims=(0, 1))
        return (image + 0.05 * torch.randn_like(image)).flatten(), self.labels[index]


class Classifier(lightning.LightningModule):
    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        time.sleep(self.hparams["pause"])
        return loss

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["loss_epoch"])
        self.print(f"epoch {self.current_epoch + 1} loss {loss:.6f}", flush=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=5, help="steps")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait in each batch")
    parser.add_argument("--out", default="model.pt")
    args = parser.parse_args()
    lightning.seed_everything(0)
    loader = DataLoader(Digits(400), batch_size=16, shuffle=True, num_workers=args.workers)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=args.devices,
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        deterministic=True,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        callbacks=[HpcResumeCallback(every_n_steps=args.save_every)],
    )
    model = Classifier(args.pause)
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        optimizer = trainer.optimizers[0].state_dict()
        torch.save({"model": model.state_dict(), "optimizer": optimizer}, args.out)


if __name__ == "__main__":
    main()
