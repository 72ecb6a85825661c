"""Runs of many links as views show them: written as links write them, without any training."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

from made_run import make_run

from hpcresume.checkpoint.manifest import NAME, FileEntry, Manifest, parse
from hpcresume.files import write_json
from hpcresume.run_dir import LinkDir, RunDir

_DAY = 86400.0


class MadeChain:
    """A run whose links are added one after the other, each from the last checkpoint on."""

    def __init__(
        self,
        root: Path,
        name: str,
        *,
        total: int = 10_000,
        begins: float | None = None,
        **config: Any,
    ) -> None:
        self.run: RunDir = make_run(root, name, max_steps=total, **config)
        self.total = total
        self.now = time.time() - 2 * _DAY if begins is None else begins
        self.step = 0
        """Of the newest checkpoint."""
        self._run_id = self.run.identify()["id"]
        self._segments: list[list[int]] = []
        self._noise = random.Random(7)
        self._saved: list[int] = []
        self._digests: dict[int, str] = {}
        self.bytes = 14_200_000_000
        lines = self.run.submissions.read_text().splitlines()
        records = [{**json.loads(line), "t": self.now - 60} for line in lines]
        self.run.submissions.write_text("".join(json.dumps(r) + "\n" for r in records))

    def link(
        self,
        steps: int,
        *,
        cause: str | None = "deadline",
        detail: str = "deadline: 90 s left",
        lost: int = 0,
        seconds: float = 7000.0,
        queued_s: float = 600.0,
        node: str = "gpu017",
        saves: int = 4,
        log: str = "",
        decision: tuple[str, str] | None = None,
    ) -> LinkDir:
        """A link that trained so many steps, of which the last `lost` were never saved."""
        self.now += queued_s
        begin, first = self.now, self.step
        number = self.run.newest_link() + 1
        job = str(48_100 + 7 * number)
        link = self.run.claim_link(
            {"job": job, "host": node, "nodes": node, "num_tasks": 1, "t": begin}
        )
        own = {"v": 1, "link": number, "job": job}
        training = [
            {**own, "t": begin + 20, "kind": "restored", "step": first, "epoch": 0}
            | {"digest": self._digests.get(first), "segments": list(self._segments)},
            {**own, "t": begin + 22, "kind": "started", "step": first, "max_steps": self.total},
        ]
        step_s = (seconds - 60) / steps
        lines = [self._line(first + n) for n in range(1, steps + 1)]
        link.metrics.write_text("".join(lines))
        monitor = []
        for n in range(0, steps, max(1, steps // 24)):
            monitor.append(self._monitor(first + n + 1, begin + 30 + n * step_s, step_s))
        link.monitor.write_text("".join(json.dumps(line) + "\n" for line in monitor))
        kept = steps - lost
        for part in range(1, saves + 1):
            at = first + kept * part // saves
            when = begin + 30 + (at - first) * step_s
            took = 6.5 + self._noise.random()
            training.append(
                {**own, "t": when + took, "kind": "saved", "step": at, "epoch": 0, "seconds": took}
                | {"bytes": self.bytes, "digest": self._commit(at, number, when + took)}
                | {"step_s": step_s, "reason": "interval"}
            )
        self.step = first + kept
        size = sum(len(line) for line in lines[:kept])
        self._segments.append([number, self.step, size])
        self.now = begin + seconds
        link.training.write_text("".join(json.dumps(r) + "\n" for r in training))
        journal: list[dict[str, Any]] = [
            {**own, "t": begin, "kind": "claimed", "host": node, "nodes": node}
        ]
        if cause is not None:
            ended = {
                "cause": cause,
                "detail": detail,
                "who": "",
                "failure": None,
                "seconds": seconds,
            }
            journal.append({**own, "t": self.now, "kind": "ended", "nodes": [], **ended})
            kind, reason = decision or ("continue", f"{detail}; step {self.step} is committed")
            told = {"decision": kind, "reason": reason, "cause": cause, "rule": ""}
            journal.append({**own, "t": self.now, "kind": "decided", **told})
        link.journal.write_text("".join(json.dumps(r) + "\n" for r in journal))
        link.rank_log(0).write_text(log or self._log(number, first, begin, step_s, steps))
        self.progress(first + steps if cause is None else self.step)
        return link

    def progress(self, step: int) -> None:
        """What the run publishes of itself."""
        state = {"global_step": step, "total_steps": self.total, "epoch": step / 4000}
        state["log_history"] = [{"step": step, "loss": self._loss(step)}]
        write_json(self.run.trainer_state, state)

    def complete(self) -> None:
        """Let training be complete."""
        link = self.run.link(self.run.newest_link())
        done = {
            "v": 1,
            "t": self.now - 2,
            "kind": "completed",
            "link": link.number,
            "step": self.step,
        }
        with link.training.open("a") as file:
            file.write(json.dumps({**done, "epoch": 3}) + "\n")
        self.run.final_model.mkdir()

    def _loss(self, step: int) -> float:
        return 1.55 + 9.3 * math.exp(-step / 350) + 1.9 * math.exp(-step / 2600)

    def _line(self, step: int) -> str:
        loss = self._loss(step) * (1 + 0.035 * self._noise.gauss(0, 1))
        norm = 0.6 + 3 * math.exp(-step / 500) + abs(self._noise.gauss(0, 0.12))
        warm = min(1.0, step / 500)
        lr = 3e-4 * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.total))))
        return (
            json.dumps({"step": step, "epoch": 0, "loss": loss, "lr": lr, "grad_norm": norm}) + "\n"
        )

    def _monitor(self, step: int, t: float, step_s: float) -> dict[str, Any]:
        wobble = self._noise.random()
        times = {"step_s_p50": step_s, "step_s_p95": step_s * (1.04 + 0.03 * wobble)}
        gpu = {
            "gpu_allocated_bytes": int(52e9 + 3e8 * wobble),
            "gpu_reserved_bytes": 61_000_000_000,
        }
        busy = {"gpu_utilization": 0.93 + 0.06 * wobble, "data_wait": 0.01 + 0.02 * wobble}
        host = {"host_bytes": int(2.4e10 + 1e9 * wobble), "parameter_bytes": 2_830_000_000}
        return {
            "t": t,
            "step": step,
            **times,
            **gpu,
            **busy,
            **host,
            "gpu_power_w": 610 + 60 * wobble,
        }

    def _log(self, number: int, first: int, begin: float, step_s: float, steps: int) -> str:
        def line(t: float, tag: str, text: str) -> str:
            return f"{time.strftime('%m-%d %H:%M:%S', time.localtime(t))} [{tag}] {text}\n"

        lines = [
            line(begin + 20, "checkpoint", f"resuming from step {first} (verified, 11 min old)")
        ]
        for n in range(100 - first % 100, steps + 1, 100):
            step, left = first + n, (self.total - first - n) * step_s
            text = f"step {step}/{self.total} ({100 * step // self.total}%): "
            text += (
                f"loss {self._loss(step):.4f} · {1 / step_s:.2f} steps/s · {left / 3600:.1f} h left"
            )
            lines.append(line(begin + 30 + n * step_s, "train", text))
        lines.append(line(self.now, "checkpoint", f"saved step {self.step} (14.2 GB in 6.8 s)"))
        return "".join(lines[-30:])

    def _commit(self, step: int, link: int, t: float) -> str:
        """A checkpoint that is one but for its bytes, which are a hole; the last four stay."""
        folder = self.run.checkpoint(step)
        folder.mkdir()
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(self.bytes)
        loss = {"name": "loss", "value": round(self._loss(step), 4), "mode": "min"}
        manifest = Manifest(
            step=step,
            epoch=step // 4000,
            link=link,
            run_id=self._run_id,
            parent=None,
            files=(FileEntry(name="model.safetensors", bytes=self.bytes, chunks=()),),
            created=t,
            metric=loss,
        )
        data = manifest.to_bytes()
        (folder / NAME).write_bytes(data)
        self._saved.append(step)
        for old in self._saved[:-4]:
            shutil.rmtree(self.run.checkpoint(old), ignore_errors=True)
        self._digests[step] = parse(data).digest
        return self._digests[step]
