"""How a run stands, in one sentence."""

from __future__ import annotations

from hpcresume.chain import PLANNED, spent
from hpcresume.config import local_moment
from hpcresume.scheduler.job import JobInfo
from hpcresume.scheduler.waiting import waiting_words
from hpcresume.training.progress import clock
from hpcresume.why.view import BUDGETS, View, node_of, told

#: A sentence is cut where somebody's error message is a page.
_LONGEST = 300


def sentence(view: View) -> str:
    """How it stands, and why: on one line, not too long, with one full stop at its end."""
    line = " ".join(_words(view).split()).rstrip(".")
    return f"{line[:_LONGEST].rstrip()}…" if len(line) > _LONGEST else f"{line}."


def _words(view: View) -> str:
    name, state, step = view.story.run.name, view.status.state, view.status.step
    at = f"at step {step}"
    if view.status.seen and not step:
        at = f"after {clock(view.status.ran_s or 0.0)}"
    if state == "complete":
        links = len(view.past)
        hours = f", {clock(spent(view.past).hours * 3600)} of work" if view.past else ""
        known = not view.status.seen or step or view.status.ran_s
        where = f" {at}" if known else ""
        return f"{name} is complete{where}: {links} link{'s' * (links != 1)}{hours}"
    if state == "running":
        total = view.status.total_steps
        return f"{name} is running {at}{f' of {total}' if total else ''}: {_doing(view)}"
    if state == "waiting":
        return f"{name} {_waiting(view, at)}"
    if state == "stalled":
        return f"{name} is stalled {at}: {_stalled(view)}"
    reason = str(view.decided.get("reason", "")) or view.status.why
    if state == "stopped":
        who = reason.removeprefix("cancelled ")
        return (
            f"{name} was stopped {at}: {reason}"
            if who == reason
            else (f"{name} was cancelled {at} {who}")
        )
    verb = "rests" if view.cause in PLANNED else "has failed"
    if view.rule in (*BUDGETS, "expired"):
        verb = "was stopped"
    return f"{name} {verb} {at}: {reason or 'no reason was recorded'}"


def _doing(view: View) -> str:
    link = view.shown
    if link is None or not view.lives:
        return f"job {view.status.job} has begun, and its link is about to"
    asked = link.last("stop_asked")
    if link.last("completed"):
        doing = "the last step is done, the final model is written"
    elif asked:
        doing = f"it saves and leaves ({asked.get('reason', 'asked to')})"
    elif view.status.why == "ending":
        doing = "its job is ending"
    elif link.last("started"):
        doing = "its command runs" if view.status.seen else "it trains"
    elif link.last("restored"):
        doing = "the checkpoint is restored, the first step is prepared"
    else:
        doing = "its ranks are starting"
    job = f", job {view.status.job}" if view.status.job else ""
    return f"link {link.number}{job} on {node_of(link)}: {doing}"


def _waiting(view: View, at: str) -> str:
    if not view.status.job and view.story.driven:
        return f"waits {at} {view.status.why}"
    if not view.status.job:
        unknown = f"stands {at}, and whether a job of it waits or runs is not known"
        return f"{unknown}: {view.status.why}" if view.status.why else unknown
    reason = view.status.reason
    words = waiting_words(reason)
    because = f" because {words}" if words != reason else f" ({reason})" if reason else ""
    return f"waits {at}: job {view.status.job} is queued{because}"


def _stalled(view: View) -> str:
    if not view.story.links and not view.story.submissions:
        return "it was never submitted"
    if view.status.queued:
        return "its jobs wait, and nobody starts them"
    if view.status.expired and view.status.deadline is not None:
        when = local_moment(view.status.deadline)
        return f"no job is queued, and none that begins now could end before its deadline, {when}"
    if not view.past:
        return f"no job of it is queued, and none has ever begun{_lost(view)}"
    last = view.past[-1]
    ended = f"link {last.number} ended ({told(last)})"
    return f"no job is queued and no decision is recorded; {ended}{_lost(view)}"


def _lost(view: View) -> str:
    """What became of the jobs that were to follow, in the scheduler's words."""
    if not view.lost:
        return ""
    jobs = ", ".join(job.id for job in view.lost)
    ends = dict.fromkeys(_end_words(job) for job in view.lost)
    which, whose = ("jobs", "their links") if len(view.lost) > 1 else ("job", "its link")
    return f"; {which} {jobs} ended before {whose} began ({'; '.join(ends)})"


def _end_words(job: JobInfo) -> str:
    word = job.raw_state or job.state.value
    return f"{word}, exit code {job.exit_code}" if job.exit_code else word
