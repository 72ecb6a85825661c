"""Random chains under the production supervisor: each ends well, and each safeguard is needed.

A failure names its seed and tells the chain's story; `play(seed)` plays it again.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import driver
import faults
import pytest
from chains import End, SimulatedChain
from cluster import Violation
from made_run import add_link, make_run

from hpcresume import drive, files, link, successors
from hpcresume.chain import decisions
from hpcresume.config import read_frozen
from hpcresume.errors import Fenced
from hpcresume.run_dir import RunDir
from hpcresume.story import Story, read_story

#: Chains of each test, and of the mutants until one must have been noticed.
_A_BLOCK, _MANY_A_BLOCK, _FOR_A_MUTANT = 100, 500, 600


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """What thousands of supervisors say is nobody's matter here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where there is such a place: the chains sync each of their records."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix="hpcresume-chains-", dir=place))
    yield made
    shutil.rmtree(made)


def play(seed: int, folder: Path) -> End:
    return SimulatedChain(seed, folder).play()


def driven(seeds: Iterable[int]) -> list[int]:
    """Those whose chains `hpcresume drive` keeps going from a login node."""
    return [seed for seed in seeds if faults.plan(seed).mode == "drive"]


def assert_ends_well(end: End) -> None:
    """`play` has looked at all that lies before; a violation there names the seed."""
    assert end.kind in ("completed", "stopped") and end.reason
    assert end.steps == end.max_steps if end.kind == "completed" else end.steps <= end.max_steps


@pytest.mark.parametrize("block", range(3))
def test_random_chains_complete_or_record_why_they_end(block: int, folder: Path) -> None:
    for seed in range(block * _A_BLOCK, (block + 1) * _A_BLOCK):
        assert_ends_well(play(seed, folder))


@pytest.mark.long
@pytest.mark.parametrize("block", range(20))
def test_ten_thousand_random_chains_complete_or_record_why_they_end(
    block: int, folder: Path
) -> None:
    for seed in range(block * _MANY_A_BLOCK, (block + 1) * _MANY_A_BLOCK):
        assert_ends_well(play(seed, folder))


def test_chains_whose_driver_dies_and_is_started_again_end_well(folder: Path) -> None:
    ends = [play(seed, folder) for seed in driven(range(_FOR_A_MUTANT))]
    for end in ends:
        assert_ends_well(end)
    assert {end.kind for end in ends} == {"completed", "stopped"}
    assert {fault for end in ends for fault in end.driver_faults} == {driver.KILLED, driver.SLOW}


def test_the_chains_of_a_block_meet_every_fault_and_end_in_both_ways(folder: Path) -> None:
    ends = [play(seed, folder) for seed in range(_A_BLOCK)]
    met = {fault for end in ends for fault in end.faults}
    assert met == set(faults.LINK_FAULTS) - {""}
    assert {end.kind for end in ends} == {"completed", "stopped"}
    assert max(end.links for end in ends) > 5


def test_a_seed_gives_the_same_chain_again(folder: Path) -> None:
    def story(seed: int) -> list[str]:
        chain = SimulatedChain(seed, folder)
        chain.play()
        return chain.lines

    assert [story(seed) for seed in range(20)] == [story(seed) for seed in range(20)]


def test_chains_leave_no_file_open(folder: Path) -> None:
    play(0, folder)
    before = sorted(os.listdir("/proc/self/fd"))
    for seed in range(1, 20):
        play(seed, folder)
    assert sorted(os.listdir("/proc/self/fd")) == before


#: Chains in which a supervisor did wrong once: what it had not heeded, and how it ends now.
MENDED = {
    "a link that died before it trained is a link of the budget": (1600, "stopped"),
    "a link that was overtaken while it ended decides nothing": (4488, "completed"),
    "a waiting job that died before its link is not believed to wait": (1656, "stopped"),
    "a failure in a job that its user cancels is no reason to go on": (8788, "stopped"),
    "a driver that asks how a job has ended is as patient as with the one before": (
        8815,
        "stopped",
    ),
}


@pytest.mark.parametrize("lesson", MENDED)
def test_a_chain_that_went_wrong_once_ends_well_now(lesson: str, folder: Path) -> None:
    seed, kind = MENDED[lesson]
    end = play(seed, folder)
    assert_ends_well(end)
    assert end.kind == kind


def test_a_link_that_was_overtaken_while_it_waited_starts_no_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    full = {"type": "OSError", "message": "[Errno 28] No space left on device", "step": 1}
    files.write_json(add_link(run).rank_failure(0), full)
    waited, started = [], []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        add_link(run)

    around = link.Surroundings(sleep=sleep, start=lambda *_args, **_options: started.append(1))
    with pytest.raises(Fenced, match="A newer link than 2"):
        link.supervise(run, {}, around)
    assert waited and not started


class Resumed:
    """A queue in which a run has no job; while one asks it, somebody resumes the run."""

    name = "slurm"

    def __init__(self, run: RunDir) -> None:
        self._run = run

    def find(self, _token: str) -> list[Any]:
        return []

    def state(self, _ids: Any) -> dict[str, Any]:
        add_link(self._run)
        return {}


def test_a_driver_does_not_end_a_chain_with_a_link_that_it_does_not_know_of(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, cluster="slurm")
    loss = {"type": "NonFinite", "message": "loss was nan", "step": 1}
    files.write_json(add_link(run).rank_failure(0), loss)
    scheduler: Any = Resumed(run)
    assert drive.Driver(run, read_frozen(run.config), scheduler).look() is None
    assert run.newest_link() == 2
    assert read_story(run).decided() is None


# ---- what is left out is missed ----------------------------------------------------------------

Mutation = Callable[[pytest.MonkeyPatch], None]


def without_row(name: str) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        left = tuple(row for row in decisions._ROWS if row.__name__ != name)
        assert len(left) == len(decisions._ROWS) - 1
        patch.setattr(decisions, "_ROWS", left)

    return mutate


def always(owner: Any, method: str, answer: Any) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(owner, method, lambda *_args, **_options: answer)

    return mutate


def claims_that_replace(patch: pytest.MonkeyPatch) -> None:
    """A claim takes a number that somebody else has just got."""
    rename = os.rename

    def replacing(source: Any, target: Any) -> None:
        if Path(target).parent.name == "links":
            shutil.rmtree(target, ignore_errors=True)
        rename(source, target)

    patch.setattr(os, "rename", replacing)


def claims_of_any_number(patch: pytest.MonkeyPatch) -> None:
    """Who comes too late for a number takes the one after it."""
    claim_after = RunDir.claim_after

    def claiming(self: RunDir, _newest: int, claim: Any) -> Any:
        taken = None
        while taken is None:
            taken = claim_after(self, self.newest_link(), claim)
        return taken

    patch.setattr(RunDir, "claim_after", claiming)


def stale_knowledge(patch: pytest.MonkeyPatch) -> None:
    """A link that was lost for hours goes by what it had read before."""
    claim = link._Supervisor._claim

    def claiming(self: Any, story: Any) -> Any:
        found = None
        while found is None:
            try:
                found = claim(self, link.read_story(self.run))
            except link.RunLive:
                continue
        return found

    patch.setattr(link._Supervisor, "_claim", claiming)


def without_a_look_into_the_queue(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drive, "find_jobs", lambda *_args: [])


def reading_once(patch: pytest.MonkeyPatch) -> None:
    """A driver does not read again what a link may have written with its last breath."""
    look, read = drive.Driver.look, drive.read_story
    known: list[Story] = []

    def looking(self: drive.Driver) -> Any:
        known.clear()
        return look(self)

    def reading(run: RunDir) -> Story:
        if not known:
            known.append(read(run))
        return known[0]

    patch.setattr(drive.Driver, "look", looking)
    patch.setattr(drive, "read_story", reading)


def no_queue_is_read_again(patch: pytest.MonkeyPatch) -> None:
    def trusting(self: Any, decision: Any) -> Any:
        return decision

    patch.setattr(successors.Successors, "ensure_one", trusting)


#: What is left out, and what the simulator says then.
MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "no row for ends": (without_row("_ended_for_good"), "complete, and the chain goes on"),
    "no row for budgets": (without_row("_out_of_budget"), r"links trained, of at most"),
    "no row for exceptions": (without_row("_same_exception"), "same failure at the same step"),
    "no row for non-finite": (without_row("_non_finite"), "trained on after a loss"),
    "no row for memory": (without_row("_same_memory"), "same failure at the same step"),
    "no row for crashes": (without_row("_too_many_crashes"), "more crashes than the budget"),
    "never fenced": (always(link._Supervisor, "_fenced", False), "trains on although a newer"),
    "claims that replace": (claims_that_replace, r"is claimed by jobs \S+ and \S+"),
    "claims of any number": (claims_of_any_number, "which it does not know of"),
    "stale knowledge": (stale_knowledge, "although training is complete"),
    "the queue is not read again": (no_queue_is_read_again, "hands over to nobody"),
    "no next link where the scheduler is silent": (
        always(link._Supervisor, "_leave_to_next", True),
        "hands over to nobody",
    ),
    "nothing is queued ahead": (
        always(successors.Successors, "queue_ahead", None),
        "nothing waits behind",
    ),
    "a cancelled spare means nothing": (
        always(successors.Successors, "cancelled_one", None),
        "although the user has ended the chain",
    ),
    "over is not over": (always(link._Supervisor, "_already_over", None), "trained on|complete"),
}


#: The same for whoever drives a chain from a login node.
DRIVER_MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "it does not look into the queue": (without_a_look_into_the_queue, "although one lives"),
    "it goes by what it read first": (reading_once, "queued although the chain has ended"),
    "it heeds no job that was cancelled": (
        always(drive.Driver, "_lost", None),
        "although the user has ended the chain",
    ),
    "it records no reason": (
        always(drive.Driver, "_recorded", True),
        "the driver leaves without a recorded reason",
    ),
}


def play_until_one_fails(folder: Path, seeds: Iterable[int] = range(_FOR_A_MUTANT)) -> None:
    for seed in seeds:
        play(seed, folder)


def test_every_row_of_decisions_is_left_out_once() -> None:
    rows = [name for name in MUTATIONS if name.startswith("no row for ")]
    assert len(rows) == len(decisions._ROWS)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_chain_without_one_of_its_safeguards_is_found_out(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, words = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises(Violation, match=words):
        play_until_one_fails(folder)


@pytest.mark.parametrize("name", DRIVER_MUTATIONS)
def test_a_driver_without_one_of_its_safeguards_is_found_out(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate, words = DRIVER_MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises(Violation, match=words):
        play_until_one_fails(folder, driven(range(5 * _FOR_A_MUTANT)))


def test_a_violation_names_its_seed_and_tells_the_story(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_queue_is_read_again(monkeypatch)
    story = r"seed \d+: .*\n(?s:.*)job 1 starts(?s:.*)link 1: claimed"
    with pytest.raises(Violation, match=story):
        play_until_one_fails(folder)
