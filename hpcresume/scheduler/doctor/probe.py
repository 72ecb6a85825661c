"""A small job that looks around on a compute node, and is always taken back at the end.

It is submitted like a link, and writes what it finds into a private folder in the folder of runs;
where it does not see that, its exit code says so.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpcresume.config import SchedulerConfig
from hpcresume.errors import SubmissionRejected, Unavailable
from hpcresume.scheduler.doctor.disk import clock_offset_s, private_folder
from hpcresume.scheduler.doctor.facts import ProbeFacts
from hpcresume.scheduler.doctor.questions import TORCH_SCRIPT, python_facts
from hpcresume.scheduler.doctor.texts import parse_answer
from hpcresume.scheduler.job import JobInfo, JobSpec, JobState
from hpcresume.scheduler.slurm import SlurmScheduler

_LOOK_S = 0.25
_ASK_S = 2.0
#: What the job's own work may take once it has started.
_TIME_S = 300
#: How long an answer that was written may take to be seen here: file systems remember what was not.
_SEEN_S = 70.0
_INVISIBLE = 3

#: Arguments: the folder, the interpreter of the links, and torch's question (or nothing).
_LOOK_AROUND = r"""
folder=$1 python=$2 question=$3 job=$SLURM_JOB_ID
node=${SLURMD_NODENAME:-$(hostname)} now=$(date +%s.%N)
touch "$folder/clock" || exit 3
for name in $(env | sed -n 's/^\(S\(LURM\|BATCH\|RUN\)_[A-Za-z0-9_]*\)=.*/\1/p'); do
  [ "$name" = SLURM_CONF ] || unset "$name"
done
say() { printf '%s=%s\n' "$1" "$(printf %s "$2" | tr '\n' ' ')" >>"$folder/answer.partial"; }
ask() {
  name=$1; shift
  said=$(timeout 30 "$@" 2>&1); code=$?
  say "${name}_code" "$code"; say "$name" "$(printf %s "$said" | tail -n 1)"
}
say clock "$now"
say node "$node"
say path_python "$(command -v python3)"
say own_python "$python"
say own_version "$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null)"
ask hpcresume "$python" -c 'import hpcresume'
ask sbatch sbatch --test-only "$folder/next.sh"
ask after sbatch --test-only "--dependency=afterany:$job" "$folder/next.sh"
ask scontrol scontrol show job "$job"
ask srun srun --version
[ -z "$question" ] || say torch "$(timeout 120 "$python" -c "$question" 2>/dev/null)"
mv "$folder/answer.partial" "$folder/answer"
"""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the job is to look for, and how long it may take to start."""

    root: Path
    """An existing folder: that of the runs, or where it will be made."""
    python: str
    wait_s: float
    with_torch: bool = False


def ask_node(
    probe: Probe,
    config: SchedulerConfig,
    environ: Mapping[str, str],
    say: Callable[[str], None] = lambda line: None,
) -> ProbeFacts:
    """What a compute node is like; a job that does not start in time is a complaint."""
    try:
        folder = private_folder(probe.root)
    except OSError as error:
        return ProbeFacts(complaint=f"no folder could be made in {probe.root}: {error.strerror}")
    token = f"hpcresume-doctor:{secrets.token_hex(8)}"
    scheduler = SlurmScheduler(small(config), environ=environ, launcher=_Launcher(folder, probe))
    spec = _spec(folder, token, environ)
    facts = ProbeFacts()
    try:
        try:
            facts = _asked(probe, scheduler, folder, spec, say)
        finally:
            left = _take_back(scheduler, token)
            shutil.rmtree(folder, ignore_errors=True)
    except (SubmissionRejected, Unavailable) as error:
        refused = isinstance(error, SubmissionRejected)
        facts = ProbeFacts(complaint=str(error).rstrip("."), refused=refused)
    except OSError as error:
        facts = ProbeFacts(complaint=f"{folder}: {error.strerror}")
    return replace(facts, left_behind=left)


def small(config: SchedulerConfig) -> SchedulerConfig:
    """The same place, for a job of one task, with one GPU where the jobs have some."""
    gpus = config.gpus_per_node
    if isinstance(gpus, int):
        gpus = min(gpus, 1)
    elif gpus is not None:
        gpus = f"{gpus.rpartition(':')[0]}:1".lstrip(":")
    return SchedulerConfig(
        partition=config.partition,
        account=config.account,
        qos=config.qos,
        constraint=config.constraint,
        exclude=config.exclude,
        gpus_per_node=gpus,
        setup=config.setup,
        sbatch=config.sbatch,
    )


class _Launcher:
    """Submits a job that looks around; see `scheduler.slurm.Launcher`."""

    def __init__(self, folder: Path, probe: Probe) -> None:
        self._folder = folder
        question = TORCH_SCRIPT if probe.with_torch else ""
        words = ("sh", str(folder), probe.python, question)
        self._command = ("/bin/sh", "-c", _LOOK_AROUND, *words)

    def launch(
        self,
        spec: JobSpec,
        text_of: Callable[[Sequence[str], Sequence[str]], str],
        sbatch: Callable[[Path], str],
    ) -> str:
        self._folder.joinpath("next.sh").write_text(text_of(["true"], ()), encoding="utf-8")
        path = self._folder / "job.sh"
        path.write_text(text_of(self._command, ()), encoding="utf-8")
        return sbatch(path)


def _spec(folder: Path, token: str, environ: Mapping[str, str]) -> JobSpec:
    return JobSpec(
        name="hpcresume-doctor",
        token=token,
        run=folder,
        # Its answer is a file; what it prints is nobody's.
        log=Path("/dev/null"),
        workdir=Path("/"),
        time_s=_TIME_S,
        environment=dict(environ),
    )


def _asked(
    probe: Probe,
    scheduler: SlurmScheduler,
    folder: Path,
    spec: JobSpec,
    say: Callable[[str], None],
) -> ProbeFacts:
    own_offset_s = clock_offset_s(folder / "clock-here")
    began = time.monotonic()
    job = scheduler.submit(spec)
    say(f"job {job}: waiting for a compute node, {probe.wait_s:.0f} s at most")
    ended_at: float | None = None
    asked_at = started_at = None
    info = JobInfo(id=job, state=JobState.PENDING)
    while True:
        now = time.monotonic()
        # A file system may remember for a while that there was no such name; a listing does not.
        names = {path.name for path in folder.iterdir()}
        if "answer" in names:
            answer = parse_answer(folder.joinpath("answer").read_text(errors="replace"))
            return _told(job, answer, folder, own_offset_s, (started_at or now) - began)
        if asked_at is None or now - asked_at >= _ASK_S:
            asked_at = now
            info = scheduler.state([job])[job]
            if started_at is None and info.state is not JobState.PENDING:
                started_at = now
        if info.state.ended and ended_at is None:
            ended_at = now
        over = _over(info, probe, now - began, None if ended_at is None else now - ended_at)
        if over is not None:
            return replace(over, job=job, waited_s=(started_at or now) - began)
        time.sleep(_LOOK_S)


def _over(
    info: JobInfo, probe: Probe, since_submit_s: float, since_end_s: float | None
) -> ProbeFacts | None:
    """What an answer that has not come yet means; None: wait for it."""
    if since_end_s is not None:
        if info.exit_code == _INVISIBLE:
            return ProbeFacts(invisible=True, complaint="the folder of runs is not there")
        if info.exit_code == 0 and since_end_s < _SEEN_S:
            return None
        code = "" if info.exit_code is None else f", exit code {info.exit_code}"
        return ProbeFacts(
            complaint=f"job {info.id} ended without an answer ({info.raw_state or info.state.value}"
            f"{code})"
        )
    if info.state is JobState.PENDING and since_submit_s >= probe.wait_s:
        why = f" ({info.reason})" if info.reason else ""
        return ProbeFacts(complaint=f"job {info.id} did not start within {probe.wait_s:.0f} s{why}")
    if since_submit_s >= probe.wait_s + _TIME_S:
        return ProbeFacts(complaint=f"job {info.id} gave no answer in {since_submit_s:.0f} s")
    return None


def _told(
    job: str, answer: Mapping[str, str], folder: Path, own_offset_s: float, waited_s: float
) -> ProbeFacts:
    """The facts in an answer.

    The file server stamps a new file of the node and one of ours: what each differs from the
    clock of who made it gives how the two clocks differ, however late the answer came.
    """
    skew_s: float | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        stamp = folder.joinpath("clock").stat().st_mtime
        skew_s = float(answer["clock"]) - (stamp - own_offset_s)
    torch = None
    if answer.get("torch"):
        torch = python_facts(
            answer["torch"],
            executable=answer.get("own_python", ""),
            version=answer.get("own_version", ""),
            said="",
        )
    return ProbeFacts(job=job, answer=answer, skew_s=skew_s, torch=torch, waited_s=waited_s)


def _take_back(scheduler: SlurmScheduler, token: str) -> str:
    """End the job, also one whose submission was interrupted; why not, where that failed."""
    try:
        scheduler.cancel([job.id for job in scheduler.find(token)])
    except Unavailable as error:
        return str(error)
    return ""
