"""The chain on the local backend: real processes, really cut, and the same bytes at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hanging import hanging
from oracle import Chain, assert_equivalent, hpcresume, merged, schedule, train_uncut

from hpcresume.journal import LinkRecords

LENIENT = {"chain": {"no_progress_links": 30, "max_crashes": 30, "lead_s": 1.0}}
#: Twice as long as the cuts of any schedule need.
SLOW = {"args": {"pause_s": 0.04}, "scheduler": {"grace_s": 3}}


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


# ---- hangs -----------------------------------------------------------------------------------


def stacks(chain: Chain, link: int) -> str:
    return chain.run.link(link).rank_log(0).read_text()


def test_a_link_that_hangs_is_ended_with_its_stacks_in_the_log_and_the_chain_goes_on(
    folder: Path, uncut: dict[str, Any]
) -> None:
    chain = Chain(folder, **merged(LENIENT, hanging(folder, once=True)))
    chain.wait_completed()
    first, second = chain.links()
    told = next(record for record in first.all("ended") if "how" in record)
    assert (told["how"], told["at"], told["step"], told["rank"]) == ("hung", "step", 20, 0)
    assert first.all("ended")[-1]["cause"] == "hang", chain.story()
    assert second.last("restored")["step"] == 18
    assert "most recent call first" in stacks(chain, 1)
    assert 'hanging.py", line' in stacks(chain, 1)
    assert "most recent call first" not in stacks(chain, 2)
    assert_equivalent(chain.run, uncut)


def test_a_chain_that_hangs_in_the_same_step_twice_stops_and_says_so(folder: Path) -> None:
    chain = Chain(folder, **merged(LENIENT, hanging(folder, once=False)))

    def stopped(links: list[LinkRecords]) -> Any:
        decided = [record for link in links for record in link.all("decided")]
        return next((record for record in decided if record["decision"] == "stop"), None)

    decision = chain.wait_for(stopped, 150)
    assert (decision["rule"], decision["cause"]) == ("same_exception", "hang"), chain.story()
    assert "in step 20, in links 1 and 2" in decision["reason"]
    assert len(chain.links()) == 2


# ---- cancelled -------------------------------------------------------------------------------


def _status(folder: Path) -> dict[str, Any]:
    document = json.loads(hpcresume("status", "run", "--json", cwd=folder).stdout)
    run: dict[str, Any] = document["runs"][0]
    return run


def test_cancel_with_save_saves_the_last_step_and_takes_more_than_the_grace_for_it(
    folder: Path, uncut: dict[str, Any]
) -> None:
    changes = {"args": {"pause_s": 0.4}, "scheduler": {"grace_s": 0}, "checkpoint": {"steps": 1000}}
    chain = Chain(folder, **merged(LENIENT, changes))
    chain.wait_for(lambda links: any(link.last("started") for link in links))
    done = hpcresume("cancel", "--yes", "--save", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "saves, and leaves then" in done.stdout

    def ended(links: list[LinkRecords]) -> Any:
        return links[-1].last("decided")

    decision = chain.wait_for(ended)
    (link,) = chain.links()
    saved = link.last("saved")
    assert saved is not None, "without --save there is no time to save at all"
    assert (decision["decision"], decision["cause"]) == ("stop", "cancelled"), chain.story()
    assert decision["reason"].endswith(f"(hpcresume cancel), saved at step {saved['step']}")
    # The decision is recorded a moment before the supervisor leaves.
    deadline = time.monotonic() + 60
    while (status := _status(folder))["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (status["state"], status["queued"]) == ("stopped", [])
    done = hpcresume("resume", "run", "--set=args.pause_s=0", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_equivalent(chain.run, uncut)
