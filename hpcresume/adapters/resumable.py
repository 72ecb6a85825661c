"""A loader of the user's with a place, for frameworks that ask a loader for its `state_dict`.

The order and the samples' own noise become a pure function of (seed, epoch, sample), as with
`session.loader`; the place is that of the batch which training has consumed, however far the
framework or workers have read ahead.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hpcresume.errors import UsageError
from hpcresume.training.feeds import IterableFeed, feed_of
from hpcresume.training.loader import Feed

log = logging.getLogger(__name__)

#: How many batches a framework may have fetched beyond the one that it trains on.
_AHEAD = 4
#: A loader that ends before the framework's epoch does begins again: another order for each pass.
_PASS = 1 << 32


class Turn(NamedTuple):
    """What the framework counts: its epoch, and how many batches of it are consumed."""

    epoch: int
    consumed: int


class _Place(NamedTuple):
    """Behind so many fetched batches of an epoch: which pass, which batch of it, its feed's own."""

    fetched: int
    number: int
    batch: int
    own: Any


class ResumableBatches:
    """Goes through a loader of the user's; whatever else is asked for, that loader answers.

    `turn` tells what the framework counts; `before` is called before each batch is fetched, which
    is where nothing of a step is under way.
    """

    def __init__(
        self,
        loader: Any,
        *,
        seed: int,
        rank: int,
        world_size: int,
        turn: Callable[[], Turn],
        before: Callable[[], None],
    ) -> None:
        self._loader = loader
        self._ranks = {"rank": rank, "world_size": world_size}
        self._seed = seed
        self._turn = turn
        self._before = before
        self._feed = _feed(loader, seed, **self._ranks)
        self._epoch = -1
        self._places: deque[_Place] = deque(maxlen=_AHEAD)
        self._saved: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __len__(self) -> int:
        """Batches of an epoch; TypeError where nobody knows, as of any object without a length."""
        number = self._feed.num_batches()
        return len(self._loader) if number is None else number

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens, no worker starts, before the first batch is asked for.
        self._before()
        for batch in self._batches():
            yield batch
            self._before()

    def _batches(self) -> Iterator[Any]:
        place = self._begin(self._turn().epoch)
        key = self._epoch + place.number * _PASS
        self._places.append(place)
        for batch, _ in self._feed.batches(key, place.batch, place.own):
            place = place._replace(
                fetched=place.fetched + 1,
                batch=place.batch + 1,
                own=copy.deepcopy(self._feed.state()),
            )
            self._places.append(place)
            yield batch

    def _begin(self, epoch: int) -> _Place:
        """Where the iteration begins that is asked for now."""
        saved, self._saved = self._saved, None
        if saved is not None:
            place = self._restored(saved, epoch)
        elif epoch == self._epoch and self._places[-1].fetched:
            place = self._places[-1]._replace(number=self._places[-1].number + 1, batch=0, own=None)
        else:
            place = _Place(0, 0, 0, None)
        self._epoch = epoch
        self._places.clear()
        return place

    def _restored(self, saved: dict[str, Any], epoch: int) -> _Place:
        if saved["fingerprint"] != self._feed.fingerprint():
            log.warning(
                "the data or how they are read have changed since the checkpoint: training goes on "
                "at batch %d, but not as it would have without the break",
                saved["batch"],
            )
        if saved["epoch"] == epoch:
            return _Place(saved["fetched"], saved["pass"], saved["batch"], saved["own"])
        # Saved behind the end of an epoch: what the feed keeps is where the next one begins.
        return _Place(0, 0, 0, saved["own"])

    # ---- what a checkpoint holds -----------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that was consumed: plain values."""
        if self._saved is not None:
            return self._saved
        epoch, consumed = self._turn()
        # Of an epoch that has not begun, the place is that behind the one before.
        place = _Place(0, 0, 0, self._places[-1].own if self._places else None)
        if epoch == self._epoch:
            # Beside longer ones a loader may be at its end, and stay behind its last batch.
            place = next((p for p in reversed(self._places) if p.fetched <= consumed), place)
        return {
            "seed": self._seed,
            "epoch": epoch,
            "fetched": place.fetched,
            "pass": place.number,
            "batch": place.batch,
            "own": place.own,
            "fingerprint": self._feed.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there with the next batch that is asked for; not from another loader's."""
        if "fingerprint" not in state:
            log.warning("the place in the data was saved by another loader, and is not taken over")
            return
        self._saved = dict(state)
        if state["seed"] != self._seed:
            self._seed = state["seed"]
            self._feed = _feed(self._loader, self._seed, **self._ranks)


def _feed(loader: Any, seed: int, *, rank: int, world_size: int) -> Feed:
    try:
        return feed_of(loader, seed=seed, rank=rank, world_size=world_size)
    except UsageError as error:
        log.debug("%s", error)
        return IterableFeed(loader, seed=seed, rank=rank)
