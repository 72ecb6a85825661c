"""The checkpoints of a run as people ask for them: what is there, why it stays, what is to come.

For `hpcresume checkpoints`. Reads only, and needs no torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpcresume import files
from hpcresume.checkpoint import retention
from hpcresume.checkpoint.disk import occupied_bytes, room_of_disk
from hpcresume.checkpoint.manifest import Committed, Manifest, read_committed
from hpcresume.checkpoint.retention import Policy
from hpcresume.checkpoint.store import Store
from hpcresume.config import CheckpointConfig
from hpcresume.errors import CheckpointError
from hpcresume.journal import Lineage, lineage
from hpcresume.run_dir import RunDir


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The checkpoints of a run and what its policy makes of them."""

    run: RunDir
    policy: Policy
    found: list[Committed]
    """Ascending by step."""
    left_out: dict[int, str]
    """Directories that do not count, and why: damaged ones, and those off the lineage."""
    broken: frozenset[int]
    """Which of these are damaged; the others are whole, and another link's or run's."""
    pinned: frozenset[int]
    free_bytes: int
    most: int
    """How many the run may hold at a time; as many as there are if it trains no more."""

    @property
    def manifests(self) -> list[Manifest]:
        """What is in them, ascending by step."""
        return [found.manifest for found in self.found]

    @property
    def total_bytes(self) -> int:
        """What all of them take on the disk."""
        return occupied_bytes(self.found)

    @property
    def each_bytes(self) -> int:
        """What the newest one holds, 0 where there is none."""
        return self.found[-1].manifest.payload_bytes if self.found else 0

    @property
    def more_bytes(self) -> int:
        """What the run will need besides, at most, if further checkpoints are like the newest."""
        return max(0, self.most - len(self.found)) * self.each_bytes

    @property
    def best(self) -> int | None:
        """The step with the best value of the watched metric."""
        return next(iter(retention.best_steps(self.manifests, 1)), None)

    def kept(self) -> dict[int, tuple[str, ...]]:
        """Why checkpoints stay; see `retention.kept`."""
        return retention.kept(self.manifests, self.policy, self.pinned)

    def to_json(self, checked: Mapping[int, str]) -> dict[str, Any]:
        """For `--json`. `checked` says what is wrong with those that were read, by step.

        What nobody asked for is null, and so is a number that JSON has no word for.
        """
        kept = self.kept()
        return {
            "run": self.run.name,
            "path": str(self.run.path),
            "policy": dataclasses.asdict(self.policy),
            "checkpoints": [
                {
                    "step": found.step,
                    "epoch": found.manifest.epoch,
                    "link": found.manifest.link,
                    "created": _utc(found.manifest.created),
                    "metric": _plain(found.manifest.metric),
                    "best": found.step == self.best,
                    "bytes": found.manifest.payload_bytes,
                    "files": len(found.manifest.files),
                    "pinned": found.step in self.pinned,
                    "kept": list(kept.get(found.step, ())),
                    "verified": not checked[found.step] if found.step in checked else None,
                    "damage": checked.get(found.step) or None,
                }
                for found in self.found
            ],
            "left_out": [
                {"step": step, "reason": reason, "damaged": step in self.broken}
                for step, reason in self.left_out.items()
            ],
            "total_bytes": self.total_bytes,
            "more_bytes": self.more_bytes,
            "free_bytes": self.free_bytes,
        }

    def to_remove(self) -> list[int]:
        """Steps that the policy lets go once the newest is verified, oldest first."""
        return retention.to_remove(self.manifests, self.policy, pinned=self.pinned)


def list_checkpoints(
    run: RunDir, settings: CheckpointConfig, *, complete: bool, over: Lineage | None = None
) -> Listing:
    """What is there now, along the run's lineage, which is read where nobody hands it in.

    Raises NotFound where it is no run, OSError where it is away.
    """
    over = lineage(run) if over is None else over
    run_id = run.identify()["id"]
    # Read first: what a link that is alive commits after this is not looked at.
    steps = run.checkpoint_steps()
    found = [c for c in Store(run, run_id).committed(over) if c.step in steps]
    counted = {committed.step for committed in found}
    left_out, broken = {}, set()
    for step in steps:
        if step in counted:
            continue
        reason, damaged = _why_not(run, step, run_id)
        # What is gone by now was not damaged, but removed.
        if run.checkpoint(step).is_dir():
            left_out[step] = reason
            broken |= {step} if damaged else set()
    policy = retention.policy_of(settings, complete=complete)
    pinned = frozenset(run.pinned_steps())
    most = retention.most_at_once(
        [committed.manifest for committed in found],
        policy,
        pinned=pinned,
        max_steps=_total_steps(run),
    )
    return Listing(
        run=run,
        policy=policy,
        found=found,
        left_out=left_out,
        broken=frozenset(broken),
        pinned=pinned,
        free_bytes=room_of_disk(run.path).free_bytes or 0,
        most=len(found) if complete else most,
    )


def _why_not(run: RunDir, step: int, run_id: str) -> tuple[str, bool]:
    """Why a directory is no checkpoint of this run, and whether it is damaged."""
    try:
        # Of no lineage: what remains to be found wrong then is damage.
        whole = read_committed(run.checkpoint(step), Lineage())
    except CheckpointError as error:
        return str(error), True
    if whole.manifest.run_id != run_id:
        return "it belongs to another run", False
    return f"link {whole.manifest.link} wrote it after a newer link had taken over", False


def _total_steps(run: RunDir) -> int | None:
    """How long the training is, where it has said so."""
    content: Any = files.read_json_or_none(run.trainer_state)
    total = content.get("total_steps") if isinstance(content, dict) else None
    return total if type(total) is int and total > 0 else None


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat()


def _plain(metric: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if metric is None:
        return None
    return {**metric, "value": metric["value"] if math.isfinite(metric["value"]) else None}
