"""Ranks that agree on the step at which they all stop."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bug_links import in_children
from torch import distributed as dist

from hpcresume.scheduler.environment import RankPlace
from hpcresume.training.distributed import Agreement, Ranks

#: Where rank 1 begins to wish for the stop.
WISHED = 100


def steps(rank: int, meeting: Path, report: Path, step_s: float) -> None:
    """Some hundred steps of a rank, until both agree to stop; at which one that was."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(meeting), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    agreement = Agreement(Ranks(RankPlace(rank=rank, world_size=2)))
    for step in range(1, 1000):
        wish = rank == 1 and step >= WISHED
        stop, _ = agreement.exchange(step, stop=wish, save=False, step_s=step_s)
        if stop:
            report.write_text(json.dumps(step))
            break
    agreement.settle()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("step_s", "latest"),
    [
        # One boundary to begin the exchange, and the next to read it.
        pytest.param(1.0, WISHED + 2, id="long steps"),
        pytest.param(1e-5, WISHED + 64 + 2, id="skipped ones, behind which long ones may come"),
    ],
)
def test_all_ranks_stop_at_one_step_soon_after_one_of_them_wishes_it(
    tmp_path: Path, step_s: float, latest: int
) -> None:
    reports = [tmp_path / "0", tmp_path / "1"]
    meeting = tmp_path / "meeting"
    in_children([(steps, (n, meeting, report, step_s)) for n, report in enumerate(reports)])
    first, second = (json.loads(report.read_text()) for report in reports)
    assert WISHED < first == second <= latest
