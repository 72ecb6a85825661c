"""Signs of life: what a rank is at, and for how long that may take.

A rank's `Heartbeat` writes them into a small file; the supervisor's `Watchdog` looks whether the
file changes, by its own monotonic clock alone, because nodes disagree about the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.journal import LinkRecords
from hpcresume.training import pace
from hpcresume.training.pace import UNKNOWN_S, Durations, Pace

#: What every rank is at in turn; `session.busy` adds its own.
START, FIRST_STEP, STEP, SAVE, STOP, END = "start", "first step", "step", "save", "stop", "end"
#: The training is over, and the process about to be: libraries clean up as long as they like.
_LEAVING = "leaving"
#: At these the last step is over, and no next one has begun.
_BETWEEN_STEPS = frozenset({START, SAVE, STOP, END, _LEAVING})
#: The longest pause between two signs of a rank, and between two looks at it.
_TICK_S = 1.0
#: Looking at one more rank costs a call to a shared file system.
_TICK_EACH_S = 0.01
#: A sign has this length whatever it says: its place on the disk is taken once.
_SIGN_BYTES = 512
_KIND_LETTERS = 32


def step_in_progress(sign_of_life: Path, restored: int) -> int | None:
    """The step that a rank was in when it gave its last sign, up to a second before its end.

    `restored` is the step that it began with. None where no sign tells it.
    """
    sign = files.read_json_or_none(sign_of_life)
    if not isinstance(sign, dict) or type(sign.get("step")) is not int:
        return None
    kind = str(sign.get("kind"))
    return None if kind == START else max(sign["step"], restored) + (kind not in _BETWEEN_STEPS)


def _tick_s(fixed_s: float | None) -> float:
    return _TICK_S if fixed_s is None else min(_TICK_S, fixed_s / 4)


class Heartbeat:
    """One rank's signs of life; without a file it only measures.

    The training's thread notes what it is at, and a thread of its own writes that down: so a slow
    disk holds no step up, and a rank that hangs has told in which step.
    """

    def __init__(self, path: Path | None = None, *, fixed_s: float | None = None) -> None:
        """`fixed_s` is the limit of all but the process's start and end; by default learned."""
        self._fixed_s = fixed_s
        self._tick_s = _tick_s(fixed_s)
        self._kind = START
        self._step = 0
        self._entered = 0
        self._entered_at = time.monotonic()
        self._durations: dict[str, Durations] = {}
        self._remembered: dict[str, Pace] = {}
        self._relieved: dict[str, float] = {}
        self._wake = threading.Event()
        self._closed = path is None
        if path is not None:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._thread = threading.Thread(target=self._tell, name="heartbeat", daemon=True)
            self._thread.start()

    def remember(self, links: Sequence[LinkRecords]) -> None:
        """Learn from what the links before have recorded."""
        self._remembered = pace.remembered(links)
        self._relieved = pace.relieved(links)

    @property
    def doing(self) -> tuple[str, float]:
        """What the rank is at, and since when by the monotonic clock; of steps, the first's."""
        return self._kind, self._entered_at

    # ---- what the training's thread notes ------------------------------------------------

    def step(self, step: int) -> None:
        """A step is over and the next one begins; cheap enough for every boundary."""
        self._step = step
        if self._kind is not STEP:
            self.enter(STEP)

    def enter(self, kind: str) -> None:
        """Something else than a step, or another kind of it, begins."""
        now = time.monotonic()
        if self._kind is not STEP:
            self._note(self._kind, now - self._entered_at)
        self._entered_at = now
        self._kind = STEP if kind == STEP else kind[:_KIND_LETTERS]
        self._entered += 1
        self._wake.set()

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Be at something of its own, and then again at what it has interrupted."""
        before = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def paces(self) -> dict[str, list[float]]:
        """What this link has seen of each kind, for a record that later links learn from."""
        return pace.to_json({kind: seen.pace() for kind, seen in [*self._durations.items()]})

    def close(self) -> None:
        """Say that the process leaves, and give no more signs."""
        if not self._closed:
            self.enter(_LEAVING)
            self._closed = True
            self._wake.set()
            # A write that a dead disk holds must not hold the process.
            self._thread.join(_TICK_S)
            if not self._thread.is_alive():
                os.close(self._fd)

    def _note(self, kind: str, seconds: float) -> None:
        self._durations.setdefault(kind, Durations()).add(seconds)

    # ---- what the other thread tells -----------------------------------------------------

    def _tell(self) -> None:
        told: tuple[str, int, int] | None = None
        told_at, number = 0.0, 0
        last = False
        while not last:
            self._wake.clear()
            last = self._closed
            seen, now = (self._kind, self._step, self._entered), time.monotonic()
            if seen != told:
                if told is not None and told[0] == seen[0] == STEP:
                    # Of short steps some together, which makes them no longer than a tick.
                    self._note(STEP, now - told_at)
                told, told_at, number = seen, now, number + 1
                self._write(number, *seen[:2])
            if not last:
                self._wake.wait(self._tick_s)

    def _write(self, number: int, kind: str, step: int) -> None:
        sign = {"n": number, "kind": kind, "step": step, "limit_s": round(self._limit_s(kind), 3)}
        line = json.dumps(sign).encode().ljust(_SIGN_BYTES - 1) + b"\n"
        # Where this fails, saves fail as well, and those are told.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, line, 0)

    def _limit_s(self, kind: str) -> float:
        if kind in (START, _LEAVING):
            return UNKNOWN_S
        if self._fixed_s is not None:
            return self._fixed_s
        own = self._durations.get(kind, Durations()).pace()
        learned = self._remembered.get(kind, Pace()).with_(own).limit_s
        return max(learned, self._relieved.get(kind, 0.0))


@dataclass(frozen=True, kw_only=True)
class Hang:
    """A rank that gave no sign of life for longer than it had said."""

    rank: int
    kind: str
    step: int
    """The step in progress; at something between two steps, the one before."""
    silent_s: float
    limit_s: float

    @property
    def reason(self) -> str:
        """A sentence for people, without its full stop."""
        allowed = f"at most {self.limit_s:.0f} s are allowed for it"
        return f"no sign of life in {self.silent_s:.0f} s, at: {self.kind} ({allowed})"


@dataclass
class _Watched:
    """What was read last of one rank, and since when it is the same."""

    since: float
    text: bytes = b""
    kind: str = START
    step: int = 0
    limit_s: float = UNKNOWN_S


class Watchdog:
    """Looks now and then whether the signs of all ranks change."""

    def __init__(
        self, sign_of: Callable[[int], Path], num_ranks: int, *, fixed_s: float | None = None
    ) -> None:
        """`sign_of` names a rank's file. With `fixed_s`, here as in the ranks, looks oftener."""
        self._sign_of = sign_of
        self._tick_s = max(_tick_s(fixed_s), _TICK_EACH_S * num_ranks)
        now = time.monotonic()
        self._watched = [_Watched(since=now) for _ in range(num_ranks)]
        self._looked_at = now

    def look(self, now: float) -> Hang | None:
        """The rank that has been silent for too long, and of several the one that was so first.

        `now` is the monotonic clock's time. Nothing counts as silence while this process itself
        did not come to look, because it was suspended or waited for the scheduler.
        """
        missed_s = now - self._looked_at - self._tick_s
        if missed_s < 0:
            return None
        self._looked_at = now
        late = []
        for rank, watched in enumerate(self._watched):
            watched.since += missed_s
            if self._is_new(rank, watched):
                watched.since = now
            elif now - watched.since > watched.limit_s:
                late.append((watched.since, rank))
        if not late:
            return None
        since, rank = min(late)
        watched = self._watched[rank]
        at_step = watched.step + (watched.kind not in _BETWEEN_STEPS)
        return Hang(
            rank=rank,
            kind=watched.kind,
            step=at_step,
            silent_s=now - since,
            limit_s=watched.limit_s,
        )

    def _is_new(self, rank: int, watched: _Watched) -> bool:
        """Whether a rank's sign is another one; of one that cannot be read nothing is known."""
        try:
            text = self._sign_of(rank).read_bytes()
            if text == watched.text:
                return False
            sign = json.loads(text)
            watched.kind, watched.step = str(sign["kind"]), int(sign["step"])
            watched.limit_s = float(sign["limit_s"])
        except FileNotFoundError:
            # Not even begun: what is allowed for the start counts from our own.
            return False
        except (OSError, ValueError, TypeError, KeyError):
            return True
        watched.text = text
        return True
