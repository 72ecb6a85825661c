"""Why a job waits: Slurm's reasons in words, for all who show them.

Slurm has more than a hundred of them, most of which are limits whose names follow a pattern. One
that nobody knows is shown as Slurm says it.
"""

from __future__ import annotations

import re

_NEVER = "it will never start like this"

_REASONS = {
    "Resources": "the nodes it needs are busy",
    "Priority": "other jobs are before it",
    "Dependency": "the job before it has not ended",
    "DependencyNeverSatisfied": f"the job that it was to follow has gone wrong: {_NEVER}",
    "BeginTime": "its start was put off",
    "JobHeldUser": "its user holds it back: `scontrol release` lets it go",
    "JobHeldAdmin": "an administrator holds it back",
    "JobArrayTaskLimit": "its array runs as many tasks as it may",
    "JobLaunchFailure": "it could not be started, and is held back",
    "launch failed requeued held": "it could not be started, and is held back",
    "NodeDown": "a node that it needs is down",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionNodeLimit": f"it asks for more nodes than the partition gives: {_NEVER}",
    "PartitionTimeLimit": f"it asks for more time than the partition gives: {_NEVER}",
    "PartitionConfig": f"it asks for what the partition does not give: {_NEVER}",
    "AccountNotAllowed": f"your account may not use the partition: {_NEVER}",
    "QOSNotAllowed": f"its QOS may not use the partition: {_NEVER}",
    "BadConstraints": f"no node is as it asks for: {_NEVER}",
    "InvalidAccount": f"its account is not valid: {_NEVER}",
    "InvalidQOS": f"its QOS is not valid: {_NEVER}",
    "ReqNodeNotAvail": "nodes that it needs are down, or reserved for maintenance",
    "Reservation": "its reservation has not begun",
    "ReservationDeleted": "its reservation is gone",
    "Licenses": "a licence that it needs is taken",
    "Prolog": "its nodes are being prepared",
    "Cleaning": "its last start is being cleaned up",
    "AssocMaxJobsLimit": "your account runs as many jobs as it may; it starts when one ends",
    "AssocGrpJobsLimit": "your account runs as many jobs as it may; it starts when one ends",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as this QOS allows; it starts when one ends",
    "QOSGrpJobsLimit": "its QOS runs as many jobs as it may; it starts when one ends",
    "MaxJobsPerAccount": "your account runs as many jobs as it may; it starts when one ends",
    "DriverGone": "nobody is there to start it",
}

_LIMIT = re.compile(
    r"(?P<whose>Assoc|QOS)?(?P<bound>Grp|Max|Min)"
    r"(?P<what>Cpu|CPU|GRES|Mem|Memory|Node|Billing|BB|Energy|License|WallDuration|Wall)s?"
    r"(?P<time>(?:Run)?Minutes|Mins)?"
    r"(?P<per>PerUser|PerAccount|PerJob|PerNode)?(?:Limit|NotSatisfied)?"
)
_WHAT = {
    "Cpu": "cores",
    "CPU": "cores",
    "GRES": "GPUs",
    "Mem": "memory",
    "Memory": "memory",
    "Node": "nodes",
    "Billing": "billed resources",
    "BB": "burst buffer",
    "Energy": "energy",
    "License": "licences",
    "Wall": "time",
    "WallDuration": "time",
}


def waiting_words(reason: str) -> str:
    """`the nodes it needs are busy (Resources)`; Slurm's own word where no other is known."""
    code = reason.partition(",")[0].strip().removesuffix(":")
    words = _REASONS.get(code) or _limit_words(code)
    if words is None:
        return reason
    return f"{words} ({reason})"


def _limit_words(code: str) -> str | None:
    limit = _LIMIT.fullmatch(code)
    if limit is None:
        return None
    owner = "its QOS" if limit["whose"] == "QOS" else "your account"
    what = _WHAT[limit["what"]]
    if limit["bound"] == "Min":
        return f"{owner} wants its jobs to ask for more {what}: {_NEVER}"
    if limit["per"] in ("PerJob", "PerNode"):
        return f"it asks for more {what} than {owner} gives a job: {_NEVER}"
    # What running jobs may still use (RunMinutes) is free again when they end.
    if limit["time"] in ("Minutes", "Mins") or what in ("time", "energy"):
        return f"{owner} has used up what it may of {what}"
    if limit["per"] == "PerUser":
        return f"you use as much of {what} as {owner} allows; it starts when a job of yours ends"
    return f"{owner} uses as much of {what} as it may; it starts when others end"
