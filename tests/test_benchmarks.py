"""The benchmarks of checkpoints and of chains: they run, and keep to their own rules."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import chain_efficiency  # noqa: E402
import checkpoint  # noqa: E402
from chain_model import hpcresume_chain, submitit_chain, with_gap  # noqa: E402
from checkpoint_payload import forget  # noqa: E402
from checkpoint_rows import MOST, Bar, Row, Unmeasurable, as_markdown, measure  # noqa: E402

from hpcresume.checkpoint.cadence import Cadence  # noqa: E402

FIGURES = [
    "stall / copy in memory",
    "step while a save is written / idle",
    "durable write rate / raw write+fsync",
    "verified restore rate / raw read, cold",
    "verified restore rate / readinto, warm",
    "extra memory of a save / payload",
    "extra memory of a restore / payload",
    "memory after 8 saves / after 5",
    "95% frozen: bytes written / changed",
    "95% frozen: time / full save",
    "two ranks: write rate / one raw writer",
]
LOADS = ["torch.load + copy_", "safetensors.load_file + copy_", "dcp.load"]
PEERS = {
    FIGURES[0]: ["dcp.async_save"],
    FIGURES[2]: ["torch.save + fsync", "safetensors.save_file + fsync", "dcp.save"],
    FIGURES[3]: LOADS,
    FIGURES[4]: LOADS,
}


def test_the_report_has_every_figure_and_its_peers_below_it(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "checkpoint.py"), "--folder", str(tmp_path)]
    command += ["--gib", "0.001", "--pairs", "2", "--tensors", "64", "--saves", "8", "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:1] == "|"]
    expected = []
    for figure in FIGURES:
        expected += [figure, *(f"— {peer}" for peer in PEERS.get(figure, []))]
    assert [cells[0] for cells in table[2:]] == expected
    # A disk that is memory itself can not be read cold.
    assert all(float(cells[2]) >= 0 for cells in table[2:] if "not measured" not in cells[-1])
    assert sum("not measured" in cells[-1] for cells in table) in (0, 1 + len(LOADS))
    assert not list(tmp_path.iterdir())


def test_an_unknown_figure_is_answered_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "--only", "stahl"])
    with pytest.raises(SystemExit) as ended:
        checkpoint.arguments()
    assert ended.value.code == 2
    assert "no such figure: stahl; there are stall, step, write" in capsys.readouterr().err


def a_row(limit: float, *, at_least: bool = False) -> Row:
    return Row(figure="x", name="x", tensors=64, bar=Bar(limit, at_least), rate=at_least)


def taking(*seconds: float) -> Iterator[float]:
    """How long calls take: the first one once, then the others over and over."""
    yield seconds[0]
    while True:
        yield from seconds[1:]


def test_a_figure_whose_bar_is_nearer_than_its_noise_is_measured_25_times() -> None:
    noisy = taking(1.0, 0.9, 1.0, 1.1)
    row = measure(a_row(1.05), lambda: next(noisy), lambda: 1.0, 9)
    assert len(row.ratios) == MOST == 25
    assert row.verdict == "met"


def test_a_figure_that_is_clear_is_measured_as_often_as_asked() -> None:
    noisy = taking(1.0, 0.9, 1.0, 1.1)
    row = measure(a_row(2.0), lambda: next(noisy), lambda: 1.0, 9)
    assert len(row.ratios) == 9 and row.verdict == "met"
    row = measure(a_row(0.5), lambda: next(noisy), lambda: 1.0, 9)
    assert len(row.ratios) == 9 and row.verdict == "missed"


def test_a_few_pairs_within_the_noise_decide_nothing() -> None:
    noisy = taking(1.0, 0.9, 1.0, 1.1)
    row = measure(a_row(1.05), lambda: next(noisy), lambda: 1.0, 3)
    assert len(row.ratios) == 3 and row.verdict == "within the noise: more pairs"


def test_a_median_on_the_wrong_side_of_the_bar_is_not_called_met_by_its_noise() -> None:
    noisy = taking(1.0, 0.9, 1.0, 1.1)
    row = measure(a_row(0.95), lambda: next(noisy), lambda: 1.0, 9)
    assert len(row.ratios) == MOST and row.verdict == "missed by less than the noise"


def test_a_rate_is_the_baseline_s_time_over_the_own_and_must_reach_its_bar() -> None:
    row = measure(a_row(0.9, at_least=True), lambda: 2.0, lambda: 1.0, 9)
    assert row.quartiles == (0.5, 0.5, 0.5) and row.verdict == "missed"
    row = measure(a_row(0.4, at_least=True), lambda: 2.0, lambda: 1.0, 9)
    assert row.verdict == "met"


def test_figure_and_baseline_swap_their_order_from_pair_to_pair() -> None:
    calls: list[str] = []

    def call(name: str) -> float:
        calls.append(name)
        return 1.0

    measure(a_row(2.0), lambda: call("own"), lambda: call("base"), 3)
    first, pairs = calls[:2], calls[2:]
    assert first == ["own", "base"]
    assert pairs == ["base", "own", "own", "base", "base", "own"]


def test_the_first_call_is_told_by_itself_and_in_no_median() -> None:
    slow_first = taking(50.0, 1.0)
    row = measure(a_row(2.0), lambda: next(slow_first), lambda: 1.0, 9)
    assert row.first == 50.0 and max(row.ratios) == 1.0


def test_what_a_machine_does_not_allow_is_a_row_that_says_why() -> None:
    def refuses() -> float:
        raise Unmeasurable("98% of the files stay in memory")

    row = measure(a_row(2.0), refuses, lambda: 1.0, 9)
    assert as_markdown(row).endswith("| not measured; 98% of the files stay in memory |")


def test_a_file_that_stays_in_memory_is_not_called_cold(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * mmap.PAGESIZE))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        # The kernel forgets no page that somebody has mapped and looked at.
        sum(pages[:: mmap.PAGESIZE])
        with pytest.raises(Unmeasurable, match="100% of the files stay in memory"):
            forget([path])


# ---- chains --------------------------------------------------------------------------------

FIXED = chain_efficiency.FIXED
lengths = pytest.mark.parametrize("limit_s", sorted(chain_efficiency.BARS))


@cache
def chains() -> list[chain_efficiency.Row]:
    held = with_gap(FIXED, chain_efficiency.HOLD_S)
    return list(chain_efficiency.rows(FIXED, held))


def chains_of(limit_s: float) -> tuple[list[chain_efficiency.Row], chain_efficiency.Row]:
    """hpcresume's, and submitit's."""
    *own, submitit = [row for row in chains() if row.limit_s == limit_s]
    return own, submitit


@lengths
def test_a_chain_of_the_model_trains_as_much_of_a_link_as_its_bar_asks(limit_s: float) -> None:
    own, _ = chains_of(limit_s)
    assert [row.verdict for row in own] == ["met", "met"]
    assert all(row.bar == chain_efficiency.BARS[limit_s] <= row.efficiency for row in own)


@lengths
def test_a_chain_of_the_model_is_ahead_of_submitit_s(limit_s: float) -> None:
    own, submitit = chains_of(limit_s)
    assert all(row.of_wall > submitit.of_wall for row in own)
    assert all(row.efficiency > submitit.efficiency for row in own)


def test_what_the_model_tells_are_shares_of_what_is_possible() -> None:
    assert len(chains()) == 3 * len(chain_efficiency.BARS)
    for row in chains():
        assert 0 < row.of_wall < row.efficiency <= 1
        assert 0 < row.first <= 1


def test_no_last_save_of_the_model_comes_too_late() -> None:
    assert [row.late for row in chains()] == [0] * len(chains())


def test_saves_of_a_minute_on_a_restless_disk_are_in_time_all_the_same() -> None:
    restless = replace(FIXED, save_s=60.0, save_noise=0.1)
    for seed in range(6):
        played = hpcresume_chain(
            restless, limit_s=1200.0, work_s=27000.0, cadence=Cadence(minutes=5.0), seed=seed
        )
        assert played.late == 0 and len(played.links) > 20


def test_the_report_has_a_line_for_each_chain() -> None:
    told = chain_efficiency.as_table("title", chains()).splitlines()
    assert told[0] == "title"
    body = [line.strip("| ").split(" | ") for line in told[4:]]
    assert [cells[1].strip() for cells in body] == [row.tool for row in chains()]


def test_a_chain_whose_links_are_too_short_to_train_says_so() -> None:
    slow = replace(FIXED, start_up_s=601.0)
    with pytest.raises(RuntimeError, match="limit is too short"):
        hpcresume_chain(slow, limit_s=600.0, work_s=600.0, cadence=Cadence())
    with pytest.raises(RuntimeError, match="limit is too short"):
        submitit_chain(slow, limit_s=600.0, work_s=600.0)
