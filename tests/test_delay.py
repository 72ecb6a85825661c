"""A link that is to wait before it begins: it waits, and whoever wants its end need not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_run import add_link, make_run
from oracle import ENVIRON

from hpcresume.journal import Journal
from hpcresume.link import Surroundings, supervise
from hpcresume.run_dir import RunDir


class _Gone:
    """Ranks that have left at once, as asked to."""

    def poll(self) -> int | None:
        return 0

    def stop(self) -> None: ...

    def show_stacks(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout_s: float) -> int | None:
        return 0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose first link met a full disk, and died before it could tell the queue."""
    made = make_run(tmp_path / "runs")
    link = add_link(made)
    journal = Journal(link.journal, link=link.number, job="1")
    full = "No space left on device"
    journal.write("ended", cause="storage", detail=full, failure=None, who="", seconds=1, nodes=[])
    journal.close()
    return made


def slept(run: RunDir, *, stop_after: float) -> float:
    """Seconds that the next link waits before its ranks start, with a STOP after so many."""
    clock = waited = 0.0

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        if clock >= stop_after:
            run.stop.touch()

    def start(*_args: Any, **_options: Any) -> _Gone:
        nonlocal waited
        waited = clock
        return _Gone()

    around = Surroundings(sleep=sleep, monotonic=lambda: clock, start=start, chance=lambda: 0.0)
    supervise(run, ENVIRON, around)
    return waited


def test_after_a_storage_failure_a_link_waits_before_it_begins(run: RunDir) -> None:
    assert slept(run, stop_after=1e9) == 30
    assert not run.link(2).stop.exists()


def test_a_stop_is_heard_while_a_link_waits(run: RunDir) -> None:
    assert slept(run, stop_after=7) == 10
    assert run.link(2).stop.read_text() == "STOP\n"
