"""The local scheduler's queue: the files that stand for jobs, and what is in them.

    1.job.json      what was submitted; made by any process of the run, never changed
    1.state.json    where it stands; written by the driver alone
    1.cancel        a request: the name of who wants it to end
    1.update.json   a request: another time to begin

All of them come into being whole (link(2) or rename), and stay for those who ask why a run
failed. What is no job file, or not one of ours, is passed over.
"""

from __future__ import annotations

import json
import logging
import os
import pwd
import re
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcresume import files
from hpcresume.scheduler.job import JobState
from hpcresume.scheduler.process_table import ProcessId

log = logging.getLogger(__name__)

KEY_VARIABLE = "HPCRESUME_JOB_KEY"

_NAMED = re.compile(r"(\d+)\.(?:job\.json|state\.json|cancel|update\.json)")
#: What the reading of a file raises that none of us has written.
_FOREIGN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
_JOB = re.compile(r"([1-9]\d*)\.job\.json")


def create_whole(path: Path, data: bytes) -> None:
    """Create a file that nobody ever sees unfinished. Raises FileExistsError."""
    private = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        files.write_new(private, data)
        os.link(private, path)
    finally:
        private.unlink(missing_ok=True)
    files.fsync_dir(path.parent)


@dataclass(frozen=True, kw_only=True)
class QueuedJob:
    """A job as it was submitted."""

    name: str
    token: str
    after: tuple[str, ...]
    argv: tuple[str, ...]
    time_s: float | None
    signal_s: float
    begin_delay_s: float
    log: str
    workdir: str
    environment: dict[str, str]
    key: str
    """A word of its own (`new_key`), in the environment of its processes: they are known by it."""
    submit_time: float
    """Unix seconds."""
    uid: int

    @property
    def mark(self) -> str:
        """The line in the environment of its processes."""
        return f"{KEY_VARIABLE}={self.key}"


def new_key() -> str:
    """A key that no other job has."""
    return secrets.token_hex(16)


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Where a job stands: pending, running, or the verdict on how it ended.

    With a verdict and not `over`, some of its processes are still dying.
    """

    state: JobState = JobState.PENDING
    over: bool = False
    lost: bool = False
    """No driver saw its end: nobody knows its exit code."""
    process: ProcessId | None = None
    """Its first process."""
    start_time: float | None = None
    end_time: float | None = None
    """Unix seconds; while it runs: when the limit is reached, as foreseen at the start."""
    limit_monotonic: float | None = None
    """When the limit is reached, by this machine's clock that never jumps."""
    exit_code: int | None = None
    exit_signal: int | None = None
    cancelled_by: str = ""


#: A state file that says nothing: the job was begun, and nobody knows by whom.
_UNREADABLE = JobRecord(state=JobState.RUNNING)


def user_name() -> str:
    """Who runs this process; the number where it has no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


class JobFiles:
    """Names, writes and reads the files of the jobs below one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said: set[str] = set()

    def job(self, id: str) -> Path:
        """What was submitted."""
        return self.path / f"{id}.job.json"

    def state(self, id: str) -> Path:
        """Where it stands."""
        return self.path / f"{id}.state.json"

    def cancel(self, id: str) -> Path:
        """The request to end it."""
        return self.path / f"{id}.cancel"

    def update(self, id: str) -> Path:
        """The request to begin it at another time."""
        return self.path / f"{id}.update.json"

    def names(self) -> frozenset[str]:
        """All names in the folder, in one look. Raises FileNotFoundError without a folder."""
        return frozenset(os.listdir(self.path))

    def ids(self, names: frozenset[str]) -> list[str]:
        """The submitted jobs among the names, in the order of submission."""
        found = (_JOB.fullmatch(name) for name in names)
        return sorted((match[1] for match in found if match), key=int)

    def add(self, job: QueuedJob) -> str:
        """Put a job into the queue; returns its id, which no other job has or had."""
        # Not files.to_json: ASCII alone can carry an environment whose bytes are no UTF-8.
        data = json.dumps(asdict(job), indent=2).encode() + b"\n"
        while True:
            used = (_NAMED.fullmatch(name) for name in self.names())
            id = str(1 + max((int(match[1]) for match in used if match), default=0))
            with suppress(FileExistsError):
                create_whole(self.job(id), data)
                return id

    def read_job(self, id: str) -> QueuedJob | None:
        """A job as submitted; None where there is none, or its file is garbage (said once)."""
        if not self.known(id):
            return None
        try:
            return _job(files.read_json_or_none(self.job(id)))
        except _FOREIGN:
            if id not in self._said:
                self._said.add(id)
                log.warning("%s is no job of the local scheduler: passed over.", self.job(id))
            return None

    def known(self, id: str) -> bool:
        """Whether a text is an id of a submitted job."""
        return _JOB.fullmatch(f"{id}.job.json") is not None and self.job(id).is_file()

    def read_record(self, id: str) -> JobRecord:
        """Where a job stands by the driver's last word."""
        try:
            return _record(files.read_json(self.state(id)))
        except FileNotFoundError:
            return JobRecord()
        except (OSError, *_FOREIGN):
            return _UNREADABLE

    def write_record(self, id: str, record: JobRecord) -> None:
        """Say where a job stands; for the driver alone."""
        files.write_json(self.state(id), dict(asdict(record), state=record.state.value))

    def ask_cancel(self, id: str, user: str) -> None:
        """Ask for a job's end; the first to ask is the one who is named."""
        with suppress(FileExistsError):
            create_whole(self.cancel(id), user.encode())

    def cancelled_by(self, id: str) -> str:
        """Who asked for a job's end; empty where nobody did."""
        try:
            text = self.cancel(id).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        return text or "unknown"

    def ask_begin(self, id: str, delay_s: float, now: float) -> None:
        """Ask that a job begins so many seconds after `now` (unix), not before."""
        files.write_json(self.update(id), {"asked": now, "begin_delay_s": delay_s})

    def begin(self, id: str, job: QueuedJob) -> tuple[float, float]:
        """When the wish for a delay was last said (unix seconds), and the delay."""
        value = files.read_json_or_none(self.update(id))
        try:
            return float(value["asked"]), float(value["begin_delay_s"])
        except _FOREIGN:
            return job.submit_time, job.begin_delay_s


def _job(value: Any) -> QueuedJob:
    return QueuedJob(
        name=str(value["name"]),
        token=str(value["token"]),
        after=tuple(str(id) for id in _list(value["after"])),
        argv=tuple(str(word) for word in _list(value["argv"])),
        time_s=_float(value["time_s"]),
        signal_s=float(value["signal_s"]),
        begin_delay_s=float(value["begin_delay_s"]),
        log=str(value["log"]),
        workdir=str(value["workdir"]),
        environment={str(key): str(text) for key, text in value["environment"].items()},
        key=_key(value["key"]),
        submit_time=float(value["submit_time"]),
        uid=int(value["uid"]),
    )


def _record(value: Any) -> JobRecord:
    process = value["process"]
    return JobRecord(
        state=JobState(value["state"]),
        over=bool(value["over"]),
        lost=bool(value["lost"]),
        process=process and ProcessId.read(process),
        start_time=_float(value["start_time"]),
        end_time=_float(value["end_time"]),
        limit_monotonic=_float(value["limit_monotonic"]),
        exit_code=_int(value["exit_code"]),
        exit_signal=_int(value["exit_signal"]),
        cancelled_by=str(value["cancelled_by"]),
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _key(value: Any) -> str:
    # An empty key would be found in every process, and all of them would be killed.
    if not re.fullmatch(r"[0-9a-f]{32}", value):
        raise ValueError("no key of a job")
    return str(value)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _int(value: Any) -> int | None:
    return None if value is None else int(value)
