"""How Slurm's clients fail, with fake ones on PATH: what is asked again, and what is not."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_run import add_link, make_run

from hpcresume.config import RunConfig, SchedulerConfig, from_mapping
from hpcresume.errors import ConfigError, SubmissionRejected, Unavailable
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import hardware, slurm, slurm_clients, slurm_text
from hpcresume.scheduler.hardware import Hardware
from hpcresume.scheduler.job import JobSpec, JobState
from hpcresume.scheduler.local import LocalScheduler
from hpcresume.scheduler.process import available
from hpcresume.scheduler.slurm import SlurmScheduler
from hpcresume.submit import check_ways
from hpcresume.successors import job_spec, pin_hardware

REFUSED = "sbatch: error: Batch job submission failed: Invalid partition name specified"
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
FORGOTTEN = "sbatch: error: Batch job submission failed: Job dependency problem"
TOO_FEW = (
    "sbatch: error: Batch job submission failed: Requested node configuration is not available"
)
NO_ACCOUNTING = "Slurm accounting storage is disabled"
NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
UNKNOWN_ID = "slurm_load_jobs error: Invalid job id specified"


class Cluster:
    """Programs named like Slurm's, each a few lines of shell, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.environ = {"PATH": f"{self.bin}:/usr/bin:/bin", "SLURM_CONF": "/etc/slurm.conf"}
        for name in ("squeue", "scontrol", "sacct", "scancel"):
            self.program(name, "exit 0")

    def program(self, name: str, body: str) -> None:
        """`$N` is the number of the call, from 1 on; `calls` are counted before the body runs."""
        path = self.bin / name
        log = self.folder / f"{name}.calls"
        path.write_text(
            "#!/bin/bash\n"
            f"(printf '%s\\x1f' \"$@\"; echo) >> '{log}'\n"
            f"env > '{self.folder}/{name}.env'\n"
            f"N=$(wc -l < '{log}')\n"
            f"{body}\n"
        )
        path.chmod(0o755)

    def answers(self, name: str, *bodies: str) -> None:
        """A different body for each call; the last one for all that follow."""
        cases = [f"  {n}) {body} ;;" for n, body in enumerate(bodies[:-1], 1)]
        self.program(name, "\n".join(["case $N in", *cases, f"  *) {bodies[-1]} ;;", "esac"]))

    def calls(self, name: str) -> list[list[str]]:
        path = self.folder / f"{name}.calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split("\x1f")[:-1] for line in lines]

    def environ_of(self, name: str) -> dict[str, str]:
        lines = self.folder.joinpath(f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


class PlainLauncher:
    """Writes the script and hands it to sbatch, without submitit."""

    def launch(
        self,
        spec: JobSpec,
        text_of: Callable[[Sequence[str], Sequence[str]], str],
        sbatch: Callable[[Path], str],
    ) -> str:
        path = spec.run / "job.sh"
        path.write_text(text_of(["true"], []))
        return sbatch(path)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(slurm, "_SUBMIT_PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(slurm, "_CANCEL_POLL_S", 0.01)
    return Cluster(tmp_path / "cluster")


def scheduler(cluster: Cluster, **config: Any) -> SlurmScheduler:
    return SlurmScheduler(
        SchedulerConfig(**config), environ=cluster.environ, launcher=PlainLauncher()
    )


def spec(cluster: Cluster, **changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "name": "toy",
        "token": "hpcresume:toy:1",
        "run": cluster.folder,
        "log": cluster.folder / "%j.log",
        "workdir": cluster.folder,
        "environment": {"PATH": cluster.environ["PATH"], "MINE": "1"},
    }
    return JobSpec(**{**fields, **changes})


def refuse(words: str, code: int = 1) -> str:
    return f"echo '{words}' >&2; exit {code}"


def queued(*rows: str) -> str:
    return "; ".join(f"echo '{row}'" for row in rows) or ":"


# ---- submitting


def test_a_submission_gives_the_job_id(cluster: Cluster) -> None:
    cluster.program("sbatch", "echo '12;cluster'")
    assert scheduler(cluster).submit(spec(cluster)) == "12"


def test_a_refusal_is_raised_with_slurms_words_and_not_tried_again(cluster: Cluster) -> None:
    cluster.program("sbatch", refuse(REFUSED))
    with pytest.raises(SubmissionRejected, match=r"failed: Invalid partition name specified$"):
        scheduler(cluster).submit(spec(cluster))
    assert len(cluster.calls("sbatch")) == 1


def test_a_job_that_was_taken_although_sbatch_timed_out_is_found_by_its_token(
    cluster: Cluster,
) -> None:
    cluster.program("sbatch", refuse(TIMED_OUT))
    cluster.program("squeue", queued("7|PENDING|None||N/A|N/A|hpcresume:toy:1"))
    assert scheduler(cluster).submit(spec(cluster)) == "7"
    assert len(cluster.calls("sbatch")) == 1


def test_a_job_of_another_token_is_not_taken_for_it(cluster: Cluster) -> None:
    cluster.answers("sbatch", refuse(TIMED_OUT), "echo 8")
    cluster.program("squeue", queued("7|PENDING|None||N/A|N/A|hpcresume:toy:2"))
    assert scheduler(cluster).submit(spec(cluster)) == "8"


def test_an_sbatch_that_hangs_is_killed_and_called_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(slurm_clients._TIMEOUT_S, "sbatch", 3.0)
    cluster.answers("sbatch", "sleep 60", "echo 9")
    assert scheduler(cluster).submit(spec(cluster)) == "9"
    assert len(cluster.calls("sbatch")) == 2


def test_a_controller_that_never_answers_is_unavailable_after_three_tries(
    cluster: Cluster,
) -> None:
    cluster.program("sbatch", refuse(TIMED_OUT))
    cluster.program("squeue", refuse(NO_CONTROLLER))
    with pytest.raises(Unavailable, match="Socket timed out"):
        scheduler(cluster).submit(spec(cluster))
    assert len(cluster.calls("sbatch")) == 3


def test_of_a_job_that_was_taken_twice_the_younger_one_is_cancelled(cluster: Cluster) -> None:
    both = ["7|PENDING|None||N/A|N/A|hpcresume:toy:1", "8|PENDING|None||N/A|N/A|hpcresume:toy:1"]
    cluster.answers("sbatch", refuse(TIMED_OUT), "echo 8")
    # Searched in vain; then both are there; then the younger one before and after its end.
    cluster.answers("squeue", ":", queued(*both), queued(both[1]), ":")
    assert scheduler(cluster).submit(spec(cluster)) == "7"
    assert cluster.calls("scancel") == [["8"]]


def test_a_missing_sbatch_is_unavailable(cluster: Cluster) -> None:
    cluster.environ["PATH"] = f"{cluster.bin}:/nonexistent"
    with pytest.raises(Unavailable, match="sbatch"):
        scheduler(cluster).submit(spec(cluster, environment=cluster.environ))


def test_sbatch_is_this_machines_although_the_environment_is_anothers(cluster: Cluster) -> None:
    cluster.program("sbatch", "echo 12")
    frozen = {"PATH": "/elsewhere/bin:/usr/bin:/bin"}
    assert scheduler(cluster).submit(spec(cluster, environment=frozen)) == "12"
    assert cluster.environ_of("sbatch")["PATH"] == frozen["PATH"]


def test_a_dependency_on_a_forgotten_job_does_not_stop_the_submission(cluster: Cluster) -> None:
    cluster.answers("sbatch", refuse(FORGOTTEN), "echo 9")
    cluster.program("squeue", queued("7|COMPLETED|None||N/A|N/A|x"))
    assert scheduler(cluster).submit(spec(cluster), after=["6", "7"]) == "9"
    assert "--dependency=afterany:7" in cluster.calls("sbatch")[1]


def test_a_dependency_on_forgotten_jobs_alone_is_left_out(cluster: Cluster) -> None:
    cluster.answers("sbatch", refuse(FORGOTTEN), "echo 9")
    cluster.program("squeue", refuse(UNKNOWN_ID))
    assert scheduler(cluster).submit(spec(cluster), after=["6"]) == "9"
    assert "--dependency=" in cluster.calls("sbatch")[1]


def test_a_dependency_that_slurm_knows_and_refuses_is_a_refusal(cluster: Cluster) -> None:
    cluster.program("sbatch", refuse(FORGOTTEN))
    cluster.program("squeue", queued("6|RUNNING|None||N/A|N/A|x"))
    with pytest.raises(SubmissionRejected, match="dependency problem"):
        scheduler(cluster).submit(spec(cluster), after=["6"])
    assert len(cluster.calls("sbatch")) == 1


def test_nodes_to_avoid_are_given_up_where_slurm_takes_no_job_without_them(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.answers("sbatch", refuse(TOO_FEW), "echo 9")
    config = scheduler(cluster, exclude="n[1-2]")
    assert config.submit(spec(cluster, exclude_nodes=("n3",))) == "9"
    assert "--exclude=n[1-2]" in cluster.calls("sbatch")[1]
    assert TOO_FEW.removeprefix("sbatch: error: ") in caplog.text


def test_a_users_script_gives_up_nodes_to_avoid_too(cluster: Cluster) -> None:
    cluster.answers("sbatch", refuse(TOO_FEW), "echo 9")
    own = cluster.folder / "train.sbatch"
    options = ("--exclude=n1",)
    wanted = spec(cluster, script=own, script_options=options, exclude_nodes=("n3",))
    assert scheduler(cluster).submit(wanted) == "9"
    first, second = cluster.calls("sbatch")
    assert ("--exclude=n1,n3" in first, "--exclude=n1" in second) == (True, True)


def test_what_slurm_refuses_without_nodes_to_avoid_is_refused(cluster: Cluster) -> None:
    cluster.program("sbatch", refuse(TOO_FEW))
    with pytest.raises(SubmissionRejected, match="node configuration"):
        scheduler(cluster).submit(spec(cluster, exclude_nodes=("n3",)))
    assert len(cluster.calls("sbatch")) == 2


def test_a_submission_has_the_frozen_environment_and_no_trace_of_a_running_job(
    cluster: Cluster,
) -> None:
    cluster.program("sbatch", "echo 1")
    inherited = {"SLURM_JOB_ID": "3", "SBATCH_PARTITION": "x", "RANK": "1", "HPCRESUME_RANK": "1"}
    frozen = {**spec(cluster).environment, **inherited, "HPCRESUME_JOB": "9"}
    scheduler(cluster).submit(spec(cluster, environment=frozen))
    seen = cluster.environ_of("sbatch")
    assert seen["MINE"] == "1"
    assert seen["SLURM_CONF"] == "/etc/slurm.conf"
    assert not {*inherited, "HPCRESUME_JOB", "SLURM_TIME_FORMAT"} & seen.keys()


def test_a_users_own_script_gets_its_real_options_and_then_the_chains(cluster: Cluster) -> None:
    cluster.program("sbatch", "echo 1")
    own = cluster.folder / "train it.sbatch"
    options = ("--partition=gpu", "--exclude=n1", "--time=10:00")
    wanted = spec(
        cluster, script=own, script_options=options, time_s=60, exclude_nodes=("n2",), signal_s=30
    )
    scheduler(cluster, exclude="n[3-4]").submit(wanted, after=["5", "6"])
    (arguments,) = cluster.calls("sbatch")
    assert arguments[:3] == ["--parsable", "--partition=gpu", "--time=10:00"]
    assert arguments[-1] == str(own)
    assert {
        "--comment=hpcresume:toy:1",
        "--dependency=afterany:5:6",
        "--exclude=n1,n[3-4],n2",
        "--no-requeue",
        "--open-mode=append",
        "--signal=B:USR2@30",
    } <= set(arguments)
    assert arguments.index("--time=00:01:00") > arguments.index("--time=10:00")


def test_what_sbatch_would_say_is_passed_on(cluster: Cluster) -> None:
    said = "sbatch: Job 5 to start at 1795299701 using 8 processors on nodes n[1-2] in partition p"
    cluster.program("sbatch", f"cat > /dev/null; echo 'site: hello' >&2; echo '{said}' >&2")
    found = scheduler(cluster).test_only(spec(cluster))
    assert found == slurm_text.FirstStart(1795299701.0, "n[1-2]", f"site: hello {said}")
    assert cluster.environ_of("sbatch")["SLURM_TIME_FORMAT"] == "%s"
    cluster.program("sbatch", "cat > /dev/null; echo 'sbatch: it may start some day' >&2")
    assert scheduler(cluster).test_only(spec(cluster)).at is None
    cluster.program("sbatch", refuse(REFUSED))
    with pytest.raises(SubmissionRejected, match="Invalid partition"):
        scheduler(cluster).test_only(spec(cluster))


# ---- asking


def test_questions_are_asked_with_unix_times_and_none_of_the_users_filters(
    cluster: Cluster,
) -> None:
    cluster.environ |= {"SQUEUE_STATES": "RUNNING", "SLURM_TIME_FORMAT": "relative"}
    scheduler(cluster).find("hpcresume:")
    seen = cluster.environ_of("squeue")
    assert seen["SLURM_TIME_FORMAT"] == "%s"
    assert "SQUEUE_STATES" not in seen


def test_only_jobs_with_our_token_are_found_oldest_first(cluster: Cluster) -> None:
    cluster.program(
        "squeue",
        queued(
            "12|PENDING|Dependency||N/A|N/A|hpcresume:a|b:2",
            "9|RUNNING|None|n1|100|200|hpcresume:a|b:1",
            "8|RUNNING|None|n1|100|200|another",
            "7|RUNNING|None|n1|100|200|hpcresume:abc:1",
        ),
    )
    found = scheduler(cluster).find("hpcresume:a|b:")
    assert [job.id for job in found] == ["9", "12"]
    (arguments,) = cluster.calls("squeue")
    assert {"--all", f"--user={os.getuid()}"} <= set(arguments)


def test_a_job_in_a_state_that_nobody_knows_is_found(cluster: Cluster) -> None:
    cluster.program("squeue", queued("9|EXPEDITING|None||N/A|N/A|hpcresume:a:1"))
    (job,) = scheduler(cluster).find("hpcresume:a:")
    assert (job.state, job.raw_state) == (JobState.UNKNOWN, "EXPEDITING")


def test_a_hanging_squeue_is_unavailable_in_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(slurm_clients._TIMEOUT_S, "squeue", 0.3)
    cluster.program("squeue", "sleep 60")
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"no answer in 0\.3 s"):
        scheduler(cluster).find("hpcresume:")
    assert time.monotonic() - began < 50


def test_the_end_of_a_job_that_is_gone_is_none(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(UNKNOWN_ID))
    assert scheduler(cluster).end_time("9") is None


def test_a_job_in_the_queue_is_not_looked_up_elsewhere(cluster: Cluster) -> None:
    cluster.program("squeue", queued("9|RUNNING|None|n1|100|200|t"))
    assert scheduler(cluster).state(["9"])["9"].state is JobState.RUNNING
    assert cluster.calls("sacct") == []


def test_a_completing_job_is_what_the_accounting_says_it_ends_as(cluster: Cluster) -> None:
    cluster.program("squeue", queued("9|COMPLETING|None|n1|100|200|t"))
    cluster.program("sacct", queued(f"9|CANCELLED by {os.getuid()}|0:0|n1|100|150|90"))
    job = scheduler(cluster).state(["9"])["9"]
    assert job.state is JobState.CANCELLED
    name = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout
    assert job.cancelled_by == name.strip()


def test_a_canceller_without_a_name_is_told_by_uid(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.program("sacct", queued("9|CANCELLED by 4012345|0:0|n1|100|150|90"))
    assert scheduler(cluster).state(["9"])["9"].cancelled_by == "4012345"


@pytest.mark.parametrize("record", ["RUNNING", "REQUEUED"])
def test_a_completing_job_completes_as_long_as_no_end_is_recorded(
    cluster: Cluster, record: str
) -> None:
    cluster.program("squeue", queued("9|COMPLETING|None|n1|100|200|t"))
    cluster.program("sacct", queued(f"9|{record}|0:0|n1|100|Unknown|90"))
    assert scheduler(cluster).state(["9"])["9"].state is JobState.COMPLETING


def test_without_accounting_the_controller_is_asked(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_clients, "_RECORD_AGE_S", 0.0)
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.program("sacct", refuse(NO_ACCOUNTING))
    cluster.program("scontrol", "printf 'JobId=9 JobName=x\\n   JobState=CANCELLED Reason=None\\n'")
    one = scheduler(cluster)
    for _ in range(3):
        job = one.state(["9"])["9"]
        assert (job.state, job.cancelled_by) == (JobState.CANCELLED, "unknown")
    assert len(cluster.calls("sacct")) == 1


def test_that_there_is_no_accounting_is_said_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slurm_clients, "_RECORD_AGE_S", 0.0)
    monkeypatch.setattr(slurm_clients, "_RECORD_PAUSE_S", 0.0)
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.program("sacct", refuse(NO_ACCOUNTING))
    one = scheduler(cluster)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            one.state(["9"])
    assert len(cluster.calls("sacct")) == 3
    assert [record.message for record in caplog.records] == [
        f"sacct: {NO_ACCOUNTING}. Why a job ended is then less certain."
    ]


def test_a_missing_sacct_is_no_error(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.bin.joinpath("sacct").unlink()
    cluster.environ["PATH"] = f"{cluster.bin}:{_shell_only(cluster)}"
    assert scheduler(cluster).state(["9"])["9"].state is JobState.UNKNOWN


def _shell_only(cluster: Cluster) -> Path:
    """A folder with what the fakes need and no real client of Slurm."""
    folder = cluster.folder / "shell"
    folder.mkdir()
    for name in ("bash", "env", "wc", "cat", "sleep"):
        folder.joinpath(name).symlink_to(f"/usr/bin/{name}")
    return folder


def test_an_id_that_nobody_knows_is_unknown(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.program("scontrol", refuse(UNKNOWN_ID))
    assert scheduler(cluster).state(["9"])["9"].state is JobState.UNKNOWN


def test_an_end_is_asked_for_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_clients, "_RECORD_AGE_S", 0.0)
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.program("sacct", queued("9|TIMEOUT|0:0|n1|100|150|90"))
    one = scheduler(cluster)
    for _ in range(3):
        assert one.state(["9"])["9"].state is JobState.TIMEOUT
    assert len(cluster.calls("sacct")) == 1


def test_what_is_no_end_is_not_asked_for_again_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_clients, "_RECORD_AGE_S", 600.0)
    cluster.program("squeue", queued("9|COMPLETING|None|n1|100|200|t"))
    cluster.program("sacct", queued("9|RUNNING|0:0|n1|100|Unknown|90"))
    one = scheduler(cluster)
    for _ in range(5):
        one.state(["9"])
    assert len(cluster.calls("sacct")) == 1


def test_the_end_of_an_earlier_life_is_forgotten_when_the_job_lives_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_clients, "_RECORD_AGE_S", 0.0)
    running = queued("9|RUNNING|None|n1|100|200|t")
    cluster.answers("squeue", refuse(UNKNOWN_ID), running, refuse(UNKNOWN_ID))
    failed = "9|NODE_FAIL|0:0|n1|100|150|90"
    cluster.answers("sacct", queued(failed), queued(failed, "9|COMPLETED|0:0|n1|170|180|160"))
    one = scheduler(cluster)
    states = [one.state(["9"])["9"].state for _ in range(3)]
    assert states == [JobState.NODE_FAIL, JobState.RUNNING, JobState.COMPLETED]


def test_a_failure_that_the_controller_calls_a_preemption_is_one(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(UNKNOWN_ID))
    cluster.program("sacct", queued("9|FAILED|15:0|n1|100|150|90"))
    cluster.program("scontrol", "printf 'JobId=9 JobName=x\\n   PreemptTime=140\\n'")
    assert scheduler(cluster).state(["9"])["9"].state is JobState.PREEMPTED


def test_the_accounting_answers_while_the_controller_is_down(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(NO_CONTROLLER))
    cluster.program("sacct", queued("9|TIMEOUT|0:0|n1|100|150|90"))
    assert scheduler(cluster).state(["9"])["9"].state is JobState.TIMEOUT


def test_a_job_without_an_end_is_unavailable_while_the_controller_is_down(
    cluster: Cluster,
) -> None:
    cluster.program("squeue", refuse(NO_CONTROLLER))
    cluster.program("sacct", queued("9|RUNNING|0:0|n1|100|Unknown|90"))
    with pytest.raises(Unavailable, match="Unable to contact slurm controller"):
        scheduler(cluster).state(["9"])


def test_a_script_that_slurm_does_not_give_is_refused(cluster: Cluster) -> None:
    failed = refuse("job script retrieval failed: Invalid job id", code=0)
    cluster.answers("scontrol", failed, WAITING)
    with pytest.raises(SubmissionRejected, match="retrieval failed"):
        scheduler(cluster).frozen_script("9")


def test_a_limit_that_slurm_has_shortened_is_asked_for_until_the_accounting_knows_the_job(
    cluster: Cluster,
) -> None:
    shortened = "printf 'JobId=9 JobName=x\\n TimeLimit=00:02:00 TimeMin=00:01:00\\n'"
    cluster.answers("scontrol", "echo '#!/bin/sh'", shortened)
    cluster.answers("sacct", ":", "echo sbatch --time=00:30:00 --time-min=1 train.sbatch")
    _, options = scheduler(cluster).frozen_script("9")
    assert options == ("--time=00:30:00", "--time-min=00:01:00")


# ---- changing


WAITING = "printf 'JobId=9 JobName=x\\n Partition=p\\n NumNodes=2-2\\n ExcNodeList=n1\\n'"


def _partition_of(num_nodes: int) -> str:
    return f"echo PartitionName=p TotalNodes={num_nodes}"


def test_nodes_are_excluded_besides_those_that_already_are(cluster: Cluster) -> None:
    cluster.answers("scontrol", WAITING, _partition_of(4), ":")
    scheduler(cluster).update("9", exclude_nodes=["n2"], begin_delay_s=60)
    assert cluster.calls("scontrol")[-1] == [
        *("update", "JobId=9", "ExcNodeList=n1,n2", "StartTime=now+60")
    ]


def test_nodes_are_not_excluded_where_too_few_are_left(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.answers("scontrol", WAITING, _partition_of(3), ":")
    scheduler(cluster).update("9", exclude_nodes=["n2"])
    assert "update" not in [arguments[0] for arguments in cluster.calls("scontrol")]
    assert "n1,n2 again" in caplog.text


def test_a_change_that_slurm_refuses_is_a_refusal(cluster: Cluster) -> None:
    cluster.program("scontrol", refuse("Job is no longer pending execution for job 9"))
    with pytest.raises(SubmissionRejected, match="no longer pending"):
        scheduler(cluster).update("9", begin_delay_s=60)


def test_requeueing_a_job_that_is_pending_again_is_no_error(cluster: Cluster) -> None:
    cluster.program("scontrol", refuse("Job is pending execution for job 9"))
    scheduler(cluster).update("9", requeue=True)
    assert [arguments[0] for arguments in cluster.calls("scontrol")] == ["requeue"]


def test_requeueing_where_it_is_forbidden_is_a_refusal(cluster: Cluster) -> None:
    cluster.program("scontrol", refuse("Requested operation is presently disabled for job 9"))
    with pytest.raises(SubmissionRejected, match="presently disabled"):
        scheduler(cluster).update("9", requeue=True)


def test_pending_jobs_are_cancelled_before_running_ones(cluster: Cluster) -> None:
    running, pending = "9|RUNNING|None|n1|1|2|t", "10|PENDING|Dependency||N/A|N/A|t"
    cluster.answers("squeue", queued(running, pending), queued(running), ":")
    scheduler(cluster).cancel(["9", "10"])
    assert cluster.calls("scancel") == [["10"], ["9"]]


def test_a_successor_that_started_meanwhile_is_cancelled_as_well(cluster: Cluster) -> None:
    rows = ["10|PENDING|None||N/A|N/A|t", "10|RUNNING|None|n1|1|2|t", "10|COMPLETING|None|n1|1|2|t"]
    cluster.answers("squeue", *(queued(row) for row in rows))
    scheduler(cluster).cancel(["10"])
    assert cluster.calls("scancel") == [["10"], ["10"]]


def test_cancelling_jobs_that_have_ended_is_no_error(cluster: Cluster) -> None:
    cluster.program("squeue", refuse(UNKNOWN_ID))
    scheduler(cluster).cancel(["9"])
    scheduler(cluster).cancel([])
    assert cluster.calls("scancel") == []


def test_a_job_that_may_not_be_cancelled_is_said_at_once(cluster: Cluster) -> None:
    cluster.program("squeue", queued("9|RUNNING|None|n1|1|2|t"))
    denied = "scancel: error: Kill job error on job id 9: Access/permission denied"
    cluster.program("scancel", refuse(denied))
    with pytest.raises(Unavailable, match="denied"):
        scheduler(cluster).cancel(["9"])
    assert len(cluster.calls("scancel")) == 1


def test_a_job_that_does_not_go_is_given_up_after_a_while(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_CANCEL_S", 0.2)
    cluster.program("squeue", queued("9|RUNNING|None|n1|1|2|t"))
    with pytest.raises(Unavailable, match="Jobs 9 could not be cancelled"):
        scheduler(cluster).cancel(["9"])


# ---- partitions


PARTITIONS = """printf '
PartitionName=short Default=YES MaxTime=02:00:00
PartitionName=long Default=NO MaxTime=7-00:00:00
PartitionName=free Default=NO MaxTime=UNLIMITED
'"""


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (None, ("short", 7200)),
        ("long", ("long", 7 * 86400)),
        ("short,long", ("long", 7 * 86400)),
        ("short,free", ("free", None)),
        ("nope", None),
    ],
)
def test_a_partition_has_a_name_and_a_limit(
    cluster: Cluster, asked: str | None, answer: tuple[str, int | None] | None
) -> None:
    cluster.program("scontrol", PARTITIONS)
    assert scheduler(cluster).partition_limit_s(asked) == answer


def test_a_machine_can_submit_where_sbatch_is_on_the_path(cluster: Cluster) -> None:
    assert not available("sbatch", {"PATH": str(cluster.bin)})
    cluster.program("sbatch", "exit 0")
    assert available("sbatch", {"PATH": str(cluster.bin)})


def test_nodes_are_excluded_only_where_enough_others_have_the_jobs_features(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    waiting = WAITING.replace("ExcNodeList", "Features=ib&a100 DelayBoot=0\\n ExcNodeList")
    nodes = [node("n1", "ib,a100"), node("n2", "ib"), node("n3", "ib,a100"), node("n4", "a100,ib")]
    cluster.answers("scontrol", waiting, show(*nodes), ":")
    scheduler(cluster).update("9", exclude_nodes=["n3"])
    assert "n1,n3 again" in caplog.text
    assert len(cluster.calls("scontrol")) == 2
    cluster.answers("scontrol", *[":"] * 2, waiting, show(*nodes, node("n5", "a100,ib")), ":")
    scheduler(cluster).update("9", exclude_nodes=["n3"])
    assert cluster.calls("scontrol")[-1] == ["update", "JobId=9", "ExcNodeList=n1,n3"]


# ---- the kind of node that a run is pinned to


def node(name: str, features: str, gres: str = "(null)") -> str:
    """A node as `scontrol show node` describes it, with what people wrote at its end."""
    return (
        f"NodeName={name} Arch=x86_64 CoresPerSocket=1\n"
        f"   CPUAlloc=0 CPUEfctv=4 CPUTot=4 CPULoad=0.16\n"
        f"   AvailableFeatures={features},sleeping\n"
        f"   ActiveFeatures={features}\n"
        f"   Gres={gres}\n"
        f"   OS=Linux 6.18 #1 SMP PREEMPT_DYNAMIC @0\n"
        f"   State=IDLE ThreadsPerCore=1 TmpDisk=0 Weight=1 Owner=N/A MCS_label=N/A\n"
        f"   Partitions=p,q\n"
        f"   Reason=no Gres=gpu:h100:8 ActiveFeatures=broken [root@now]\n\n"
    )


def show(*nodes: str) -> str:
    return f"cat <<'END'\n{''.join(nodes)}END\n"


@pytest.mark.parametrize(
    ("features", "gres", "names", "gpu_type"),
    [
        ("", "(null)", (), ""),
        ("(null)", "gpu:2", (), ""),
        ("ib,a100", "gpu:a100:4(S:0-1)", ("ib", "a100"), "a100"),
        ("x-1.2", "nic:1,gpu:a100_1g.5gb:7(S:0,2-3)", ("x-1.2",), "a100_1g.5gb"),
        ("ib", "gpu:a100:2(S:0),gpu:v100:2(S:1)", ("ib",), ""),
        ("ib", "gpu:a100:2,gpu:2", ("ib",), ""),
        ("ib", "gpu:a100:2(S:0),gpu:a100:2(S:1),mps:200", ("ib",), "a100"),
    ],
)
def test_a_nodes_kind_is_its_active_features_and_its_one_type_of_gpu(
    cluster: Cluster, features: str, gres: str, names: tuple[str, ...], gpu_type: str
) -> None:
    cluster.program("scontrol", show(node("n1", features, gres)))
    assert scheduler(cluster).hardware_of("n1") == Hardware(features=names, gpu_type=gpu_type)
    assert cluster.calls("scontrol") == [["show", "node", "n1"]]


def test_several_nodes_are_of_the_kind_that_they_have_in_common(cluster: Cluster) -> None:
    one, two = node("n1", "ib,old,a100", "gpu:a100:4"), node("n2", "a100,ib,new", "gpu:v100:4")
    cluster.program("scontrol", show(one, two))
    assert scheduler(cluster).hardware_of("n[1-2]") == Hardware(features=("ib", "a100"))


def test_nodes_that_slurm_does_not_know_have_no_kind(cluster: Cluster) -> None:
    cluster.program("scontrol", "echo 'Node n1 not found'; exit 1")
    with pytest.raises(Unavailable, match="Slurm does not describe n1: Node n1 not found"):
        scheduler(cluster).hardware_of("n1")


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        (None, "ib&a100"),
        ("linux", "linux&ib&a100"),
        ("a100&ib", "a100&ib"),
        ("a100,linux", "a100,linux&ib"),
        ("ib|linux", "ib|linux&ib&a100"),
        ("(ib&x)|y", "(ib&x)|y&ib&a100"),
        ("ib&x|y", "ib&x|y&ib&a100"),
        ("[rack1|rack2]", "[rack1|rack2]&ib&a100"),
        ("[x*1&y*1]", "[x*1&y*1]"),
    ],
)
def test_a_pinned_job_asks_for_the_features_besides_those_of_the_user(
    cluster: Cluster, own: str | None, asked: str
) -> None:
    kind = Hardware(features=("ib", "a100"))
    assert f"--constraint={asked}" in script_options(cluster, kind, constraint=own)


@pytest.mark.parametrize(
    ("number", "asked"), [(2, "a100:2"), ("2", "a100:2"), ("v100:2", "v100:2"), (0, "0")]
)
def test_a_pinned_job_asks_for_the_type_of_gpu_where_it_wants_just_a_number(
    cluster: Cluster, number: int | str, asked: str
) -> None:
    options = script_options(cluster, Hardware(gpu_type="a100"), gpus_per_node=number)
    assert f"--gpus-per-node={asked}" in options


def test_a_pinned_job_without_gpus_asks_for_none(cluster: Cluster) -> None:
    kind = Hardware(features=("ib",), gpu_type="a100")
    assert not [line for line in script_options(cluster, kind) if "a100" in line]


def script_options(cluster: Cluster, kind: Hardware, **config: Any) -> list[str]:
    """The options in the script of a job that is pinned to a kind of node."""
    cluster.program("sbatch", "echo 1")
    scheduler(cluster, **config).submit(spec(cluster, hardware=kind))
    lines = cluster.folder.joinpath("job.sh").read_text().splitlines()
    return [line.removeprefix("#SBATCH ").replace('"', "") for line in lines]


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ("--constraint=fast", "--constraint=fast&ib"),
        ("--gpus-per-node=2", "--gpus-per-node=a100:2"),
        ("--gpus=8", "--gpus=a100:8"),
        ("--gpus-per-task=v100:1", "--gpus-per-task=v100:1"),
        ("--gres=gpu:2,shard:1", "--gres=gpu:a100:2,shard:1"),
        ("--gres=gpu", "--gres=gpu:a100:1"),
        ("--gres=gpu:v100:2", "--gres=gpu:v100:2"),
        ("--exclusive", "--exclusive"),
    ],
)
def test_a_users_own_script_is_pinned_on_the_command_line(
    cluster: Cluster, own: str, asked: str
) -> None:
    cluster.program("sbatch", "echo 1")
    script = cluster.folder / "train.sbatch"
    kind = Hardware(features=("ib",), gpu_type="a100")
    wanted = spec(cluster, script=script, script_options=("--mem=5", own), hardware=kind)
    scheduler(cluster).submit(wanted)
    arguments = cluster.calls("sbatch")[0]
    assert asked in arguments
    assert next(a for a in arguments if a.startswith("--constraint")).endswith("ib")
    assert arguments[-1] == str(script)


PINNED = from_mapping({"scheduler": {"pin_hardware": True}}, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of Slurm whose links ran on n1 and n2."""
    made = make_run(tmp_path / "runs", cluster="slurm")
    for nodes in ("n1", "n2"):
        add_link(made, nodes=nodes)
    return made


def pinned_to(run: RunDir, config: RunConfig = PINNED) -> Hardware:
    return job_spec(run, config, lead_s=30).hardware


def test_the_first_links_kind_of_node_is_frozen_once(
    cluster: Cluster, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.program("scontrol", show(node("n1", "ib", "gpu:a100:4")))
    assert pinned_to(run) == Hardware()
    with caplog.at_level(logging.INFO):
        pin_hardware(run, PINNED, scheduler(cluster))
        pin_hardware(run, PINNED, scheduler(cluster))
    assert cluster.calls("scontrol") == [["show", "node", "n1"]]
    assert caplog.messages == ["later jobs ask for nodes like n1: features ib, GPUs of type a100"]
    assert pinned_to(run) == Hardware(features=("ib",), gpu_type="a100")
    assert pinned_to(run, RunConfig()) == Hardware(), "it is no longer wanted"
    run.hardware.write_text("torn")
    assert pinned_to(run) == Hardware()


@pytest.mark.parametrize(("gres", "end"), [("(null)", "ware)"), ("gpu:a100:1", "of type a100")])
def test_a_node_without_features_is_said_once(
    cluster: Cluster, run: RunDir, caplog: pytest.LogCaptureFixture, gres: str, end: str
) -> None:
    cluster.program("scontrol", show(node("n1", "", gres)))
    for _ in range(2):
        pin_hardware(run, PINNED, scheduler(cluster))
    (message,) = caplog.messages
    assert message.startswith("this node has no features that could be asked for; later jobs may")
    assert message.endswith(end)


def test_a_controller_that_does_not_answer_is_asked_about_the_node_again(
    cluster: Cluster, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.answers("scontrol", refuse(NO_CONTROLLER), show(node("n1", "ib")))
    pin_hardware(run, PINNED, scheduler(cluster))
    assert "the next job may run on other hardware than the first link" in caplog.text
    pin_hardware(run, PINNED, scheduler(cluster))
    assert pinned_to(run) == Hardware(features=("ib",))


def test_nothing_is_pinned_without_the_wish_or_a_link_or_a_slurm(
    cluster: Cluster, run: RunDir, tmp_path: Path
) -> None:
    pin_hardware(run, RunConfig(), scheduler(cluster))
    pin_hardware(run, PINNED, LocalScheduler(run, ["true"]))
    pin_hardware(make_run(tmp_path, "new"), PINNED, scheduler(cluster))
    assert cluster.calls("scontrol") == []
    assert hardware.frozen(run) is None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"chain": {"mode": "requeue"}}, "no effect with chain.mode requeue"),
        ({"scheduler": {"constraint": "[a*1&b*1]"}}, r"constraint \[a\*1&b\*1\]: Slurm adds"),
    ],
    ids=["requeue", "counts"],
)
def test_pinning_is_refused_where_it_could_have_no_effect(
    more: dict[str, Any], sentence: str
) -> None:
    check_ways(from_mapping(more, "test"))
    scheduler_too = {"pin_hardware": True, **more.get("scheduler", {})}
    with pytest.raises(ConfigError, match=sentence):
        check_ways(from_mapping({**more, "scheduler": scheduler_too}, "test"))
