"""Where a session runs: what `rank` hands in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hpcresume.config import RunConfig
from hpcresume.journal import Journal, Lineage
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.signals import SignalFlags
from hpcresume.training.clock import Clock
from hpcresume.training.distributed import Ranks
from hpcresume.training.heartbeat import Heartbeat
from hpcresume.training.progress import Progress
from hpcresume.training.start_up import StartUp

#: Takes what tells the progress at any time, in any thread.
Show = Callable[[Callable[[], Progress]], None]


@dataclass(kw_only=True)
class Berth:
    """One rank's place in one link of a run."""

    run: RunDir
    run_id: str
    link: LinkDir
    config: RunConfig
    ranks: Ranks
    flags: SignalFlags
    clock: Clock
    journal: Journal | None
    """Rank 0's; None on the other ranks."""
    lineage: Lineage
    """As it stood before this link."""
    known_step: int = 0
    """The newest step that the journals know as committed."""
    begin_fresh: bool = False
    """Do not resume, although there may be checkpoints (`resume: never`)."""
    orphaned: Callable[[], bool] = lambda: False
    """Whether the supervisor is gone."""
    beat: Heartbeat = field(default_factory=Heartbeat)
    """Tells the supervisor that this rank goes on; by default nobody."""
    start_up: StartUp = field(default_factory=StartUp)
    """Measures the time to the first step."""
    warmed: Callable[[], None] = lambda: None
    """Told when the first step is done, so that most of what is to be compiled has been."""
    show: Show | None = None
    """Whoever draws the progress is handed it by this; None where lines must do."""
    stop_at: int | None = None
    """The step after which this link saves and leaves; None: whenever it must."""
