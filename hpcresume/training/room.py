"""How much room this user's quotas leave for checkpoints, where a program tells them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from hpcresume.checkpoint.disk import Room
from hpcresume.errors import Unavailable
from hpcresume.scheduler.doctor.disk import ask_quotas
from hpcresume.scheduler.doctor.facts import Quota

log = logging.getLogger(__name__)

#: A quota's use is told by a server, and changes slowly.
_ASK_AGAIN_S = 600.0


class Quotas:
    """Asked now and then, by the thread that writes checkpoints."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._asked_at: float | None = None
        self._rooms: list[Room] = []

    def rooms(self) -> list[Room]:
        """What each quota leaves; what was written since it was asked is not counted."""
        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at >= _ASK_AGAIN_S:
            self._asked_at = now
            try:
                self._rooms = rooms_of(ask_quotas(self._path, os.environ) or (), self._path)
            except (Unavailable, OSError) as error:
                log.debug("quotas are not known: %s", error)
        return self._rooms


def rooms_of(quotas: Sequence[Quota], path: Path) -> list[Room]:
    """What is left of quotas on a path's file system."""
    where = f"your quota on the file system of {path}"
    return [
        Room(
            where=where,
            free_bytes=quota.limit - quota.used if quota.unit == "bytes" else None,
            free_files=quota.limit - quota.used if quota.unit == "files" else None,
        )
        for quota in quotas
    ]
