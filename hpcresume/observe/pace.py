"""How long a step of a run took, as far as its journals tell: on the average between two records.

What the training logs about its own steps is finer; this is there for every run.
"""

from __future__ import annotations

from hpcresume.journal import LinkRecords
from hpcresume.observe.curves import Curve
from hpcresume.story import Story


class PaceTail:
    """The pace over the steps of a run as it grows."""

    def __init__(self) -> None:
        self._num_links = 0
        """Links that are in `_settled`: those before the newest."""
        self._settled = Curve()
        self._newest: LinkRecords | None = None
        self._shown = Curve()

    def look(self, story: Story) -> Curve:
        """Seconds a step, at the steps that records tell."""
        if self._newest is not story.newest:
            for link in story.links[self._num_links : -1]:
                _add(self._settled, link)
                self._num_links += 1
            self._newest, self._shown = story.newest, self._settled.copy()
            if self._newest is not None:
                _add(self._shown, self._newest)
        return self._shown


def _add(curve: Curve, link: LinkRecords) -> None:
    """Add what a link's records tell; not of steps that a link before it had reached already."""
    begin: tuple[int, float] | None = None
    seen = curve.latest[0] if curve.latest is not None else 0
    for record in link.all("started", "saved", "stop_asked"):
        step, t = int(record.get("step", 0)), float(record["t"])
        if begin is not None and step > max(seen, begin[0]) and t > begin[1]:
            curve.add(step, (t - begin[1]) / (step - begin[0]))
        if begin is None or step > begin[0]:
            begin = (step, t)
