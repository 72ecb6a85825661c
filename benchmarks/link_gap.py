"""How long a chain does not train between two jobs, against a bare pair of dependent jobs.

Measured on a real Slurm of its own (tests/slurm_cluster.py; needs root and Debian's packages):

- bare: one job ends, a dependent one starts and imports torch, nothing else;
- hpcresume: from a link's last committed checkpoint to the next link's first training step;
- submitit: its own chain by requeue, from the checkpoint in the signal handler to the next start.
  Slurm holds a requeued job for its credentials' lifetime, 120 s by default (`--requeue`: measure
  it; it takes some minutes).

    python benchmarks/link_gap.py [--links 6] [--requeue]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from slurm_runs import SlurmCluster, bare, lines, python

from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir

TRAIN = """
import time, torch, hpcresume
from torch.utils.data import TensorDataset

def train(session):
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = session.loader(TensorDataset(torch.randn(4096, 64)), batch_size=4)
    session.register(model=model, optimizer=optimizer)
    first = True
    for (batch,) in session.steps(loader):
        if first:
            with open(session.path / "first-steps", "a") as file:
                file.write(f"{time.time()}\\n")
            first = False
        time.sleep(0.02)
        loss = model(batch).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        session.log(loss=loss)
"""
CONFIG = """
name: gap
train: train.py:train
max_steps: 100000
chain: {lead_s: 54, max_links: %d}
scheduler: {cluster: slurm, time: "00:01:00"}
"""
SUBMITIT = """
import sys, time, submitit
class Work:
    def __init__(self, notes):
        self.notes = notes
    def note(self, word):
        with open(self.notes, "a") as file:
            file.write(f"{word} {time.time()}\\n")
    def __call__(self):
        import torch
        self.note("start")
        while True:
            time.sleep(0.1)
    def checkpoint(self):
        self.note("checkpoint")
        return submitit.helpers.DelayedSubmission(Work(self.notes))
executor = submitit.SlurmExecutor(folder=sys.argv[1])
executor.update_parameters(time=1, signal_delay_s=50, additional_parameters={"requeue": True})
print(executor.submit(Work(sys.argv[1] + "/notes")).job_id)
"""


def chained(cluster: SlurmCluster, folder: Path, links: int) -> list[float]:
    """Seconds from each link's last commit to the next link's first step."""
    (folder / "train.py").write_text(TRAIN)
    (folder / "gap.yaml").write_text(CONFIG % links)
    python(cluster, folder, "-m", "hpcresume", "submit", "gap.yaml")
    run = RunDir(folder / "runs" / "gap")
    first = lines(run.path / "first-steps", links)
    cluster.wait_idle(90)
    saved = [link.last("saved") for link in read_chain(run)]
    last = [float(record["t"]) for record in saved if record]
    return [start - end for end, start in zip(last, first[1:], strict=False)]


def requeued(cluster: SlurmCluster, folder: Path) -> float:
    """Seconds from submitit's checkpoint to its next start."""
    script = folder / "submitit_chain.py"
    script.write_text(SUBMITIT)
    work = folder / "submitit"
    work.mkdir()
    job = python(cluster, folder, str(script), str(work)).strip()
    _, checkpoint, start = lines(work / "notes", 3)[:3]
    cluster.run("scancel", job)
    return start - checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--links", type=int, default=6)
    parser.add_argument("--requeue", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, SlurmCluster() as cluster:
        folder = Path(name)
        bare(cluster, folder, 1)  # the first start reads everything from the disk
        rows = {
            "bare dependent job": bare(cluster, folder, options.links - 1),
            "hpcresume": chained(cluster, folder, options.links),
        }
    if options.requeue:
        # As Slurm comes: credentials live for 120 s.
        with tempfile.TemporaryDirectory() as name, SlurmCluster(cred_expire_s=120) as cluster:
            rows["submitit (requeue)"] = [requeued(cluster, Path(name))]
    base = statistics.median(rows["bare dependent job"])
    print(
        f"{'gap between two links':24} {'median':>8} {'worst':>8} {'above bare':>11} {'ratio':>7}"
    )
    for name, gaps in rows.items():
        median = statistics.median(gaps)
        print(
            f"{name:20} {median:7.2f}s {max(gaps):7.2f}s {median - base:+10.2f}s "
            f"{median / base:6.1f}x"
        )


if __name__ == "__main__":
    main()
