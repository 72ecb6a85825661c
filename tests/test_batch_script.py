"""The batch script says what was asked for, and survives every path that can be written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcresume.config import ContainerConfig, SchedulerConfig
from hpcresume.errors import ConfigError
from hpcresume.scheduler.job import JobSpec
from hpcresume.scheduler.launcher import command_line, prepare_lines
from hpcresume.scheduler.script import container_prefix, render


def spec(**changes: Any) -> JobSpec:
    fields: dict[str, Any] = {
        "name": "toy",
        "token": "hpcresume:toy:1",
        "run": Path("/runs/toy"),
        "log": Path("/runs/toy/jobs/%j.log"),
        "workdir": Path("/project"),
    }
    return JobSpec(**{**fields, **changes})


def options(text: str) -> list[str]:
    return [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]


def rendered(config: SchedulerConfig | None = None, **changes: Any) -> list[str]:
    return options(render(spec(**changes), config or SchedulerConfig(), ["true"]))


def test_the_script_is_short_and_ends_in_the_command() -> None:
    config = SchedulerConfig(time="2:00:00", gpus_per_node=4, setup=["module load cuda"])
    text = render(spec(signal_s=90), config, ["python", "-m", "it's"], after=["7", "8"])
    assert text == (
        "#!/bin/bash\n"
        "#SBATCH --nodes=1\n"
        "#SBATCH --ntasks-per-node=1\n"
        "#SBATCH --gpus-per-node=4\n"
        "#SBATCH --job-name=toy\n"
        "#SBATCH --comment=hpcresume:toy:1\n"
        "#SBATCH --chdir=/project\n"
        "#SBATCH --output=/runs/toy/jobs/%j.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --no-requeue\n"
        "#SBATCH --time=02:00:00\n"
        "#SBATCH --signal=B:USR2@90\n"
        "#SBATCH --dependency=afterany:7:8\n"
        "\n"
        "trap '' USR1 USR2\n"
        "module load cuda\n"
        "export HPCRESUME_RUN=/runs/toy\n"
        "exec python -m 'it'\"'\"'s'\n"
    )


def test_what_was_not_asked_for_is_left_to_slurm() -> None:
    names = {option.partition("=")[0] for option in rendered()}
    assert not {"--time", "--mem", "--partition", "--signal", "--wckey", "--exclude"} & names


def test_every_resource_has_its_option() -> None:
    config = SchedulerConfig(
        nodes=2,
        tasks_per_node=4,
        cpus_per_task=8,
        gpus_per_node="a100:4",
        mem="64G",
        partition="gpu,fast",
        account="proj",
        qos="high",
        constraint="a100&ib",
    )
    assert rendered(config)[:9] == [
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=8",
        "--gpus-per-node=a100:4",
        "--mem=64G",
        "--partition=gpu,fast",
        "--account=proj",
        "--qos=high",
        "--constraint=a100&ib",
    ]


def test_a_range_of_nodes_names_the_tasks_cpus_because_tasks_would_fix_the_least() -> None:
    config = SchedulerConfig(nodes="2-4", tasks_per_node=4, cpus_per_task=8)
    assert rendered(config)[:3] == ["--nodes=2-4", "--mincpus=32", "--cpus-per-task=8"]
    plain = rendered(SchedulerConfig(nodes="2-4"))
    assert plain[0] == "--nodes=2-4"
    assert not any(option.startswith(("--ntasks", "--mincpus")) for option in plain)


def test_the_links_own_time_counts_more_than_the_configured_one() -> None:
    assert "--time=00:10:00" in rendered(SchedulerConfig(time="2:00:00"), time_s=600)


def test_nodes_to_avoid_are_those_of_the_user_and_of_the_chain() -> None:
    config = SchedulerConfig(exclude="n[1-2]")
    assert "--exclude=n[1-2],n7" in rendered(config, exclude_nodes=("n7", "n7"))


def test_a_delay_counts_from_now() -> None:
    assert "--begin=now+60" in rendered(begin_delay_s=60)


def test_in_requeue_mode_slurm_may_restart_the_job() -> None:
    assert "--requeue" in rendered(allow_requeue=True)
    assert "--no-requeue" not in rendered(allow_requeue=True)


def test_a_signal_comes_no_earlier_than_slurm_can_count() -> None:
    assert "--signal=B:USR2@65535" in rendered(signal_s=100000)


def test_other_options_of_the_user_are_passed_on() -> None:
    sbatch = {"mail-type": "END", "exclusive": True, "reservation": None, "nice": 5, "hint": False}
    lines = rendered(SchedulerConfig(sbatch=sbatch))
    assert {"--mail-type=END", "--exclusive", "--reservation", "--nice=5"} <= set(lines)
    assert not [line for line in lines if "hint" in line]


def test_an_option_of_the_user_takes_the_place_of_ours() -> None:
    lines = rendered(SchedulerConfig(sbatch={"output": "/elsewhere/%j"}))
    assert [line for line in lines if line.startswith("--output")] == ["--output=/elsewhere/%j"]


def test_a_users_dependency_holds_for_the_first_link_only() -> None:
    config = SchedulerConfig(sbatch={"dependency": "afterok:5"})
    assert "--dependency=afterok:5" in rendered(config)
    later = options(render(spec(), config, ["true"], after=["9"]))
    assert [line for line in later if "dependency" in line] == ["--dependency=afterany:9"]


@pytest.mark.parametrize("name", ["comment", "array", "requeue", "wrap", "parsable"])
def test_an_option_that_the_chain_needs_cannot_be_set(name: str) -> None:
    with pytest.raises(ConfigError, match=f"scheduler.sbatch.{name} cannot be set: "):
        rendered(SchedulerConfig(sbatch={name: "x"}))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain-1.2_x", "plain-1.2_x"),
        ("with space", '"with space"'),
        ("it's", '"it\'s"'),
        ('a "b"', '"a \\"b\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("#1", '"#1"'),
        ("größe", '"größe"'),
        ("", ""),
    ],
)
def test_values_are_quoted_as_sbatch_reads_them(value: str, written: str) -> None:
    config = SchedulerConfig(sbatch={"admin-comment": value})
    assert f"--admin-comment={written}" in rendered(config)


@pytest.mark.parametrize("broken", ["a\nb", "a\rb", "a\0b"])
def test_a_line_break_cannot_get_into_the_script(broken: str) -> None:
    with pytest.raises(ConfigError, match="line break"):
        render(spec(workdir=Path(f"/p/{broken}")), SchedulerConfig(), ["true"])
    with pytest.raises(ConfigError, match="line break"):
        render(spec(name=f"{broken}\n#SBATCH --x"), SchedulerConfig(), ["true"])


def test_a_percent_sign_in_a_folder_is_no_pattern_of_the_log() -> None:
    assert "--output=/100%%job/%j.log" in rendered(log=Path("/100%job/%j.log"))


def test_a_backslash_in_the_logs_path_is_refused_because_slurm_cannot_write_it() -> None:
    with pytest.raises(ConfigError, match="backslash"):
        rendered(log=Path("/a\\b/%j.log"))


def test_the_script_hands_the_run_to_the_command_whatever_its_path(tmp_path: Path) -> None:
    run = tmp_path / 'it\'s a "$HOME"\nof `true` 100%'
    text = render(spec(run=run), SchedulerConfig(), ["printenv", "HPCRESUME_RUN"])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == f"{run}\n"


def test_the_command_becomes_the_batch_process_itself() -> None:
    text = render(spec(), SchedulerConfig(), ["python3", "-c", "import os; print(os.getpid())"])
    with subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, text=True) as started:
        assert started.communicate()[0].strip() == str(started.pid)


def test_a_warning_signal_before_the_command_listens_does_not_end_it() -> None:
    early = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('lives')"
    text = render(spec(), SchedulerConfig(), ["python3", "-c", early])
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "lives\n")


def test_a_job_finds_its_pickle_before_its_submitter_knows_the_id(tmp_path: Path) -> None:
    wanted = spec(run=tmp_path / "it's\na run", token="hpcresume:a/b:1")
    jobs = wanted.run / "jobs"
    jobs.mkdir(parents=True)
    jobs.joinpath("hpcresume-a-b-1.pkl").write_text("pickled")
    _bash(prepare_lines(wanted), job_id="12")
    assert jobs.joinpath("12_submitted.pkl").read_text() == "pickled"
    # The submitter's rename takes the link's place.
    jobs.joinpath("hpcresume-a-b-1.pkl").rename(jobs / "12_submitted.pkl")
    _bash(prepare_lines(wanted), job_id="12")
    assert jobs.joinpath("12_submitted.pkl").read_text() == "pickled"


def _bash(lines: list[str], job_id: str) -> None:
    text = "\n".join(["set -e", *lines, 'test "$SUBMITIT_EXECUTOR" = slurm'])
    environ = {**os.environ, "SLURM_JOB_ID": job_id}
    subprocess.run(["bash", "-c", text], check=True, env=environ)


def test_the_command_of_a_link_is_submitits() -> None:
    assert command_line(spec())[1:] == ["-u", "-m", "submitit.core._submit", "/runs/toy/jobs"]


@pytest.mark.parametrize("mark", ["%j", "%t", "%A", "%a"])
def test_a_folder_that_submitit_would_take_for_a_pattern_is_refused(mark: str) -> None:
    with pytest.raises(ConfigError, match="submitit"):
        command_line(spec(run=Path(f"/runs/100{mark}")))


def test_without_a_container_a_rank_is_the_command_itself() -> None:
    assert container_prefix(None, Path("/runs/toy")) == ([], [])


@pytest.mark.parametrize("runtime", ["apptainer", "singularity"])
def test_a_container_gets_the_run_and_the_mounts(runtime: Any) -> None:
    config = ContainerConfig(
        image="img.sif", runtime=runtime, mounts=["/data:/data:ro"], args=["--cleanenv"]
    )
    assert container_prefix(config, Path("/my runs/toy")) == (
        [],
        [
            *(runtime, "exec", "--nv", "--bind", "/my runs/toy:/my runs/toy"),
            *("--bind", "/data:/data:ro", "--cleanenv", "img.sif"),
        ],
    )


def test_pyxis_is_asked_through_srun() -> None:
    config = ContainerConfig(image="nvcr#pytorch", runtime="pyxis", mounts=["/data:/data"])
    assert container_prefix(config, Path("/runs/toy")) == (
        ["--container-image=nvcr#pytorch", "--container-mounts=/runs/toy:/runs/toy,/data:/data"],
        [],
    )


@pytest.mark.parametrize("run", ["/runs/a:b", "/runs/a,b"])
def test_a_run_that_cannot_be_mounted_is_refused(run: str) -> None:
    with pytest.raises(ConfigError, match="mounted"):
        container_prefix(ContainerConfig(image="x"), Path(run))
