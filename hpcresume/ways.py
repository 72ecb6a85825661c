"""How the jobs of a run follow each other: chosen when a job is submitted, and frozen in the run.

What the configuration names is not argued with. With `chain.mode: auto` the cluster is asked once,
for what it tells without a job; the answer stands in the run's newest `submitted` record, so that
every link goes the same way.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from hpcresume.config import RunConfig, node_range
from hpcresume.journal import read_submissions
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.doctor.checks_slurm import submit_slots
from hpcresume.scheduler.doctor.facts import Mode, SlurmFacts, Wishes
from hpcresume.scheduler.doctor.questions import ask_slurm
from hpcresume.scheduler.doctor.way import (
    Way,
    choose_way,
    circumstances,
)

#: How long the cluster's clients may take; what has not answered by then is not known.
_ASK_S = 5.0
_MODES = typing.get_args(Mode)


def find_way(config: RunConfig, cluster: str, environ: Mapping[str, str]) -> Way:
    """The way for the jobs of a new submission. Asks Slurm where that has a say."""
    wishes = _wishes(config, cluster)
    facts = SlurmFacts()
    if cluster == "slurm" and wishes.mode == "auto":
        facts = ask_slurm(environ, timeout_s=_ASK_S)
    slots = submit_slots(facts, wishes)
    return choose_way(wishes, circumstances(facts, None, slots[0] if slots else None, wishes))


def is_default(way: Way, config: RunConfig) -> bool:
    """Whether it is what everybody gets who neither names a way nor meets a limit."""
    return way.mode == "prequeue" and way.ahead == config.chain.ahead


def way_of(run: RunDir, config: RunConfig) -> Way:
    """The way that a run's jobs go: as configured, else as chosen at the newest submission."""
    if config.chain.mode == "auto":
        for record in reversed(read_submissions(run)):
            found = _from_json(record.get("way")) if record["kind"] == "submitted" else None
            if found is not None:
                return found
    wishes = _wishes(config, "local")
    return choose_way(wishes, circumstances(SlurmFacts(), None, None, wishes))


def to_json(way: Way) -> dict[str, Any]:
    """For the record of a submission."""
    return {"mode": way.mode, "ahead": way.ahead, "reasons": list(way.reasons)}


def _from_json(value: Any) -> Way | None:
    if not isinstance(value, dict) or value.get("mode") not in _MODES:
        return None
    ahead, reasons = value.get("ahead"), value.get("reasons")
    if type(ahead) is not int or not 0 <= ahead <= 8 or not isinstance(reasons, list):
        return None
    return Way(mode=value["mode"], ahead=ahead, reasons=tuple(map(str, reasons)))


def _wishes(config: RunConfig, cluster: str) -> Wishes:
    return Wishes(
        cluster=cluster,
        mode=config.chain.mode,
        ahead=config.chain.ahead,
        nodes=node_range(config.scheduler.nodes)[0],
        partition=config.scheduler.partition,
        account=config.scheduler.account,
        qos=config.scheduler.qos,
    )
