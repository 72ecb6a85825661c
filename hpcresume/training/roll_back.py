"""Going back to an older checkpoint, without the data behind which a loss was not finite.

The link that meets such a loss asks for it in its journal, and ends. The next one begins where it
was told, and leaves the data out; so does each link after it, until one has committed a state in
which they are left out. So any of these links may be killed at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcresume.journal import Lineage, LinkRecords, Segment, read_chain
from hpcresume.training.berth import Berth
from hpcresume.training.record import BadStep

#: What the reason of such an end begins with.
WORD = "roll back"
_KEY = "roll_back"


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """What a link has asked those that follow it for."""

    link: int
    """The link that asked."""
    step: int
    """The checkpoint to go on from."""
    metric: str
    bad_step: int
    epoch: int
    position: int
    """The last micro-batch that is left out: of this epoch, as counted behind it."""

    @property
    def reason(self) -> str:
        """A sentence about the end of the link that asks."""
        return f"{WORD} to step {self.step}: {self.metric} was not finite in step {self.bad_step}"

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The fields that a record `stop_asked` has besides."""
        place = [self.epoch, self.position]
        told = {"step": self.step, "metric": self.metric, "bad_step": self.bad_step}
        return {_KEY: {**told, "through": place}}

    def narrowed(self, lineage: Lineage, link: int) -> Lineage:
        """What of a lineage stands for link number `link`, once the run has gone back."""
        if lineage.link > self.link:
            return lineage
        whole = (*lineage.segments, Segment(lineage.link, self.step, 0))
        upto = (Segment(s.link, min(s.upto_step, self.step), s.metrics_bytes) for s in whole)
        return Lineage(tuple(upto), link)


def asked_for(bad: BadStep, *, link: int, steps: Sequence[int], back: int) -> RollBack | None:
    """Go back so many of the checkpoints at `steps` (ascending), or to the oldest; None: none."""
    if not steps:
        return None
    return RollBack(
        link=link,
        step=steps[max(0, len(steps) - back)],
        metric=bad.metric,
        bad_step=bad.step,
        epoch=bad.epoch,
        position=bad.position,
    )


def told(berth: Berth) -> RollBack | None:
    """What the links before this one asked for last, on every rank alike; all must ask."""
    asked = last_asked(read_chain(berth.run)) if berth.ranks.rank == 0 else None
    found = berth.ranks.broadcast(None if asked is None else asdict(asked))
    return None if found is None else RollBack(**found)


def last_asked(links: Sequence[LinkRecords]) -> RollBack | None:
    """What the links before asked for last; it is done with once a later link has committed."""
    for link in reversed(links):
        for record in reversed(link.all("stop_asked")):
            found = _read(link.number, record.get(_KEY))
            if found is not None:
                return found
    return None


def _read(link: int, asked: Any) -> RollBack | None:
    """What a record asks for; None where it does not, or is damaged."""
    try:
        epoch, position = asked["through"]
        return RollBack(
            link=link,
            step=int(asked["step"]),
            metric=str(asked["metric"]),
            bad_step=int(asked["bad_step"]),
            epoch=int(epoch),
            position=int(position),
        )
    except (LookupError, TypeError, ValueError):
        return None
