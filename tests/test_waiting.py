"""Why a job waits, in words: the same wherever it is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_run import FakeSlurm, Said, make_run

from hpcresume.observe.jobs import LivingJobs
from hpcresume.observe.overview import OverviewTail
from hpcresume.scheduler.waiting import waiting_words
from hpcresume.story import token_prefix


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "the nodes it needs are busy (Resources)"),
        (
            "ReqNodeNotAvail, UnavailableNodes:gpu01",
            "nodes that it needs are down, or reserved for maintenance "
            "(ReqNodeNotAvail, UnavailableNodes:gpu01)",
        ),
        (
            "QOSMaxGRESPerUser",
            "you use as much of GPUs as its QOS allows; it starts when a job of yours ends "
            "(QOSMaxGRESPerUser)",
        ),
        (
            "AssocGrpCPUMinutesLimit",
            "your account has used up what it may of cores (AssocGrpCPUMinutesLimit)",
        ),
        (
            "AssocGrpNodeLimit",
            "your account uses as much of nodes as it may; it starts when others end "
            "(AssocGrpNodeLimit)",
        ),
        (
            "QOSMaxNodePerJobLimit",
            "it asks for more nodes than its QOS gives a job: it will never start like this "
            "(QOSMaxNodePerJobLimit)",
        ),
        (
            "AssocGrpCPURunMinutesLimit",
            "your account uses as much of cores as it may; it starts when others end "
            "(AssocGrpCPURunMinutesLimit)",
        ),
        (
            "QOSMinGRES",
            "its QOS wants its jobs to ask for more GPUs: it will never start like this "
            "(QOSMinGRES)",
        ),
        (
            "QOSMinCpuNotSatisfied",
            "its QOS wants its jobs to ask for more cores: it will never start like this "
            "(QOSMinCpuNotSatisfied)",
        ),
        ("NewInSlurm99", "NewInSlurm99"),
        ("", ""),
    ],
)
def test_a_reason_of_slurm_has_words_and_an_unknown_one_stays(reason: str, words: str) -> None:
    assert waiting_words(reason) == words


def test_status_why_and_the_page_say_the_same(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCRESUME_RUNS", str(tmp_path / "runs"))
    run = make_run(tmp_path / "runs", cluster="slurm")
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    token = token_prefix(run.identify()["id"])
    slurm.program("squeue", f"echo '7|PENDING|Priority||N/A|N/A|{token}1'")
    words = "other jobs are before it (Priority)"
    row = json.loads(said("status", "--json")[1])["runs"][0]
    assert (row["why"], row["reason"]) == (words, "Priority")
    assert words in said("why", "toy")[1].replace("\n", " ")
    (shown,) = (
        OverviewTail(tmp_path / "runs", LivingJobs({"PATH": slurm.path})).look().runs.values()
    )
    assert shown.to_json()["why"] == words
