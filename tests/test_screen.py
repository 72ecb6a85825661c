"""Bars, curves and screens as text: whatever the numbers and the terminal's size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcresume.display.bars import progress_lines
from hpcresume.display.screen import screen_lines
from hpcresume.display.sparkline import chart, condensed, sparkline
from hpcresume.display.view import Series, View
from hpcresume.observe.picture import CheckpointShown
from hpcresume.status import RunStatus
from hpcresume.training.progress import (
    Progress,
    from_json,
    metric_text,
    percent,
    progress_line,
    rate_text,
)

NOW = Progress(
    step=575,
    total_steps=5000,
    epoch=2,
    epochs=10,
    step_in_epoch=75,
    steps_per_epoch=500,
    epoch_s=30.0,
    train_s=240.0,
    steps_per_s=2.5,
    left_s=1770.0,
    samples_per_step=16,
    metrics={"step": 575, "epoch": 1, "loss": 2.12345, "lr": 3e-4, "tokens": 16384, "ok": True},
    monitor={
        "gpu_reserved_bytes": 8.5e9,
        "gpu_allocated_bytes": 7.1e9,
        "gpu_total_bytes": 16e9,
        "gpu_utilization": 0.97,
        "gpu_power_w": 312.4,
        "host_bytes": 12e9,
        "host_limit_bytes": 64e9,
        "step_s_p50": 0.4,
        "step_s_p95": 0.45,
        "step_s_p99": 1.25,
        "data_wait": 0.03,
        "parameter_bytes": 5e8,
        "optimizer_bytes": 1e9,
    },
)


def test_the_line_of_a_step_says_where_it_is_how_fast_and_how_long_yet() -> None:
    assert progress_line(NOW) == (
        "step 575/5000 (11%): loss 2.1235, lr 0.000300 · 2.5 steps/s · 41.0k tokens/s · "
        "0:29:30 left · 8.5GB/16GB"
    )


def test_a_line_leaves_out_what_is_not_known() -> None:
    assert progress_line(Progress(step=3)) == "step 3"


def test_bars_show_the_epoch_all_steps_and_what_interrupts_them() -> None:
    busy = replace(NOW, busy="evaluate", busy_s=12.0, busy_usual_s=20.0)
    epoch, whole, evaluation, values = (line.plain for line in progress_lines(busy, 79))
    assert (
        epoch[2:] == "Epoch 2/10 ━━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━  15%    75/500 • 0:00:30 < 0:02:50"
    )
    assert (
        whole == "  all steps  ━━━╸━━━━━━━━━━━━━━━━━━━━━━━━━━━  11%  575/5000 • 0:04:00 < 0:29:30"
    )
    assert evaluation[2:].startswith("evaluate   ━━━━━━━━━━━━━━")
    assert evaluation.endswith("• 0:00:12 < 0:00:08")
    assert values == "  loss 2.1235 • lr 0.000300 • 2.5 steps/s • 41.0k tokens/s • 8.5GB/16GB"


def test_the_last_epoch_ends_where_the_steps_end() -> None:
    now = replace(NOW, total_steps=1200, step=1010, epoch=3, step_in_epoch=10)
    assert "5%" in progress_lines(now, 79)[0].plain
    assert " 10/200 " in progress_lines(now, 79)[0].plain


def test_a_training_without_known_length_has_a_bar_without_end() -> None:
    (bar, _) = progress_lines(Progress(step=7, train_s=3.0, metrics={"loss": 1.0}), 60)
    assert "Epoch 1 " in bar.plain
    assert bar.plain.endswith("7 • 0:00:03 < -:--:--")


TEXTS = st.sampled_from(["", "x", "a\nb", "━" * 200])
numbers = st.one_of(st.none(), st.integers(-3, 10**12), st.floats(allow_nan=True))


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(NOW.to_json())), st.one_of(numbers, TEXTS)),
    st.integers(20, 160),
    st.booleans(),
)
def test_whatever_is_published_is_drawn_within_the_terminal(
    changes: dict[str, object], width: int, plain: bool
) -> None:
    read = from_json({**NOW.to_json(), **changes})
    if read is not None:
        lines = progress_lines(read, width, plain=plain)
        assert max(line.cell_len for line in lines) <= width
        assert isinstance(progress_line(read), str)


# ---- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 2.0, "2.0000"),
        ("loss", 1e-5, "1e-05"),
        ("val_loss", 0.12346, "0.1235"),
        ("lr", 0.000123456, "0.000123"),
        ("lr", 4.28e-8, "4.28e-08"),
        ("lr", 0.0, "0.000000"),
        ("grad_norm", 0.82634, "0.8263"),
        ("tokens", 16384, "16384"),
        ("loss", math.nan, "nan"),
    ],
)
def test_a_number_is_written_as_its_name_asks(name: str, value: float, text: str) -> None:
    assert metric_text(name, value) == text


def test_nothing_is_whole_before_it_is() -> None:
    assert [percent(done, 1000) for done in (0, 9, 10, 999, 1000)] == [
        *("0%", "0%", "1%", "99%", "100%")
    ]


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (12.34, "steps/s", "12.3 steps/s"),
        (0.25, "steps/s", "4.0 s/step"),
        (173.2, "samples/s", "173 samples/s"),
        (41_000, "tokens/s", "41.0k tokens/s"),
        (2.5e6, "tokens/s", "2.5M tokens/s"),
    ],
)
def test_a_rate_is_written_in_few_digits(rate: float, unit: str, text: str) -> None:
    assert rate_text(rate, unit) == text


# ---- curves --------------------------------------------------------------------------------


def test_a_sparkline_goes_from_the_lowest_block_to_the_highest() -> None:
    assert sparkline(range(7), 8) == "▁▂▃▄▅▆▇"
    assert sparkline(range(14), 7) == "▁▂▃▄▅▆▇"
    assert sparkline([1.0, math.nan, 2.0], 8) == "▁▇"
    assert sparkline([3.0, 3.0], 8) == "▄▄"
    assert sparkline(range(8), 8, plain=True).isascii()
    assert sparkline([math.inf], 8) == ""


def test_a_chart_is_one_connected_curve() -> None:
    assert chart([0, 1, 2, 3], 2, 1) == ["⡠⠊"]
    assert chart([3, 0], 1, 2) == ["⡇", "⢸"]
    assert chart([0, 3], 2, 1) == ["⡠⠊"]


def test_condensing_takes_every_value_into_account() -> None:
    assert condensed([1, 3, 5, 7], 2) == [2, 6]


# ---- whole screens -------------------------------------------------------------------------


def a_view(**status: object) -> View:
    values = [4.0 * math.exp(-step / 80) + 0.1 * math.sin(step) for step in range(300)]
    series = {
        name: Series(values, values[-1], min(values), max(values))
        for name in ("lr", "loss", "grad_norm", "a_metric_with_a_long_name")
    }
    return View(
        name="quickstart",
        status=RunStatus(
            **{
                "name": "quickstart",
                "path": Path("/runs/quickstart"),
                "state": "running",
                "link": 3,
                "job": "4711",
                "node": "gpu017",
                "time_left_s": 3909.0,
                "queued": ["4712", "4713"],
                **status,
            }
        ),
        progress=NOW,
        series=series,
        checkpoints=tuple(
            CheckpointShown(
                step=step,
                epoch=0,
                link=1,
                bytes=10**9,
                created=0.0,
                seconds=0.8,
                verified="as written",
                best=step == 100,
                pinned=step == 400,
                metric=None,
                kept=(),
            )
            for step in (500, 400, 300, 200, 100)
        ),
        log=tuple(f"11-30 00:18:33 [train] line {n} {'long ' * 40}" for n in range(100)),
    )


@pytest.mark.parametrize("plain", [False, True], ids=["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("height", [5, 10, 20, 24, 40, 60])
def test_a_screen_fills_the_terminal_and_no_more(width: int, height: int, plain: bool) -> None:
    lines = screen_lines(a_view(why="a reason\nof two lines"), width, height, plain=plain)
    assert len(lines) == height
    assert max(line.cell_len for line in lines) <= width
    text = [line.plain for line in lines]
    assert "quickstart" in text[0] and "running" in text[0]
    assert "Epoch 2/10" in text[3]
    assert "q leaves" in text[-1]


def test_the_header_says_run_state_link_job_node_and_what_is_left() -> None:
    head = screen_lines(a_view(), 100, 40)[0].plain
    assert head.startswith(" quickstart  running · link 3 · job 4711 · gpu017 · 2 queued  ")
    assert head.endswith("  1:05:09 left in this job ")


def test_a_tall_screen_shows_the_best_checkpoint_among_the_newest() -> None:
    text = "\n".join(line.plain for line in screen_lines(a_view(), 100, 60))
    assert "CHECKPOINTS  5 kept" in text
    assert [f"step {step} ·" in text for step in (500, 400, 300, 200, 100)] == [
        *(True, True, True, False, True)
    ]
    assert "1.0 GB in 0.8 s · verified · best" in text
    assert "1.0 GB in 0.8 s · verified · pinned" in text


def test_a_screen_shows_the_machine_and_the_newest_log_lines() -> None:
    text = "\n".join(line.plain for line in screen_lines(a_view(), 100, 40))
    assert "8.5GB/16GB · 7.1 GB in tensors · 97% busy · 312 W" in text
    assert "p50 400 ms  p95 450 ms  p99 1.25 s  data wait 3%" in text
    assert "line 99 " in text


def test_a_run_without_a_step_has_a_screen_too() -> None:
    text = "\n".join(line.plain for line in screen_lines(View(name="new"), 80, 24))
    assert "new" in text
    assert "no step yet" in text
