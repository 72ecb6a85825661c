"""Judges what a small job saw on a compute node. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hpcresume.scheduler import slurm_text
from hpcresume.scheduler.doctor.checks_machine import judge_python
from hpcresume.scheduler.doctor.facts import Finding, ProbeFacts, Wishes, failure, good, warning
from hpcresume.scheduler.doctor.words import ASK_ADMIN, clock


def judge_probe(facts: ProbeFacts, wishes: Wishes) -> Iterator[Finding]:
    """What a small job saw on a compute node."""
    job = f"job {facts.job}" if facts.job else "the probe job"
    if facts.left_behind:
        yield warning("probe", f"{job} could not be cancelled", f"scancel {facts.job}")
    if facts.invisible:
        yield failure(
            "runs folder",
            f"{job} did not find it on its node",
            "choose one that all nodes share (--runs or $HPCRESUME_RUNS)",
        )
    elif facts.refused:
        yield failure("probe", facts.complaint, "change what is asked for (-p, -A, --sbatch)")
    elif facts.complaint:
        yield warning("probe", facts.complaint, "try again later, or in another partition (-p)")
    if not facts.answer:
        return
    node = facts.answer.get("node", "a node")
    yield good("probe", f"{job} ran on {node}, {facts.waited_s:.0f} s after its submission")
    if not facts.invisible:
        yield good("runs folder", f"{node} sees it and may write")
    yield _node_python(facts)
    if facts.torch is not None:
        yield from judge_python(facts.torch, wishes, on_node=True)
    yield from _node_clients(facts, wishes)
    if facts.skew_s is not None:
        yield clock(
            "node clock",
            f"{node}'s clock",
            facts.skew_s,
            harm="a job may end before it saves",
            remedy="raise chain.lead_s by as much",
        )


def _node_python(facts: ProbeFacts) -> Finding:
    own, version = facts.answer.get("own_python", ""), facts.answer.get("own_version", "")
    others = facts.answer.get("path_python") or "none"
    if not version:
        return failure(
            "node python",
            f"{own} is not there (on PATH: {others})",
            "install the environment where all nodes see it",
        )
    if facts.answer.get("hpcresume_code") != "0":
        return failure(
            "node python",
            f"{own} ({version}) cannot import hpcresume: {facts.answer.get('hpcresume', '')}",
            "install the environment where all nodes see it",
        )
    other = "" if others == own else f"; on PATH: {others}"
    return good("node python", f"{version}, {own}{other}")


def _node_clients(facts: ProbeFacts, wishes: Wishes) -> Iterator[Finding]:
    if facts.can("sbatch") is False:
        yield warning(
            "node sbatch",
            f"does not work there: {_said(facts, 'sbatch')}",
            f"{ASK_ADMIN} for Slurm's clients on compute nodes; until then see the way below",
        )
    elif facts.can("after") is False:
        yield warning(
            "node sbatch",
            f"takes no job that waits for another: {_said(facts, 'after')}",
            "submit with --set chain.mode=resubmit",
        )
    elif facts.can("sbatch"):
        yield good("node sbatch", "a job may submit the next one")
    if facts.can("scontrol") is False:
        yield warning(
            "node scontrol",
            f"does not work there: {_said(facts, 'scontrol')}",
            f"{ASK_ADMIN} for Slurm's clients on compute nodes",
        )
    if facts.can("srun") is False:
        yield failure("node srun", "not on PATH there: no rank could start", f"{ASK_ADMIN} for it")


def _said(facts: ProbeFacts, program: str) -> str:
    """The complaint of a client on the node."""
    if facts.answer.get(f"{program}_code") == "127":
        return "not on PATH"
    return slurm_text.words(facts.answer.get(program, "")) or "no answer"
