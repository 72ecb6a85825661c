"""The oracle of exact resume: what a finished run consists of, as digests that must be equal.

Used with real processes that are really cut: `Chain` submits a run to the local backend by the
command line, watches its journals, and cuts links as a schedule says.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hpcresume.journal import LinkRecords, read_chain, read_metrics
from hpcresume.run_dir import RunDir

TRAINING = Path(__file__).parent / "training"
ENVIRON = {
    **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
    "OMP_NUM_THREADS": "1",
    "HPCRESUME_SITE": os.devnull,
    "XDG_CONFIG_HOME": os.devnull,
    "PYTHONWARNINGS": "",
}
BASE: dict[str, Any] = {
    "name": "run",
    "train": "noisy.py:train",
    "max_steps": 100,
    "seed": 5,
    "deterministic": True,
    "args": {"size": 300},
    "checkpoint": {"steps": 9},
    "log": {"every_steps": 20},
}


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def project(folder: Path, **changes: Any) -> Path:
    """A project folder with the training function and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "noisy.py").write_text((TRAINING / "noisy.py").read_text())
    (folder / "hpcresume.yaml").write_text(yaml.safe_dump(merged(BASE, changes)))
    return folder


def hpcresume(
    *argv: str, cwd: Path, timeout: float = 120, **environ: str
) -> subprocess.CompletedProcess[str]:
    """The command line, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "hpcresume", *argv],
        cwd=cwd,
        env={**ENVIRON, **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


#: Files of a checkpoint that say how it came about, or repeat the configuration, which a test may
#: vary; state.json is compared part by part.
_HISTORY = frozenset({"manifest.json", "state.json", "trainer_state.json", "training_args.json"})
#: What the session remembers of the way that the training took.
_OF_THE_WAY = frozenset({"train_seconds", "lineage", "history", "machines"})


def fingerprint(run: RunDir) -> dict[str, Any]:
    """What of a finished run must not depend on how often it was cut: files as digests."""
    last = run.checkpoint(json.loads(run.trainer_state.read_text())["global_step"])
    state = json.loads((last / "state.json").read_text())
    metrics = [
        {k: v.hex() if isinstance(v, float) else v for k, v in line.items()}
        for line in read_metrics(run)
    ]
    return {
        **{path.name: _digest(path) for path in sorted(last.iterdir()) if _is_compared(path)},
        "progress": {k: v for k, v in state["progress"].items() if k not in _OF_THE_WAY},
        "objects": state["objects"],
        "values": state["values"],
        "metrics": metrics,
        "final": _digest(run.final_model / "model.safetensors"),
        "completed": json.loads(run.trainer_state.read_text())["completed"],
    }


def _is_compared(path: Path) -> bool:
    return path.is_file() and path.name not in _HISTORY


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The parts in which two fingerprints are not the same."""
    parts = [*one, *(part for part in other if part not in one)]
    return [p for p in parts if p not in one or p not in other or one[p] != other[p]]


def assert_equivalent(run: RunDir, uncut: Mapping[str, Any]) -> None:
    """The run's fingerprint is the uncut run's, and each of its steps is logged once."""
    own = fingerprint(run)
    steps = [line["step"] for line in own["metrics"]]
    assert steps == list(range(1, len(steps) + 1)), "the loss log has gaps or repeats"
    assert not differing(uncut, own), "not as in the uncut run"


def train_uncut(folder: Path, **changes: Any) -> dict[str, Any]:
    """Train in one process without a break; the fingerprint."""
    project(folder, **changes)
    done = subprocess.run(
        [sys.executable, "noisy.py", "--config", "hpcresume.yaml"],
        cwd=folder,
        env=ENVIRON,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return fingerprint(RunDir(folder / "runs" / "run"))


class Chain:
    """A run on the local backend, with a driver of its own in the background."""

    def __init__(self, folder: Path, *argv: str, **changes: Any) -> None:
        self.folder = project(folder, **changes)
        self.run = RunDir(folder / "runs" / "run")
        done = hpcresume("submit", "--cluster", "local", "--detach", *argv, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def links(self) -> list[LinkRecords]:
        return read_chain(self.run)

    def wait_for(self, what: Callable[[list[LinkRecords]], Any], timeout: float = 150) -> Any:
        """Poll the journals until `what` finds something."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = what(self.links())
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"timed out; {self.story()}")

    def wait_started(self, number: int) -> LinkRecords | None:
        """The link with a number once it trains; None if the run completed before."""

        def look(links: list[LinkRecords]) -> Any:
            if any(link.last("completed") for link in links):
                return "completed"
            return next((k for k in links if k.number >= number and k.last("started")), None)

        found = self.wait_for(look)
        return None if found == "completed" else found

    def wait_completed(self, timeout: float = 150) -> None:
        self.wait_for(lambda links: any(k.last("completed") for k in links), timeout)
        deadline = time.monotonic() + 60
        while self.run.driver.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.run.driver.exists(), "the driver did not leave"

    def pids(self, link: LinkRecords) -> tuple[int, list[int]]:
        """The supervisor of a link, and its ranks."""
        supervisor = int(link.claim["pid"])
        children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
        try:
            return supervisor, [int(pid) for pid in children.read_text().split()]
        except OSError:
            return supervisor, []

    def cut(self, link: LinkRecords, how: str) -> None:
        """Cut a link: kill -9 of a rank or of the supervisor, or an orderly SIGTERM."""
        supervisor, ranks = self.pids(link)
        target, number = {
            "kill rank": ((ranks or [supervisor])[0], signal.SIGKILL),
            "kill supervisor": (supervisor, signal.SIGKILL),
            "term rank": ((ranks or [supervisor])[0], signal.SIGTERM),
        }[how]
        try:
            os.kill(target, number)
        except ProcessLookupError:
            pass

    def story(self) -> str:
        """Everything that the journals say, for a failed test."""
        hidden = {"v", "t", "kind", "link", "job"}
        lines = [
            f"{k.number}: {r['kind']} { ({n: v for n, v in r.items() if n not in hidden}) }"
            for k in self.links()
            for r in k.records
        ]
        log = self.run.train_log.read_text()[-3000:] if self.run.train_log.exists() else ""
        return "\n".join([*lines, log])

    def stop_driver(self) -> None:
        """End whatever is left."""
        hpcresume("cancel", "--yes", "run", cwd=self.folder)


def schedule(seed: int) -> list[tuple[str, float]]:
    """At least two cuts, each with the seconds that it comes after a link's first step."""
    dice = random.Random(seed)
    ways = ("kill rank", "kill supervisor", "term rank")
    return [(dice.choice(ways), dice.random() * 1.2) for _ in range(dice.choice((2, 2, 3)))]
