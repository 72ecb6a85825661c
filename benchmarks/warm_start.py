"""What a link saves by the code that the links before it have compiled.

A chain of short links on this machine, whose training torch.compile compiles with its real backend
(on the CPU g++, so that one is needed; on a GPU Triton). The first link starts cold; the others
take over what it has compiled, into a new folder, as on another node. Each is killed in its third
step. The times are those that the links journal themselves.

    python benchmarks/warm_start.py [--links 4] [--layers 2]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir

TRAIN = """
import os, signal, time, torch, hpcresume
from torch.utils.data import TensorDataset

def train(session):
    layers = []
    for _ in range(session.args.layers):
        layers += [torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.GELU()]
    model = torch.nn.Sequential(*layers).to(session.device)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = session.loader(TensorDataset(torch.randn(4096, 64)), batch_size=8)
    session.register(model=model, optimizer=optimizer)
    compiled = torch.compile(model)
    began = session.global_step
    for (batch,) in session.steps(loader):
        if session.global_step == began + 2:
            cache = session.path / "cache"
            while not any(cache.glob("*/*.zip")):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        loss = compiled(batch.to(session.device)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
"""
CONFIG = """
name: warm
train: train.py:train
max_steps: %d
args: {layers: %d}
checkpoint: {steps: 1, background: false}
chain: {max_crashes: 100, no_progress_links: 100}
scheduler: {cluster: local}
"""
#: Set by users who keep their caches elsewhere; this measures those of the run.
CHOSEN = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def measured(folder: Path, links: int, layers: int) -> list[dict[str, float]]:
    """What each link's start took, in seconds, by part; and together, as `all`."""
    (folder / "train.py").write_text(TRAIN)
    # Two steps a link, and the last link ends with the run.
    (folder / "warm.yaml").write_text(CONFIG % (2 * links, layers))
    environ = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    environ |= {"HPCRESUME_SITE": os.devnull, "TMPDIR": str(folder)}
    argv = [sys.executable, "-m", "hpcresume", "submit", "warm.yaml"]
    done = subprocess.run(
        argv, cwd=folder, env=environ, check=False, capture_output=True, text=True
    )
    told = [link.last("stepped") for link in read_chain(RunDir(folder / "runs" / "warm"))]
    starts = [{**r["start_up"], "all": r["seconds"]} for r in told if r]
    if len(starts) < 2:
        raise SystemExit(f"the chain did not get to a second link:\n{done.stdout}{done.stderr}")
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--links", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cold, *warm = measured(Path(name), options.links, options.layers)
    print(f"{'seconds':12} {'cold':>7} {'warm':>7} {'cold/warm':>10}")
    for part in ("imports", "caches", "checkpoint", "step", "all"):
        median = statistics.median(start[part] for start in warm)
        ratio = f"{cold[part] / median:9.1f}x" if part in ("step", "all") else ""
        print(f"{part:12} {cold[part]:7.2f} {median:7.2f} {ratio:>10}")


if __name__ == "__main__":
    main()
