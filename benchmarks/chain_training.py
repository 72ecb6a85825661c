"""The training whose chains `chain_cluster` measures: the same steps under either tool.

A step takes STEP_S seconds, of which the optimizer uses what it needs, and is noted with what it
took. `train` is what hpcresume runs, `Work` what submitit does.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

STEP_S = 0.25
NOTES = "notes"
#: A parameter and its two moments, of 4 bytes each.
BYTES_PER_PARAMETER = 12


class Notes:
    """Lines of `LIFE WORD STEP SECONDS TIME`; a life is one start of a job."""

    def __init__(self, folder: Path) -> None:
        self._file = open(folder / NOTES, "a", buffering=1)  # noqa: SIM115
        self._life = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"

    def add(self, word: str, step: int, seconds: float) -> None:
        self._file.write(f"{self._life} {word} {step} {seconds:.4f} {time.time():.4f}\n")


def build(payload_bytes: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer with as much state together."""
    side = int((payload_bytes / BYTES_PER_PARAMETER) ** 0.5)
    model = torch.nn.Linear(side, side, bias=False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Train one step; how long it took in seconds."""
    began = time.monotonic()
    batch = torch.randn(2, model.weight.shape[1])
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    time.sleep(max(0.0, STEP_S - (time.monotonic() - began)))
    return time.monotonic() - began


def train(session: Any) -> None:
    """Under hpcresume."""
    model, optimizer = build(session.args.payload_bytes)
    session.register(model=model, optimizer=optimizer)
    notes = Notes(session.path)
    for _ in session.steps(range(10**6)):
        notes.add("step", session.global_step + 1, one_step(model, optimizer))


class Work:
    """Under submitit, as its documentation has it: state that is saved when a signal comes."""

    def __init__(self, folder: Path, payload_bytes: int, num_steps: int) -> None:
        self.folder, self.payload_bytes, self.num_steps = folder, payload_bytes, num_steps

    def __call__(self) -> None:
        self.notes = Notes(self.folder)
        self.model, self.optimizer = build(self.payload_bytes)
        self.step = 0
        if self.checkpoint_file.exists():
            saved = torch.load(self.checkpoint_file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
        while self.step < self.num_steps:
            took = one_step(self.model, self.optimizer)
            self.step += 1
            self.notes.add("step", self.step, took)
        self.save()
        self.notes.add("completed", self.step, 0.0)

    @property
    def checkpoint_file(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        began = time.monotonic()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        partial = self.checkpoint_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_file)
        self.notes.add("saved", self.step, time.monotonic() - began)

    def checkpoint(self) -> Any:
        import submitit

        # A signal may come before there is anything to save.
        if getattr(self, "step", 0):
            self.save()
        return submitit.helpers.DelayedSubmission(
            Work(self.folder, self.payload_bytes, self.num_steps)
        )


def submit(folder: Path, payload_bytes: int, num_steps: int, signal_s: int) -> None:
    """Start a chain of one-minute jobs by submitit, and print the job's id."""
    import submitit

    # By default the chain ends with its fourth time-out, and each job of a minute counts as one.
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=1000)
    executor.update_parameters(
        time=1,
        signal_delay_s=signal_s,
        mem="3G",
        additional_parameters={"requeue": True},
    )
    print(executor.submit(Work(folder, payload_bytes, num_steps)).job_id)


if __name__ == "__main__":
    # By its name, so that the job finds the class again.
    import chain_training

    chain_training.submit(Path(sys.argv[1]), *map(int, sys.argv[2:]))
