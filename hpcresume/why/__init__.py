"""Why a run stands as it does: its story, its status and its logs as sentences for people.

Used by `hpcresume why`. Reads only, asks nobody, never imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hpcresume.history import last_lines, log_of, past_link
from hpcresume.scheduler.job import JobInfo
from hpcresume.status import RunStatus, is_alive
from hpcresume.story import Story
from hpcresume.why.advice import Advice, next_steps
from hpcresume.why.evidence import ChainLine, chain_lines, exit_code, facts
from hpcresume.why.sentence import sentence
from hpcresume.why.view import View, node_of

_LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `hpcresume why` says, in its order."""

    run: str
    path: str
    state: str
    sentence: str
    cause: str = ""
    """Of the newest link that has ended; empty where none has."""
    rule: str = ""
    """The row of the table of decisions that ended the chain."""
    link: int | None = None
    job: str = ""
    node: str = ""
    rank: int | None = None
    failed_step: int | None = None
    """The step in which it failed, where that was recorded."""
    committed_step: int = 0
    exit_code: int | None = None
    facts: tuple[tuple[str, str], ...] = ()
    """What is known besides: a word and what it stands for."""
    log: str = ""
    log_lines: tuple[str, ...] = ()
    next: tuple[Advice, ...] = ()
    """What to do: why, and the exact command; the command may be empty."""
    chain: tuple[ChainLine, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        values = asdict(self)
        values["facts"] = dict(self.facts)
        values["next"] = [{"why": why, "command": command} for why, command in self.next]
        return values


def link_to_ask_about(story: Story) -> str:
    """The job whose end no file tells: what the scheduler is to be asked about, or empty.

    Only the newest link's: what became of the others, those after them have recorded.
    """
    newest = story.newest
    if newest is None or story.ended(newest) is not None or story.completed:
        return ""
    return str(newest.claim.get("job") or "")


def is_settled(story: Story) -> bool:
    """Whether files alone tell how the run stands: it is complete, or a recorded decision ended it.

    A link that lives is not settled, whatever was decided before it.
    """
    newest = story.newest
    if story.completed:
        return True
    if newest is None or story.ended(newest) is None:
        return False
    decided = story.decided()
    return decided is not None and decided.get("decision") != "continue"


def explain(
    story: Story,
    status: RunStatus,
    jobs: Mapping[str, JobInfo],
    settings: Mapping[str, Any],
    *,
    now: float,
    called: str,
) -> Explanation:
    """Why a run stands as it does.

    `jobs` are the scheduler's words on ended jobs that no file tells of, `settings` the frozen
    configuration as plain values (empty where it cannot be read), `now` Unix time, and `called`
    what RUN is called in commands.
    """
    lives = is_alive(story, status)
    ended = story.links[:-1] if lives else story.links
    view = View(
        story=story,
        status=status,
        past=[past_link(story, link, jobs.get(str(link.claim.get("job")))) for link in ended],
        lives=lives,
        decided={} if lives else story.decided() or {},
        settings=settings,
        now=now,
        lost=[jobs[id] for id in story.unclaimed() if id in jobs and jobs[id].state.ended],
        called=shlex.quote(called),
    )
    link, last = view.shown, view.last
    failure = last.failure if last is not None else None
    log = None if link is None else log_of(story.run, link, failure.rank if failure else 0)
    lines = [] if log is None or status.state == "complete" else last_lines(log, _LOG_LINES)
    return Explanation(
        run=story.run.name,
        path=str(story.run.path),
        state=status.state,
        sentence=sentence(view),
        cause=last.cause.value if last is not None else "",
        rule=view.rule,
        link=link.number if link else None,
        job=str(link.claim.get("job") or "") if link else status.job,
        node=node_of(link) if link else status.node,
        rank=failure.rank if failure else None,
        failed_step=failure.step if failure else None,
        committed_step=status.checkpoint_step or 0,
        exit_code=exit_code(view),
        facts=tuple(facts(view)),
        log=str(log) if lines else "",
        log_lines=tuple(lines),
        next=tuple(next_steps(view)),
        chain=tuple(chain_lines(view)),
    )
