"""What became of the links before: a story and the scheduler's word, as `chain` needs them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.chain import (
    HANG,
    MEMORY,
    NODE_CAUSES,
    Budgets,
    Cause,
    Decision,
    Evidence,
    Failure,
    PastLink,
    cause_named,
    cause_of,
    spent,
)
from hpcresume.config import RunConfig
from hpcresume.journal import LinkRecords, Record
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import node_names
from hpcresume.scheduler.job import JobInfo
from hpcresume.story import Story
from hpcresume.training.heartbeat import step_in_progress

#: More ranks than any link has had; a claim that says so is damaged.
_MOST_RANKS = 1 << 20
#: How much of a log is read for its last lines, and how many lines tell why a rank was killed.
_TAIL_BYTES = 1 << 16
_LAST_WORDS = 40
#: What terminals are told besides text.
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")


def past_links(
    story: Story, jobs: Mapping[str, JobInfo], *, after: int | None = None
) -> list[PastLink]:
    """The history after link `after`, by default since the last submission, for `chain.decide`.

    `jobs` are the scheduler's words on jobs whose links have no recorded end.
    """
    begin = story.after_link if after is None else after
    return [
        past_link(story, link, jobs.get(str(link.claim.get("job"))))
        for link in story.links
        if link.number > begin
    ]


def past_link(story: Story, link: LinkRecords, job: JobInfo | None) -> PastLink:
    """One link: as its end was recorded, else as the evidence tells."""
    record = story.ended(link)
    restored = link.last("restored")
    committed = story.committed_step(link)
    first = int(restored["step"]) if restored else committed
    times = [float(r["t"]) for r in link.records] or [_seconds(link.claim.get("t"))]
    num_nodes = _number(link.claim.get("num_nodes"))
    retries = _retries(link)
    if record is not None:
        failure = _recorded_failure(story.run, link, record)
        nodes = record.get("nodes")
        return PastLink(
            number=link.number,
            cause=cause_named(record["cause"], failure),
            first_step=first,
            committed_step=committed,
            failure=failure,
            at_step=at_step(story.run, link, cause_named(record["cause"], failure)),
            who=str(record.get("who", "")),
            detail=str(record.get("detail", "")),
            seconds=_seconds(record.get("seconds")),
            nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
            retries=retries,
            num_nodes=num_nodes,
            ended_at=max(times),
        )
    evidence = gather(story.run, link, job, exit_code=None, user_stop=story.cancelled)
    cause, detail = cause_of(evidence)
    return PastLink(
        number=link.number,
        cause=cause,
        first_step=first,
        committed_step=committed,
        failure=evidence.failure,
        at_step=at_step(story.run, link, cause),
        who=story.cancelled or (job.cancelled_by if job is not None else ""),
        detail=detail,
        seconds=_lasted(job, times),
        nodes=failed_nodes(link) if cause in NODE_CAUSES else (),
        retries=retries,
        num_nodes=num_nodes,
        ended_at=max(times),
    )


def _retries(link: LinkRecords) -> int:
    count = 0
    for record in link.all("saved", "retried"):
        count = count + 1 if record["kind"] == "retried" else 0
    return count


def at_step(run: RunDir, link: LinkRecords, cause: Cause) -> int | None:
    """The step in which memory ran out, by rank 0's last sign of life: who is killed says nothing.

    None where something else was the cause, and where it is not known.
    """
    if cause not in MEMORY:
        return None
    restored = link.last("restored")
    return step_in_progress(run.link(link.number).beat(0), int(restored["step"]) if restored else 0)


def _lasted(job: JobInfo | None, times: Sequence[float]) -> float:
    """Seconds: as the scheduler tells; else between records, whose clock may have jumped."""
    if job is not None and job.start_time is not None and job.end_time is not None:
        return max(0.0, job.end_time - job.start_time)
    return max(times) - min(times)


def budgets_of(config: RunConfig) -> Budgets:
    """What a chain may use up, as configured."""
    given = config.chain
    return Budgets(**{field.name: getattr(given, field.name) for field in fields(Budgets)})


def end_of(past: PastLink) -> dict[str, Any]:
    """A link's end for its record, from which `past_link` reads it again."""
    return {
        "cause": past.cause.value,
        "detail": past.detail,
        "who": past.who,
        "failure": asdict(past.failure) if past.failure else None,
        "first_step": past.first_step,
        "committed_step": past.committed_step,
        "seconds": round(past.seconds, 3),
        "nodes": list(past.nodes),
    }


def verdict_of(decision: Decision, history: Sequence[PastLink]) -> dict[str, Any]:
    """A decision for its record, with the numbers behind it."""
    return {
        "decision": decision.kind,
        "reason": decision.reason,
        "cause": decision.cause.value,
        "rule": decision.rule,
        "delay_s": decision.delay_s,
        "exclude_nodes": list(decision.exclude_nodes),
        "numbers": decision.numbers or spent(history).to_json(),
    }


def failed_nodes(link: LinkRecords) -> tuple[str, ...]:
    """The node to stay away from; of several nobody says here which one it was."""
    names = node_names(str(link.claim.get("nodes") or ""))
    return tuple(names) if len(names) == 1 else ()


def gather(
    run: RunDir, link: LinkRecords, job: JobInfo | None, *, exit_code: int | None, user_stop: str
) -> Evidence:
    """The evidence on a link's end."""
    asked, done = link.last("stop_asked"), link.last("completed")
    told = next((r for r in reversed(link.all("ended")) if "how" in r), {})
    failure = first_failure(run, link.number, num_tasks(link))
    if failure is None and told.get("how") == "hung":
        failure = _hang(told)
    return Evidence(
        job=job,
        completed=done is not None,
        judged=str(done.get("judged", "")) if done is not None else "",
        how=str(told.get("how", "")),
        why=str(told.get("reason", "")),
        asked=str(asked.get("reason", "")) if asked else "",
        failure=failure,
        exit_code=exit_code,
        user_stop=user_stop,
        last_words="\n".join(last_words(run, link)),
    )


def _hang(record: Record) -> Failure:
    """A hang as the supervisor noticed it; the ranks themselves could not tell."""
    step, rank = record.get("step", 0), record.get("rank", 0)
    return Failure(
        type=HANG,
        message=str(record.get("reason", "")),
        step=int(step),
        rank=rank if isinstance(rank, int) else 0,
    )


def num_tasks(link: LinkRecords) -> int:
    """How many ranks a link has."""
    return _number(link.claim.get("num_tasks"))


def _number(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < _MOST_RANKS else 1


# ---- failures ------------------------------------------------------------------------------


def first_failure(run: RunDir, number: int, num_tasks: int) -> Failure | None:
    """The exception that ended a rank first, by the time of its record."""
    found = []
    for rank in range(num_tasks):
        content = files.read_json_or_none(run.link(number).rank_failure(rank))
        failure = _failure(content)
        if failure is not None:
            found.append((_seconds(content.get("t")), rank, failure))
    return min(found, key=lambda item: item[:2])[2] if found else None


def _recorded_failure(run: RunDir, link: LinkRecords, record: Record) -> Failure | None:
    """As the end was recorded; a link in the foreground leaves it to the rank's own file."""
    if "failure" in record:
        return _failure(record.get("failure"))
    return first_failure(run, link.number, num_tasks(link))


_TYPES = {"str": str, "int": int}


def _failure(content: Any) -> Failure | None:
    """A failure as it was recorded; None for what is none of ours.

    What a later version records besides is passed over.
    """
    if not isinstance(content, dict):
        return None
    known = [field for field in fields(Failure) if field.name in content]
    if not all(isinstance(content[field.name], _TYPES[str(field.type)]) for field in known):
        return None
    try:
        return Failure(**{field.name: content[field.name] for field in known})
    except TypeError:
        return None


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e18 else 0.0


# ---- logs ----------------------------------------------------------------------------------


def log_of(run: RunDir, link: LinkRecords, rank: int) -> Path | None:
    """The log that tells most of a rank: its own, or of a link in the foreground the run's."""
    own = run.link(link.number).rank_log(rank)
    for path in (
        (own, run.train_log) if link.claim.get("foreground") else (own, _job_log(run, link))
    ):
        if path is not None and files.size_or_zero(path):
            return path
    return None


def _job_log(run: RunDir, link: LinkRecords) -> Path | None:
    """What the job itself printed: the supervisor's words, and those of srun and slurmstepd."""
    job = str(link.claim.get("job") or "")
    return run.job_log.with_name(run.job_log.name.replace("%j", job)) if job.isalnum() else None


def last_words(run: RunDir, link: LinkRecords) -> list[str]:
    """The last lines of the logs in which a rank that was killed, or who killed it, is heard."""
    logs = [run.link(link.number).rank_log(0), _job_log(run, link)]
    return [line for path in logs if path is not None for line in last_lines(path, _LAST_WORDS)]


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log as a terminal would show them in the end.

    Of a progress bar, which goes back to the start of its line, the last state is left; colours
    and empty lines are not.
    """
    try:
        begin = max(0, os.stat(path).st_size - _TAIL_BYTES)
        data = files.read_bytes(path, _TAIL_BYTES, begin)
    except OSError:
        return []
    if begin and b"\n" in data[:-1]:
        data = data[data.index(b"\n") + 1 :]  # The rest of a line that began before.
    found = []
    for raw in data.decode(errors="replace").split("\n"):
        shown = as_shown(raw)
        if shown:
            found.append(shown)
    return found[-count:]


def as_shown(raw: str) -> str:
    """A line of a log as a terminal would show it in the end, without its colours."""
    states = [text.rstrip() for text in _ESCAPES.sub("", raw).split("\r")]
    shown = next((text for text in reversed(states) if text), "")
    return "".join(c if c.isprintable() or c == "\t" else "?" for c in shown)
