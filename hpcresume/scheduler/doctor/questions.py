"""Asks Slurm's clients, torch in a child process, and the driver; each question at most once."""

from __future__ import annotations

import json
import os
import platform
import pwd
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

from hpcresume.scheduler import process, slurm_text
from hpcresume.scheduler.doctor.facts import Complaint, LocalFacts, PythonFacts, SlurmFacts
from hpcresume.scheduler.doctor.texts import parse_config, parse_rows

T = TypeVar("T")

CLIENTS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "sacctmgr")
#: How long a client may take, in seconds; all are asked at the same time.
CLIENT_S = 10.0
#: Importing torch from a slow file system takes its time.
TORCH_S = 90.0
_DRIVER_S = 20.0
_LOCAL_S = 10.0

_ASSOCIATION = ("Account", "Partition", "DefaultQOS", "MaxSubmit", "GrpSubmit")
_QOS = ("Name", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit")

#: Prints one line of JSON; run in the interpreter that links will use.
TORCH_SCRIPT = """
import json, time
began = time.monotonic()
try:
    import torch
except Exception as error:
    print(json.dumps({"complaint": f"{type(error).__name__}: {error}"}))
else:
    there = torch.cuda.is_available()
    numbers = range(torch.cuda.device_count() if there else 0)
    names = [torch.cuda.get_device_name(number) for number in numbers]
    print(json.dumps({"torch": str(torch.__version__), "gpus": names,
        "cuda": torch.version.cuda or torch.version.hip, "import_s": time.monotonic() - began}))
"""


class Pending(Generic[T]):
    """A question that is being asked in the background, by a thread that nobody must wait for."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._answers: list[T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answers.append(self._ask())
        except BaseException as error:
            self._errors.append(error)

    def answer(self, timeout_s: float | None = None) -> T | None:
        """What came; None where nothing did in time. Raises what the asking raised."""
        self._thread.join(timeout_s)
        if self._errors:
            raise self._errors[0]
        return self._answers[0] if self._answers else None


# ---- Slurm -------------------------------------------------------------------------------


def ask_slurm(environ: Mapping[str, str], *, timeout_s: float = CLIENT_S) -> SlurmFacts:
    """What Slurm's clients tell, all asked at once."""
    missing = tuple(name for name in CLIENTS if not process.available(name, environ))
    user = _user_name()
    questions: dict[str, Sequence[str]] = {
        "config": ("scontrol", "show", "config"),
        "partitions": ("scontrol", "--all", "show", "partition"),
        "associations": (
            *("sacctmgr", "--noheader", "--parsable2", "show", "associations"),
            *("where", f"user={user}", f"format={','.join(_ASSOCIATION)}"),
        ),
        "qos": (
            *("sacctmgr", "--noheader", "--parsable2", "show", "qos"),
            f"format={','.join(_QOS)}",
        ),
        "records": (
            *("sacct", "--noheader", "--allocations", "--parsable2"),
            *("--starttime=now", "--format=JobID"),
        ),
    }
    clean = process.scrubbed(environ) | {"SLURM_TIME_FORMAT": "%s"}
    asked = {
        name: Pending(partial(process.run, argv, environ=clean, timeout_s=timeout_s))
        for name, argv in questions.items()
        if argv[0] not in missing
    }
    answers: dict[str, str] = {}
    complaints: dict[str, Complaint] = {}
    for name, pending in asked.items():
        done = pending.answer()
        assert done is not None
        answers[name] = "" if done.code else done.out
        if done.timed_out or done.code:
            words = slurm_text.words(done.err or done.out) or f"left with code {done.code}"
            # What went wrong in the end stands last.
            complaints[name] = Complaint(words=words.splitlines()[-1], silent=done.timed_out)
    return _understood(missing, answers, complaints)


def _understood(
    missing: tuple[str, ...], answers: Mapping[str, str], complaints: dict[str, Complaint]
) -> SlurmFacts:
    """The answers as values; one that makes no sense becomes a complaint."""
    config = parse_config(answers.get("config", ""))
    partitions = tuple(slurm_text.parse_partitions(answers.get("partitions", "")))
    understood = {"config": "SLURM_VERSION" in config, "partitions": bool(partitions)}
    for name, sense in understood.items():
        if name in answers and name not in complaints and not sense:
            said = _one_line(answers[name])[:60]
            words = f"an answer that is not understood, {said!r}" if said else "an empty answer"
            complaints[name] = Complaint(words=words)
    return SlurmFacts(
        missing=missing,
        config=config if understood["config"] else {},
        partitions=partitions,
        associations=parse_rows(answers.get("associations", ""), _ASSOCIATION),
        qos=parse_rows(answers.get("qos", ""), _QOS),
        complaints=complaints,
    )


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- this machine ------------------------------------------------------------------------


def ask_local(environ: Mapping[str, str]) -> LocalFacts:
    """Whether a process can be started in a group of its own, found in /proc, and ended."""
    argv = ["sleep", "60"]
    try:
        with open(os.devnull, "wb") as nowhere:
            child = process.spawn(argv, environ=environ, output=nowhere, new_session=True)
    except OSError as error:
        return LocalFacts(complaint=f"no process could be started: {error.strerror}")
    complaint = ""
    try:
        if os.getpgid(child.pid) != child.pid:
            complaint = "a process has no group of its own"
        elif not os.path.exists(f"/proc/{child.pid}/stat"):
            complaint = "/proc does not show processes"
        os.killpg(child.pid, signal.SIGTERM)
        child.wait(_LOCAL_S)
    except Exception as error:
        complaint = f"a process group could not be ended: {error}"
    finally:
        child.kill()
        child.wait()
    return LocalFacts(complaint=complaint)


def ask_python(environ: Mapping[str, str], *, timeout_s: float = TORCH_S) -> PythonFacts:
    """What a child of this interpreter says about torch, and nvidia-smi about the driver."""
    driver = Pending(lambda: _ask_driver(environ))
    done = process.run([sys.executable, "-c", TORCH_SCRIPT], environ=environ, timeout_s=timeout_s)
    facts = python_facts(
        done.out, executable=sys.executable, version=platform.python_version(), said=done.err
    )
    return _with_driver(facts, driver.answer())


def python_facts(answer: str, *, executable: str, version: str, said: str) -> PythonFacts:
    """The facts in what TORCH_SCRIPT printed; `said` is what went to standard error."""
    told: dict[str, Any] = {}
    for line in answer.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # Something that an imported package printed.
        if isinstance(value, dict):
            told = value
    complaint = str(told.get("complaint", ""))
    if not told:
        complaint = said.strip().splitlines()[-1] if said.strip() else "it printed nothing"
    return PythonFacts(
        executable=executable,
        version=version,
        torch=told.get("torch"),
        cuda=told.get("cuda"),
        gpus=tuple(told.get("gpus", ())),
        import_s=told.get("import_s"),
        complaint=complaint,
    )


def _ask_driver(environ: Mapping[str, str]) -> process.Completed:
    query = ("--query-gpu=driver_version,name", "--format=csv,noheader")
    return process.run(["nvidia-smi", *query], environ=environ, timeout_s=_DRIVER_S)


def _with_driver(facts: PythonFacts, done: process.Completed | None) -> PythonFacts:
    if done is None or done.code == 127:
        return facts
    if done.code:
        return replace(facts, driver_complaint=_one_line(done.out or done.err))
    rows = [line.partition(", ") for line in done.out.splitlines() if ", " in line]
    if not rows:
        return facts
    return replace(facts, driver=rows[0][0], cards=tuple(name for _, _, name in rows))
