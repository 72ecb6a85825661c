"""The way in which a run's jobs follow each other: as configured, or as chosen and frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_run import make_run

from hpcresume import ways
from hpcresume.config import RunConfig, from_mapping
from hpcresume.journal import Journal
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.doctor.facts import SlurmFacts, Wishes
from hpcresume.scheduler.doctor.way import Way, circumstances
from hpcresume.successors import job_spec

REQUEUE: Way = Way(mode="requeue", ahead=0, reasons=("you may have 1 job at a time",))


def config(**chain: Any) -> RunConfig:
    return from_mapping({"chain": chain}, "test")


def submitted(run: RunDir, way: Any) -> None:
    journal = Journal(run.submissions, link=0, job=None)
    journal.write("submitted", after_link=0, way=way)
    journal.close()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path)


def test_a_run_that_was_never_asked_about_queues_ahead(run: RunDir) -> None:
    way = ways.way_of(run, config(ahead=3))
    assert (way.mode, way.ahead) == ("prequeue", 3)
    assert ways.is_default(way, config(ahead=3))


def test_the_way_of_the_newest_submission_holds(run: RunDir) -> None:
    submitted(run, ways.to_json(Way(mode="prequeue", ahead=1, reasons=("because",))))
    submitted(run, ways.to_json(REQUEUE))
    assert ways.way_of(run, config()) == REQUEUE
    assert not ways.is_default(REQUEUE, config())


def test_the_way_that_the_configuration_names_wins(run: RunDir) -> None:
    submitted(run, ways.to_json(REQUEUE))
    assert ways.way_of(run, config(mode="resubmit")).mode == "resubmit"
    assert ways.way_of(run, config(mode="drive")).mode == "drive"


@pytest.mark.parametrize(
    "told",
    [
        *(None, 7, "prequeue", {}, {"mode": "prequeue"}),
        {"mode": "fly", "ahead": 1, "reasons": []},
        {"mode": "prequeue", "ahead": 99, "reasons": []},
        {"mode": "prequeue", "ahead": True, "reasons": []},
        {"mode": "prequeue", "ahead": 1, "reasons": "none"},
    ],
    ids=str,
)
def test_a_way_that_makes_no_sense_is_passed_over(run: RunDir, told: Any) -> None:
    submitted(run, ways.to_json(REQUEUE))
    submitted(run, told)
    assert ways.way_of(run, config()) == REQUEUE


def test_jobs_may_be_requeued_where_that_is_the_way(run: RunDir) -> None:
    assert not job_spec(run, config(), lead_s=30).allow_requeue
    assert job_spec(run, config(), lead_s=30, way=REQUEUE).allow_requeue
    submitted(run, ways.to_json(REQUEUE))
    assert job_spec(run, config(), lead_s=30).allow_requeue


def partition(**fields: str) -> dict[str, str]:
    return {"PartitionName": "main", "Default": "YES", "Nodes": "n[1-4]", **fields}


@pytest.mark.parametrize(
    ("partitions", "wanted", "allowed"),
    [
        ([], None, None),
        ([partition()], None, True),
        ([partition(AllocNodes="ALL")], None, True),
        ([partition(AllocNodes="login1,login2")], None, False),
        ([partition(AllocNodes="login1,n[3-9]")], None, True),
        ([partition(AllocNodes="login1")], "gpu", None),
        ([partition(AllocNodes="login1"), partition(PartitionName="gpu")], "gpu,main", True),
    ],
    ids=["unknown", "silent", "all", "login only", "some", "another", "one of two"],
)
def test_partitions_tell_whether_their_nodes_may_submit(
    partitions: list[dict[str, str]], wanted: str | None, allowed: bool | None
) -> None:
    facts, wishes = SlurmFacts(partitions=tuple(partitions)), Wishes(partition=wanted)
    # That they are let is no proof that sbatch works there.
    refused = None if allowed is not False else False
    assert circumstances(facts, None, None, wishes).sbatch_on_nodes is refused
