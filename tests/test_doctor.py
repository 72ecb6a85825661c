"""`doctor`: what is judged as what, what is asked and how it fails, and what it looks like."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import pytest
from oracle import ENVIRON
from slurm_cluster import SlurmCluster, missing, wait_until

from hpcresume.config import SchedulerConfig
from hpcresume.scheduler.doctor import disk, questions, texts
from hpcresume.scheduler.doctor.checks_machine import judge_files, judge_local, judge_python
from hpcresume.scheduler.doctor.checks_node import judge_probe
from hpcresume.scheduler.doctor.checks_slurm import judge_slurm, submit_slots
from hpcresume.scheduler.doctor.facts import (
    Complaint,
    FileFacts,
    Finding,
    LocalFacts,
    ProbeFacts,
    PythonFacts,
    Quota,
    SlurmFacts,
    Wishes,
)
from hpcresume.scheduler.doctor.probe import Probe, ask_node, small
from hpcresume.scheduler.doctor.verdict import judge_way, tally
from hpcresume.scheduler.doctor.way import Circumstances, Way, choose_way, requeue_hold_s

# ---- texts

CONFIG = """\
Configuration data as of 2026-11-21T16:47:56
AccountingStorageEnforce = associations,limits
AccountingStorageType   = accounting_storage/slurmdbd
AuthInfo                = socket=/run/munge/socket,cred_expire=10
JobRequeue              = 1
KillWait                = 30 sec
MinJobAge               = 300 sec
OverTimeLimit           = 0 min
PreemptMode             = OFF
PreemptType             = preempt/none
ProctrackType           = proctrack/cgroup
RequeueExit             = (null)
SLURM_VERSION           = 22.05.8

Cgroup Support Configuration:
CgroupPlugin            = cgroup/v1

Slurmctld(primary) at cluster is UP
"""


def test_the_settings_of_scontrol_are_read_and_empty_ones_left_out() -> None:
    config = texts.parse_config(CONFIG)
    assert config["KillWait"] == "30 sec"
    assert config["AuthInfo"] == "socket=/run/munge/socket,cred_expire=10"
    assert config["CgroupPlugin"] == "cgroup/v1"
    assert "RequeueExit" not in config


def test_rows_of_another_form_are_passed_over() -> None:
    rows = texts.parse_rows("a|1\nsacctmgr: something|else|here\n\nb|\n", ("Name", "Limit"))
    assert rows == ({"Name": "a", "Limit": "1"}, {"Name": "b", "Limit": ""})


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("22.05.8", (22, 5, 8)),
        ("26.11.0-0rc1", (26, 11, 0)),
        ("2.13.0+cpu", (2, 13, 0)),
        ("?", ()),
        (None, ()),
    ],
)
def test_a_version_is_its_leading_numbers(text: str | None, version: tuple[int, ...]) -> None:
    assert texts.version_of(text) == version


@pytest.mark.parametrize(
    ("text", "codes"),
    [("1,3-5", {1, 3, 4, 5}), ("75", {75}), ("", set()), (None, set()), ("x,7-y", set())],
)
def test_exit_codes_are_numbers_and_ranges(text: str | None, codes: set[int]) -> None:
    assert texts.exit_codes(text) == codes


def test_a_path_lies_on_the_innermost_mount_that_was_made_last() -> None:
    mounts = (
        "/dev/vda / ext4 rw 0 0\nserver:/h /home nfs4 rw 0 0\n"
        "fs /home/my\\040data lustre rw 0 0\ntmpfs /home nfs rw 0 0\nbroken\n"
    )
    assert texts.mount_of(PurePath("/home/ada"), mounts) == ("/home", "nfs")
    assert texts.mount_of(PurePath("/home/my data/x"), mounts) == ("/home/my data", "lustre")
    assert texts.mount_of(PurePath("/homes"), mounts) == ("/", "ext4")
    assert texts.mount_of(PurePath("/homes"), "") == ("", "")


QUOTA = """\
Disk quotas for user ada (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
server:/home     1000*    900    2000       0      10       0       0       0
"""
LFS_QUOTA = """\
           /lustre
                     1000       0    4000       -      90      50     100       -
"""


def test_quotas_are_read_from_quota_and_lfs() -> None:
    assert texts.parse_quota(QUOTA) == (Quota(unit="bytes", used=1000 << 10, limit=2000 << 10),)
    assert texts.parse_quota(LFS_QUOTA) == (
        Quota(unit="bytes", used=1000 << 10, limit=4000 << 10),
        Quota(unit="files", used=90, limit=100),
    )
    soft = LFS_QUOTA.replace("4000", "0").replace("0    4000", "0 0").replace("100 ", "0 ")
    assert texts.parse_quota(soft) == (Quota(unit="files", used=90, limit=50),)
    assert texts.parse_quota("Disk quotas for user ada (uid 1000): none\n") == ()


# ---- judging Slurm

MAIN = {
    "PartitionName": "main",
    "Default": "YES",
    "State": "UP",
    "MaxTime": "1-00:00:00",
    "DefaultTime": "01:00:00",
    "TotalNodes": "4",
    "MaxNodes": "UNLIMITED",
    "AllocNodes": "ALL",
    "PreemptMode": "OFF",
    "GraceTime": "0",
    "QoS": "N/A",
}
OTHER = {**MAIN, "PartitionName": "other", "Default": "NO"}
ASSOCIATION = {
    "Account": "lab",
    "Partition": "",
    "DefaultQOS": "normal",
    "MaxSubmit": "",
    "GrpSubmit": "",
}
NORMAL = {"Name": "normal", "MaxSubmitPU": "", "MaxSubmitPA": "", "GrpSubmit": ""}
GOOD = SlurmFacts(
    config=texts.parse_config(CONFIG),
    partitions=(MAIN, OTHER),
    associations=(ASSOCIATION,),
    qos=(NORMAL,),
)
WISHES = Wishes(time_s=7200)


def with_config(**changes: str) -> SlurmFacts:
    return replace(GOOD, config={**GOOD.config, **changes})


def with_main(**changes: str) -> SlurmFacts:
    return replace(GOOD, partitions=({**MAIN, **changes}, OTHER))


def preempting(mode: str, grace_s: int) -> SlurmFacts:
    facts = with_config(PreemptType="preempt/qos")
    main = {**MAIN, "PreemptMode": mode, "GraceTime": str(grace_s)}
    return replace(facts, partitions=(main, OTHER))


def limited(number: int, **of: str) -> SlurmFacts:
    return replace(GOOD, associations=({**ASSOCIATION, "MaxSubmit": str(number), **of},))


def complaining(question: str, words: str, *, silent: bool = False) -> SlurmFacts:
    told = {"config": {} if question == "config" else GOOD.config}
    return replace(GOOD, complaints={question: Complaint(words=words, silent=silent)}, **told)


def found(findings: Iterator[Finding], name: str) -> Finding | None:
    return next((finding for finding in findings if finding.name == name), None)


def test_a_cluster_without_fault_gives_good_findings_alone() -> None:
    findings = list(judge_slurm(GOOD, WISHES))
    assert [finding.name for finding in findings] == [
        *("clients", "version", "partition", "MaxTime", "MaxSubmitJobs", "KillWait"),
        *("OverTimeLimit", "preemption", "JobRequeue", "RequeueExit", "proctrack"),
        *("accounting", "MinJobAge"),
    ]
    assert {finding.grade for finding in findings} == {"good"}
    assert {finding.remedy for finding in findings} == {""}


REQUEUE = replace(WISHES, mode="requeue")
NO_ACCOUNTING = with_config(AccountingStorageType="accounting_storage/none")
JUDGED: list[tuple[str, SlurmFacts, Wishes, str, str, str]] = [
    # id, facts, wishes, check, grade, a part of the line
    ("no sbatch", SlurmFacts(missing=("sbatch",)), WISHES, "Slurm", "failure", "--cluster local"),
    (
        "no sbatch, local",
        SlurmFacts(missing=("sbatch",)),
        replace(WISHES, cluster="local"),
        *("Slurm", "good", "not on this machine"),
    ),
    (
        "local by choice",
        SlurmFacts(missing=("sbatch",)),
        replace(WISHES, cluster="local", chosen=True),
        *("Slurm", "good", "not asked"),
    ),
    ("no scancel", replace(GOOD, missing=("scancel",)), WISHES, "clients", "failure", "scancel"),
    ("no sacct", replace(GOOD, missing=("sacct",)), WISHES, "clients", "warning", "sacct not on"),
    (
        "controller away",
        complaining("config", "Unable to contact slurm controller (connect failure)"),
        WISHES,
        *("controller", "failure", "try again later"),
    ),
    (
        "controller silent",
        complaining("config", "no answer in 10 s", silent=True),
        WISHES,
        *("controller", "warning", "no answer in 10 s"),
    ),
    (
        "nonsense",
        complaining("partitions", "an empty answer"),
        WISHES,
        *("controller", "warning", "compare with"),
    ),
    ("old", with_config(SLURM_VERSION="19.05.2"), WISHES, "version", "warning", "20.11"),
    ("odd version", with_config(SLURM_VERSION="next"), WISHES, "version", "warning", "next"),
    (
        "unknown partition",
        GOOD,
        replace(WISHES, partition="main,gpus"),
        *("partition", "failure", "no partition gpus"),
    ),
    ("down", with_main(State="DOWN"), WISHES, "partition", "failure", "DOWN"),
    ("no default", with_main(Default="NO"), WISHES, "partition", "failure", "main, other (-p)"),
    (
        "too many nodes",
        with_main(MaxNodes="2"),
        replace(WISHES, nodes=3),
        *("partition", "failure", "gives a job 2 nodes, not 3"),
    ),
    (
        "nodes of one of two",
        replace(GOOD, partitions=({**MAIN, "TotalNodes": "2"}, OTHER)),
        replace(WISHES, nodes=3, partition="main,other"),
        *("partition", "good", "main, other, 4 nodes"),
    ),
    (
        "down by name",
        replace(GOOD, partitions=(MAIN, {**OTHER, "State": "DRAIN"})),
        replace(WISHES, partition="other"),
        *("partition", "failure", "other: DRAIN"),
    ),
    ("alloc nodes", with_main(AllocNodes="login1"), WISHES, "AllocNodes", "warning", "login1"),
    (
        "too long",
        with_main(MaxTime="01:00:00"),
        WISHES,
        *("MaxTime", "failure", "--time 01:00:00 or less"),
    ),
    (
        "no end",
        with_main(MaxTime="UNLIMITED", DefaultTime="NONE"),
        Wishes(),
        *("MaxTime", "warning", "no time is asked for"),
    ),
    ("default time", GOOD, Wishes(), "MaxTime", "good", "01:00:00 where none is asked for"),
    (
        "longest of two",
        replace(GOOD, partitions=({**MAIN, "MaxTime": "UNLIMITED"}, {**OTHER, "MaxTime": "10"})),
        replace(WISHES, partition="other,main"),
        *("MaxTime", "good", "UNLIMITED in main"),
    ),
    ("too short", GOOD, Wishes(time_s=60), "MaxTime", "warning", "--time 00:03:00"),
    ("one job", limited(1), WISHES, "MaxSubmitJobs", "warning", "chain.mode=requeue"),
    ("two jobs", limited(2), WISHES, "MaxSubmitJobs", "warning", "chain.ahead=1"),
    ("three jobs", limited(3), WISHES, "MaxSubmitJobs", "good", "3 (MaxSubmit of account lab)"),
    ("two to requeue", limited(2), REQUEUE, "MaxSubmitJobs", "good", "2 (MaxSubmit"),
    (
        "no sacctmgr",
        replace(GOOD, missing=("sacctmgr",)),
        WISHES,
        *("MaxSubmitJobs", "warning", "not known"),
    ),
    (
        "sacctmgr fails",
        complaining("qos", "Access denied"),
        WISHES,
        *("MaxSubmitJobs", "warning", "Access denied"),
    ),
    ("short kill wait", with_config(KillWait="5 sec"), WISHES, "KillWait", "warning", "5 s from"),
    ("zero kill wait", with_config(KillWait="0 sec"), WISHES, "KillWait", "warning", "5 s from"),
    ("over time", with_config(OverTimeLimit="5 min"), WISHES, "OverTimeLimit", "good", "5 min"),
    (
        "over time for ever",
        with_config(OverTimeLimit="UNLIMITED"),
        WISHES,
        *("OverTimeLimit", "good", "without end"),
    ),
    ("preempted", preempting("REQUEUE", 60), WISHES, "preemption", "good", "90 s to save in"),
    (
        "preempted at once",
        replace(preempting("REQUEUE", 0), config={**preempting("", 0).config, "KillWait": "20"}),
        WISHES,
        *("preemption", "warning", "20 s to save in"),
    ),
    (
        "preempted for good",
        preempting("CANCEL", 60),
        REQUEUE,
        *("preemption", "warning", "chain.mode=prequeue"),
    ),
    ("preempted, prequeued", preempting("CANCEL", 60), WISHES, "preemption", "good", "CANCEL"),
    (
        "shortest grace of two",
        replace(
            preempting("REQUEUE", 60),
            partitions=({**MAIN, "PreemptMode": "REQUEUE", "GraceTime": "60"}, OTHER),
            config={**preempting("", 0).config, "KillWait": "10 sec"},
        ),
        replace(WISHES, partition="main,other"),
        *("preemption", "warning", "GraceTime=0: 10 s to save in"),
    ),
    (
        "partition is spared",
        preempting("OFF", 0),
        WISHES,
        *("preemption", "good", "no job is preempted"),
    ),
    (
        "mode without a type",
        with_main(PreemptMode="REQUEUE"),
        WISHES,
        *("preemption", "good", "no job is preempted"),
    ),
    ("suspended", preempting("SUSPEND", 0), WISHES, "preemption", "good", "waits where it is"),
    ("no requeue needed", with_config(JobRequeue="0"), WISHES, "JobRequeue", "good", "not needed"),
    ("no requeue", with_config(JobRequeue="0"), REQUEUE, "JobRequeue", "warning", "=prequeue"),
    ("requeue", GOOD, REQUEUE, "JobRequeue", "good", "held for 11 s"),
    ("requeue exit", with_config(RequeueExit="70-80"), WISHES, "RequeueExit", "warning", "75"),
    (
        "requeue exit hold",
        with_config(RequeueExitHold="8", RequeueExit="75"),
        WISHES,
        *("RequeueExit", "warning", "holds a job that leaves with 8"),
    ),
    ("another exit", with_config(RequeueExit="100"), WISHES, "RequeueExit", "good", "no exit code"),
    (
        "requeue exit, new",
        with_config(RequeueExit="75", SLURM_VERSION="23.11.1"),
        WISHES,
        *("RequeueExit", "good", "no exit code"),
    ),
    (
        "requeue exit, new, requeue",
        with_config(RequeueExit="75", SLURM_VERSION="23.11.1"),
        REQUEUE,
        *("RequeueExit", "warning", "requeues a job that leaves with 75"),
    ),
    (
        "linuxproc",
        with_config(ProctrackType="proctrack/linuxproc"),
        WISHES,
        *("proctrack", "warning", "chain.lead_s"),
    ),
    (
        "signal children",
        with_config(SignalChildrenProcesses="yes"),
        WISHES,
        *("proctrack", "warning", "SignalChildrenProcesses=yes"),
    ),
    ("no accounting", NO_ACCOUNTING, WISHES, "accounting", "warning", "none on this cluster"),
    ("no limits", NO_ACCOUNTING, WISHES, "MaxSubmitJobs", "good", "no limit"),
    (
        "sacct fails",
        complaining("records", "Unable to contact slurmdbd"),
        WISHES,
        *("accounting", "warning", "slurmdbd"),
    ),
    (
        "forgetful",
        replace(NO_ACCOUNTING, config={**NO_ACCOUNTING.config, "MinJobAge": "10 sec"}),
        WISHES,
        *("MinJobAge", "warning", "MinJobAge=300"),
    ),
    ("forgetful, recorded", with_config(MinJobAge="10 sec"), WISHES, "MinJobAge", "good", "10 s"),
]


@pytest.mark.parametrize("case", JUDGED, ids=[case[0] for case in JUDGED])
def test_slurm_is_judged(case: tuple[str, SlurmFacts, Wishes, str, str, str]) -> None:
    _, facts, wishes, name, grade, part = case
    finding = found(judge_slurm(facts, wishes), name)
    assert finding is not None
    assert finding.grade == grade
    assert part in f"{finding.what} {finding.remedy}"
    assert bool(finding.remedy) == (grade != "good")


def test_a_cluster_that_tells_nothing_is_one_line_and_no_guess() -> None:
    silent = Complaint(words="no answer in 10 s", silent=True)
    facts = SlurmFacts(complaints={"config": silent, "partitions": silent})
    assert [f.name for f in judge_slurm(facts, WISHES)] == ["clients", "controller"]


@pytest.mark.parametrize(
    ("associations", "qos", "wishes", "slots"),
    [
        ([{"MaxSubmit": "9"}], [], WISHES, (9, "MaxSubmit of account lab")),
        ([{"MaxSubmit": "9", "GrpSubmit": "4"}], [], WISHES, (4, "GrpSubmit of account lab")),
        ([{"MaxSubmit": "9"}], [{"MaxSubmitPU": "5"}], WISHES, (5, "MaxSubmitPU of QOS normal")),
        ([{}], [{"Name": "long", "MaxSubmitPU": "5"}], WISHES, None),
        ([{}], [{"Name": "long", "MaxSubmitPA": "5"}], replace(WISHES, qos="long"), (5, "")),
        ([{"Account": "a", "MaxSubmit": "1"}, {"Account": "b"}], [], WISHES, (1, "")),
        (
            [{"Account": "a", "MaxSubmit": "1"}, {"Account": "b"}],
            [],
            replace(WISHES, account="b"),
            None,
        ),
        ([{"Partition": "other", "MaxSubmit": "1"}], [], WISHES, None),
        (
            [{"Partition": "other", "MaxSubmit": "1"}],
            [],
            replace(WISHES, partition="other"),
            (1, ""),
        ),
    ],
)
def test_the_smallest_limit_that_applies_counts(
    associations: list[dict[str, str]],
    qos: list[dict[str, str]],
    wishes: Wishes,
    slots: tuple[int, str] | None,
) -> None:
    facts = replace(
        GOOD,
        associations=tuple({**ASSOCIATION, **row} for row in associations),
        qos=tuple({**NORMAL, **row} for row in qos),
    )
    told = submit_slots(facts, wishes)
    assert (told and told[0]) == (slots and slots[0])
    assert slots is None or (told is not None and slots[1] in told[1])


def test_a_limit_that_slurm_does_not_enforce_is_none() -> None:
    facts = limited(1)
    free = replace(facts, config={**facts.config, "AccountingStorageEnforce": "none"})
    assert submit_slots(facts, WISHES) is not None
    assert submit_slots(free, WISHES) is None


# ---- judging files and this machine

PLACE = FileFacts(
    root=Path("/home/ada/runs"),
    base=Path("/home/ada"),
    file_system="nfs4",
    mount="/home",
    fsync_s=0.002,
    free_bytes=10**12,
    total_bytes=2 * 10**12,
    free_inodes=10**8,
    quotas=(Quota(unit="bytes", used=1, limit=100),),
    skew_s=0.0,
)


def test_a_folder_without_fault_gives_good_findings_alone() -> None:
    findings = list(judge_files(PLACE, WISHES))
    assert [finding.name for finding in findings] == [
        *("folder", "fsync", "atomic rename", "exclusive names", "permissions"),
        *("free space", "inodes", "quota", "clock"),
    ]
    assert {finding.grade for finding in findings} == {"good"}


FILE_CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("place", {}, "folder", "good", "/home/ada (nfs4)"),
    ("rename", {}, "atomic rename", "good", "in one step"),
    ("fsync without a time", {"fsync_s": None}, "fsync", "good", "works"),
    ("refused", {"complaint": "Read-only"}, "folder", "failure", "/home/ada: Read-only"),
    ("memory", {"file_system": "tmpfs"}, "folder", "failure", "in this machine's memory"),
    ("mode", {"errors": {"permissions": "gets the mode 0777"}}, "permissions", "failure", "0777"),
    ("overlay", {"file_system": "overlay"}, "folder", "warning", "other nodes lack it"),
    ("slow", {"fsync_s": 2.5}, "fsync", "warning", "2.5 s"),
    ("no fsync", {"errors": {"fsync": "Input/output error"}}, "fsync", "failure", "Input/output"),
    *(
        (name, {"errors": {name: "Operation not permitted"}}, name, "failure", "not be safe")
        for name in ("atomic rename", "exclusive names", "permissions")
    ),
    ("open", {"open_to_others": True}, "folder mode", "warning", "chmod o-w '/home/ada'"),
    ("little space", {"free_bytes": 5 * 10**9}, "free space", "warning", "5.0 GB of 2.0 TB"),
    ("no space", {"free_bytes": 10**8}, "free space", "failure", "100.0 MB of 2.0 TB"),
    ("few files", {"free_inodes": 5_000}, "inodes", "warning", "5,000"),
    ("no files", {"free_inodes": 50}, "inodes", "failure", "50"),
    ("quota unknown", {"quotas": None}, "quota", "good", "none told"),
    ("no quota", {"quotas": ()}, "quota", "good", "none"),
    (
        "quota nearly full",
        {
            "quotas": (
                Quota(unit="bytes", used=9, limit=90),
                Quota(unit="files", used=95, limit=100),
            )
        },
        *("quota", "warning", "95 of 100 files used (95%)"),
    ),
    (
        "quota full",
        {"quotas": (Quota(unit="bytes", used=2 * 10**9, limit=10**9),)},
        *("quota", "failure", "2.0 GB of 1.0 GB used (200%)"),
    ),
    ("scratch", {"scratch": "$SCRATCH"}, "scratch", "warning", "old files may be removed"),
    ("clock ahead", {"skew_s": 7.0}, "clock", "warning", "7.0 s ahead of this machine's: ages"),
    ("clock behind", {"skew_s": -7.0}, "clock", "warning", "7.0 s behind"),
    ("clock nearly right", {"skew_s": 1.0}, "clock", "good", "to 1 s"),
]


@pytest.mark.parametrize("case", FILE_CASES, ids=[case[0] for case in FILE_CASES])
def test_the_folder_of_runs_is_judged(case: tuple[str, dict[str, Any], str, str, str]) -> None:
    _, changes, name, grade, part = case
    finding = found(judge_files(replace(PLACE, **changes), WISHES), name)
    assert finding is not None
    assert finding.grade == grade
    assert part in f"{finding.what} {finding.remedy}"
    assert bool(finding.remedy) == (grade != "good")


PYTHON = PythonFacts(
    executable="/env/bin/python",
    version="3.11.7",
    torch="2.13.0",
    cuda="12.8",
    gpus=("NVIDIA H100", "NVIDIA H100"),
    driver="570.1",
    cards=("NVIDIA H100", "NVIDIA H100"),
    import_s=2.0,
)
LOCAL = Wishes(cluster="local")
ON_GPUS = Wishes(cluster="local", gpus=True)
#: No torch of these can use a GPU.
WITHOUT = replace(PYTHON, gpus=())
PYTHON_CASES: list[tuple[str, PythonFacts, Wishes, str, str, str]] = [
    ("fine", PYTHON, ON_GPUS, "GPUs", "good", "2 x NVIDIA H100, driver 570.1"),
    ("torch", PYTHON, LOCAL, "torch", "good", "2.13.0, CUDA 12.8, imported in 2.0 s"),
    (
        "no torch",
        replace(PYTHON, torch=None, complaint="ModuleNotFoundError: No module named 'torch'"),
        LOCAL,
        *("torch", "failure", 'pip install "torch>=2.10"'),
    ),
    ("old torch", replace(PYTHON, torch="2.9.1"), LOCAL, "torch", "failure", "older than 2.10"),
    ("slow torch", replace(PYTHON, import_s=45.0), LOCAL, "torch", "warning", "45 s"),
    (
        "container",
        replace(PYTHON, torch=None),
        replace(LOCAL, container="train.sif"),
        *("torch", "good", "train.sif"),
    ),
    ("cpu torch", replace(WITHOUT, cuda=None), ON_GPUS, "GPUs", "failure", "for the CPU only"),
    ("old driver", WITHOUT, ON_GPUS, "GPUs", "failure", "torch (CUDA 12.8) cannot use 2 x"),
    ("old driver, unneeded", WITHOUT, LOCAL, "GPUs", "warning", "driver 570.1"),
    (
        "broken driver",
        replace(WITHOUT, cards=(), driver_complaint="Failed to initialize NVML"),
        LOCAL,
        *("GPUs", "warning", "NVML"),
    ),
    ("no GPU", replace(WITHOUT, cards=()), ON_GPUS, "GPUs", "failure", "none is here"),
    ("no GPU, unneeded", replace(WITHOUT, cards=()), LOCAL, "GPUs", "good", "none here"),
    (
        "no GPU on the login node",
        replace(WITHOUT, cards=()),
        Wishes(cluster="slurm", gpus=True),
        *("GPUs", "good", "--probe"),
    ),
]


@pytest.mark.parametrize("case", PYTHON_CASES, ids=[case[0] for case in PYTHON_CASES])
def test_torch_and_gpus_are_judged(
    case: tuple[str, PythonFacts, Wishes, str, str, str],
) -> None:
    _, facts, wishes, name, grade, part = case
    finding = found(judge_python(facts, wishes), name)
    assert finding is not None
    assert finding.grade == grade
    assert part in f"{finding.what} {finding.remedy}"
    assert bool(finding.remedy) == (grade != "good")


def test_a_local_backend_that_cannot_work_fails_only_where_it_is_wanted() -> None:
    broken = LocalFacts(complaint="/proc does not show processes")
    grades = [next(judge_local(broken, Wishes(cluster=c))).grade for c in ("local", "debug")]
    assert grades == ["failure", "warning"]
    assert next(judge_local(LocalFacts(), LOCAL)).grade == "good"


# ---- judging a compute node

ANSWER = {
    "node": "n1",
    "path_python": "/usr/bin/python3",
    "own_python": "/env/bin/python",
    "own_version": "3.11.7",
    "hpcresume_code": "0",
    "sbatch_code": "0",
    "after_code": "0",
    "scontrol_code": "0",
    "srun_code": "0",
}
PROBED = ProbeFacts(job="7", answer=ANSWER, skew_s=0.0, waited_s=4.0)


def answering(**changes: str) -> ProbeFacts:
    return replace(PROBED, answer={**ANSWER, **changes})


def test_a_compute_node_without_fault_gives_good_findings_alone() -> None:
    findings = list(judge_probe(PROBED, WISHES))
    assert [finding.name for finding in findings] == [
        *("probe", "runs folder", "node python", "node sbatch", "node clock")
    ]
    assert {finding.grade for finding in findings} == {"good"}
    assert "on PATH: /usr/bin/python3" in findings[2].what


def test_the_nodes_torch_is_judged_where_it_was_looked_at() -> None:
    names = [finding.name for finding in judge_probe(replace(PROBED, torch=PYTHON), WISHES)]
    assert names[2:5] == ["node python", "torch", "GPUs"]


NODE_CASES: list[tuple[str, ProbeFacts, str, str, str]] = [
    (
        "refused",
        ProbeFacts(complaint="Slurm refused", refused=True),
        "probe",
        "failure",
        "--sbatch",
    ),
    ("late", ProbeFacts(job="7", complaint="did not start"), "probe", "warning", "later"),
    ("left", replace(PROBED, left_behind="no answer"), "probe", "warning", "scancel 7"),
    ("invisible", ProbeFacts(job="7", invisible=True), "runs folder", "failure", "all nodes share"),
    ("no python", answering(own_version=""), "node python", "failure", "is not there"),
    (
        "no package",
        answering(hpcresume_code="1", hpcresume="No module named 'hpcresume'"),
        *("node python", "failure", "No module named 'hpcresume'"),
    ),
    ("no sbatch", answering(sbatch_code="127"), "node sbatch", "warning", "not on PATH"),
    (
        "sbatch refuses",
        answering(sbatch_code="1", sbatch="sbatch: error: Submission from here is off"),
        *("node sbatch", "warning", "there: Submission from here is off"),
    ),
    (
        "no dependency",
        answering(after_code="1", after="sbatch: error: no dependencies, please"),
        *("node sbatch", "warning", "chain.mode=resubmit"),
    ),
    ("no scontrol", answering(scontrol_code="127"), "node scontrol", "warning", "not on PATH"),
    ("no srun", answering(srun_code="127"), "node srun", "failure", "no rank"),
    (
        "clock",
        replace(PROBED, skew_s=-30.0),
        "node clock",
        "warning",
        "raise chain.lead_s",
    ),
    (
        "no GPU",
        replace(PROBED, torch=replace(WITHOUT, cards=())),
        "GPUs",
        "failure",
        "none is here",
    ),
]


@pytest.mark.parametrize("case", NODE_CASES, ids=[case[0] for case in NODE_CASES])
def test_a_compute_node_is_judged(case: tuple[str, ProbeFacts, str, str, str]) -> None:
    _, facts, name, grade, part = case
    finding = found(judge_probe(facts, replace(WISHES, gpus=True)), name)
    assert finding is not None
    assert finding.grade == grade
    assert part in f"{finding.what} {finding.remedy}"


# ---- the way

WAYS: list[tuple[str, Wishes, Circumstances, str, int]] = [
    ("default", WISHES, Circumstances(), "prequeue", 2),
    ("room", WISHES, Circumstances(submit_slots=3), "prequeue", 2),
    ("two jobs", WISHES, Circumstances(submit_slots=2), "prequeue", 1),
    ("one job", WISHES, Circumstances(submit_slots=1), "requeue", 0),
    (
        "one job, no scontrol",
        WISHES,
        Circumstances(submit_slots=1, scontrol_on_nodes=False),
        *("drive", 0),
    ),
    ("no dependency", WISHES, Circumstances(dependency_on_nodes=False), "resubmit", 0),
    ("no sbatch", WISHES, Circumstances(sbatch_on_nodes=False), "drive", 0),
    (
        "no sbatch, scontrol",
        WISHES,
        Circumstances(sbatch_on_nodes=False, scontrol_on_nodes=True),
        *("requeue", 0),
    ),
    ("eight ahead", replace(WISHES, ahead=8), Circumstances(submit_slots=5), "prequeue", 4),
    ("local", LOCAL, Circumstances(submit_slots=1), "prequeue", 2),
    ("wished", REQUEUE, Circumstances(submit_slots=9), "requeue", 0),
    ("wished too", replace(WISHES, mode="prequeue"), Circumstances(submit_slots=1), "prequeue", 2),
]


@pytest.mark.parametrize("case", WAYS, ids=[case[0] for case in WAYS])
def test_the_way_follows_from_the_circumstances(
    case: tuple[str, Wishes, Circumstances, str, int],
) -> None:
    _, wishes, known, mode, ahead = case
    way = choose_way(wishes, known)
    assert (way.mode, way.ahead) == (mode, ahead)
    assert way.reasons


def test_the_reasons_of_a_way_give_numbers() -> None:
    one = choose_way(WISHES, Circumstances(submit_slots=1, requeue_hold_s=121))
    assert one.reasons[1:] == ("Slurm holds a requeued job for 121 s",)
    two = choose_way(WISHES, Circumstances(submit_slots=2))
    assert two.reasons == ("you may have 2 jobs at a time, so one job waits",)


@pytest.mark.parametrize(
    ("mode", "ahead", "grade", "part"),
    [
        ("prequeue", 2, "good", "2 jobs ahead"),
        ("prequeue", 1, "warning", "chain.ahead=1"),
        ("requeue", 0, "warning", "chain.mode=requeue"),
        ("drive", 0, "failure", "hpcresume resume NAME"),
    ],
)
def test_a_way_that_submit_would_not_take_by_itself_says_how(
    mode: Any, ahead: int, grade: str, part: str
) -> None:
    way = Way(mode=mode, ahead=ahead, reasons=("because",))
    finding = next(judge_way(way, WISHES))
    assert finding.grade == grade
    assert part in f"{finding.what} {finding.remedy}"


def test_signal_and_lead_time_are_said() -> None:
    wishes = replace(WISHES, lead_s=45.0, signal_s=105)
    findings = list(judge_way(choose_way(wishes, Circumstances()), wishes))
    assert "B:USR2@105" in findings[1].what
    assert "45 s before a job's end, as configured" in findings[2].what
    assert "learned" in list(judge_way(choose_way(WISHES, Circumstances()), WISHES))[2].what


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        ({}, None),
        ({"X": ""}, 121),
        ({"AuthInfo": "socket=/x,cred_expire=10"}, 11),
        ({"AuthInfo": "cred_expire=10", "SchedulerParameters": "a=1,requeue_delay=3"}, 4),
    ],
)
def test_a_requeued_job_is_held_for_slurms_own_delay(
    config: Mapping[str, str], seconds: int | None
) -> None:
    assert requeue_hold_s(config) == seconds


@pytest.mark.parametrize(
    ("grades", "strict", "code", "words"),
    [
        (["good", "good"], True, 0, "all 2 good."),
        (["good", "warning"], False, 0, "1 warning, 1 good."),
        (["good", "warning"], True, 1, "1 warning, 1 good."),
        (["failure", "warning", "warning"], True, 4, "1 failure, 2 warnings, 0 good."),
        (["failure"], False, 4, "1 failure, 0 good."),
    ],
)
def test_the_exit_code_follows_from_the_worst(
    grades: list[Any], strict: bool, code: int, words: str
) -> None:
    count = tally([Finding(name="x", grade=grade, what="") for grade in grades])
    assert count.exit_code(strict=strict) == code
    assert count.words() == words


# ---- trying the file system


def test_a_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    facts = disk.ask_files(tmp_path / "not" / "there", ENVIRON)
    assert facts.base == tmp_path
    assert not facts.complaint and not facts.errors
    assert facts.fsync_s is not None and facts.free_bytes and facts.file_system
    assert facts.skew_s is not None and abs(facts.skew_s) < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["/proc/runs", "/sys/runs", "/dev/null", "/dev/null/runs"])
def test_a_place_for_no_files_is_a_complaint(root: str) -> None:
    facts = disk.ask_files(Path(root), ENVIRON)
    assert facts.complaint
    findings = list(judge_files(facts, WISHES))
    assert [(f.name, f.grade) for f in findings] == [("folder", "failure")]


def test_a_silent_file_system_is_a_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "lfs"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(disk, "PATIENCE_S", 0.2)
    monkeypatch.setattr(disk, "_QUOTA_S", 2.0)
    facts = disk.ask_files(tmp_path, {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert "gave no answer" in facts.complaint


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        ("fsync", "EIO", "fsync"),
        ("rename", "EXDEV", "atomic rename"),
        # All but the first folder, in which everything else is tried.
        ("mkdir", "EEXIST", "atomic rename"),
    ],
)
def test_a_system_call_that_fails_is_told_and_nothing_is_left(
    tmp_path: Path, call: str, error: str, name: str
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to make system calls fail")
    when = ":when=4+" if call == "mkdir" else ""
    script = (
        "import os, sys; from pathlib import Path; from hpcresume.scheduler.doctor import disk; "
        "print(*disk.ask_files(Path(sys.argv[1]), os.environ).errors, sep=chr(10))"
    )
    done = subprocess.run(
        [
            *("strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}"),
            *("-e", f"inject={call}:error={error}{when}"),
            *(sys.executable, "-c", script, str(tmp_path)),
        ],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace does not work here: {done.stderr}")
    assert name in done.stdout.splitlines(), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB and 64 files, of its own."""
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    for argv in (
        ["mkfs.ext4", "-q", "-N", "64", str(image)],
        ["mount", "-o", "loop", str(image), str(mount)],
    ):
        try:
            subprocess.run(argv, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk of its own here: {error}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_without_space_or_files_is_a_failure(small_disk: Path) -> None:
    empty = {f.name: f.grade for f in judge_files(disk.ask_files(small_disk, ENVIRON), WISHES)}
    assert empty["folder"] == "good" and empty["fsync"] == "good"
    assert empty["free space"] == empty["inodes"] == "failure"
    with pytest.raises(OSError, match="No space left"):
        small_disk.joinpath("all").write_bytes(bytes(8 << 20))
    # To the last block, of which a file system keeps some to itself.
    for number in range(1000):
        try:
            with small_disk.joinpath(f"more-{number}").open("wb", buffering=0) as file:
                file.write(bytes(1024))
                os.fsync(file.fileno())
        except OSError:
            break
    facts = disk.ask_files(small_disk, ENVIRON)
    assert facts.file_system == "ext4" and facts.mount == str(small_disk)
    assert "No space left" in f"{facts.complaint} {facts.errors}"
    left = {path.name.partition("-")[0] for path in small_disk.iterdir()}
    assert left <= {"all", "more", "lost+found"}


def test_a_disk_that_is_read_only_is_a_complaint(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    facts = disk.ask_files(small_disk / "runs", ENVIRON)
    assert facts.complaint == "Read-only file system"


def test_a_folder_of_everybody_is_told_unless_it_is_sticky(tmp_path: Path) -> None:
    modes = {}
    for mode in (0o700, 0o777, 0o1777):
        tmp_path.chmod(mode)
        modes[mode] = disk.ask_files(tmp_path, ENVIRON).open_to_others
    assert modes == {0o700: False, 0o777: True, 0o1777: False}


@pytest.mark.parametrize(
    ("name", "variables", "scratch"),
    [
        ("scratch1", {}, "scratch1"),
        ("home", {"SCRATCH": "."}, "$SCRATCH"),
        ("home", {"SCRATCH": "/"}, ""),
        ("purged_weekly", {}, "purged_weekly"),
        ("home", {}, ""),
    ],
)
def test_scratch_is_known_by_its_name_or_the_sites_variable(
    name: str, variables: dict[str, str], scratch: str
) -> None:
    path = Path("/data") / name / "ada"
    environ = {key: "/data" if value == "." else value for key, value in variables.items()}
    assert disk._scratch_of(path, environ) == scratch


def test_quotas_are_those_of_the_program_that_is_there(tmp_path: Path) -> None:
    program = tmp_path / "quota"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{QUOTA}END\nexit 1\n")
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    facts = disk.ask_files(tmp_path, environ)
    assert facts.quotas == (Quota(unit="bytes", used=1000 << 10, limit=2000 << 10),)
    assert disk.ask_files(tmp_path, {"PATH": "/nonexistent"}).quotas is None


# ---- asking Slurm's clients, and torch


class Programs:
    """Programs named like Slurm's, each a few lines of shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.environ = {**ENVIRON, "PATH": f"{folder}:/usr/bin:/bin"}
        self.program("scontrol", f"cat <<'END'\n{CONFIG}PartitionName=main\n   Default=YES\nEND")
        self.program("sacctmgr", "case $* in *qos*) echo 'normal|||';; *) echo 'lab||||';; esac")
        for name in ("sbatch", "squeue", "scancel", "sacct"):
            self.program(name, "exit 0")

    def program(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    return Programs(tmp_path / "bin")


def test_the_clients_answers_are_gathered(programs: Programs) -> None:
    facts = questions.ask_slurm(programs.environ)
    assert facts.complaints == {} and facts.missing == ()
    assert facts.config["KillWait"] == "30 sec"
    assert [block["PartitionName"] for block in facts.partitions] == ["main"]
    assert facts.associations == (ASSOCIATION | {"DefaultQOS": ""},)
    assert facts.qos == (NORMAL,)


def test_a_client_that_hangs_is_given_up(programs: Programs) -> None:
    programs.program("scontrol", "exec sleep 60")
    facts = questions.ask_slurm(programs.environ, timeout_s=3)
    assert facts.complaints["config"] == Complaint(words="no answer in 3 s", silent=True)
    assert facts.associations, "the other clients were asked all the same"
    finding = found(judge_slurm(facts, WISHES), "controller")
    assert finding is not None and finding.grade == "warning"


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("echo '<html>502 Bad Gateway</html>'", "not understood, '<html>502 Bad"),
        ("head -c 300 /dev/zero", "not understood"),
        ("exit 0", "an empty answer"),
        ("echo 'scontrol: error: one' >&2; echo 'scontrol: fatal: two' >&2; exit 1", "two"),
        ("exit 3", "left with code 3"),
    ],
)
def test_nonsense_of_scontrol_is_a_complaint(programs: Programs, body: str, part: str) -> None:
    programs.program("scontrol", body)
    facts = questions.ask_slurm(programs.environ)
    assert part in facts.complaints["config"].words
    assert facts.config == {} and facts.partitions == ()


def test_without_clients_nothing_is_asked(tmp_path: Path) -> None:
    facts = questions.ask_slurm({"PATH": str(tmp_path)})
    assert facts.missing == questions.CLIENTS
    assert facts.complaints == {}


def test_the_clients_environment_is_scrubbed(programs: Programs, tmp_path: Path) -> None:
    programs.program("squeue", "exit 0")
    programs.program("sacct", f"env > '{tmp_path}/env'")
    questions.ask_slurm({**programs.environ, "SACCT_FORMAT": "x", "SLURM_JOB_ID": "1"})
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SLURM_TIME_FORMAT" in names
    assert not names & {"SACCT_FORMAT", "SLURM_JOB_ID"}


def test_torch_is_asked_in_a_child_process() -> None:
    facts = questions.ask_python(ENVIRON)
    assert facts.torch is not None and texts.version_of(facts.torch) >= (2, 10)
    assert facts.import_s is not None and facts.complaint == ""


@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("import os; os._exit(3)", "it printed nothing"),
        ("import os; os.write(2, b'Illegal instruction'); os._exit(1)", "Illegal instruction"),
        ("print('{\"noise\"'); raise ImportError('no libcuda')", "ImportError: no libcuda"),
    ],
)
def test_a_torch_that_does_not_import_is_a_complaint(
    tmp_path: Path, module: str, complaint: str
) -> None:
    (tmp_path / "torch.py").write_text(module)
    facts = questions.ask_python({**ENVIRON, "PYTHONPATH": str(tmp_path)})
    assert facts.torch is None
    assert facts.complaint == complaint


@pytest.mark.parametrize(
    ("body", "driver", "cards", "complaint"),
    [
        ("echo '570.1, NVIDIA H100'; echo '570.1, NVIDIA H100'", "570.1", 2, ""),
        ("echo 'Failed to initialize NVML'; exit 18", None, 0, "Failed to initialize NVML"),
        ("exit 0", None, 0, ""),
    ],
)
def test_the_driver_is_asked(
    tmp_path: Path, body: str, driver: str | None, cards: int, complaint: str
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    facts = questions.ask_python(environ)
    assert (facts.driver, len(facts.cards), facts.driver_complaint) == (driver, cards, complaint)


def test_this_machine_can_be_driven_as_a_cluster_of_one() -> None:
    assert questions.ask_local(ENVIRON) == LocalFacts()


def test_a_machine_that_starts_no_process_is_a_complaint(tmp_path: Path) -> None:
    assert "no process could be started" in questions.ask_local({"PATH": str(tmp_path)}).complaint


# ---- the command

#: A torch that is quickly imported.
QUICK_TORCH = """
__version__ = "2.13.0+cpu"
class version: cuda = hip = None
class cuda:
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
"""


@pytest.fixture
def place(tmp_path: Path, programs: Programs) -> Path:
    """A folder to call the command in."""
    if disk.ask_files(tmp_path, ENVIRON).file_system in ("tmpfs", "ramfs"):
        pytest.skip("temporary files lie in memory, where runs may not: set TMPDIR=/var/tmp")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "torch.py").write_text(QUICK_TORCH)
    path = os.pathsep.join(filter(None, (str(tmp_path / "torch"), ENVIRON.get("PYTHONPATH"))))
    programs.environ |= {"PYTHONPATH": path, "TMPDIR": "/nonexistent"}
    programs.environ |= {"LC_ALL": "C.UTF-8"}
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def doctor(*argv: str, cwd: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcresume", "doctor", *argv],
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The findings of `doctor --json` by their names."""
    document = json.loads(done.stdout)
    assert document["schema_version"] == 1
    return {finding["name"]: finding for finding in document["findings"]}


def test_every_finding_is_one_line_in_a_pipe(place: Path, programs: Programs) -> None:
    done = doctor(cwd=place, environ=programs.environ)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == str(place / "runs")
    findings = [line for line in lines if re.match(r"  [✔▲✖] ", line)]
    titles = ["Files", "Scheduler", "Python", "Chain"]
    assert [line for line in lines[1:-1] if line and line not in findings] == titles
    assert all("→" in line for line in findings if line.startswith(("  ▲", "  ✖")))
    assert "\x1b" not in done.stdout
    assert list(place.iterdir()) == []


def test_warnings_fail_only_where_they_are_to(place: Path, programs: Programs) -> None:
    programs.program("sacct", "echo 'sacct: error: slurmdbd is away' >&2; exit 1")
    codes = [
        doctor(*argv, cwd=place, environ=programs.environ).returncode
        for argv in ([], ["--strict"], ["-p", "nosuch"])
    ]
    assert codes == [0, 1, 4]


def test_json_is_one_document(place: Path, programs: Programs) -> None:
    done = doctor("--json", cwd=place, environ=programs.environ)
    assert done.returncode == 0
    way = json.loads(done.stdout)["way"]
    assert (way["mode"], way["ahead"]) == ("prequeue", 2)
    assert (way["signal"], way["lead_s"]) == ("B:USR2@90", None)
    assert told(done)["KillWait"] == {
        "section": "Scheduler",
        "name": "KillWait",
        "grade": "good",
        "what": "30 s from SIGTERM to SIGKILL",
        "remedy": "",
    }
    assert done.stderr == ""


def test_the_configuration_says_what_is_asked_for(place: Path, programs: Programs) -> None:
    place.joinpath("hpcresume.yaml").write_text(
        "scheduler: {partition: nosuch, gpus_per_node: 2}\nchain: {lead_s: 40, mode: requeue}\n"
    )
    findings = told(doctor("--json", cwd=place, environ=programs.environ))
    assert findings["partition"]["grade"] == "failure"
    assert findings["GPUs"]["grade"] == "failure"
    assert "chain.mode is requeue" in findings["way"]["what"]
    assert "B:USR2@100" in findings["signal"]["what"]
    assert "40 s" in findings["lead time"]["what"]


def test_a_wrong_configuration_is_one_sentence(place: Path, programs: Programs) -> None:
    done = doctor("--set", "chain.mode=x", cwd=place, environ=programs.environ)
    assert done.returncode == 4
    assert done.stderr.startswith("hpcresume: ") and "Traceback" not in done.stderr


def test_without_slurm_it_says_so_and_checks_the_rest(place: Path, programs: Programs) -> None:
    for name in questions.CLIENTS:
        (programs.folder / name).unlink()
    programs.environ["PATH"] = str(programs.folder)
    for name in ("sleep", "env"):
        (programs.folder / name).symlink_to(f"/usr/bin/{name}")
    done = doctor("--probe", cwd=place, environ=programs.environ)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert sum("Slurm" in line for line in lines) == 1 or "queues like Slurm" in done.stdout
    for name in ("not on this machine", "local jobs", "fsync", "torch", "way"):
        assert any(name in line for line in lines)


def test_a_controller_that_hangs_is_one_warning_and_no_probe(
    place: Path, programs: Programs
) -> None:
    programs.program("scontrol", "exec sleep 60")
    programs.program("sbatch", f"touch '{place}/called'")
    script = (
        "import sys; from hpcresume.scheduler.doctor import questions; from hpcresume.cli import "
        "main; ask = questions.ask_slurm; "
        "questions.ask_slurm = lambda environ: ask(environ, timeout_s=3); main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor", "--json", "--probe"],
        cwd=place,
        env=programs.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    findings = told(done)
    assert findings["controller"]["grade"] == "warning"
    assert "no answer in 3 s" in findings["controller"]["what"]
    assert "not tried" in findings["probe"]["what"]
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("root", ["/proc/runs", "/sys/kernel"])
def test_a_folder_that_takes_no_files_is_a_failure_and_no_traceback(
    place: Path, programs: Programs, root: str
) -> None:
    done = doctor("--runs", root, cwd=place, environ=programs.environ)
    assert done.returncode == 4
    assert "Traceback" not in done.stdout + done.stderr
    assert f"✖ folder          {root.removesuffix('/runs')}: " in done.stdout


def test_the_first_line_is_there_before_slurm_has_answered(place: Path, programs: Programs) -> None:
    gate = place / "gate"
    programs.program("scontrol", f"while [ ! -e '{gate}' ]; do sleep 0.05; done")
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "doctor"],
        cwd=place,
        env=programs.environ,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{place / 'runs'}\n"
        gate.touch()
        rest = process.stdout.read()
    assert "an empty answer" in rest


def test_it_imports_no_torch(place: Path, programs: Programs) -> None:
    script = (
        "import sys\nfrom hpcresume.cli import main\n"
        "try:\n    main(['doctor'])\n"
        "finally:\n    print('torch' in sys.modules, 'rich' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=place,
        env=programs.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "False False"


def on_terminal(width: int, cwd: Path, environ: Mapping[str, str], *argv: str) -> str:
    """What the command shows on a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "doctor", *argv],
        cwd=cwd,
        # COLUMNS would win over the terminal's own width.
        env={name: value for name, value in environ.items() if name != "COLUMNS"},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    ):
        os.close(follower)
        shown = b""
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # Linux says so when the last writer has gone.
                break
            shown += data
    os.close(leader)
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(place: Path, programs: Programs, width: int) -> None:
    programs.program("sacct", "echo 'sacct: error: slurmdbd is away' >&2; exit 1")
    shown = on_terminal(width, place, programs.environ, "--set", "chain.ahead=3", "-p", "nosuch")
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    lines = [line for line in plain.splitlines()[1:] if str(place.parent) not in line]
    assert max(map(len, lines)) <= min(width, 100)
    assert "\x1b[33m▲\x1b[0m accounting" in shown
    # A remedy that does not fit stands below what it mends.
    assert re.search(r"▲ accounting .*\n {20}→ try again later", plain)


def test_no_colour_where_none_is_wished(place: Path, programs: Programs) -> None:
    shown = on_terminal(80, place, {**programs.environ, "NO_COLOR": "1"})
    assert "\x1b" not in shown
    assert "  ✔ KillWait        30 s from SIGTERM to SIGKILL\n" in shown


@pytest.mark.parametrize(
    "variables",
    [{"LC_ALL": "C"}, {"LC_ALL": "", "LANG": "C"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["LC_ALL", "LANG", "encoding"],
)
def test_a_locale_without_utf_8_gets_ascii(
    place: Path, programs: Programs, variables: dict[str, str]
) -> None:
    programs.program("sacct", "echo 'sacct: error: slurmdbd is away' >&2; exit 1")
    environ = {k: v for k, v in programs.environ.items() if k not in ("LANG", "LC_CTYPE")}
    shown = on_terminal(120, place, {**environ, **variables, "NO_COLOR": "1"})
    assert shown.isascii()
    assert "  + KillWait        30 s" in shown
    assert re.search(r"  ! accounting .*\n {20}-> try again later", shown)


# ---- a real cluster


@pytest.fixture(scope="module")
def bare() -> Iterator[SlurmCluster]:
    """A cluster without accounting, and with settings that are worth a word."""
    if reason := missing():
        pytest.skip(reason)
    conf = {"JobRequeue": "0", "RequeueExit": "70-80", "KillWait": "60", "OverTimeLimit": "3"}
    with SlurmCluster(accounting=False, extra_conf=conf) as cluster:
        yield cluster


def test_a_real_cluster_is_asked_and_understood(slurm: SlurmCluster) -> None:
    facts = questions.ask_slurm({**os.environ, **slurm.env})
    assert facts.complaints == {} and facts.missing == ()
    assert facts.config["KillWait"] == "5 sec"
    assert [block["PartitionName"] for block in facts.partitions] == ["main", "high"]
    assert [row["Name"] for row in facts.qos] == ["normal"]
    findings = {finding.name: finding for finding in judge_slurm(facts, WISHES)}
    grades = {name: finding.grade for name, finding in findings.items()}
    assert {name for name, grade in grades.items() if grade != "good"} <= {
        *("KillWait", "preemption", "proctrack")
    }
    assert "main (the default), 4 nodes" in findings["partition"].what
    assert grades["KillWait"] == grades["preemption"] == "warning"
    assert findings["accounting"].grade == "good"


def test_a_real_cluster_without_accounting_is_understood(bare: SlurmCluster) -> None:
    facts = questions.ask_slurm({**os.environ, **bare.env})
    findings = {finding.name: finding for finding in judge_slurm(facts, WISHES)}
    assert findings["accounting"].grade == "warning"
    assert findings["MaxSubmitJobs"].grade == "good"
    assert findings["RequeueExit"].grade == "warning"
    assert findings["OverTimeLimit"].what.startswith("jobs may go on for 3 min")
    assert findings["KillWait"].what.startswith("60 s")
    assert findings["JobRequeue"].what.startswith("0;")


def nothing_left(slurm: SlurmCluster, folder: Path) -> bool:
    names = [job["name"] for job in slurm.queue()]
    return "hpcresume-doctor" not in names and not list(folder.glob(".hpcresume-doctor-*"))


def probed(slurm: SlurmCluster, root: Path, *, wait_s: float = 60.0, **config: Any) -> ProbeFacts:
    facts = ask_node(
        Probe(root=root, python=sys.executable, wait_s=wait_s),
        SchedulerConfig(**config),
        {**os.environ, **slurm.env},
    )
    wait_until("the probe job to be gone", lambda: nothing_left(slurm, root), 60)
    return facts


def test_a_small_job_tells_what_a_compute_node_is_like(slurm: SlurmCluster, tmp_path: Path) -> None:
    facts = probed(slurm, tmp_path)
    assert facts.complaint == "" and facts.left_behind == ""
    assert facts.answer["node"] in slurm.nodes
    assert facts.answer["own_version"] == sys.version.split()[0]
    for program in ("sbatch", "after", "scontrol", "srun", "hpcresume"):
        assert facts.can(program), facts.answer
    assert facts.skew_s is not None and abs(facts.skew_s) < 2
    assert {finding.grade for finding in judge_probe(facts, WISHES)} == {"good"}
    assert list(tmp_path.iterdir()) == []


def without(tmp_path: Path, *programs: str) -> str:
    """The shell line of a job that finds no Slurm but these programs on its PATH."""
    folder = tmp_path / "few"
    folder.mkdir()
    needed = ("sh", "env", "sed", "tr", "tail", "timeout", "touch", "date", "mv", "hostname")
    for name in (*needed, *programs):
        place = shutil.which(name)
        assert place is not None
        (folder / name).symlink_to(place)
    return f"export PATH={folder}"


@pytest.mark.parametrize(
    ("gpus", "one"), [(None, None), (0, 0), (4, 1), ("a100:4", "a100:1"), ("4", "1")]
)
def test_the_probe_asks_for_one_gpu_where_jobs_have_some(gpus: Any, one: Any) -> None:
    wished = SchedulerConfig(nodes=4, gpus_per_node=gpus, partition="main", mem="64G")
    assert small(wished) == SchedulerConfig(gpus_per_node=one, partition="main")


def test_a_node_without_sbatch_leads_to_another_way(slurm: SlurmCluster, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    facts = probed(slurm, root, setup=[without(tmp_path, "scontrol", "srun")])
    assert facts.can("sbatch") is False and facts.can("scontrol") is True
    finding = found(judge_probe(facts, WISHES), "node sbatch")
    assert finding is not None and finding.grade == "warning" and "not on PATH" in finding.what
    assert facts.answer["path_python"] == ""


def test_what_a_job_inherits_does_not_leak_into_its_own_sbatch(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    facts = probed(slurm, tmp_path, setup=["export SBATCH_PARTITION=nosuch"])
    assert facts.can("sbatch") is True, facts.answer


def test_a_folder_that_nodes_do_not_see_is_a_failure(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = (
        f"mount -t tmpfs none {tmp_path} && cd / && exec {sys.executable} -m hpcresume doctor "
        f"--json --probe --runs {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env={**ENVIRON, **slurm.env},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 4, done.stderr
    assert told(done)["runs folder"]["grade"] == "failure"
    assert nothing_left(slurm, tmp_path)


def test_a_job_that_does_not_start_in_time_is_taken_back(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    facts = probed(slurm, tmp_path, wait_s=0.5, sbatch={"begin": "now+1hour"})
    assert "did not start within" in facts.complaint and "BeginTime" in facts.complaint
    assert not facts.refused and not facts.left_behind


def test_a_job_that_slurm_refuses_is_a_complaint_with_its_words(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    facts = probed(slurm, tmp_path, partition="nosuch")
    assert facts.refused and "invalid partition" in facts.complaint.lower()


def test_a_job_that_ends_without_an_answer_is_a_complaint(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    facts = probed(slurm, tmp_path, setup=["exit 7"])
    assert "ended without an answer" in facts.complaint and "exit code 7" in facts.complaint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_probe_that_is_interrupted_takes_its_job_back(
    slurm: SlurmCluster, tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hpcresume", "doctor", "--probe", "--wait", "100"),
            *("--sbatch", "begin=now+1hour", "--runs", str(tmp_path)),
        ],
        env={**ENVIRON, **slurm.env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell the tests have it ignored, and hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    with process:
        assert process.stderr is not None
        assert "waiting for a compute node" in process.stderr.readline()
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    wait_until("the probe job to be gone", lambda: nothing_left(slurm, tmp_path), 60)


def test_limits_of_a_real_account_are_found(slurm: SlurmCluster) -> None:
    def limit(jobs: int) -> None:
        slurm.run("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={jobs}")

    limit(2)
    try:
        facts = questions.ask_slurm({**os.environ, **slurm.env})
    finally:
        limit(-1)
    enforcing = replace(facts, config={**facts.config, "AccountingStorageEnforce": "limits"})
    assert submit_slots(enforcing, WISHES) == (2, "MaxSubmit of account root")


def test_the_command_on_a_real_cluster(slurm: SlurmCluster, place: Path) -> None:
    environ = {**ENVIRON, **slurm.env, "LC_ALL": "C.UTF-8"}
    done = doctor("--probe", "--json", "--time", "01:00:00", cwd=place, environ=environ)
    findings = told(done)
    assert done.returncode == 0, done.stdout
    assert findings["node sbatch"]["grade"] == "good"
    assert findings["way"]["what"].startswith("prequeue, 2 jobs ahead")
    assert findings["MaxTime"]["what"] == "02:00:00 in main, 01:00:00 asked for"
    assert list(place.iterdir()) == []
