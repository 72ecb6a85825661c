"""What Slurm 22.05's clients print is understood; every text here was printed by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.scheduler import slurm_text
from hpcresume.scheduler.frozen_options import frozen_options
from hpcresume.scheduler.job import JobInfo, JobState

CAPTURES = Path(__file__).parent / "captures" / "slurm-22.05"

QUEUE = """\
4|PENDING|Dependency||1795253807|1795261007|hpcresume:x:0002
1|RUNNING|None|k[1-2,4]|1795253748|1795255548|hpcresume:a|b:0001
25|COMPLETING|None|k2|1795254417|1826790375|hpcresume:x:0003
29|PENDING|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority \
partitions||1795265220|1795272420|
30|RUNNING|None|k1|1795254600|NONE|another's comment
31|EXPEDITING|None||N/A|N/A|hpcresume:x:0004
"""

#: A requeued job, whose node failed in its second life and which was cancelled in its third.
LIVES = """\
26|REQUEUED|0:0|k1|1795254419|1795254421|1795254419
26.batch|CANCELLED|0:9|k1|1795254419|1795254427|1795254419
26.0|CANCELLED|0:9|k1|1795254419|1795254428|1795254419
26|NODE_FAIL|0:0|k1|1795254439|1795254441|1795254428
26.batch|CANCELLED||k1|1795254439|1795254441|1795254439
26.0|CANCELLED||k1|1795254439|1795254441|1795254439
26|CANCELLED by 1000|0:0|None assigned|1795254441|1795254441|1795254441
"""

OUT_OF_MEMORY = """\
27|FAILED|1:0|k1|1795254443|1795254443|1795254442
27.batch|FAILED|1:0|k1|1795254443|1795254443|1795254443
27.0|OUT_OF_MEMORY|0:125|k1|1795254443|1795254443|1795254443
"""

JOB = """\
JobId=4 JobName=na|me Partition=x
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901756 Nice=0 Account=proj QOS=normal
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:01 TimeLimit=00:30:00 TimeMin=N/A
   SubmitTime=1795253747 EligibleTime=1795253747
   StartTime=1795253748 EndTime=1795255548 Deadline=N/A
   PreemptEligibleTime=1795253748 PreemptTime=None
   Partition=main AllocNode:Sid=localhost:4199
   ReqNodeList=(null) ExcNodeList=k[1-2]
   NodeList=k[3-4]
   BatchHost=k3
   NumNodes=2 NumCPUs=4 NumTasks=4 CPUs/Task=2 ReqB:S:C:T=0:0:*:1
   TRES=cpu=4,mem=600M,node=2,billing=4
   Socks/Node=* NtasksPerN:B:S:C=2:0:*:* CoreSpec=*
   MinCPUsNode=2 MinMemoryCPU=150M MinTmpDiskNode=0
   Features=fast&big DelayBoot=00:00:00
   OverSubscribe=NO Contiguous=0 Licenses=(null) Network=(null)
   Command=/tmp/a b.sh --nodes=9 JobState=FAILED
   WorkDir=/tmp/w d
   Comment=hpcresume:x:0004 Account=wrong\x20
   StdErr=/tmp/j o'b/4.log
   StdIn=/dev/null
   StdOut=/tmp/j o'b/4.log
   Power=
   TresPerNode=gres:gpu:a100:1
   MailUser=a@b MailType=BEGIN,END
"""

PARTITIONS = """\
PartitionName=main
   AllocNodes=ALL Default=YES QoS=N/A
   MaxNodes=UNLIMITED MaxTime=02:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED

PartitionName=long
   AllocNodes=ALL Default=NO QoS=N/A
   MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED

"""


def queue() -> dict[str, JobInfo]:
    return {job.id: job for job in slurm_text.parse_queue(QUEUE)}


def test_the_queue_is_read_oldest_first() -> None:
    assert list(queue()) == ["1", "4", "25", "29", "30", "31"]


def test_a_bar_in_a_comment_is_part_of_it() -> None:
    assert queue()["1"].token == "hpcresume:a|b:0001"


def test_a_running_job_has_its_nodes_and_its_times() -> None:
    job = queue()["1"]
    assert (job.state, job.nodes) == (JobState.RUNNING, "k[1-2,4]")
    assert (job.start_time, job.end_time) == (1795253748.0, 1795255548.0)
    assert job.reason == ""


def test_a_waiting_job_has_a_reason_but_no_times_which_are_guesses() -> None:
    job = queue()["4"]
    assert (job.state, job.reason) == (JobState.PENDING, "Dependency")
    assert (job.start_time, job.end_time) == (None, None)


def test_a_reason_of_many_words_is_kept() -> None:
    assert queue()["29"].reason.endswith("higher priority partitions")
    assert queue()["29"].token == ""


def test_a_completing_job_has_no_end_because_squeue_moves_it_ahead() -> None:
    assert queue()["25"].state is JobState.COMPLETING
    assert queue()["25"].end_time is None


def test_an_unlimited_job_has_no_end() -> None:
    assert queue()["30"].end_time is None


def test_a_state_that_nobody_knows_is_unknown_and_its_word_is_kept() -> None:
    assert (queue()["31"].state, queue()["31"].raw_state) == (JobState.UNKNOWN, "EXPEDITING")


def test_the_other_lines_of_a_comment_are_no_jobs() -> None:
    text = "5|PENDING|None||N/A|N/A|first\nsecond line\n6|of|them\n"
    assert [job.id for job in slurm_text.parse_queue(text)] == ["5"]


def test_each_life_of_a_requeued_job_is_read_in_order() -> None:
    lives = slurm_text.parse_records(LIVES)["26"]
    states = [life.state for life in lives]
    assert states == [JobState.REQUEUED, JobState.NODE_FAIL, JobState.CANCELLED]


def test_the_newest_life_is_the_last_even_if_sacct_prints_it_first() -> None:
    shuffled = "".join(reversed(LIVES.splitlines(keepends=True)))
    assert slurm_text.parse_records(shuffled)["26"][-1].state is JobState.CANCELLED


def test_who_cancelled_a_job_is_told_by_uid() -> None:
    assert slurm_text.parse_records(LIVES)["26"][-1].cancelled_by == "1000"


def test_a_cancellation_without_a_name_is_by_unknown() -> None:
    text = "7|CANCELLED|0:0|k1|1795254443|1795254443|1795254442\n"
    assert slurm_text.parse_records(text)["7"][0].cancelled_by == "unknown"


def test_memory_that_ran_out_in_a_step_is_the_end_of_its_job() -> None:
    (life,) = slurm_text.parse_records(OUT_OF_MEMORY)["27"]
    assert life.state is JobState.OUT_OF_MEMORY
    assert life.exit_code == 1


def test_memory_that_ran_out_in_an_earlier_life_is_not_the_end_of_the_later_one() -> None:
    later = "27|FAILED|2:0|k1|1795254460|1795254461|1795254450\n"
    states = [life.state for life in slurm_text.parse_records(OUT_OF_MEMORY + later)["27"]]
    assert states == [JobState.OUT_OF_MEMORY, JobState.FAILED]


def test_memory_that_ran_out_in_a_later_life_is_not_the_end_of_the_earlier_one() -> None:
    earlier = "27|FAILED|2:0|k1|1795254420|1795254421|1795254410\n"
    states = [life.state for life in slurm_text.parse_records(earlier + OUT_OF_MEMORY)["27"]]
    assert states == [JobState.FAILED, JobState.OUT_OF_MEMORY]


def test_a_time_limit_outweighs_memory_that_ran_out_in_a_step() -> None:
    text = OUT_OF_MEMORY.replace("27|FAILED", "27|TIMEOUT")
    assert slurm_text.parse_records(text)["27"][0].state is JobState.TIMEOUT


def test_a_signal_is_told_apart_from_an_exit_code() -> None:
    text = "8|FAILED|0:9|k1|1795254443|1795254443|1795254442\n"
    (life,) = slurm_text.parse_records(text)["8"]
    assert (life.exit_code, life.exit_signal) == (0, 9)


def test_a_record_of_a_running_job_has_no_end_and_no_exit_code() -> None:
    text = "3|RUNNING|0:0|k2|1795253748|Unknown|1795253747\n3.batch|RUNNING|0:0|k2|1|Unknown|1\n"
    (life,) = slurm_text.parse_records(text)["3"]
    assert (life.end_time, life.exit_code) == (None, None)


def test_no_records_are_no_error() -> None:
    assert slurm_text.parse_records("") == {}


def test_the_fields_of_a_job_are_read_whatever_its_name_path_and_comment_hold() -> None:
    fields = slurm_text.parse_job(JOB)
    assert fields["JobName"] == "na|me Partition=x"
    assert fields["Partition"] == "main"
    assert fields["JobState"] == "RUNNING"
    assert fields["Account"] == "proj"
    assert fields["StdOut"] == "/tmp/j o'b/4.log"


def test_fields_that_say_nothing_are_left_out() -> None:
    fields = slurm_text.parse_job(JOB)
    assert not {"Dependency", "TimeMin", "ReqNodeList", "Power"} & fields.keys()


def test_the_controllers_record_of_a_job_has_its_restarts_and_token() -> None:
    job = slurm_text.job_of_fields(slurm_text.parse_job(JOB))
    assert (job.id, job.state, job.restarts) == ("4", JobState.RUNNING, 2)
    assert (job.nodes, job.end_time) == ("k[3-4]", 1795255548.0)


def test_the_controller_does_not_know_who_cancelled() -> None:
    text = JOB.replace("JobState=RUNNING", "JobState=CANCELLED")
    assert slurm_text.job_of_fields(slurm_text.parse_job(text)).cancelled_by == "unknown"


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("scontrol-cancelled", JobState.CANCELLED),
        ("scontrol-completed", JobState.COMPLETED),
        ("scontrol-dependent", JobState.PENDING),
        ("scontrol-failed", JobState.FAILED),
        ("scontrol-held", JobState.PENDING),
        ("scontrol-node-fail", JobState.NODE_FAIL),
        ("scontrol-preempted", JobState.PREEMPTED),
        ("scontrol-requeued-pending", JobState.PENDING),
        ("scontrol-requeued-running", JobState.RUNNING),
        ("scontrol-timeout", JobState.TIMEOUT),
    ],
)
def test_the_controllers_records_are_understood(name: str, state: JobState) -> None:
    fields = slurm_text.parse_job(CAPTURES.joinpath(f"{name}.txt").read_text())
    job = slurm_text.job_of_fields(fields)
    assert (job.state, job.id) == (state, fields["JobId"])
    assert (job.exit_code is not None) == state.ended


def test_a_job_that_left_in_its_grace_time_was_preempted_although_slurm_says_failed() -> None:
    text = JOB.replace("JobState=RUNNING", "JobState=FAILED")
    text = text.replace("PreemptTime=None", "PreemptTime=1795255531")
    job = slurm_text.job_of_fields(slurm_text.parse_job(text))
    assert (job.state, job.raw_state) == (JobState.PREEMPTED, "FAILED")


def test_the_real_options_of_a_job_are_long_options() -> None:
    assert set(frozen_options(slurm_text.parse_job(JOB), {})) == {
        "--partition=main",
        "--time=00:30:00",
        "--nodes=2",
        "--account=proj",
        "--qos=normal",
        "--constraint=fast&big",
        "--exclude=k[1-2]",
        "--mail-user=a@b",
        "--mail-type=BEGIN,END",
        "--ntasks=4",
        "--cpus-per-task=2",
        "--mem-per-cpu=150M",
        "--gres=gpu:a100:1",
        "--ntasks-per-node=2",
        "--threads-per-core=1",
        "--exclusive",
    }


def test_tasks_that_slurm_counted_by_itself_are_not_asked_for() -> None:
    inside = {"SLURM_JOB_ID": "4"}
    options = frozen_options(slurm_text.parse_job(JOB), inside)
    assert not [o for o in options if o.startswith(("--ntasks=", "--cpus-per-task="))]


def test_one_task_with_one_cpu_that_was_asked_for_is_asked_for_again() -> None:
    fields = slurm_text.parse_job(JOB.replace("NumTasks=4 CPUs/Task=2", "NumTasks=1 CPUs/Task=1"))
    inside = {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "1"}
    assert {"--ntasks=1", "--cpus-per-task=1"} <= set(frozen_options(fields, inside))


def test_all_memory_of_a_node_is_a_wish_that_is_kept() -> None:
    fields = slurm_text.parse_job(JOB.replace("MinMemoryCPU=150M", "MinMemoryNode=0"))
    assert "--mem=0" in frozen_options(fields, {})


def test_memory_for_each_gpu_displaces_the_default_for_each_cpu() -> None:
    more = "   CpusPerTres=gres:gpu:3\n   MemPerTres=gres:gpu:100\n   TresPerTask=gres:gpu:1\n"
    options = frozen_options(slurm_text.parse_job(JOB + more), {})
    assert {"--cpus-per-gpu=3", "--mem-per-gpu=100", "--gpus-per-task=1"} <= set(options)
    assert not [o for o in options if o.startswith(("--mem-per-cpu", "--cpus-per-task", "--mem="))]


def test_gpus_that_were_asked_for_on_each_node_are_asked_for_the_same_way() -> None:
    inside = {"SLURM_JOB_ID": "4", "SLURM_GPUS_PER_NODE": "a100:1"}
    options = frozen_options(slurm_text.parse_job(JOB), inside)
    assert "--gpus-per-node=a100:1" in options
    assert not [o for o in options if o.startswith("--gres")]


def test_resources_are_read_in_the_words_of_later_versions_too() -> None:
    more = "   TresPerNode=gres/gpu:a100:2\n   TresPerTask=cpu=4,gres/gpu=1\n"
    options = frozen_options(slurm_text.parse_job(JOB + more), {})
    assert {"--gres=gpu:a100:2", "--gpus-per-task=1"} <= set(options)


def test_partitions_have_names_defaults_and_limits() -> None:
    main, long = slurm_text.parse_partitions(PARTITIONS)
    assert (main["PartitionName"], main["Default"]) == ("main", "YES")
    assert slurm_text.limit_s(main["MaxTime"]) == 7200
    assert slurm_text.limit_s(long["MaxTime"]) is None


def test_only_the_ranks_step_is_found_among_the_steps_of_a_job() -> None:
    text = "49.3|hpcresume\n49.batch|batch\n49.extern|extern\n49.4|hpcresume2\n"
    assert slurm_text.parse_step_ids(text, "hpcresume") == ["49.3"]


@pytest.mark.parametrize("text", ["12\n", "12;cluster\n", "Welcome to 7!\n12\n"])
def test_the_job_id_is_found_in_sbatchs_answer(text: str) -> None:
    assert slurm_text.parse_job_id(text) == "12"


def test_an_answer_without_a_job_id_gives_none() -> None:
    assert slurm_text.parse_job_id("Submitted batch job 12\n") is None


def test_words_are_slurms_own_without_the_programs_name() -> None:
    text = (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    assert slurm_text.words(text) == (
        "invalid partition specified: nope\n"
        "Batch job submission failed: Invalid partition name specified"
    )


@pytest.mark.parametrize(
    "complaint",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "Batch job submission failed: Socket timed out on send/recv operation",
        "Batch job submission failed: Zero Bytes were transmitted or received",
        "Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Protocol authentication error",
        "fatal: Could not establish a configuration source",
    ],
)
def test_a_controller_that_cannot_be_reached_is_no_refusal(complaint: str) -> None:
    assert slurm_text.says_no_answer(complaint)


@pytest.mark.parametrize(
    "complaint",
    [
        "Batch job submission failed: Invalid partition name specified",
        "Batch job submission failed: Job dependency problem",
        "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, "
        "user's size and/or time limits)",
        "slurm_load_jobs error: Invalid job id specified",
    ],
)
def test_a_refusal_is_an_answer(complaint: str) -> None:
    assert not slurm_text.says_no_answer(complaint)
