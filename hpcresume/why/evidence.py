"""The evidence behind a sentence: what is known of a link's end, and a line for every link."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcresume.chain import PastLink
from hpcresume.display.tables import ago, calendar_words, late_words
from hpcresume.status import fell_back
from hpcresume.story import resized
from hpcresume.training.progress import clock
from hpcresume.why.view import View, node_of, told


@dataclass(frozen=True, kw_only=True)
class ChainLine:
    """One link of the chain's history."""

    link: int
    job: str
    node: str
    first_step: int
    committed_step: int
    seconds: float
    cause: str
    """A cause's word, or `running`."""
    detail: str
    seen: str = ""
    """Of a command, how its progress is seen; see `Story.seen`."""


def chain_lines(view: View) -> list[ChainLine]:
    """A line for each link; one beyond those that have ended is alive."""
    lines = []
    for at, link in enumerate(view.story.links):
        ended = view.past[at] if at < len(view.past) else None
        restored = link.last("restored")
        committed = view.story.committed_step(link)
        began = float(link.records[0]["t"]) if link.records else view.now
        lines.append(
            ChainLine(
                link=link.number,
                job=str(link.claim.get("job") or ""),
                node=node_of(link),
                first_step=int(restored["step"]) if restored else committed,
                committed_step=committed,
                seconds=round(ended.seconds if ended else max(0.0, view.now - began), 3),
                cause=ended.cause.value if ended else "running",
                detail=ended.detail if ended else "",
                seen=str(restored.get("seen", "")) if restored else "",
            )
        )
    return lines


def exit_code(view: View) -> int | None:
    """What the ranks left with, as their supervisor or the one that failed recorded it."""
    last = view.last
    if last is None or view.shown is None:
        return None
    code = (view.story.ended(view.shown) or {}).get("exit_code")
    if type(code) is int:
        return code
    return None if last.failure is None else last.failure.exit_code


def facts(view: View) -> list[tuple[str, str]]:
    """A word each, and what it stands for."""
    found: list[tuple[str, str]] = []
    status, last = view.status, view.last
    complete = status.state == "complete"
    if last is not None and not complete:
        found.append(("cause", told(last)))
        found += _failure_facts(last, str(view.story.run.code))
    if view.shown is not None:
        found.append(("link", _link_words(view)))
    if resized(view.story.links):
        found.append(("ranks", resized(view.story.links)))
    found.append(("saved", _saved(view)))
    if fell_back(view.story):
        found.append(("note", fell_back(view.story)))
    code = exit_code(view)
    if code:
        found.append(("exit code", str(code)))
    if status.state == "running" and status.time_left_s is not None:
        found.append(("time left", clock(status.time_left_s)))
    if status.calendar is not None:
        found.append(("complete", _calendar(view)))
    if status.state in ("running", "waiting") and status.queued:
        found.append(("queued", ", ".join(f"job {job}" for job in status.queued)))
    numbers = view.decided.get("numbers")
    if isinstance(numbers, dict) and numbers and not complete:
        found.append(("used up", _numbers(numbers)))
    if complete and not status.seen:
        found.append(("model", str(view.story.run.final_model)))
    return found


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _failure_facts(past: PastLink, code: str) -> list[tuple[str, str]]:
    """In which step, and at which line: that of the run's own code which lies deepest."""
    failure = past.failure
    if failure is None:
        return []
    facts = [("in step", f"{failure.step}, rank {failure.rank}")] if failure.step else []
    frames = _FRAME.findall(failure.traceback)
    own = [frame for frame in frames if frame[0].startswith(code)]
    foreign = [frame for frame in frames if "site-packages" not in frame[0]]
    for file, line in (own or foreign or frames)[-1:]:
        facts.append(("at", f"{file}, line {line}"))
    return facts


def _link_words(view: View) -> str:
    link, last = view.shown, view.last
    assert link is not None
    words = [str(link.number)]
    if link.claim.get("job"):
        words.append(f"job {link.claim['job']}")
    words.append(node_of(link))
    if last is not None:
        words.append(f"after {clock(last.seconds)}")
        if last.ended_at:
            words.append(f"{ago(max(0.0, view.now - last.ended_at))} ago")
    elif link.records:
        words.append(f"for {clock(max(0.0, view.now - float(link.records[0]['t'])))}")
    return " · ".join(words)


def _saved(view: View) -> str:
    status = view.status
    if view.lost_step:
        return f"no checkpoint is left, although step {view.lost_step} was committed"
    if status.checkpoint_step is None:
        return "what the command saves is not seen" if status.seen else "no checkpoint yet"
    age = ago(status.checkpoint_age_s or 0.0)
    if status.seen:
        return f"step {status.checkpoint_step}, {age} ago, by the command itself"
    words = "verified" if status.checkpoint_verified else "committed"
    return f"step {status.checkpoint_step}, {age} ago, {words}"


def _calendar(view: View) -> str:
    words, late = calendar_words(view.status, view.now), late_words(view.status)
    return f"{words}; {late}" if late else words


def _numbers(numbers: Mapping[str, Any]) -> str:
    """`3 links · 5:01:00 · 20 node-hours · 2 without a new step · 1 crashed`."""
    used = {key: n for key, n in numbers.items() if n and isinstance(n, (int, float))}
    links = used.get("links", 0)
    words = [f"{links:g} link{'s' * (links != 1)}"]
    if "hours" in used:
        words.append(clock(used["hours"] * 3600))
    if "node_hours" in used and used["node_hours"] != used.get("hours"):
        words.append(f"{used['node_hours']:g} node-hours")
    if "idle_links" in used:
        words.append(f"{used['idle_links']:g} without a new step")
    if "crashes" in used:
        words.append(f"{used['crashes']:g} crashed")
    return " · ".join(words)
