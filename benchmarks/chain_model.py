"""Chains of links in simulated time: as hpcresume plays them, and as submitit does.

hpcresume's part is the production code wherever it decides something: `training.clock` (the lead
time, in a link and from link to link), `training.stopping` (when a rank looks, and stops),
`checkpoint.cadence` (when a save is due), `successors` (what a link learns from the journals of
those before). Simulated are the clock, and the durations of steps and saves, with their noise.
The loop around them does what `Session._look_after` and `Session._stop` do, in their order.

submitit's part is a model of version 1.5.4, kind to it wherever there is a doubt:

- `--signal=USR2@90`, its default. Slurm (facts of its sources) sends that in the first look of
  its background loop, every 30 s, that finds `signal + 30 s` or less left: 0 to 30 s early.
- `SignalHandler.checkpoint_and_try_requeue`: the state is saved inside the handler, and the step
  that it interrupts is lost. (Nothing but that save: no periodic one holds training up.)
- `scontrol requeue`, after which Slurm holds the job for the life of its credential, 120 s, and
  one second more.
- Its countdown of time-outs is taken to be large enough. By default it is 3, so that the chain
  ends with its fourth link; a job of less than 10 minutes always counts as timed out.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from hpcresume.checkpoint.cadence import (
    PRIOR_MTBF_S,
    UNMEASURED_S,
    Cadence,
    Measured,
    auto_interval,
    average,
)
from hpcresume.config import RunConfig
from hpcresume.journal import Lineage, LinkRecords
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.session import SLOW_DISK_BYTES_S
from hpcresume.signals import SignalFlags
from hpcresume.successors import save_durations
from hpcresume.training.berth import Berth
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks
from hpcresume.training.stopping import StopWatch

#: Between two looks of Slurm's controller for jobs to be warned.
SLURM_LOOKS_EVERY_S = 30.0
#: The simulation's clocks when a chain begins: Unix and monotonic seconds.
_EPOCH = 1_800_000_000.0
_BOOTED = 1e6


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a training, a disk and a cluster take, in seconds; each tool may have its own."""

    start_up_s: float
    """From the job's start to the first step: processes, imports, the restore."""
    step_s: float
    save_s: float
    """From a save's beginning to its commit."""
    first_stall_s: float
    """How long a link's first save keeps training from going on, where it is written meanwhile."""
    stall_s: float
    """The same of a later one."""
    gap_s: float
    """From the last commit of a link to the start of the next job on an idle queue."""
    payload_bytes: float
    slowed: float = 1.05
    """How much longer steps take while a save is written (docs/performance.md)."""
    save_noise: float = 0.10
    """Standard deviation of the logarithm of a save's duration."""
    step_noise: float = 0.02


@dataclass(frozen=True)
class LinkPlayed:
    """What became of one link of a chain."""

    committed_s: float
    """Seconds of training that the link has added to what is committed."""
    possible_s: float
    """What it could train at most: its limit without a start, a save and a step."""
    wall_s: float
    """From the job's start to the end of its last save."""
    late: bool = False
    """Its last save was not over when the job's time was."""

    @property
    def efficiency(self) -> float:
        """The share of what it could train."""
        return self.committed_s / self.possible_s


@dataclass(frozen=True)
class ChainPlayed:
    """A chain that ran to its end on an idle queue."""

    limit_s: float
    links: list[LinkPlayed]
    wall_s: float
    """From the first job's start to the last save."""

    @property
    def first(self) -> float:
        """The first link's share of what it could train: nothing has been measured yet."""
        return self.links[0].efficiency

    @property
    def efficiency(self) -> float:
        """The mean share of what a link could train, of all links that their limit ended."""
        return statistics.mean(link.efficiency for link in self.links[:-1])

    @property
    def of_wall(self) -> float:
        """The share of the time from the first start to completion that was training."""
        return sum(link.committed_s for link in self.links) / self.wall_s

    @property
    def late(self) -> int:
        """How many last saves came too late."""
        return sum(link.late for link in self.links)


def _chain(limit_s: float, inputs: Inputs, links: list[LinkPlayed]) -> ChainPlayed:
    return ChainPlayed(
        limit_s=limit_s,
        links=links,
        wall_s=sum(link.wall_s for link in links) + inputs.gap_s * (len(links) - 1),
    )


def possible_s(limit_s: float, inputs: Inputs) -> float:
    """What a link could train at most, in seconds."""
    return limit_s - inputs.start_up_s - inputs.save_s - inputs.step_s


# ---- hpcresume -----------------------------------------------------------------------------


def hpcresume_chain(
    inputs: Inputs, *, limit_s: float, work_s: float, cadence: Cadence, seed: int = 0
) -> ChainPlayed:
    """Train for `work_s` seconds in links of `limit_s`; RuntimeError where none goes forward."""
    links: list[LinkPlayed] = []
    past: list[LinkRecords] = []
    dice = Random(seed)
    left_s = work_s
    with tempfile.TemporaryDirectory() as folder:
        while left_s > 0:
            link = _Link(inputs, limit_s, cadence, past, dice, Path(folder))
            links.append(link.play(left_s))
            past.append(LinkRecords(len(links), {}, link.records))
            left_s -= links[-1].committed_s
            _check_progress(links)
    return _chain(limit_s, inputs, links)


def _check_progress(links: list[LinkPlayed]) -> None:
    if len(links) >= 3 and not any(link.committed_s for link in links[-3:]):
        raise RuntimeError("three links in a row have trained nothing: their limit is too short")


@dataclass
class _Link:
    """One link: a clock that the production code reads, moved by what the link does."""

    inputs: Inputs
    limit_s: float
    cadence: Cadence
    past: list[LinkRecords]
    dice: Random
    folder: Path
    records: list[dict[str, float | str]] = field(default_factory=list)
    elapsed_s: float = 0.0
    trained_s: float = 0.0
    committed_s: float = 0.0
    auto_s: float = UNMEASURED_S
    stalls: list[float] = field(default_factory=list)
    writing: _Save | None = None

    def play(self, left_s: float) -> LinkPlayed:
        """Train until the deadline, or until `left_s` seconds are trained."""
        self.clock = Clock(
            end_time=_EPOCH + self.limit_s,
            file=None,
            lead_s=None,
            guess_s=0.0,
            saves=save_durations(self.past),
            monotonic=lambda: _BOOTED + self.elapsed_s,
            now=lambda: _EPOCH + self.elapsed_s,
        )
        stops = StopWatch(_berth(self.folder, self.clock))
        self._spend(self.inputs.start_up_s)
        self.saved_at = self.elapsed_s
        self.clock.guess(self.inputs.payload_bytes / SLOW_DISK_BYTES_S)
        if stops.look() is not None:
            # It starts too late for a step, and has nothing new to save.
            return self._played(0.0, late=False)
        while self.trained_s < left_s:
            self._step()
            if stops.why(_BOOTED + self.elapsed_s) is not None:
                break
            self._save_if_due()
        late = not self._save_at_the_end()
        return self._played(self.committed_s, late=late)

    def _played(self, committed_s: float, *, late: bool) -> LinkPlayed:
        possible = possible_s(self.limit_s, self.inputs)
        return LinkPlayed(committed_s, possible, self.elapsed_s, late)

    def _spend(self, seconds: float) -> None:
        self.elapsed_s += seconds
        if self.writing is not None and self.elapsed_s >= self.writing.ends_at:
            self._commit(self.writing)

    def _step(self) -> None:
        plain_s = _noisy(self.dice, self.inputs.step_s, self.inputs.step_noise)
        took_s = plain_s if self.writing is None else plain_s * self.inputs.slowed
        self._spend(took_s)
        self.clock.step_took(took_s)
        self.trained_s += plain_s

    def _save_if_due(self) -> None:
        if self.writing is not None:
            return
        due = self.cadence.by_clock(self.elapsed_s - self.saved_at, self.auto_s)
        if due is not None and self.clock.has_time_for_a_save():
            self._begin_save()
            self._spend(self.stalls[-1])
            self.saved_at = self.elapsed_s

    def _save_at_the_end(self) -> bool:
        """Whether the link's last save was committed before the job's end."""
        if self.writing is not None:
            self._spend(self.writing.ends_at - self.elapsed_s)
        save = self._begin_save()
        if save.ends_at > self.limit_s:
            self.elapsed_s = self.limit_s
            return False
        self._spend(save.ends_at - self.elapsed_s)
        return True

    def _begin_save(self) -> _Save:
        seconds = _noisy(self.dice, self.inputs.save_s, self.inputs.save_noise)
        self.stalls.append(self.inputs.stall_s if self.stalls else self.inputs.first_stall_s)
        self.writing = _Save(self.elapsed_s, seconds, self.trained_s)
        return self.writing

    def _commit(self, save: _Save) -> None:
        """As `Saver._write` ends: the clock, the journal and the automatic interval learn of it."""
        self.writing = None
        self.committed_s = save.trained_s
        self.clock.saves.append(save.seconds)
        self.records.append(
            {"kind": "saved", "seconds": save.seconds, "step_s": self.inputs.step_s}
        )
        left_s = self.limit_s - self.elapsed_s
        self.auto_s = auto_interval(
            Measured(
                stall_s=average(self.stalls) or 0.0,
                persist_s=average(self.clock.saves) or 0.0,
                step_s=self.inputs.step_s,
            ),
            mtbf_s=PRIOR_MTBF_S,
            overhead=RunConfig().checkpoint.overhead,
            until_deadline_s=max(
                1.0, self.elapsed_s - self.saved_at + left_s - self.clock.lead_s()
            ),
        )


@dataclass(frozen=True)
class _Save:
    """A save that is being written: when it began, how long it takes, how far it holds."""

    began_at: float
    seconds: float
    trained_s: float

    @property
    def ends_at(self) -> float:
        return self.began_at + self.seconds


def _berth(folder: Path, clock: Clock) -> Berth:
    run = RunDir(folder)
    return Berth(
        run=run,
        run_id="model",
        link=run.link(1),
        config=RunConfig(),
        ranks=Ranks(RankPlace()),
        flags=SignalFlags(),
        clock=clock,
        journal=None,
        lineage=Lineage((), 1),
    )


# ---- submitit ------------------------------------------------------------------------------


def submitit_chain(
    inputs: Inputs, *, limit_s: float, work_s: float, signal_s: float = 90.0, seed: int = 0
) -> ChainPlayed:
    """The same training by submitit; RuntimeError where no link goes forward.

    `inputs.gap_s` is from the end of the checkpoint to the next start of the requeued job.
    """
    links: list[LinkPlayed] = []
    dice = Random(seed)
    left_s = work_s
    while left_s > 0:
        links.append(_submitit_link(inputs, limit_s, left_s, signal_s, dice))
        left_s -= links[-1].committed_s
        _check_progress(links)
    return _chain(limit_s, inputs, links)


def _submitit_link(
    inputs: Inputs, limit_s: float, left_s: float, signal_s: float, dice: Random
) -> LinkPlayed:
    # A job too short for its signal is warned by the first look after its start: late.
    earliest_s = max(0.0, limit_s - signal_s - SLURM_LOOKS_EVERY_S)
    warned_at = earliest_s + dice.uniform(0, SLURM_LOOKS_EVERY_S)
    elapsed_s, trained_s = inputs.start_up_s, 0.0
    while trained_s < left_s:
        took_s = _noisy(dice, inputs.step_s, inputs.step_noise)
        if elapsed_s + took_s > warned_at:
            elapsed_s = max(elapsed_s, warned_at)
            break
        elapsed_s += took_s
        trained_s += took_s
    elapsed_s += _noisy(dice, inputs.save_s, inputs.save_noise)
    late = elapsed_s > limit_s
    committed_s = 0.0 if late else trained_s
    return LinkPlayed(committed_s, possible_s(limit_s, inputs), min(elapsed_s, limit_s), late)


def _noisy(dice: Random, seconds: float, sigma: float) -> float:
    return seconds * dice.lognormvariate(0.0, sigma)


def with_gap(inputs: Inputs, gap_s: float) -> Inputs:
    """The same, but for the time between two jobs."""
    return replace(inputs, gap_s=gap_s)
