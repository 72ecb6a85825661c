"""Runs a rank for `verify`, and looks at the training's variables as its steps begin and end.

A cut loses what is not registered. Two looks around one show what: an object that is not, where
the next link begins, what it was where the link before left.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpcresume import files, rank
from hpcresume.checkpoint import rng
from hpcresume.config import read_frozen
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import rank_place
from hpcresume.session import Session
from hpcresume.verify.looks import looks_file
from hpcresume.verify.search import OwnCode, search

log = logging.getLogger(__name__)


def run_watched(run: RunDir, number: int, environ: Mapping[str, str]) -> int:
    """`rank.run_rank`, with a look as the steps begin and another as they end."""
    path = looks_file(run.link(number), rank_place(environ).rank)
    watch = _Watch(path, OwnCode(read_frozen(run.config).train))
    register, steps = Session.register, Session.steps

    def registering(session: Session, *args: Any, **objects: Any) -> None:
        register(session, *args, **objects)
        # `keep` is an option; nothing can be registered under its name.
        watch.registered.update({name: v for name, v in objects.items() if name != "keep"})

    def stepping(session: Session, *args: Any, **options: Any) -> Iterator[Any]:
        watch.look("begin")
        try:
            yield from steps(session, *args, **options)
        finally:
            # Where the training function's variables still are, however it leaves its loop.
            watch.look("end")

    # This process runs one rank for `verify` and nothing else.
    Session.register = registering  # type: ignore[method-assign, assignment]
    Session.steps = stepping  # type: ignore[method-assign, assignment]
    return rank.run_rank(run, number, environ)


class _Watch:
    """Looks at what the code holds, and writes it down."""

    def __init__(self, path: Path, code: OwnCode) -> None:
        self.registered: dict[str, Any] = {}
        self._path = path
        self._code = code
        self._looks: dict[str, dict[str, Any]] = {}

    def look(self, when: str) -> None:
        """Note what the user's variables hold now; a look that fails troubles nobody."""
        try:
            generators = {n: v for n, v in self.registered.items() if rng.is_generator(v)}
            before = rng.capture(generators)
            try:
                found = search(self._code, self.registered, sys._getframe(1))
            finally:
                # A state_dict() may draw random numbers; a look leaves no trace in the training.
                rng.restore(before, generators)
            self._looks[when] = {name: asdict(seen) for name, seen in found.items()}
            files.write_json(self._path, self._looks, sync=False)
        except Exception:
            log.debug("the training's variables could not be looked at", exc_info=True)
