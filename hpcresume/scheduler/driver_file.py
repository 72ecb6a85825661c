"""Who drives a run's local jobs: one process at a time, by the file driver.json.

To be the first, a process creates the file. To follow a driver that was killed, it creates a
second file, named after the dead one's content: link(2) lets one process do that, and for each
dead driver it happens once, so that a slow rival can never push a living driver out. Then the new
content is renamed over driver.json. A follower that died between the two is followed the same
way, as the last of a chain. The second files stay: one for each driver that was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from hpcresume import files
from hpcresume.errors import RunLive, Unavailable
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.process_table import ProcessId


def driver_alive(run: RunDir) -> bool:
    """Whether a living process serves the run's jobs. Another machine's driver counts as alive."""
    data = _newest(run)
    process = _process(data)
    return process is not None and process.alive()


@contextlib.contextmanager
def only_driver(run: RunDir) -> Iterator[None]:
    """Be the run's driver until the block ends.

    Raises RunLive where another one is alive, Unavailable where the folder cannot be written.
    """
    data = files.to_json(asdict(ProcessId.own()), indent=2)
    private = run.driver.with_name(f".{run.driver.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        files.write_new(private, data)
        while not _taken(run, private):
            pass
    except OSError as error:
        raise Unavailable(
            f"No driver can serve the local queue {run.jobs}: {error.strerror or error}. "
            "Mend that, and start it again."
        ) from error
    finally:
        private.unlink(missing_ok=True)
    try:
        yield
    finally:
        if _read(run.driver) == data:
            run.driver.unlink(missing_ok=True)


def _taken(run: RunDir, private: Path) -> bool:
    """One attempt; False when somebody else was quicker and the picture has changed."""
    before = _newest(run)
    process = _process(before)
    if process is not None and process.alive():
        raise RunLive(_live(run, process))
    try:
        os.link(private, run.driver if before is None else _follower(run, before))
    except FileExistsError:
        return False
    if before is not None:
        os.rename(private, run.driver)
    return True


def _newest(run: RunDir) -> bytes | None:
    """The content of driver.json, or of the last one who followed it; None without a driver."""
    data = _read(run.driver)
    while data is not None:
        follower = _read(_follower(run, data))
        if follower is None:
            break
        data = follower
    return data


def _follower(run: RunDir, data: bytes) -> Path:
    digest = hashlib.sha256(data).hexdigest()[:16]
    return run.driver.with_name(f"driver.after-{digest}.json")


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _process(data: bytes | None) -> ProcessId | None:
    """The driver that a file names; None for garbage, which nobody defends."""
    try:
        return ProcessId.read(json.loads(data or b""))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return None


def _live(run: RunDir, process: ProcessId) -> str:
    text = (
        f"The driver of run '{run.name}' is alive: process {process.pid} on {process.host}. "
        "Let it go on, or end it with `hpcresume cancel`"
    )
    if process.here:
        return f"{text}."
    return f"{text} on that machine; if the machine is gone for good, remove {run.driver}."
