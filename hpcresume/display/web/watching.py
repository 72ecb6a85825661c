"""Looks at runs for as long as somebody watches, once for all who do."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from hpcresume.errors import HpcResumeError

log = logging.getLogger(__name__)

_PAUSE_S = 1.0
#: Looking takes at most this part of the time, on however slow a file system.
_SHARE = 0.2


class Watched:
    """Something that changes, and those who watch it. For one event loop."""

    def __init__(self, look: Callable[[], dict[str, Any]]) -> None:
        """`look` reads how it stands; it may take its time, and is never called twice at once."""
        self._look = look
        self._looking = threading.Lock()
        self._viewers = 0
        self._seen: dict[str, Any] | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    @property
    def viewers(self) -> int:
        """How many watch."""
        return self._viewers

    async def views(self, idle_s: float) -> AsyncIterator[dict[str, Any] | None]:
        """How it stands, and again whenever that changes; None where nothing did for a while.

        Until `end` is called.
        """
        self._viewers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._keep_looking())
        shown: dict[str, Any] | None = None
        try:
            while not self._ended:
                changed = self._changed
                if self._seen is not None and self._seen is not shown:
                    shown = self._seen
                    yield shown
                    continue
                try:
                    await asyncio.wait_for(changed.wait(), idle_s)
                except asyncio.TimeoutError:
                    yield None
        finally:
            self._viewers -= 1
            if not self._viewers and self._task is not None:
                # Who comes before it has ended must not take it for one that still looks.
                self._task.cancel()
                self._task = None

    def end(self) -> None:
        """Send everybody home."""
        self._ended = True
        self._changed.set()

    async def _keep_looking(self) -> None:
        while True:
            began = time.monotonic()
            seen = await asyncio.to_thread(self.look)
            if seen != self._seen:
                self._seen = seen
                before, self._changed = self._changed, asyncio.Event()
                before.set()
            took = time.monotonic() - began
            await asyncio.sleep(max(_PAUSE_S, took / _SHARE - took))

    def look(self) -> dict[str, Any]:
        """How it stands now; what cannot be read is said instead."""
        with self._looking:
            try:
                return self._look()
            except (HpcResumeError, OSError) as error:
                return {"error": str(error)}
            except Exception:
                log.exception("a look failed")
                return {"error": "It cannot be shown: the terminal of `hpcresume web` says why."}
