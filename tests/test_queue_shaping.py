"""`scheduler.time_min` and `scheduler.deadline`: what Slurm is asked for, and how a chain ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from made_run import FakeSlurm, Said, add_link, end_link, make_run

from hpcresume.config import RunConfig, format_moment, from_mapping, local_moment, parse_moment
from hpcresume.drive import drive
from hpcresume.errors import ConfigError
from hpcresume.files import write_json
from hpcresume.journal import read_chain
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import slurm_text
from hpcresume.scheduler.frozen_options import asked_limit, asked_nodes, frozen_options
from hpcresume.scheduler.script import render, script_arguments
from hpcresume.submit import at_fixed_time, check_ways, ignored_elsewhere
from hpcresume.successors import job_spec, note_queued, too_late

#: A Saturday evening, in the local time of whoever runs the test.
NOW = time.mktime((2026, 11, 21, 22, 30, 0, 0, 0, -1))
HOUR = 3600.0


def config(**scheduler: Any) -> RunConfig:
    return from_mapping({"scheduler": scheduler}, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs", cluster="slurm")


# ---- moments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("now+90minutes", 1.5),
        ("now+1hour", 1),
        ("now+7200", 2),
        ("now+3days", 72),
        ("NOW+1week", 168),
        ("23:30", 1),
        ("22:00", 23.5),
        ("22:30:00", 24),
        ("2026-11-22", 1.5),
        ("2026-11-22T00:30", 2),
        (" 2026-11-22T00:30:00 ", 2),
    ],
)
def test_a_moment_is_read_as_sbatch_reads_it(text: str, hours: float) -> None:
    assert parse_moment(text, now=NOW) == NOW + hours * HOUR


def test_a_moment_with_an_offset_is_the_same_everywhere() -> None:
    assert parse_moment("2026-11-22T00:30:00+01:00", now=0) == 1795303800
    assert parse_moment(format_moment(NOW), now=0) == NOW
    assert parse_moment(local_moment(NOW), now=0) == NOW


@pytest.mark.parametrize(
    "text", ["soon", "", "11/22/26", "4pm", "1122", "25:00", "2026-13-01", "now-1day", "now+1month"]
)
def test_what_readers_differ_about_is_no_moment(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a moment; expected YYYY-MM-DD\[T"):
        parse_moment(text, now=NOW)


# ---- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"time_min": "soon"}, "scheduler.time_min: 'soon' is not a time limit"),
        ({"deadline": "soon"}, "scheduler.deadline: 'soon' is not a moment"),
        ({"sbatch": {"deadline": "now"}}, "write scheduler.deadline instead"),
        ({"sbatch": {"time-min": "5"}}, "write scheduler.time_min instead"),
    ],
)
def test_a_setting_that_is_no_time_is_refused(scheduler: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**scheduler)


@pytest.mark.parametrize("least", ["2:00:01", "UNLIMITED"])
def test_a_least_time_above_the_limit_is_refused(least: str) -> None:
    check_ways(config(time="2:00:00", time_min="120"))
    check_ways(config(time_min="120"))
    with pytest.raises(ConfigError, match=r"scheduler.time_min is .*, above scheduler.time"):
        check_ways(config(time="2:00:00", time_min=least))


def test_a_deadline_is_counted_from_the_submission_once() -> None:
    settled = at_fixed_time(config(deadline="now+1hour"), NOW)
    assert settled.scheduler.deadline == format_moment(NOW + HOUR)
    assert at_fixed_time(settled, NOW + 5 * HOUR) == settled
    assert at_fixed_time(config(), NOW) == config()


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_what_only_slurm_knows_is_said_to_be_ignored_elsewhere(cluster: str) -> None:
    asked = config(time_min="5", deadline="now+1hour").scheduler
    words = ignored_elsewhere(asked, cluster)
    assert words is not None
    assert words.startswith("scheduler.time_min and scheduler.deadline are ignored")
    assert ignored_elsewhere(asked, "slurm") is None
    assert ignored_elsewhere(config(time="5").scheduler, cluster) is None


# ---- what a job asks for -------------------------------------------------------------------


def test_a_job_asks_slurm_for_both(run: RunDir) -> None:
    settled = at_fixed_time(config(time="2:00:00", time_min="30", deadline="now+1day"), NOW)
    spec = job_spec(run, settled, lead_s=30)
    lines = render(spec, settled.scheduler, ["true"]).splitlines()
    assert "#SBATCH --time=02:00:00" in lines
    assert "#SBATCH --time-min=00:30:00" in lines
    assert f"#SBATCH --deadline={local_moment(NOW + 24 * HOUR)}" in lines


def test_the_warning_is_meant_for_the_shortest_job_that_may_come(run: RunDir) -> None:
    assert job_spec(run, config(time="60", time_min="2"), lead_s=600).signal_s == 60
    assert job_spec(run, config(time="60"), lead_s=600).signal_s == 660


def test_a_job_of_this_machine_has_neither(tmp_path: Path) -> None:
    local = make_run(tmp_path, cluster="local")
    spec = job_spec(local, config(time="60", time_min="2", deadline="now+1hour"), lead_s=30)
    assert (spec.time_s, spec.time_min_s, spec.deadline) == (3600, None, None)


@pytest.fixture
def own_script(run: RunDir) -> RunDir:
    """A run that was begun by sbatch of a user's own script."""
    run.script.write_text("#!/bin/bash\n")
    deadline = format_moment(NOW + 24 * HOUR)
    options = ["--time=02:00:00", "--time-min=00:30:00", f"--deadline={deadline}", "--mem=5"]
    write_json(run.script_options, options)
    return run


def test_the_jobs_of_a_users_script_ask_for_what_its_first_one_asked_for(
    own_script: RunDir,
) -> None:
    spec = job_spec(own_script, config(), lead_s=30)
    assert (spec.time_s, spec.time_min_s, spec.deadline) == (7200, 1800, NOW + 24 * HOUR)
    arguments = script_arguments(spec, config().scheduler, ())
    assert "--time-min=00:30:00" in arguments
    assert [a for a in arguments if a.startswith("--deadline")] == [
        f"--deadline={local_moment(NOW + 24 * HOUR)}"
    ]


def test_what_is_configured_wins_over_a_users_script(own_script: RunDir) -> None:
    spec = job_spec(own_script, config(time="60", deadline=format_moment(NOW)), lead_s=30)
    assert (spec.time_s, spec.time_min_s, spec.deadline) == (3600, 1800, NOW)


# ---- the job that a user's script got --------------------------------------------------------

JOB = """\
JobId=4 JobName=toy
   RunTime=00:00:01 TimeLimit=00:02:00 TimeMin=00:01:00
   StartTime=1795253748 EndTime=1795255548 Deadline=1795303800
   Partition=main AllocNode:Sid=localhost:4199
"""


def test_a_deadline_is_frozen_as_one_moment() -> None:
    options = frozen_options(slurm_text.parse_job(JOB), {})
    assert f"--deadline={format_moment(1795303800)}" in options
    assert "--time-min=00:01:00" in options
    none = frozen_options(slurm_text.parse_job(JOB.replace("1795303800", "N/A")), {})
    assert not [option for option in none if option.startswith("--deadline")]


SCRIPT = "#!/bin/bash\n#SBATCH --time=20 # of an hour\n#SBATCH --time-min=5\ntrain -t 7\n"


@pytest.mark.parametrize(
    ("line", "environ", "script", "limit"),
    [
        ("sbatch --parsable --time=10 --time-min=1 o.sh", {}, SCRIPT, "10"),
        ("sbatch --time 1-12 o.sh", {}, SCRIPT, "1-12"),
        ("sbatch -t 10:00 o.sh", {}, SCRIPT, "10:00"),
        ("sbatch -t10 --mem=1 -t 30 o.sh", {}, SCRIPT, "30"),
        ("sbatch --time-min=1 o.sh --time soon", {}, SCRIPT, "20"),
        ("sbatch o.sh", {"SBATCH_TIMELIMIT": "40"}, SCRIPT, "40"),
        ("", {}, SCRIPT, "20"),
        ("", {}, '#!/bin/sh\n#SBATCH -t "2:00:00"\n', "2:00:00"),
        ("sbatch o.sh", {}, "#!/bin/bash\ntrain --time=7\n", None),
    ],
)
def test_the_limit_that_was_asked_for_is_found_where_it_was_named(
    line: str, environ: dict[str, str], script: str, limit: str | None
) -> None:
    assert asked_limit(line, environ, script) == limit


@pytest.mark.parametrize(
    ("script", "line", "nodes"),
    [
        ("#SBATCH --nodes=2-4", "", "2-4"),
        ("#SBATCH -N 2-4  # some", "sbatch x.sh", "2-4"),
        ("#SBATCH --nodes=2-4", "sbatch -N3 x.sh", None),
        ("#SBATCH --nodes=2-4", "sbatch --nodes 3-8 x.sh", "3-8"),
        ("#SBATCH --nodes=2", "", None),
        ("echo --nodes=2-4", "", None),
    ],
)
def test_the_range_of_nodes_of_a_script_is_found_which_slurm_does_not_keep(
    script: str, line: str, nodes: str | None
) -> None:
    assert asked_nodes(script, lambda: line) == nodes


# ---- too late --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "hours", "late"),
    [
        ({"time": "60"}, 1.01, False),
        ({"time": "60"}, 0.99, True),
        ({"time": "60", "time_min": "30"}, 0.6, False),
        ({"time": "60", "time_min": "30"}, 0.4, True),
        ({}, 0.01, False),
        ({}, -0.01, True),
    ],
)
def test_a_job_is_too_late_when_even_a_short_one_could_not_end_before_the_deadline(
    run: RunDir, asked: dict[str, str], hours: float, late: bool
) -> None:
    settled = config(**asked, deadline=format_moment(NOW + hours * HOUR))
    found = too_late(job_spec(run, settled, lead_s=30), NOW)
    assert (found is not None) is late
    if found is not None:
        assert (found.kind, found.rule, found.cause.value) == ("stop", "expired", "expired")
        assert "that begins now could not end before the deadline, 2026-11-2" in found.reason


def test_without_a_deadline_nothing_is_too_late(run: RunDir) -> None:
    assert too_late(job_spec(run, config(time="60"), lead_s=30), NOW) is None


def test_a_driver_records_that_slurm_removed_a_job_for_its_deadline(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("sacct", "echo '7|DEADLINE|1:0|None assigned|100|100|90'")
    run = make_run(tmp_path / "runs", cluster="slurm", chain={"mode": "drive"})
    note_queued(run, "7", job_spec(run, config(time="60"), lead_s=30))
    over = drive(run, {"PATH": slurm.path}, every_s=1, interrupted=lambda: False)
    assert over is not None
    assert (
        over.reason == "the waiting job 7 could not end before its deadline, and Slurm removed it"
    )
    (decided,) = [record for link in read_chain(run) for record in link.all("decided")]
    assert (decided["decision"], decided["cause"], decided["rule"]) == ("stop", *["expired"] * 2)


def test_a_driver_submits_no_job_that_could_not_end_before_the_deadline(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.program("sbatch", "echo 8")
    past = {"time": "60", "deadline": format_moment(NOW - 400 * 86400)}
    run = make_run(tmp_path / "runs", cluster="slurm", chain={"mode": "drive"}, scheduler=past)
    end_link(add_link(run), "continue", "deadline", "the job's time was nearly over")
    over = drive(run, {"PATH": slurm.path}, every_s=1, interrupted=lambda: False)
    assert over is not None and over.cause.value == "expired"
    assert read_chain(run)[-1].last("decided")


# ---- what people are told --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "command"),
    [
        ({"deadline": "2026-11-22"}, "hpcresume resume toy --set scheduler.deadline="),
        ({}, "hpcresume resume toy --set scheduler.deadline=now+7days"),
    ],
)
def test_why_says_how_to_go_on_after_the_deadline(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: Said,
    asked: dict[str, str],
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs", cluster="slurm", scheduler=asked)
    end_link(add_link(run), "stop", "deadline", "no job could end in time", "expired")
    _, out, _ = said("why", "toy")
    assert out.startswith("toy was stopped at step 0: no job could end in time.")
    assert f"  {command}" in out.splitlines()


def test_a_submission_whose_first_job_would_be_too_late_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", slurm.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text("def train(session):\n    pass\n")
    (tmp_path / "toy.yaml").write_text("name: toy\ntrain: toy.py\nmax_steps: 9\n")
    argv = ["submit", "toy.yaml", "--cluster=slurm", "--time=60", "--deadline=now+50minutes"]
    code, _, err = said(*argv)
    assert code == 4
    assert "A job of 01:00:00 that begins now could not end before the deadline" in err
    assert not (tmp_path / "runs").exists()
