"""What a run begins with that was told to, until it has a checkpoint of its own.

A checkpoint of ours goes on exactly. Another program's gives its state to what is registered, and
its counters to the session.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume.checkpoint import images
from hpcresume.checkpoint.foreign import open_foreign
from hpcresume.checkpoint.foreign.giving import Giver
from hpcresume.checkpoint.images import Images
from hpcresume.checkpoint.origin import Origin, frozen_origin, is_own, read_own
from hpcresume.errors import CheckpointError, HpcResumeError, NotFound
from hpcresume.training.berth import Berth

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Another's state, found for one rank: `images` of one of ours, else a `giver`."""

    origin: Origin
    layout: str
    step: int
    epoch: int
    digest: str
    """Of what is read: a manifest's, or of all files; empty on other ranks than the first."""
    bytes: int
    images: Images | None = None
    giver: Giver | None = None

    @property
    def record(self) -> dict[str, Any]:
        """The fields of `restored` that tell of it."""
        told = {"path": self.origin.path, "layout": self.layout}
        sizes = {"digest": self.digest, "bytes": self.bytes}
        return {"step": self.step, "epoch": self.epoch, **sizes, "from": told}


def begin(berth: Berth) -> Beginning | None:
    """What the run was told to begin with; None where it begins by itself; on every rank alike.

    Raises NotFound, CheckpointError, OSError.
    """
    origin = frozen_origin(berth.run)
    if origin is None:
        return None
    try:
        return _opened(origin, is_first=berth.ranks.rank == 0)
    except (NotFound, CheckpointError) as error:
        # Submitted days ago, perhaps: whoever reads it must know whence the path comes.
        raise _with_hint(error, berth) from None


def _with_hint(error: HpcResumeError, berth: Berth) -> HpcResumeError:
    return type(error)(
        f"{error} {berth.run.name} was to begin with it, and has no checkpoint of its own yet."
    )


def _opened(origin: Origin, *, is_first: bool) -> Beginning:
    path = Path(origin.path)
    if is_own(path):
        own = read_own(path)
        # The other ranks verify what they take.
        try:
            found = images.read(own) if is_first else Images(own)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be begun with: {error}.") from None
        return Beginning(
            origin=origin,
            layout="a checkpoint",
            step=own.step,
            epoch=own.manifest.epoch,
            digest=own.manifest.digest,
            bytes=own.manifest.payload_bytes,
            images=found,
        )
    source = open_foreign(path, origin.trust)
    digest, size = source.digest() if is_first else ("", 0)
    return Beginning(
        origin=origin,
        layout=source.layout,
        step=source.global_step,
        epoch=source.epoch,
        digest=digest,
        bytes=size,
        giver=Giver(source),
    )
