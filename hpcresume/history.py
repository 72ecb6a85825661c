"""What became of the links before: a story and the scheduler's word, as `chain` needs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcresume import files
from hpcresume.chain import Cause, Evidence, Failure, PastLink, cause_of
from hpcresume.journal import LinkRecords
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import node_names
from hpcresume.scheduler.job import JobInfo
from hpcresume.story import Story

#: More ranks than any link has had; a claim that says so is damaged.
_MOST_RANKS = 1 << 20


def past_links(story: Story, jobs: Mapping[str, JobInfo]) -> list[PastLink]:
    """The history since the last submission, for `chain.decide`.

    `jobs` are the scheduler's words on jobs whose links have no recorded end.
    """
    return [
        past_link(story, link, jobs.get(str(link.claim.get("job"))))
        for link in story.links
        if link.number > story.after_link
    ]


def past_link(story: Story, link: LinkRecords, job: JobInfo | None) -> PastLink:
    """One link: as its end was recorded, else as the evidence tells."""
    record = story.ended(link)
    restored = link.last("restored")
    committed = story.committed_step(link)
    first = int(restored["step"]) if restored else committed
    if record is not None:
        nodes = record.get("nodes")
        return PastLink(
            number=link.number,
            cause=_cause(record["cause"]),
            first_step=first,
            committed_step=committed,
            failure=_failure(record.get("failure")),
            who=str(record.get("who", "")),
            detail=str(record.get("detail", "")),
            seconds=_seconds(record.get("seconds")),
            nodes=tuple(map(str, nodes)) if isinstance(nodes, list) else (),
        )
    evidence = gather(story.run, link, job, exit_code=None, user_stop=story.cancelled)
    cause, detail = cause_of(evidence)
    times = [float(r["t"]) for r in link.records] or [0.0]
    return PastLink(
        number=link.number,
        cause=cause,
        first_step=first,
        committed_step=committed,
        failure=evidence.failure,
        who=story.cancelled or (job.cancelled_by if job is not None else ""),
        detail=detail,
        seconds=max(times) - min(times),
        nodes=failed_nodes(link) if cause is Cause.NODE_FAILURE else (),
    )


def failed_nodes(link: LinkRecords) -> tuple[str, ...]:
    """The node to stay away from; of several nobody says here which one it was."""
    names = node_names(str(link.claim.get("nodes") or ""))
    return tuple(names) if len(names) == 1 else ()


def _cause(word: str) -> Cause:
    try:
        return Cause(word)
    except ValueError:
        return Cause.UNKNOWN


def gather(
    run: RunDir, link: LinkRecords, job: JobInfo | None, *, exit_code: int | None, user_stop: str
) -> Evidence:
    """The evidence on a link's end."""
    asked = link.last("stop_asked")
    how = next((str(r["how"]) for r in reversed(link.all("ended")) if "how" in r), "")
    return Evidence(
        job=job,
        completed=link.last("completed") is not None,
        how=how,
        asked=str(asked["reason"]) if asked else "",
        failure=first_failure(run, link.number, _num_tasks(link)),
        exit_code=exit_code,
        user_stop=user_stop,
    )


def _num_tasks(link: LinkRecords) -> int:
    number = link.claim.get("num_tasks")
    return number if isinstance(number, int) and 0 < number < _MOST_RANKS else 1


def first_failure(run: RunDir, number: int, num_tasks: int) -> Failure | None:
    """The exception that ended a rank first, by the time of its record."""
    found = []
    for rank in range(num_tasks):
        content = files.read_json_or_none(run.link(number).rank_failure(rank))
        failure = _failure(content)
        if failure is not None:
            found.append((_seconds(content.get("t")), rank, failure))
    return min(found, key=lambda item: item[:2])[2] if found else None


def _failure(content: Any) -> Failure | None:
    """A failure as it was recorded; None for what is none of ours."""
    try:
        failure = Failure(**{key: content[key] for key in content if key != "t"})
    except TypeError:
        return None
    return failure if isinstance(failure.message, str) else None


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e18 else 0.0
