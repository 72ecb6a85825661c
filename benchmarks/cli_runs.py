"""Folders of runs as links write them, without any training: what `cli.py` reads.

Each run has links that were queued, trained, saved and were ended by their deadline; its newest
checkpoints are there, with files of no length that is not a hole.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path
from typing import Any

from hpcresume.checkpoint.manifest import NAME, FileEntry, Manifest, parse
from hpcresume.config import dump, from_mapping
from hpcresume.files import to_json
from hpcresume.run_dir import RunDir

#: What the directory of a checkpoint holds besides its manifest.
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "rng.json")
_LINK_S, _QUEUED_S, _TOTAL = 7200.0, 900.0, 10_000_000
_KEPT = 3


class Folder:
    """A folder of runs, and the squeue that knows of their jobs."""

    def __init__(self, path: Path) -> None:
        self.runs = path / "runs"
        self.runs.mkdir(parents=True)
        self._queue = path / "queue"
        self._queue.touch()
        squeue = path / "bin" / "squeue"
        squeue.parent.mkdir()
        squeue.write_text(
            f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done < '{self._queue}'\n"
        )
        squeue.chmod(0o755)
        self.environ = {**os.environ, "HPCRESUME_RUNS": str(self.runs), "PATH": str(squeue.parent)}
        self.environ["HPCRESUME_SITE"] = os.devnull
        # Otherwise what is measured is how long Python takes to compile us.
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def add(self, name: str, state: str, *, links: int = 6, saves: int = 8) -> RunDir:
        """A run that is complete, failed or waiting, of so many links with so many saves each."""
        run = RunDir(self.runs / name)
        for folder in (run.path, run.links, run.jobs):
            folder.mkdir(mode=0o700)
        run_id = f"{zlib.crc32(name.encode()):012x}"
        config = from_mapping({"name": name, "train": "x.py", "max_steps": _TOTAL}, "benchmark")
        run.config.write_text(dump(config))
        identity = {"id": run_id, "name": name, "project": str(self.runs), "cluster": "slurm"}
        run.identity.write_bytes(to_json(identity, indent=2))
        begins = time.time() - links * (_LINK_S + _QUEUED_S)
        writer = _Writer(run, run_id, begins, links if state == "complete" else links + 2)
        for number in range(1, links + 1):
            last = number == links
            end = state if last and state != "waiting" else "deadline"
            writer.link(number, saves, end, newest=last)
        if state == "complete":
            run.final_model.mkdir()
        if state == "waiting":
            line = f"{900 + links}|PENDING|Priority||N/A|N/A|hpcresume:{run_id}:{links + 1}\n"
            with self._queue.open("a") as file:
                file.write(line)
        return run


class _Writer:
    """Writes the links of one run, one after the other."""

    def __init__(self, run: RunDir, run_id: str, begins: float, links: int) -> None:
        self._run, self._run_id, self._now = run, run_id, begins
        self._step, self._segments, self._digest = 0, list[list[int]](), ""
        self._steps = _TOTAL // links
        first = {"v": 1, "t": begins - _QUEUED_S, "link": 0, "job": None, "after_link": 0}
        queued = {**first, "kind": "queued", "queued_job": "901", "time_s": _LINK_S, "lead_s": 90.0}
        submitted = {**first, "kind": "submitted", "token": "t", "by": "ada", "host": "login1"}
        run.submissions.write_bytes(to_json(submitted) + to_json(queued))

    def link(self, number: int, saves: int, end: str, newest: bool) -> None:
        """A link that was ended so after so many saves."""
        link, begin = self._run.link(number), self._now
        link.path.mkdir()
        job = str(900 + number)
        common: dict[str, Any] = {"v": 1, "link": number, "job": job}
        claim = {**common, "host": "gpu017", "pid": 7, "num_tasks": 1, "t": begin}
        sizes = {"link": number - 1, "journal": 1 << 40, "training": 1 << 40, "metrics": 0}
        link.claim.write_bytes(to_json({**claim, "adopted": sizes}, indent=2))
        training = [
            {**common, "t": begin + 20, "kind": "restored", "step": self._step}
            | {"digest": self._digest, "segments": list(self._segments)},
            {**common, "t": begin + 30, "kind": "started", "step": self._step, "max_steps": _TOTAL},
            {**common, "t": begin + 32, "kind": "stepped", "parts": {"import": 6.1, "model": 2.5}},
        ]
        steps = self._steps
        for part in range(1, saves + 1):
            at = self._step + steps * part // saves
            shown = saves - part < _KEPT and newest
            when = begin + 30 + (_LINK_S - 120) * part / saves
            digest = self._checkpoint(at, number, when) if shown else f"{at:064x}"
            training.append(
                {**common, "t": when, "kind": "saved", "step": at, "epoch": 0, "seconds": 6.5}
                | {"bytes": 14_200_000_000, "digest": digest, "step_s": 0.7, "reason": "minutes"}
            )
        self._step += steps
        self._segments.append([number, self._step, 0])
        self._now = begin + _LINK_S
        journal: list[dict[str, Any]] = [
            {**common, "t": begin, "kind": "claimed", "host": "gpu017", "nodes": "gpu017"},
            {**common, "t": begin + 1, "kind": "queued", "queued_job": str(901 + number)}
            | {"time_s": _LINK_S, "lead_s": 90.0},
        ]
        if end == "complete":
            training.append({**common, "t": self._now, "kind": "completed", "step": self._step})
        cause = {"complete": "completed", "failed": "user code"}.get(end, end)
        decision = {"complete": "finished", "failed": "stop"}.get(end, "continue")
        told = {"cause": cause, "detail": cause, "who": "", "failure": None, "seconds": _LINK_S}
        journal.append({**common, "t": self._now, "kind": "ended", "nodes": [], **told})
        journal.append(
            {**common, "t": self._now, "kind": "decided", "decision": decision}
            | {"reason": f"{cause} at step {self._step}", "cause": cause, "rule": ""}
        )
        link.training.write_bytes(b"".join(map(to_json, training)))
        link.journal.write_bytes(b"".join(map(to_json, journal)))
        self._now += _QUEUED_S
        self._publish()

    def _publish(self) -> None:
        history = [{"step": self._step - n, "loss": 2.0 + n / 1000} for n in range(100, 0, -1)]
        state = {"log_history": history, "epoch": 0.5, "global_step": self._step}
        content = {**state, "total_steps": _TOTAL, "completed": False}
        self._run.trainer_state.write_bytes(to_json(content, indent=2))

    def _checkpoint(self, step: int, link: int, t: float) -> str:
        folder = self._run.checkpoint(step)
        folder.mkdir()
        for name in _FILES:
            (folder / name).touch()
        manifest = Manifest(
            step=step,
            epoch=0,
            link=link,
            run_id=self._run_id,
            parent=None,
            files=tuple(FileEntry(name=name, bytes=0, chunks=()) for name in _FILES),
            created=t,
        )
        data = manifest.to_bytes()
        (folder / NAME).write_bytes(data)
        self._digest = parse(data).digest
        return self._digest
