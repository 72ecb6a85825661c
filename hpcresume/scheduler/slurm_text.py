"""What Slurm's clients print, as values: pure functions of text, used by `slurm` alone.

Every client is called with SLURM_TIME_FORMAT=%s, so that times are Unix seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpcresume.config import parse_time
from hpcresume.errors import ConfigError
from hpcresume.scheduler.job import JobInfo, JobState

#: For squeue: the comment comes last, because it may hold the separator.
QUEUE_FORMAT = "%A|%T|%r|%N|%S|%e|%k"
#: For sacct.
RECORD_FORMAT = "JobID,State,ExitCode,NodeList,Start,End,Submit"

_STATES = {
    "PENDING": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "RESV_DEL_HOLD": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    # Nodes are given but still boot: the script has not started.
    "CONFIGURING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "SUSPENDED": JobState.SUSPENDED,
    "STOPPED": JobState.SUSPENDED,
    "COMPLETING": JobState.COMPLETING,
    "STAGE_OUT": JobState.COMPLETING,
    "COMPLETED": JobState.COMPLETED,
    "FAILED": JobState.FAILED,
    "TIMEOUT": JobState.TIMEOUT,
    "CANCELLED": JobState.CANCELLED,
    "PREEMPTED": JobState.PREEMPTED,
    "NODE_FAIL": JobState.NODE_FAIL,
    "BOOT_FAIL": JobState.BOOT_FAIL,
    "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
    "DEADLINE": JobState.DEADLINE,
    "REQUEUED": JobState.REQUEUED,
}
_RUNS = (JobState.RUNNING, JobState.SUSPENDED, JobState.COMPLETING)

#: Slurm did not answer, or not in time: the same call may work later.
_NO_ANSWER = re.compile(
    "unable to contact|socket timed out|zero bytes were transmitted|communication connection|"
    "connection (refused|reset|timed out)|transport endpoint|message (receive|send) failure|"
    "temporarily unable|temporarily unavailable|in standby mode|rate limit|"
    "could not establish a configuration source|authentication error|munge",
    re.IGNORECASE,
)
_PREFIX = re.compile(r"^\w+: (error|fatal): ", re.MULTILINE)


def words(text: str) -> str:
    """What a client complained about, without its own name before every line."""
    return _PREFIX.sub("", text.strip())


def says_no_answer(complaint: str) -> bool:
    """Whether a complaint is about reaching Slurm, and no answer of Slurm."""
    return bool(_NO_ANSWER.search(complaint))


def state_of(word: str) -> tuple[JobState, str]:
    """The state that a word of Slurm means, and who cancelled the job (a uid, or empty).

    "CANCELLED by 1000" is sacct's; a word that nobody knows gives UNKNOWN.
    """
    name, _, more = word.partition(" ")
    state = _STATES.get(name.upper(), JobState.UNKNOWN)
    return state, more.removeprefix("by ").strip() if state is JobState.CANCELLED else ""


def parse_job_id(text: str) -> str | None:
    """The id in the answer of sbatch --parsable ("12" or "12;cluster"), whatever stands before."""
    found = re.findall(r"^(\d+)(?:;.*)?$", text, re.MULTILINE)
    return found[-1] if found else None


@dataclass(frozen=True)
class FirstStart:
    """When and where a job would start."""

    at: float | None
    """Unix seconds; None where that was not said."""
    nodes: str
    words: str
    """All that sbatch said."""


_FIRST_START = re.compile(r"to start at (\d+)(?: using .* on nodes (\S+))?")


def parse_first_start(text: str) -> FirstStart:
    """What sbatch --test-only estimates, out of all that it and the site's plugins print."""
    found = _FIRST_START.search(text)
    if found is None:
        return FirstStart(None, "", " ".join(text.split()))
    return FirstStart(float(found[1]), found[2] or "", " ".join(text.split()))


def parse_queue(text: str) -> list[JobInfo]:
    """The jobs in squeue's answer in QUEUE_FORMAT, oldest first."""
    jobs = []
    for line in text.splitlines():
        fields = line.split("|", 6)
        if len(fields) < 7 or not fields[0].isdigit():
            continue  # The rest of a comment that has several lines.
        id, word, reason, nodes, start, end, comment = fields
        state, _ = state_of(word)
        jobs.append(
            JobInfo(
                id=id,
                state=state,
                raw_state=word,
                reason="" if reason == "None" else reason,
                token=comment.strip(),
                nodes=nodes,
                # While it waits both are guesses, while it completes the end jumps ahead.
                start_time=_time(start) if state in _RUNS else None,
                end_time=_time(end) if state is JobState.RUNNING else None,
            )
        )
    return sorted(jobs, key=lambda job: int(job.id))


@dataclass
class _Life:
    """A job row of sacct and what its step rows add."""

    info: JobInfo
    submitted: float
    out_of_memory: bool = False


def parse_records(text: str) -> dict[str, list[JobInfo]]:
    """Every life of the jobs in the answer of sacct -D in RECORD_FORMAT, oldest first.

    A requeued job has several lives under one id. That memory ran out stands only in the row of
    a step; its job just failed.
    """
    lives: dict[str, list[_Life]] = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) < 7:
            continue
        id, _, step = fields[0].partition(".")
        if not step:
            life = _Life(_record(id, fields), _time(fields[6]) or 0.0)
            lives.setdefault(id, []).append(life)
        elif id in lives and state_of(fields[1])[0] is JobState.OUT_OF_MEMORY:
            lives[id][-1].out_of_memory = True
    return {id: [_told(life) for life in sorted(all, key=_age)] for id, all in lives.items()}


def _age(life: _Life) -> float:
    return life.submitted


def _told(life: _Life) -> JobInfo:
    if life.out_of_memory and life.info.state is JobState.FAILED:
        return replace(life.info, state=JobState.OUT_OF_MEMORY)
    return life.info


def _record(id: str, fields: list[str]) -> JobInfo:
    state, uid = state_of(fields[1])
    code, signal = _exit(fields[2])
    by = (uid or "unknown") if state is JobState.CANCELLED else ""
    return JobInfo(
        id=id,
        state=state,
        raw_state=fields[1],
        nodes="" if fields[3] == "None assigned" else fields[3],
        cancelled_by=by,
        exit_code=code if state.ended else None,
        exit_signal=signal or None,
        start_time=_time(fields[4]),
        end_time=_time(fields[5]),
    )


#: Fields of `scontrol show job` that take the rest of their line: they may hold anything.
_WHOLE_LINE = frozenset(
    {"AdminComment", "Command", "Comment", "Extra", "StdErr", "StdIn", "StdOut"}
    | {"SubmitLine", "SystemComment", "WorkDir"}
)


def parse_job(text: str) -> dict[str, str]:
    """The fields that `scontrol show job ID` prints, those that say nothing left out."""
    fields: dict[str, str] = {}
    for line in map(str.strip, text.splitlines()):
        key, _, rest = line.partition("=")
        if key == "JobId":
            id, _, name = rest.partition(" JobName=")
            fields |= {"JobId": id, "JobName": name}
        elif key in _WHOLE_LINE:
            fields[key] = rest
        else:
            pairs = (word.partition("=") for word in line.split(" "))
            fields |= {name: value for name, equals, value in pairs if equals}
    return {key: value for key, value in fields.items() if value not in ("", "(null)", "N/A")}


def job_of_fields(fields: Mapping[str, str]) -> JobInfo:
    """The job that `scontrol show job` described. It keeps no record of who cancelled it."""
    state, _ = state_of(fields["JobState"])
    if state is JobState.FAILED and was_preempted(fields):
        state = JobState.PREEMPTED
    reason = fields.get("Reason", "None")
    code, signal = _exit(fields.get("ExitCode", ""))
    return JobInfo(
        id=fields["JobId"],
        state=state,
        raw_state=fields["JobState"],
        reason="" if reason == "None" else reason,
        token=fields.get("Comment", "").strip(),
        nodes=fields.get("NodeList", ""),
        cancelled_by="unknown" if state is JobState.CANCELLED else "",
        exit_code=code if state.ended else None,
        exit_signal=signal or None,
        restarts=int(fields.get("Restarts", "0")),
        start_time=_time(fields.get("StartTime", "")) if state is not JobState.PENDING else None,
        end_time=_time(fields.get("EndTime", "")) if state.ended or state in _RUNS[:1] else None,
    )


def was_preempted(fields: Mapping[str, str]) -> bool:
    """Whether a job was chosen for preemption.

    If it then leaves within its grace time, before Slurm ends it, its state is FAILED or COMPLETED.
    """
    return fields.get("PreemptTime", "None") != "None"


def parse_partitions(text: str) -> list[dict[str, str]]:
    """The partitions that `scontrol show partition` prints."""
    return _blocks(text, "PartitionName")


def parse_nodes(text: str) -> list[dict[str, str]]:
    """The nodes that `scontrol show node` prints."""
    return _blocks(text, "NodeName")


def _blocks(text: str, first: str) -> list[dict[str, str]]:
    """The fields of blocks that begin with `first`; what people wrote stands at their ends."""
    blocks = re.split(rf"^(?={first}=)", text, flags=re.MULTILINE)
    named = (block for block in blocks if block.startswith(f"{first}="))
    pairs = ([word.partition("=") for word in reversed(block.split())] for block in named)
    return [{name: value for name, _, value in block} for block in pairs]


def limit_s(text: str) -> int | None:
    """Seconds of a partition's MaxTime; None for UNLIMITED, and where it is no time."""
    try:
        return parse_time(text)
    except ConfigError:
        return None


def parse_step_ids(text: str, name: str) -> list[str]:
    """The steps of that name in the answer of `squeue --steps` in the format %i|%j."""
    pairs = (line.partition("|") for line in text.splitlines())
    return [id for id, _, found in pairs if found == name and id.rpartition(".")[2].isdigit()]


def _time(text: str) -> float | None:
    """Unix seconds, None for Unknown, N/A, NONE and whatever is no number."""
    return float(text) if text.isdigit() else None


def _exit(text: str) -> tuple[int | None, int]:
    """Exit code and signal of Slurm's "code:signal"."""
    code, _, signal = text.partition(":")
    return (int(code) if code.isdigit() else None), (int(signal) if signal.isdigit() else 0)
