"""What a user can do next: why, and the exact command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from hpcresume.chain import MEMORY, NODE_CAUSES, PLANNED, Cause
from hpcresume.why.view import BUDGETS, View

#: Why, and the command; which may be empty.
Advice = tuple[str, str]


def next_steps(view: View) -> list[Advice]:
    """What to do next, in order; nothing where a run is complete."""
    run, state = view.story.run, view.status.state
    if state == "complete":
        return []
    if state == "running":
        return [("it goes on by itself; to look on", f"hpcresume logs -f {view.called}")]
    if state == "waiting":
        return _while_waiting(view)
    if view.rule == "expired" or (state == "stalled" and view.status.expired):
        return _mend_deadline(view)
    if not view.past:
        return [("start it", _resume(view))]
    if view.shown is not None and view.shown.claim.get("foreground"):
        return [("it ran in the foreground: start the script again, and it goes on", "")]
    if view.lost_step:
        return [(f"put a checkpoint back into {run.path}, or begin a new run", "")]
    if view.rule in BUDGETS:
        limit = _setting(view, "chain", view.rule)
        more = f"{2 * limit:g}" if isinstance(limit, (int, float)) else "null"
        return [("allow more", _resume(view, f"chain.{view.rule}={more}"))]
    return _mend(view, view.cause)


def _resume(view: View, *settings: str) -> str:
    sets = "".join(f" --set {shlex.quote(setting)}" for setting in settings)
    return f"hpcresume resume {view.called}{sets}"


def _setting(view: View, *keys: str) -> Any:
    value: Any = view.settings
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _while_waiting(view: View) -> list[Advice]:
    job = view.status.job
    if "held" in view.status.why.lower():
        return [("let it go", f"scontrol release {job}")]
    if view.story.run.identify().get("cluster") == "slurm" and job:
        return [("it goes on by itself; when, Slurm guesses", f"squeue --start -j {job}")]
    return [("it goes on by itself", "")]


def _mend(view: View, cause: Cause) -> list[Advice]:
    run = view.story.run
    if cause in (Cause.CANCELLED, Cause.STOPPED):
        return [("go on from what is saved", _resume(view))]
    if cause is Cause.HANDED_OVER:
        logs = f"hpcresume logs {view.called}"
        return [("the command left by itself, and is not done: see what it says", logs)]
    if cause in PLANNED:
        return _mend_time(view)
    if cause in MEMORY:
        return _mend_memory(view, cause)
    if cause is Cause.NON_FINITE:
        rate = _setting(view, "override", "lr") or _setting(view, "args", "lr")
        half = f"{rate / 2:g}" if isinstance(rate, (int, float)) else "VALUE"
        smaller = "go on from the last finite step with a smaller learning rate"
        return [(smaller, _resume(view, f"lr={half}"))]
    if cause is Cause.EXPIRED:
        return _mend_deadline(view)
    if cause is Cause.STORAGE:
        return [("make room", f"df -h {shlex.quote(str(run.path))}"), ("go on", _resume(view))]
    if cause in (Cause.USER_CODE, Cause.CONFIGURATION) and run.code.is_dir():
        return [(f"mend the code that its jobs use, {run.code}; then go on", _resume(view))]
    if cause in NODE_CAUSES:
        return [("go on, on other nodes", _resume(view))]
    return [("read the whole log", f"hpcresume logs {view.called}"), ("go on", _resume(view))]


def _mend_deadline(view: View) -> list[Advice]:
    if _setting(view, "scheduler", "deadline") is None:
        # It stood in the user's own batch script, or on its command line.
        later = _resume(view, "scheduler.deadline=now+7days")
        return [("give the next jobs a later deadline", later)]
    return [("submit the next jobs without that deadline", _resume(view, "scheduler.deadline="))]


def _mend_time(view: View) -> list[Advice]:
    if view.past[-1].progressed or view.cause is Cause.PREEMPTED:
        return [("go on", _resume(view))]
    longer = "not one step was saved within a job's time: give the jobs more"
    return [(longer, f"{_resume(view)} --time HH:MM:SS")]


def _mend_memory(view: View, cause: Cause) -> list[Advice]:
    if cause is Cause.HOST_MEMORY:
        more = _doubled(_setting(view, "scheduler", "mem"))
        return [("ask for more memory", _resume(view, f"scheduler.mem={more}"))]
    smaller = (
        "take half the batch and accumulate twice (a step keeps its samples), or GPUs with more "
        "memory (scheduler.constraint); then go on"
    )
    return [(smaller, _resume(view))]


def _doubled(mem: Any) -> str:
    """Twice a --mem; a value to begin with where none was asked for."""
    text = str(mem or "")
    digits = text.rstrip("KMGTkmgt")
    return f"{2 * int(digits)}{text[len(digits) :]}" if digits.isdecimal() else "64G"
