"""The records of a run's journals, one sentence each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcresume.files import size_words
from hpcresume.journal import Record
from hpcresume.story import Story


@dataclass(frozen=True)
class Entry:
    """A record as people read it."""

    t: float
    """Unix seconds."""
    link: int
    """0 for what was done from outside a link."""
    kind: str
    text: str


def newest_entries(story: Story, most: int) -> list[Entry]:
    """The last entries of a run, in order."""
    found: list[Entry] = []
    for link in reversed(story.links):
        found = [*_told(link.records[-most:], link.number), *found]
        if len(found) >= most:
            break
    found += _told(story.submissions[-most:], 0)
    found.sort(key=lambda entry: entry.t)
    return found[-most:]


def _told(records: list[Record], link: int) -> list[Entry]:
    entries = []
    for record in records:
        kind = record["kind"]
        if kind == "ended" and "cause" not in record and record.get("how") != "hung":
            # How the ranks left; their supervisor's own record says why.
            continue
        text = " ".join(_WORDS.get(kind, _plainly)(record).split())
        entries.append(Entry(float(record["t"]), link, kind, text))
    return entries


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record.get(name)
    return value if isinstance(value, (int, float)) else 0


def _saved(record: Record) -> str:
    size, seconds = size_words(_number(record, "bytes")), _number(record, "seconds")
    return f"step {record.get('step')} ({size} in {seconds:.1f} s)"


def _restored(record: Record) -> str:
    if not record.get("digest"):
        return "nothing: it starts fresh"
    return f"step {record.get('step')} (verified, {str(record['digest'])[:8]})"


def _ended(record: Record) -> str:
    if "cause" not in record:
        return f"hung: {record.get('reason', '')}"
    of = f"link {record['of']}: " if "of" in record else ""
    cause, detail = str(record["cause"]), str(record.get("detail", ""))
    return of + (detail if detail.startswith(cause) else f"{cause}: {detail}" if detail else cause)


def _claimed(record: Record) -> str:
    job = f"by job {record['job']} " if record.get("job") else ""
    return f"{job}on {record.get('nodes') or record.get('host', '?')}"


def _submitted(record: Record) -> str:
    return f"by {record.get('by', '?')} on {record.get('host', '?')}"


def _decided(record: Record) -> str:
    return f"{record.get('decision', '?')}: {record.get('reason', '')}"


def _changed(record: Record) -> str:
    changes = record.get("changes", record.get("change", ""))
    who = f"by {record['by']}: " if "by" in record else ""
    if isinstance(changes, dict):
        return who + ", ".join(f"{name}={value}" for name, value in changes.items())
    return who + (", ".join(map(str, changes)) if isinstance(changes, list) else str(changes))


_PLUMBING = frozenset({"v", "t", "kind", "link", "job", "token", "after_link"})


def _plainly(record: Record) -> str:
    """A kind that is not known here: what a later version writes is shown all the same."""
    shown = {name: value for name, value in record.items() if name not in _PLUMBING}
    plain = {n: v for n, v in shown.items() if isinstance(v, (str, int, float)) and v != ""}
    return ", ".join(f"{name} {value}" for name, value in plain.items())[:300]


_WORDS: dict[str, Callable[[Record], str]] = {
    "submitted": _submitted,
    "claimed": _claimed,
    "queued": lambda r: f"job {r.get('queued_job', '?')} waits behind",
    "started": lambda r: f"at step {r.get('step')} of {r.get('max_steps') or '?'}",
    "restored": _restored,
    "saved": _saved,
    "save_failed": lambda r: f"step {r.get('step')}: {r.get('reason', '')}",
    "quarantined": lambda r: f"step {r.get('step')}: {r.get('reason', '')}",
    "stop_asked": lambda r: f"at step {r.get('step')}: {r.get('reason', '')}",
    "ended": _ended,
    "decided": _decided,
    "changed": _changed,
    "completed": lambda r: f"at step {r.get('step')}",
    "cancelled": lambda r: f"by {r.get('by', '?')}",
}
