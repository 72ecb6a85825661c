"""The chain on the local backend: real processes, really cut, and the same bytes at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from oracle import Chain, assert_equivalent, schedule, train_uncut

LENIENT = {"chain": {"no_progress_links": 30, "max_crashes": 30, "lead_s": 1.0}}
SLOW = {"args": {"pause_s": 0.02}, "scheduler": {"grace_s": 3}}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_uncut(tmp_path_factory.mktemp("uncut"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # Paths of users hold spaces and quotes.
    return tmp_path / "it's a project"


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_cut_at_random_places_gives_the_bytes_of_the_uncut_run(
    folder: Path, uncut: dict[str, Any], seed: int
) -> None:
    chain = Chain(folder, **LENIENT, **SLOW)
    number = 1
    for how, delay_s in schedule(seed):
        link = chain.wait_started(number)
        if link is None:
            break
        time.sleep(delay_s)
        chain.cut(link, how)
        number = link.number + 1
    chain.wait_completed()
    assert len(chain.links()) >= 3, chain.story()
    assert_equivalent(chain.run, uncut)
