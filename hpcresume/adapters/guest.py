"""A training framework inside a command: what its link tells it, and what it tells.

A callback of ours, in the framework's own process, holds a `Guest`. It decides nothing about the
chain: it hears when to stop, and rank 0 appends what happens to `links/NNNN/guest.jsonl`, which the
command's thin parent reads (`heard`) and records. Outside a link nothing but a signal stops it, and
all else works. No torch, and no framework.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from hpcresume import files
from hpcresume.adapters.vouched import Newest, Voucher, vouch
from hpcresume.display.logging import LineFormatter
from hpcresume.errors import CheckpointError
from hpcresume.journal import Lineage, read_chain, segments_from_json, segments_to_json
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.signals import STOP_SIGNALS, SignalFlags
from hpcresume.training.clock import Clock
from hpcresume.training.requests import requested

log = logging.getLogger("hpcresume.guest")

#: Between two looks at files and the clock, and between two lines of progress, in seconds.
_LOOK_S = 0.5
_PROGRESS_S = 1.0


class Guest:
    """One rank of a framework; all ranks hear, rank 0 alone tells."""

    def __init__(self, environ: Mapping[str, str], *, rank: int) -> None:
        self.rank = rank
        self.run: RunDir | None = None
        self.link: LinkDir | None = None
        self.run_id: str | None = None
        """None in the foreground."""
        lead_s = float(environ.get("HPCRESUME_LEAD_S") or 0)
        if environ.get("HPCRESUME_RUN") and environ.get("HPCRESUME_LINK"):
            self.run = RunDir(Path(environ["HPCRESUME_RUN"]))
            self.link = self.run.link(int(environ["HPCRESUME_LINK"]))
            self.run_id = str(self.run.identify()["id"])
        deadline = None if self.link is None else self.link.deadline
        self._clock = Clock(end_time=None, file=deadline, lead_s=lead_s, guess_s=0.0)
        self._flags = SignalFlags()
        self._before: dict[signal.Signals, Any] = {}
        self._lineage = Lineage()
        self._lines: files.LineWriter | None = None
        self._metrics: files.LineWriter | None = None
        if self.link is not None and rank == 0:
            self._lines = files.LineWriter(self.link.guest)
            self._metrics = files.LineWriter(self.link.metrics)
        self._step: dict[str, Any] = {}
        self._written_step = -1
        self._reason: str | None = None
        self._looked_at = self._progress_at = -_LOOK_S
        _show_lines(logging.INFO if rank == 0 else logging.WARNING)

    @property
    def active(self) -> bool:
        """Whether it runs in a link."""
        return self.link is not None

    # ---- what it hears -----------------------------------------------------------------------

    def listen(self) -> None:
        """Note SIGTERM and SIGINT from now on; handlers of the user's own are called besides.

        Outside the main thread no handler can be set, and files and the clock must do.
        """
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            with contextlib.suppress(ValueError):
                signal.signal(number, self._noting(before))
                self._before[number] = before

    def unlisten(self) -> None:
        """Put back the handlers that were there before."""
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def _noting(self, before: Any) -> Callable[[int, FrameType | None], None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self._flags.note(number)
            if before is signal.default_int_handler:
                # The second Ctrl-C acts at once, as people expect.
                signal.signal(number, before)
            elif callable(before):
                before(number, frame)

        return handler

    def why_stop(self) -> str | None:
        """Why to save and leave now, or None; cheap enough for each step.

        A reason that was found stays: several ranks take some steps to agree on the stop.
        """
        if self._reason is not None:
            return self._reason
        if self._flags.any:
            self._reason = self._flags.stop_asked()
        now = time.monotonic()
        if self._reason is None and now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._reason = self._look()
        return self._reason

    def _look(self) -> str | None:
        if self.run is None or self.link is None:
            return None
        if self._clock.due():
            return f"deadline: {self._clock.remaining_s() or 0:.0f} s left"
        return requested(self.run, self.link)

    # ---- where it begins -----------------------------------------------------------------------

    def owns(self, voucher: Voucher | None) -> bool:
        """Whether a checkpoint is one of this very run."""
        run = None if voucher is None else voucher.about.get("run")
        return run is not None and run == self.run_id

    def known_step(self, folder: Path) -> int:
        """The step that a guest of this run has saved last in a folder, as its journals know it."""
        if self.run is None:
            return 0
        root, wanted = self.run.identify()["project"], os.path.abspath(folder)
        saves = [r for link in read_chain(self.run) for r in link.all("saved") if r.get("guest")]
        own = [r for r in saves if os.path.dirname(os.path.join(root, str(r["path"]))) == wanted]
        return int(own[-1]["step"]) if own else 0

    def began(self, step: int, found: Newest, *, looked_in: Path, words: str = "") -> None:
        """It goes on from what was found, at `step`, or begins afresh, because of `words`."""
        for path, wrong in found.passed_over:
            self._log(logging.WARNING, "%s is passed over: %s", path, wrong)
        if found.path is None:
            self._log(logging.INFO, "begins afresh: %s", words or f"no checkpoint in {looked_in}")
        else:
            sure = "verified" if found.voucher else "not vouched for, looks whole"
            self._log(logging.INFO, "goes on from %s, step %d (%s)", found.path, step, sure)
        about = found.voucher.about if found.voucher and self.owns(found.voucher) else {}
        with contextlib.suppress(ValueError, TypeError):
            self._lineage = Lineage(segments_from_json(about.get("lineage", [])))
        if self._lineage.segments:
            # What is told of this step again stands in the log of the link that has saved it.
            self._written_step = step
        self._tell(
            "began",
            step=step,
            path=None if found.path is None else os.path.abspath(found.path),
            verified=found.voucher is not None,
            segments=segments_to_json(self._lineage.segments),
            passed_over=[[str(path), wrong] for path, wrong in found.passed_over],
        )

    # ---- what it tells -------------------------------------------------------------------------

    def progress(
        self, step: int, *, max_steps: int | None, epoch: float, epochs: int | None
    ) -> None:
        """Where it is; at most one line a second comes of it."""
        now = time.monotonic()
        if now - self._progress_at >= _PROGRESS_S:
            self._progress_at = now
            self._tell("progress", step=step, max_steps=max_steps, epoch=epoch, epochs=epochs)

    def metrics(self, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """What it logs: numbers of one step, which may come in several parts."""
        if self._metrics is None or step <= self._written_step:
            return
        if self._step and self._step["step"] != step:
            self._flush()
        # Some scripts log an "epoch" or a "step" of their own, as the axis of their logger.
        own = ("step", "epoch")
        kept = {n: v for n, v in values.items() if type(v) in (int, float) and n not in own}
        if kept:
            self._step = {"step": step, "epoch": int(epoch), **self._step, **kept}

    def _flush(self, *, sync: bool = False) -> int:
        """Write the metrics that wait; the length of the log in bytes."""
        if self._metrics is None:
            return 0
        try:
            if self._step:
                self._written_step = int(self._step["step"])
                line, self._step = self._step, {}
                self._metrics.append(line)
            size = self._metrics.flush()
            if sync:
                self._metrics.sync()
            return size
        except OSError as error:
            log.warning("the metrics wait in memory, their file cannot be written: %s", error)
            return self._metrics.size_bytes()

    def saved(
        self, step: int, path: Path, seconds: float, about: Mapping[str, Any] | None = None
    ) -> Voucher:
        """The framework has saved, in so many seconds: vouches for it, and tells. Rank 0 alone.

        `about` is kept with it, and found again in its voucher. Raises OSError.
        """
        began = time.monotonic()
        own: dict[str, Any] = {"run": self.run_id}
        if self.link is not None:
            # What it follows on must be on the disk with it.
            segments = self._lineage.extended(self.link.number, step, self._flush(sync=True))
            own["lineage"] = segments_to_json(segments)
        voucher = vouch(path, step, {**(about or {}), **own})
        seconds += time.monotonic() - began
        size = files.size_words(voucher.num_bytes)
        self._log(logging.INFO, "saved step %d (%s in %.1f s): %s", step, size, seconds, path)
        self._tell(
            "saved",
            sync=True,
            step=step,
            path=os.path.abspath(path),
            save_s=round(seconds, 3),
            bytes=voucher.num_bytes,
            digest=voucher.digest,
        )
        return voucher

    def leaves(self, step: int, reason: str) -> None:
        """It was asked to stop, has saved what there was to save, and leaves."""
        self._log(logging.INFO, "%s: leaves at step %d", reason, step)
        self._tell("left", step=step, reason=reason)

    def completed(self, step: int, words: str) -> None:
        """Training is complete: the framework has come to its end by itself."""
        self._flush()
        self._log(logging.INFO, "training is complete at step %d: %s", step, words)
        self._tell("completed", sync=True, step=step, judged=words)

    def close(self) -> None:
        """Write what waits, and give the files back."""
        self._flush()
        for writer in filter(None, (self._lines, self._metrics)):
            writer.close()
        self._lines = self._metrics = None

    def _tell(self, kind: str, *, sync: bool = False, **fields: Any) -> None:
        if self._lines is None:
            return
        record = {"t": round(time.time(), 3), "kind": kind, **fields}
        try:
            self._lines.append(record, sync=sync)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._lines.path, error)

    def _log(self, level: int, message: str, *args: Any) -> None:
        if self.rank == 0:
            log.log(level, message, *args)


class Left(SystemExit):
    """Ends the process of a guest that was asked to stop, with exit code 0.

    `except Exception` does not catch it: what a script does behind its training must not run.
    """

    def __init__(self) -> None:
        super().__init__(0)


def nothing_left(run: RunDir, step: int, looked_in: Path) -> CheckpointError:
    """The journal knows a saved step, and nothing whole is left: never a silent fresh start."""
    return CheckpointError(
        f"{run.name} had saved step {step}, and no checkpoint in {looked_in} is whole: bring one "
        f"back, or begin anew with `hpcresume submit --force-new` and another output folder."
    )


def _show_lines(level: int) -> None:
    """Lines of ours go to standard error of a program that has not said where they go."""
    logger = logging.getLogger("hpcresume")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
