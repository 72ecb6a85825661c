"""The directory of a run: `RunDir` names every file in it; nobody else joins path strings.

run.yaml                 the resolved configuration, frozen at submit
run.json                 identity: name, id, when and where it was made, code and versions
origin.json              what it begins with, where that is the state of something else
environment              the environment for nested submissions (0600, never shown)
script.sbatch, .json     a user's own batch script and its job's real options, where there is one
hardware.json            the kind of node that later jobs ask for, where the run is pinned to one
code/                    the code at submit
submissions.jsonl        what `submit`, `resume` and `cancel` did
trainer_state.json       the newest checkpoint's state plus live progress
checkpoint-1000/         committed checkpoints
pinned-1000              keeps that checkpoint, whatever the policy says
links/0007/              the claim of link 7, its journals, metrics and logs
jobs/                    batch scripts, job output; the local driver's queue
cache/                   what torch.compile and Triton have compiled; may be removed at any time
final_model/             after completion
trackers/wandb.json      the id of the tracker run that all links share, the step that it was told
tensorboard/             event files
framework/               what a training framework saves where its script names no place
train.log                the log of all links, for tail -F
STOP, CANCEL             requests, made by creating the file
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.errors import HpcResumeError, NotFound

#: Only the names that `RunDir` itself gives: another spelling of a number is something else.
_LINK = re.compile(r"[0-9]{4}|[1-9][0-9]{4,}")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_PIN = re.compile(r"pinned-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class LinkDir:
    """The directory of one link. Only that link writes here."""

    path: Path

    @property
    def number(self) -> int:
        """1, 2, 3…; also the fencing token."""
        return int(self.path.name)

    @property
    def claim(self) -> Path:
        """Who claimed it, and how much of the link before it is adopted."""
        return self.path / "claim.json"

    @property
    def journal(self) -> Path:
        """The supervisor's records."""
        return self.path / "journal.jsonl"

    @property
    def training(self) -> Path:
        """Rank 0's records: a second journal, because a journal has one writer."""
        return self.path / "training.jsonl"

    @property
    def metrics(self) -> Path:
        """What the training function logged, a line a step."""
        return self.path / "metrics.jsonl"

    @property
    def guest(self) -> Path:
        """What the training framework in a command tells; its parent records it."""
        return self.path / "guest.jsonl"

    @property
    def monitor(self) -> Path:
        """How rank 0's machine did, a line now and then."""
        return self.path / "monitor.jsonl"

    @property
    def supervisor_log(self) -> Path:
        """What the supervisor did, at DEBUG."""
        return self.path / "supervisor.log"

    @property
    def deadline(self) -> Path:
        """The end of the job as the supervisor last read it, for the ranks' clocks."""
        return self.path / "deadline.json"

    @property
    def stop(self) -> Path:
        """Tells the ranks of this link to save and leave; the text says why."""
        return self.path / "STOP"

    def rank_log(self, rank: int | str) -> Path:
        """Everything that a rank prints. `%t` gives srun's pattern."""
        return self.path / f"rank-{rank}.log"

    def debug_log(self, rank: int) -> Path:
        """A rank's log at DEBUG, with the paths of what it touches."""
        return self.path / f"rank-{rank}.debug.log"

    def beat(self, rank: int) -> Path:
        """A rank's newest sign of life."""
        return self.path / f"rank-{rank}.beat"

    def tracker_log(self, name: str) -> Path:
        """What the process prints that tells a tracker."""
        return self.path / f"tracker-{name}.log"

    def rank_end(self, rank: int) -> Path:
        """How the command of a rank ended, for rank 0, which judges for all."""
        return self.path / f"rank-{rank}.end.json"

    def rank_failure(self, rank: int) -> Path:
        """The exception that ended a rank."""
        return self.path / f"rank-{rank}.failure.json"

    def rank_failures(self) -> list[Path]:
        """The failures of all ranks that have failed."""
        return sorted(self.path.glob("rank-*.failure.json"))


@dataclass(frozen=True)
class RunDir:
    """A run, by its directory (absolute)."""

    path: Path

    @property
    def name(self) -> str:
        """The run's name: its directory's."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The frozen configuration; every link reads only this."""
        return self.path / "run.yaml"

    @property
    def identity(self) -> Path:
        """Id of the run, project directory, versions of code and packages."""
        return self.path / "run.json"

    @property
    def origin(self) -> Path:
        """What the run begins with, where that is the state of something else."""
        return self.path / "origin.json"

    @property
    def environment(self) -> Path:
        """The environment for nested submissions."""
        return self.path / "environment"

    @property
    def script(self) -> Path:
        """The batch script of a run that was started by sbatch."""
        return self.path / "script.sbatch"

    @property
    def script_options(self) -> Path:
        """The real sbatch options of that first job."""
        return self.path / "script.json"

    @property
    def hardware(self) -> Path:
        """The kind of node that the run is pinned to."""
        return self.path / "hardware.json"

    @property
    def code(self) -> Path:
        """The code as it was at submit."""
        return self.path / "code"

    @property
    def submissions(self) -> Path:
        """Records of `submit`, `resume` and `cancel`."""
        return self.path / "submissions.jsonl"

    @property
    def trainer_state(self) -> Path:
        """Progress for people and tools; a copy, the checkpoint wins."""
        return self.path / "trainer_state.json"

    @property
    def links(self) -> Path:
        """The chain."""
        return self.path / "links"

    @property
    def jobs(self) -> Path:
        """Batch scripts and job output; the local driver's queue."""
        return self.path / "jobs"

    @property
    def cache(self) -> Path:
        """Compiled code for later links, by the kind of processor; made when there is some."""
        return self.path / "cache"

    @property
    def driver(self) -> Path:
        """The local driver that serves this run's jobs: pid, start, host."""
        return self.jobs / "driver.json"

    @property
    def driver_log(self) -> Path:
        """Output of a detached local driver."""
        return self.jobs / "driver.log"

    @property
    def job_log(self) -> Path:
        """Pattern of a job's own output (%j: job id)."""
        return self.jobs / "%j.log"

    @property
    def final_model(self) -> Path:
        """The finished model."""
        return self.path / "final_model"

    @property
    def trackers(self) -> Path:
        """What is known of trackers, and what they leave where they are offline."""
        return self.path / "trackers"

    def tracker(self, name: str) -> Path:
        """The tracker run that all links share, and how far it was told."""
        return self.trackers / f"{name}.json"

    @property
    def tensorboard(self) -> Path:
        """The event files of all links."""
        return self.path / "tensorboard"

    @property
    def framework(self) -> Path:
        """What a training framework saves for us where its script names no place."""
        return self.path / "framework"

    @property
    def train_log(self) -> Path:
        """The log of all links in one file."""
        return self.path / "train.log"

    @property
    def stop(self) -> Path:
        """Request: save, then let the chain rest."""
        return self.path / "STOP"

    @property
    def cancel(self) -> Path:
        """Request: end the chain."""
        return self.path / "CANCEL"

    def checkpoint(self, step: int) -> Path:
        """The committed checkpoint of a step."""
        return self.path / f"checkpoint-{step}"

    def partial(self, name: str) -> Path:
        """A directory that is being written; never the same name twice."""
        return self.path / f".{name}.{os.getpid()}.{files.unique()}.partial"

    def quarantined(self, step: int) -> Path:
        """Where a damaged or off-lineage checkpoint is put: no `checkpoint-*` pattern matches."""
        return self.path / f"quarantined-{step}.{files.unique()}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a directory, ascending. Whether it is a checkpoint, the store says."""
        found = []
        for entry in os.scandir(self.path):
            match = _CHECKPOINT.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                found.append(int(match[1]))
        return sorted(found)

    def pin(self, step: int) -> Path:
        """Where it exists, the checkpoint of that step is never removed; its content is no matter.

        A file of its own, so that pins come and go without a word to a link that is alive.
        """
        return self.path / f"pinned-{step}"

    def pinned_steps(self) -> list[int]:
        """Steps that are pinned, ascending, whether their checkpoints are there or not."""
        matches = (_PIN.fullmatch(name) for name in os.listdir(self.path))
        return sorted(int(match[1]) for match in matches if match)

    def link(self, number: int) -> LinkDir:
        """The directory of a link, claimed or not."""
        return LinkDir(self.links / f"{number:04d}")

    def link_numbers(self) -> list[int]:
        """Numbers of the claimed links, ascending."""
        try:
            entries = os.listdir(self.links)
        except FileNotFoundError:
            return []
        return sorted(int(entry) for entry in entries if _LINK.fullmatch(entry))

    def newest_link(self) -> int:
        """The number that alone may change the run; 0 before the first claim."""
        return max(self.link_numbers(), default=0)

    def claim_link(self, claim: Mapping[str, object]) -> LinkDir:
        """Become the newest link, whichever was that before; see `claim_after`."""
        while True:
            taken = self.claim_after(self.newest_link(), claim)
            if taken is not None:
                return taken

    def claim_after(self, newest: int, claim: Mapping[str, object]) -> LinkDir | None:
        """Become the link that follows number `newest`; None where another one is that already.

        So nobody overtakes a link that it does not know of. The directory is prepared under a
        private name, with the claim's content in it, and renamed: rename(2) refuses a target that
        is not empty, so that exactly one claimant gets a number. The content says how much of the
        journals of the link before is adopted.
        """
        target = self.link(newest + 1)
        private = self.links / f".claim.{os.getpid()}.{files.unique()}"
        private.mkdir(mode=0o700)
        content = dict(claim, link=target.number, adopted=self._sizes(newest))
        try:
            files.write_new(private / target.claim.name, files.to_json(content, indent=2))
            files.fsync_dir(private)
            os.rename(private, target.path)
        except OSError:
            _remove(private)
            if not target.path.exists():
                raise
            return None
        files.fsync_dir(self.links)
        return target

    def _sizes(self, number: int) -> dict[str, int]:
        link = self.link(number)
        return {
            "link": number,
            "journal": files.size_or_zero(link.journal),
            "training": files.size_or_zero(link.training),
            "metrics": files.size_or_zero(link.metrics),
        }

    def create(
        self,
        frozen: str,
        *,
        cluster: str,
        project: Path,
        versions: Mapping[str, str],
        origin: Mapping[str, object] | None = None,
    ) -> None:
        """Make the directory, private to the user, with its frozen configuration and identity.

        `frozen` is the text of run.yaml; `cluster` stands in run.json as well, so that `status`
        needs no YAML to know whom to ask; `origin` is the content of origin.json.

        Prepared under a private name and renamed, so that no half-made run is ever seen. Raises
        FileExistsError if it is there already.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        private = RunDir(self.path.with_name(f".{self.name}.{files.unique()}.new"))
        for folder in (private.path, private.links, private.jobs):
            folder.mkdir(mode=0o700)
        identity = {
            "id": os.urandom(6).hex(),
            "name": self.name,
            "project": str(project),
            "cluster": cluster,
            "created": round(time.time(), 3),
            "host": os.uname().nodename,
            "versions": dict(versions),
        }
        try:
            files.write_json(private.identity, identity)
            if origin is not None:
                files.write_json(private.origin, origin)
            files.write_durably(private.config, frozen.encode())
            try:
                os.rename(private.path, self.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise FileExistsError(str(self.path)) from None
                raise
        except BaseException:
            _remove(private.path)
            raise
        files.fsync_dir(self.path.parent)

    def identify(self) -> dict[str, Any]:
        """The content of run.json. Raises NotFound where it is no run of this format."""
        content = files.read_json_or_none(self.identity)
        if isinstance(content, dict) and all(
            isinstance(content.get(name), str) for name in ("id", "cluster")
        ):
            return content
        raise NotFound(f"{self.path} is not a run directory: its run.json is missing or torn.")

    def check_private(self) -> None:
        """Refuse a directory that others can write to: what is frozen in it gets executed."""
        status = self.path.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise HpcResumeError(
                f"{self.path} belongs to another user or is writable by others, and its code "
                f"would be executed: make it yours and run `chmod go-w {self.path}`."
            )


def _remove(private: Path) -> None:
    # Imported when it is needed, since it brings the modules of all archive formats along.
    import shutil

    shutil.rmtree(private, ignore_errors=True)


def runs_root(option: str | None, environ: Mapping[str, str]) -> Path:
    """Where runs lie: --runs, else $HPCRESUME_RUNS, else ./runs."""
    return Path(option or environ.get("HPCRESUME_RUNS") or "runs").absolute()


def is_run(path: Path) -> bool:
    """Whether a directory is a run."""
    return (path / "run.yaml").is_file()


def all_runs(root: Path) -> list[RunDir]:
    """The runs below a root, newest first by their newest sign of life."""
    try:
        with os.scandir(root) as entries:
            found = [RunDir(Path(entry.path)) for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    runs = [run for run in found if is_run(run.path)]
    return sorted(runs, key=_touched, reverse=True)


def _touched(run: RunDir) -> tuple[float, str]:
    times = [0.0]
    for path in (run.trainer_state, run.submissions, run.links):
        with contextlib.suppress(OSError):
            times.append(os.stat(path).st_mtime)
    return max(times), run.name


def find_run(text: str, root: Path) -> RunDir:
    """The run that a path or a name means. Raises NotFound, with the names that there are."""
    for candidate in (Path(text), root / text):
        if is_run(candidate):
            return RunDir(candidate.absolute())
    known = ", ".join(run.name for run in all_runs(root)[:8]) or "none"
    raise NotFound(f"No run '{text}', neither as a directory nor in {root} (runs there: {known}).")
