"""A chain that is cut gives the bytes of the uncut run: every kind of training, every kind of cut.

By default torch.compile stands for its front half (aot_eager), which takes a tenth of the time;
the cells in fresh processes and the long suite have the real compiler.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

import pytest
from cells import EVALUATE_EVERY, Cell, pairwise, product
from cuts import EVERY, KINDS, SCHEDULES, Cut, after
from links import Link, RankPool, link_alone, link_here, make_run, run_chain
from oracle import assert_equivalent, differing, fingerprint

from hpcresume.journal import read_chain

#: What torch's own compiler imports.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
SHARED = pytest.mark.xdist_group("exact-ranks")
PAIRWISE = pairwise()
CHAINS = [(cell, SCHEDULES[number % len(SCHEDULES)]) for number, cell in enumerate(PAIRWISE)]
FRESH = [
    (Cell("sgd", "scaled", "workers-3", 3, ema=True), SCHEDULES[0]),
    (Cell("adamw", "bf16", "batchnorm", 4, ranks=2), SCHEDULES[3]),
    (Cell("adamw", "fp32", "dropout", 3, compile=True), SCHEDULES[2]),
    (Cell("adafactor", "fp32", "batchnorm", 1, ema=True, compile=True), SCHEDULES[0]),
]


def as_parameters(chains: list[tuple[Cell, tuple[Cut, ...]]]) -> list[object]:
    """Cells of several ranks go to one pytest process, which starts the rank processes once."""
    return [
        pytest.param(cell, cuts, id=cell.name, marks=[SHARED] if cell.ranks > 1 else [])
        for cell, cuts in chains
    ]


def assert_exact(
    folder: Path, cell: Cell, cuts: tuple[Cut, ...], link: Link, backend: str = "aot_eager"
) -> None:
    """The cell's run, cut as told, gives the bytes of the run that is not cut."""
    uncut = run_chain(make_run(folder / "uncut", cell, backend), (), link)
    cut = run_chain(make_run(folder / "cut", cell, backend), cuts, link)
    assert_equivalent(cut, fingerprint(uncut))


def compiler(cell: Cell) -> str:
    """torch.compile's real backend, where the cell needs it; skips where it does not work."""
    if cell.compile and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler: apt-get install g++")
    return "inductor"


# The cells themselves


def test_default_cells_hold_every_pair_of_values() -> None:
    every = set().union(*(cell.pairs() for cell in product()))
    assert len(product()) == 1080
    assert set().union(*(cell.pairs() for cell in PAIRWISE)) == every


def test_default_chains_are_cut_in_every_way_at_least_twice() -> None:
    counts = Counter(cut.kind for _, cuts in CHAINS for cut in cuts)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 2


def test_default_chains_have_three_links_or_more() -> None:
    assert min(len(cuts) + 1 for _, cuts in [*CHAINS, *FRESH]) >= 3


def test_long_chains_are_cut_in_every_way() -> None:
    assert {cut.kind for cut in EVERY} == set(KINDS)
    compiled = {cut.kind for cell, cuts in long_chains() if cell.compile for cut in cuts}
    assert compiled == set(KINDS)
    both = {(cell.ranks, cuts) for cell, cuts in long_chains() if cell.compile}
    assert len(both) == 2 * len(SCHEDULES)


# Chains


@pytest.mark.parametrize(("cell", "cuts"), as_parameters(CHAINS))
def test_chain_gives_the_bytes_of_the_uncut_run(
    tmp_path: Path, request: pytest.FixtureRequest, cell: Cell, cuts: tuple[Cut, ...]
) -> None:
    link = request.getfixturevalue("ranks").link if cell.ranks > 1 else link_here
    assert_exact(tmp_path, cell, cuts, link)


# Each link imports torch, and compiles: where other tests take the processors, for minutes.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("cell", "cuts"), as_parameters(FRESH))
def test_chain_of_fresh_processes_gives_the_bytes_of_the_uncut_run(
    tmp_path: Path, cell: Cell, cuts: tuple[Cut, ...]
) -> None:
    assert_exact(tmp_path, cell, cuts, link_alone, compiler(cell))


@pytest.mark.parametrize(
    "cell",
    [
        Cell(noise="workers-1", accumulate=3, ema=True),
        Cell("sgd", "bf16", "batchnorm"),
        pytest.param(Cell("adamw", "scaled", accumulate=4, ranks=2), marks=SHARED),
    ],
    ids=lambda cell: cell.name,
)
def test_chain_that_saves_in_the_background_gives_the_bytes_of_one_that_waits(
    tmp_path: Path, request: pytest.FixtureRequest, cell: Cell
) -> None:
    link = request.getfixturevalue("ranks").link if cell.ranks > 1 else link_here
    uncut = run_chain(make_run(tmp_path / "uncut", cell), (), link)
    cuts = (after(2), Cut("evaluation", 6), after(11))
    cut = run_chain(make_run(tmp_path / "cut", cell, background=True), cuts, link)
    assert_equivalent(cut, fingerprint(uncut))


@SHARED
def test_chain_of_three_ranks_gives_the_bytes_of_the_uncut_run(
    tmp_path: Path, ranks: RankPool
) -> None:
    # Two ranks are too few to tell: the order in which they add up two numbers has no effect.
    assert_exact(tmp_path, Cell(ranks=3), SCHEDULES[0], ranks.link)


@SHARED
def test_best_state_of_several_ranks_is_saved_at_the_step_that_reported_it(
    tmp_path: Path, ranks: RankPool
) -> None:
    run = run_chain(make_run(tmp_path / "run", Cell(ranks=2)), (), ranks.link)
    (link,) = read_chain(run)
    saved = [record for record in link.records if record["kind"] == "saved"]
    best = [record["step"] for record in saved if record["reason"] == "best"]
    assert best
    assert all(step % EVALUATE_EVERY == 0 for step in best)


def test_noise_of_the_data_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    found = []
    for workers in (0, 1, 3):
        cell = Cell(noise=f"workers-{workers}")
        run = run_chain(make_run(tmp_path / str(workers), cell), (), link_here)
        found.append(fingerprint(run))
    assert [differing(found[0], other) for other in found] == [[], [], []]


def long_chains() -> list[tuple[Cell, tuple[Cut, ...]]]:
    """All cells. To compile takes most of a chain's time: those take the schedules in turn."""
    plain = [(cell, EVERY) for cell in product() if not cell.compile]
    turns = itertools.cycle([*SCHEDULES, *SCHEDULES[1:]])
    # As many turns as schedules would give each number of ranks half of them alone.
    return [*plain, *zip((cell for cell in product() if cell.compile), turns, strict=False)]


@pytest.mark.long
@pytest.mark.parametrize(("cell", "cuts"), as_parameters(long_chains()))
def test_chain_of_any_cell_gives_the_bytes_of_the_uncut_run(
    tmp_path: Path, request: pytest.FixtureRequest, cell: Cell, cuts: tuple[Cut, ...]
) -> None:
    link = request.getfixturevalue("ranks").link if cell.ranks > 1 else link_here
    assert_exact(tmp_path, cell, cuts, link, compiler(cell))
