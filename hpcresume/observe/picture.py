"""Everything that a view of one run shows, as plain values.

`RunView` looks again and again, and reads only what has grown: the page in the browser, the full
screen of a terminal and the report draw the same picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcresume.checkpoint.listing import Listing, list_checkpoints
from hpcresume.config import CheckpointConfig, read_frozen
from hpcresume.errors import HpcResumeError
from hpcresume.history import past_link
from hpcresume.journal import Lineage, LinkRecords, lineage
from hpcresume.observe.chain import StoryTail
from hpcresume.observe.curves import CurvesTail
from hpcresume.observe.entries import Entry, newest_entries
from hpcresume.observe.loglines import LogWindow
from hpcresume.observe.pace import PaceTail
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobInfo, JobState
from hpcresume.status import RunStatus, is_alive, read_status
from hpcresume.story import Story

SCHEMA_VERSION = 1
_ENTRIES = 200
#: What a status tells relative to the moment of the look; a picture has the moments themselves.
_AGES = ("time_left_s", "checkpoint_age_s", "worked_s", "train_left_s")


@dataclass(frozen=True, kw_only=True)
class LinkShown:
    """One link of the chain."""

    link: int
    job: str
    node: str
    began: float | None
    """Unix seconds, as are all moments here."""
    ended: float | None
    """None while it lives."""
    seconds: float
    """0 while it lives."""
    first_step: int
    last_step: int
    """The step that stood committed at its end; while it lives, the one it is at."""
    cause: str
    """Why it ended; `running` while it lives."""
    detail: str


@dataclass(frozen=True, kw_only=True)
class CheckpointShown:
    """One committed checkpoint."""

    step: int
    epoch: int
    link: int
    bytes: int
    created: float
    seconds: float | None
    """How long it took to be written; None where no journal tells."""
    verified: str
    """`read back`, `as written` (hashed when it was written), or empty."""
    best: bool
    pinned: bool
    metric: float | None
    kept: tuple[str, ...]
    """The rules by which it stays; none: the next commit may remove it."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A run as it stands at a moment."""

    run_id: str
    name: str
    path: str
    status: RunStatus
    job_ends: float | None
    """When the running job's time is over."""
    checkpoint_created: float | None
    links: Sequence[LinkShown]
    bands: Sequence[tuple[int, int, int]]
    """Which link the steps are of that stand: link, first step, last step."""
    curves: dict[str, dict[str, Any]]
    """The metrics by name; see `curves.Curve.to_json`."""
    curves_left_out: int
    machine: dict[str, dict[str, Any]]
    """What the monitor saw, likewise: step times, memory, the GPU."""
    pace: dict[str, Any]
    """Seconds a step took, on the average between two records of a journal; like a metric."""
    checkpoints: Sequence[CheckpointShown]
    left_out: dict[int, str]
    """Directories that are no checkpoints of the run, and why."""
    free_bytes: int | None
    entries: Sequence[Entry]
    log: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """As views and reports take it: objects, lists, text and finite numbers."""
        status = self.status.to_json()
        for name in _AGES:
            del status[name]
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "name": self.name,
            "path": self.path,
            "status": status,
            "job_ends": self.job_ends,
            "checkpoint_created": self.checkpoint_created,
            "links": [asdict(link) for link in self.links],
            "bands": [list(band) for band in self.bands],
            "curves": self.curves,
            "curves_left_out": self.curves_left_out,
            "machine": self.machine,
            "pace": self.pace,
            "checkpoints": [asdict(checkpoint) for checkpoint in self.checkpoints],
            "left_out": {str(step): reason for step, reason in self.left_out.items()},
            "free_bytes": self.free_bytes,
            "entries": [asdict(entry) for entry in self.entries],
            "log": list(self.log),
        }


@dataclass(frozen=True)
class _KnownEnd:
    """How a link ended, as far as could be told at some moment."""

    link: LinkRecords
    newest: LinkRecords | None
    recorded: bool
    shown: LinkShown

    def holds(self, link: LinkRecords, story: Story) -> bool:
        """Whether it is still all that can be told; the next link may find out more."""
        return self.link is link and (self.recorded or self.newest is story.newest)


class RunView:
    """Looks at one run. Not for several threads at a time."""

    def __init__(self, run: RunDir) -> None:
        """Raises NotFound where it is no run."""
        self.run = run
        self.story: Story | None = None
        """What the last look read."""
        self._stories = StoryTail(run)
        self._curves = CurvesTail(run)
        self._machine = CurvesTail(run, monitor=True)
        self._window = LogWindow(run)
        self._ended: dict[int, _KnownEnd] = {}
        self._listing: tuple[object, Listing] | None = None
        self._settings: CheckpointConfig | None = None
        self._pace = PaceTail()
        self._entries: tuple[object, list[Entry]] | None = None
        self._checkpoints: tuple[Listing, LinkRecords | None, list[CheckpointShown]] | None = None

    def look(self, jobs: Sequence[JobInfo] | None, note: str = "") -> Picture:
        """The run as it is now; `jobs` and `note` as for `status.read_status`.

        Raises NotFound where it is gone, OSError where it is away.
        """
        story = self.story = self._stories.look()
        over = lineage(self.run, story.links)
        listing = self._look_at_checkpoints(story, over)
        status = read_status(self.run, jobs, note, story=story, committed=listing.found)
        curves = self._curves.look(over)
        running = next((j for j in jobs or () if j.state is not JobState.PENDING), None)
        newest = listing.found[-1].manifest.created if listing.found else None
        return Picture(
            run_id=story.run_id,
            name=self.run.name,
            path=str(self.run.path),
            status=status,
            job_ends=running.end_time if running is not None else None,
            checkpoint_created=newest,
            links=self._links(story, status),
            bands=_bands(over, max(curves.step, status.step if over.link else 0)),
            curves={name: curve.to_json() for name, curve in curves.by_name.items()},
            curves_left_out=len(curves.left_out),
            machine={
                name: curve.to_json()
                for name, curve in self._machine.look(over).by_name.items()
                if name not in curves.by_name
            },
            pace=self._pace.look(story).to_json(),
            checkpoints=self._shown_checkpoints(listing, story),
            left_out=listing.left_out,
            free_bytes=listing.free_bytes or None,
            entries=self._newest_entries(story),
            log=self._window.look(),
        )

    def _links(self, story: Story, status: RunStatus) -> list[LinkShown]:
        lives = is_alive(story, status)
        shown = []
        for link in story.links:
            if lives and link is story.newest:
                shown.append(_living(link, story, status))
                continue
            known = self._ended.get(link.number)
            if known is None or not known.holds(link, story):
                recorded = story.ended(link) is not None
                known = _KnownEnd(link, story.newest, recorded, _ended(link, story))
                self._ended[link.number] = known
            shown.append(known.shown)
        return shown

    def _look_at_checkpoints(self, story: Story, over: Lineage) -> Listing:
        steps, pins = self.run.checkpoint_steps(), self.run.pinned_steps()
        newest = story.newest
        saves = len(newest.all("saved", "quarantined")) if newest is not None else 0
        seen = (steps, pins, len(story.links), saves, over, story.completed)
        if self._listing is None or self._listing[0] != seen:
            if self._settings is None:
                self._settings = CheckpointConfig()
                with contextlib.suppress(HpcResumeError, OSError):
                    self._settings = read_frozen(self.run.config).checkpoint
            listing = list_checkpoints(
                self.run, self._settings, complete=story.completed, over=over
            )
            self._listing = (seen, listing)
        return self._listing[1]

    def _shown_checkpoints(self, listing: Listing, story: Story) -> list[CheckpointShown]:
        known = self._checkpoints
        if known is None or known[0] is not listing or known[1] is not story.newest:
            known = self._checkpoints = (listing, story.newest, _checkpoints(listing, story))
        return known[2]

    def _newest_entries(self, story: Story) -> list[Entry]:
        newest = story.newest
        seen = (len(story.submissions), len(story.links), len(newest.records) if newest else 0)
        if self._entries is None or self._entries[0] != seen:
            self._entries = (seen, newest_entries(story, _ENTRIES))
        return self._entries[1]


def _living(link: LinkRecords, story: Story, status: RunStatus) -> LinkShown:
    restored = link.last("restored")
    first = int(restored["step"]) if restored else story.committed_step(link)
    began = float(link.records[0]["t"]) if link.records else None
    return LinkShown(
        link=link.number,
        job=str(link.claim.get("job") or ""),
        node=_node(link),
        began=began,
        ended=None,
        seconds=0.0,
        first_step=first,
        last_step=max(first, status.step),
        cause="running",
        detail="",
    )


def _ended(link: LinkRecords, story: Story) -> LinkShown:
    past = past_link(story, link, None)
    began = float(link.records[0]["t"]) if link.records else None
    # A link that was killed has written nothing since, but its job may have lasted longer.
    ended = past.ended_at if began is None else max(past.ended_at, began + past.seconds)
    detail = past.detail if past.detail != past.cause.value else ""
    if past.failure is not None and not detail:
        detail = past.failure.words
    return LinkShown(
        link=link.number,
        job=str(link.claim.get("job") or ""),
        node=_node(link),
        began=began,
        ended=ended,
        seconds=past.seconds,
        first_step=past.first_step,
        last_step=past.committed_step,
        cause=past.cause.value,
        detail=f"{detail} (by {past.who})" if past.who and past.who not in detail else detail,
    )


def _node(link: LinkRecords) -> str:
    return str(link.claim.get("nodes") or link.claim.get("host") or "")


def _bands(over: Lineage, step: int) -> list[tuple[int, int, int]]:
    """The stretches of the lineage; the newest link's own ends where it is now."""
    bands, begin = [], 0
    for segment in over.segments:
        if segment.upto_step > begin:
            bands.append((segment.link, begin, segment.upto_step))
            begin = segment.upto_step
    if over.link and step > begin:
        bands.append((over.link, begin, step))
    return bands


def _checkpoints(listing: Listing, story: Story) -> list[CheckpointShown]:
    kept, best = listing.kept(), listing.best
    digests = {found.manifest.digest for found in listing.found}
    saved: dict[str, float] = {}
    read_back: set[str] = set()
    for link in story.links:
        for record in link.all("saved"):
            if record.get("digest") in digests:
                saved[record["digest"]] = float(record.get("seconds", 0.0))
        read_back |= {str(record.get("digest")) for record in link.all("restored")}
    return [
        CheckpointShown(
            step=found.step,
            epoch=found.manifest.epoch,
            link=found.manifest.link,
            bytes=found.manifest.payload_bytes,
            created=found.manifest.created,
            seconds=saved.get(found.manifest.digest),
            verified=(
                "read back"
                if found.manifest.digest in read_back
                else "as written"
                if found.manifest.digest in saved
                else ""
            ),
            best=found.step == best,
            pinned=found.step in listing.pinned,
            metric=_finite((found.manifest.metric or {}).get("value")),
            kept=kept.get(found.step, ()),
        )
        for found in listing.found
    ]


def _finite(value: Any) -> float | None:
    number = float(value) if type(value) in (int, float) else None
    return number if number is not None and abs(number) < 1e300 else None
