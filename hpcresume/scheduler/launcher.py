"""submitit: the one place that knows it. It starts the links on Slurm, and in debug mode here.

submitit pickles a callable before it submits, and runs it inside the job. Ours holds one path and
nothing else; script and submission come from `slurm`, so that they have its time-outs and its
certainty. The callable is handed in, because links are above schedulers.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from hpcresume.errors import ConfigError, SubmissionRejected
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobSpec

_TextOf = Callable[[Sequence[str], Sequence[str]], str]


class SubmititLauncher:
    """Submits links that execute `make_callable(run)`; see `slurm.Launcher`."""

    def __init__(self, make_callable: Callable[[Path], Any]) -> None:
        self._make_callable = make_callable

    def launch(self, spec: JobSpec, text_of: _TextOf, sbatch: Callable[[Path], str]) -> str:
        """Submit the script that `text_of(command, prepare)` gives; returns the job id.

        Afterwards submitit's files lie in the run's `jobs`, named by the job's id.
        """
        executor = _Executor(spec, text_of, sbatch)
        return str(executor.submit(self._make_callable(spec.run)).job_id)


def command_line(spec: JobSpec) -> list[str]:
    """What the batch script of a link executes as its last line."""
    folder = _folder(spec)
    return [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]


def prepare_lines(spec: JobSpec) -> list[str]:
    """The shell lines that `command_line` needs before it.

    In the job, submitit waits a minute for a pickle that is named by the job's id. Only sbatch's
    answer tells that, which may come late, or never where its caller is killed: so the job makes
    the name itself. If the submitter was faster, the line fails and nothing is lost.
    """
    link = f"{shlex.quote(str(_folder(spec)))}/${{SLURM_JOB_ID}}_submitted.pkl"
    return [
        "export SUBMITIT_EXECUTOR=slurm",
        f"ln -s {shlex.quote(_pickle(spec).name)} {link} 2>/dev/null || true",
    ]


def delayed(function: Callable[[], Any]) -> Any:
    """What a callable's `checkpoint` returns so that submitit runs `function` next."""
    return utils.DelayedSubmission(function)


def run_debug(make_callable: Callable[[Path], Any], run: Path, folder: Path) -> Any:
    """Execute a link in this process, through submitit's debug executor; returns its result.

    An exception opens a debugger, but only where somebody sits at a terminal.
    """
    job = submitit.DebugExecutor(folder=folder).submit(make_callable(run))
    if not sys.stdin.isatty():
        error = job.exception()
        if error is not None:
            raise error
    return job.result()


class _Executor(submitit.SlurmExecutor):
    """submitit's, with our script and our way to sbatch."""

    def __init__(self, spec: JobSpec, text_of: _TextOf, sbatch: Callable[[Path], str]) -> None:
        super().__init__(folder=_folder(spec), python=shlex.quote(sys.executable))
        self._spec = spec
        self._text_of = text_of
        self._sbatch = sbatch

    @classmethod
    def affinity(cls) -> int:
        # submitit looks for srun in its own process's PATH; ours is where `slurm` says.
        return 2

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text_of(shlex.split(command), prepare_lines(self._spec))

    def _internal_process_submissions(
        self, delayed_submissions: list[utils.DelayedSubmission]
    ) -> list[submitit.Job[Any]]:
        (submission,) = delayed_submissions
        pickle = _pickle(self._spec)
        script = pickle.with_suffix(".sh")
        text = self._make_submission_file_text(self._submitit_command_str, pickle.stem)
        script.write_text(text, encoding="utf-8")
        submission.dump(pickle)
        try:
            job_id = self._sbatch(script)
        except SubmissionRejected:
            # After any other failure there may be a job, or come to be one, that needs them.
            script.unlink()
            pickle.unlink()
            raise
        job: submitit.Job[Any] = self.job_class(folder=self.folder, job_id=job_id)
        job.paths.move_temporary_file(pickle, "submitted_pickle")
        job.paths.move_temporary_file(script, "submission_file")
        return [job]


def _folder(spec: JobSpec) -> Path:
    folder = RunDir(spec.run).jobs
    if any(mark in str(folder) for mark in ("%j", "%t", "%A", "%a")):
        raise ConfigError(
            f"{folder} has a '%' before j, t, a or A, which submitit takes for a job's number: "
            "choose another folder of runs (--runs)."
        )
    return folder


def _pickle(spec: JobSpec) -> Path:
    """The pickle until the job's id is known; tokens are unique, but not made for file names."""
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in spec.token)
    return _folder(spec) / f"{name}.pkl"
