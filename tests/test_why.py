"""`hpcresume why`: a sentence that is true, its evidence, what to do next, and the history."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_run import (
    STATES,
    FakeSlurm,
    Said,
    add_link,
    complete,
    end_link,
    make_run,
    queue_job,
    training,
)
from oracle import ENVIRON, hpcresume
from slurm_cluster import SlurmCluster
from terminal import in_terminal

from hpcresume import files
from hpcresume.journal import Journal
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.driver_file import only_driver
from hpcresume.story import this_process, token_prefix


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs, found without being named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("HPCRESUME_RUNS", raising=False)
    return tmp_path / "runs"


def told(said: Said, *argv: str) -> dict[str, Any]:
    """What `why --json` says."""
    code, out, err = said("why", "--json", *argv)
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def ended(link: LinkDir, cause: str, detail: str = "", **more: Any) -> None:
    """The record of a link's end, as its supervisor writes it."""
    journal = Journal(link.journal, link=link.number, job="1")
    journal.write("ended", **{"cause": cause, "detail": detail, "seconds": 60.0, **more})
    journal.close()


def decided(link: LinkDir, decision: str, cause: str, reason: str, rule: str = "") -> None:
    numbers = {"links": 2, "hours": 0.5, "node_hours": 2.0, "idle_links": 2, "crashes": 1}
    journal = Journal(link.journal, link=link.number, job="1")
    journal.write(
        "decided", decision=decision, cause=cause, reason=reason, rule=rule, numbers=numbers
    )
    journal.close()


def failed(run: RunDir, cause: str, rule: str = "", detail: str = "", **config: Any) -> LinkDir:
    """A run whose only link ended so, which ended the chain."""
    link = add_link(run, job="12", nodes="gpu3")
    ended(link, cause, detail)
    decided(link, "stop", cause, f"{cause}, twice", rule)
    return link


# ---- every state ---------------------------------------------------------------------------

SENTENCES = {
    "complete": "toy is complete at step 0: 1 link, 0:00:01 of work.",
    "running": "toy is running at step 0: link 1 on gpu9: it trains.",
    "waiting": "toy waits at step 0: job 1 is queued.",
    "stopped": "toy was cancelled at step 0 by ada.",
    "failed": "toy has failed at step 0: it is the code.",
    "stalled": "toy is stalled at step 0: no job is queued and no decision is recorded; link 1 "
    "ended (unknown: nothing is known about its end).",
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_run_has_its_sentence(runs: Path, said: Said, state: str) -> None:
    run = make_run(runs)
    with STATES[state](run):
        sentence = told(said, "toy")["sentence"]
    here = f"on {this_process()['host']}:"
    assert sentence.replace(here, "on gpu9:") == SENTENCES[state]


@pytest.mark.parametrize("state", STATES)
def test_text_begins_with_the_sentence_or_with_where_the_run_lies(
    runs: Path, said: Said, state: str
) -> None:
    run = make_run(runs)
    with STATES[state](run):
        sentence = told(said, "toy")["sentence"]
        code, out, _ = said("why", "toy")
    first, *rest = out.splitlines()
    settled = state in ("complete", "stopped", "failed")
    assert code == 0
    assert first == sentence if settled else (first, rest[0]) == (str(run.path), sentence)


def test_run_without_any_link_is_told_to_be_started(runs: Path, said: Said) -> None:
    make_run(runs)
    document = told(said, "toy")
    assert "none has ever begun" in document["sentence"]
    assert document["next"] == [{"why": "start it", "command": "hpcresume resume toy"}]
    assert document["chain"] == []


def test_driven_run_between_its_links_waits_for_its_driver(runs: Path, said: Said) -> None:
    run = make_run(runs)
    journal = Journal(run.submissions, link=0, job=None)
    journal.write("submitted", after_link=0, way={"mode": "drive", "ahead": 0, "reasons": []})
    journal.close()
    end_link(add_link(run), "continue", "deadline", "the job's time was nearly over")
    assert told(said, "toy")["sentence"] == (
        "toy waits at step 0 for `hpcresume drive toy` to submit its next job."
    )


def test_run_that_is_not_there_is_not_found(runs: Path, said: Said) -> None:
    make_run(runs)
    code, out, err = said("why", "toi")
    assert (code, out) == (3, "")
    assert "toi" in err and "toy" in err


def test_no_run_at_all_is_not_found(runs: Path, said: Said) -> None:
    assert said("why")[0] == 3


def test_newest_unfinished_run_is_the_default(runs: Path, said: Said) -> None:
    make_run(runs, "one")
    complete(make_run(runs, "two"))
    assert told(said)["run"] == "one"


def test_link_that_lives_is_told_by_what_it_does_now(runs: Path, said: Said) -> None:
    run = make_run(runs)
    link = run.claim_link({**this_process(), "job": None, "foreground": True, "num_tasks": 1})
    assert "its ranks are starting" in told(said, "toy")["sentence"]
    with training(link) as journal:
        journal.write("restored", step=4, segments=[])
        assert "the checkpoint is restored" in told(said, "toy")["sentence"]
        journal.write("started", step=4, max_steps=10)
        assert "it trains" in told(said, "toy")["sentence"]
        journal.write("stop_asked", step=5, reason="SIGTERM")
        assert "it saves and leaves (SIGTERM)" in told(said, "toy")["sentence"]
    assert told(said, "toy")["chain"][0]["cause"] == "running"


def test_link_that_lives_after_others_is_not_confused_with_their_end(
    runs: Path, said: Said
) -> None:
    run = make_run(runs)
    ended(add_link(run), "user code", "ValueError: boom (step 3)")
    add_link(run, **this_process(), job=None, foreground=True)
    document = told(said, "toy")
    assert document["cause"] == "" and document["exit_code"] is None
    assert [line["cause"] for line in document["chain"]] == ["user code", "running"]


def test_another_number_of_ranks_than_before_is_told(runs: Path, said: Said) -> None:
    run = make_run(runs)
    ended(add_link(run, num_tasks=4), "deadline")
    assert "ranks" not in dict(told(said, "toy")["facts"])
    ended(add_link(run, num_tasks=4), "deadline")
    assert "ranks" not in dict(told(said, "toy")["facts"])
    add_link(run, **this_process(), job=None, foreground=True, num_tasks=2)
    assert dict(told(said, "toy")["facts"])["ranks"] == "2 ranks, after 4 in link 2"


# ---- the evidence --------------------------------------------------------------------------

TRACEBACK = """\
Traceback (most recent call last):
  File "{code}/train.py", line 41, in train
    loss.backward()
  File "/opt/venv/site-packages/torch/_tensor.py", line 9, in backward
    run()
ValueError: boom
"""


@pytest.fixture
def broken(runs: Path) -> RunDir:
    """A run that an exception of rank 3 ended in step 7, twice."""
    run = make_run(runs)
    run.code.mkdir()
    failure = {
        "type": "ValueError",
        "message": "boom",
        "step": 7,
        "rank": 3,
        "traceback": TRACEBACK.format(code=run.code),
        "exit_code": 1,
    }
    for number in (1, 2):
        link = add_link(run, job=str(10 + number), nodes="gpu3", num_tasks=4)
        link.rank_log(3).write_text("begin\n 10%|#\r 99%|###\nValueError: boom\n")
        detail = "ValueError: boom (rank 3, step 7)"
        ended(link, "user code", detail, failure=failure, exit_code=143)
    decided(link, "stop", "user code", "the same exception twice", "same_exception")
    return run


def test_failure_is_told_with_cause_step_rank_node_job_exit_code_and_log(
    broken: RunDir, said: Said
) -> None:
    document = told(said, "toy")
    known = {name: document[name] for name in ("cause", "rule", "failed_step", "rank", "link")}
    assert known == {
        "cause": "user code",
        "rule": "same_exception",
        "failed_step": 7,
        "rank": 3,
        "link": 2,
    }
    assert (document["job"], document["node"], document["exit_code"]) == ("12", "gpu3", 143)
    assert document["log"] == str(broken.link(2).rank_log(3))
    assert document["log_lines"] == ["begin", " 99%|###", "ValueError: boom"]


def test_exception_is_placed_at_the_deepest_line_of_the_runs_own_code(
    broken: RunDir, said: Said
) -> None:
    assert told(said, "toy")["facts"]["at"] == f"{broken.code}/train.py, line 41"


def test_numbers_behind_the_decision_are_told(broken: RunDir, said: Said) -> None:
    used = told(said, "toy")["facts"]["used up"]
    assert used == "2 links · 0:30:00 · 2 node-hours · 2 without a new step · 1 crashed"


def test_end_that_slurm_alone_knows_is_asked_for(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    slurm.program("sacct", "echo '1|NODE_FAIL|0:0|gpu7|1795254439|1795254441|1795254428'")
    add_link(make_run(runs, cluster="slurm"), nodes="gpu7")
    document = told(said, "toy")
    assert document["cause"] == "node failure"
    assert document["state"] == "stalled" and "job 1: NODE_FAIL" in document["sentence"]


def queue(path: Path, *jobs: str, link: int) -> None:
    """What whoever queues jobs records."""
    journal = Journal(path, link=link, job=None)
    for job in jobs:
        journal.write("queued", queued_job=job, after_link=0)
    journal.close()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's clients: no job is left, and the accounting knows of four that have died."""
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    rows = [f"{job}|FAILED|3:0|gpu7|1795254439|1795254441|1795254428" for job in (1, 2, 4)]
    rows.append("3|NODE_FAIL|0:0|gpu8|1795254439|1795254441|1795254428")
    slurm.program("sacct", "\n".join(f"echo '{row}'" for row in rows))
    return slurm


def test_jobs_that_died_before_their_links_began_are_told_with_slurms_words(
    runs: Path, said: Said, asked: FakeSlurm
) -> None:
    run = make_run(runs, cluster="slurm")
    queue(run.submissions, "1", link=0)
    link = add_link(run, job="1")
    queue(link.journal, "2", "3", "4", link=1)
    document = told(said, "toy")
    assert document["state"] == "stalled"
    assert document["sentence"].endswith(
        "; link 1 ended (killed: job 1 failed (exit code 3)); jobs 2, 3, 4 ended before their "
        "links began (FAILED, exit code 3; NODE_FAIL)."
    )


def test_first_job_that_died_before_its_link_began_is_told(
    runs: Path, said: Said, asked: FakeSlurm
) -> None:
    queue(make_run(runs, cluster="slurm").submissions, "1", link=0)
    assert told(said, "toy")["sentence"] == (
        "toy is stalled at step 0: no job of it is queued, and none has ever begun; job 1 ended "
        "before its link began (FAILED, exit code 3)."
    )


def test_jobs_of_an_earlier_submission_are_not_told_again(
    runs: Path, said: Said, asked: FakeSlurm
) -> None:
    run = make_run(runs, cluster="slurm")
    queue(run.submissions, "2", link=0)
    journal = Journal(run.submissions, link=0, job=None)
    journal.write("submitted", after_link=0, token="u", by="ada", host="login1")
    journal.close()
    queue(run.submissions, "4", link=0)
    assert "; job 4 ended before" in told(said, "toy")["sentence"]


def test_reason_of_slurm_is_told_in_words(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(runs, cluster="slurm")
    token = token_prefix(run.identify()["id"])
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    slurm.program("squeue", f"echo '7|PENDING|QOSMaxJobsPerUserLimit||N/A|N/A|{token}1'")
    document = told(said, "toy")
    assert document["sentence"] == (
        "toy waits at step 0: job 7 is queued because you run as many jobs as this QOS allows; "
        "it starts when one ends (QOSMaxJobsPerUserLimit)."
    )
    assert document["next"][0]["command"] == "squeue --start -j 7"


def test_slurm_that_does_not_answer_is_said_and_nothing_is_made_up(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    slurm.program("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    add_link(make_run(runs, cluster="slurm"))
    sentence = told(said, "toy")["sentence"]
    assert "is not known" in sentence and "Unable to contact slurm controller" in sentence


def test_settled_run_is_told_without_asking_anybody(
    runs: Path, said: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    for name in ("squeue", "sacct", "scontrol"):
        slurm.program(name, f"echo {name} >> {shlex.quote(str(tmp_path / 'asked'))}")
    failed(make_run(runs, cluster="slurm"), "user code")
    assert told(said, "toy")["state"] == "failed"
    assert not (tmp_path / "asked").exists()


FAILING = """\
import torch


def train(session):
    model = torch.nn.Linear(2, 1)
    session.register(model=model)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2))
    for _ in session.steps(session.loader(data, batch_size=2)):
        if session.global_step == 2:
            raise KeyError("label")
"""


def test_real_link_leaves_all_the_evidence_behind(runs: Path, said: Said) -> None:
    (runs.parent / "toy.py").write_text(FAILING)
    config = {"max_steps": 4, "chain": {"max_links": 1}, "checkpoint": {"steps": 1}}
    (runs.parent / "toy.yaml").write_text(json.dumps({"train": "toy.py", "name": "toy", **config}))
    submitted = subprocess.run(
        [sys.executable, "-m", "hpcresume", "submit", "toy.yaml", "--cluster", "local"],
        cwd=runs.parent,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert submitted.returncode == 8, submitted.stderr
    document = told(said, "toy")
    # Which step: the last save may still have been under way.
    assert document["sentence"].startswith("toy was stopped at step ")
    assert document["sentence"].endswith(": 1 link is used up (max_links: 1).")
    assert (document["cause"], document["rule"]) == ("user code", "max_links")
    assert (document["failed_step"], document["exit_code"]) == (3, 1)
    assert document["facts"]["at"] == f"{runs}/toy/code/toy.py, line 10"
    assert document["facts"]["used up"].startswith("1 link · 0:0")
    assert document["log_lines"][-1] == "KeyError: 'label'"
    assert document["next"][0]["command"] == "hpcresume resume toy --set chain.max_links=2"


FILLING = FAILING.replace('raise KeyError("label")', "bytearray(4_000_000_000)")


@pytest.mark.xdist_group("slurm")
def test_memory_limit_of_real_jobs_ends_a_chain_and_is_told(
    slurm: SlurmCluster, runs: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not slurm.has_cgroups:
        pytest.skip("no writable cgroups (v1): Slurm enforces no memory limit")
    (runs.parent / "toy.py").write_text(FILLING)
    wanted = {"time": "00:05:00", "cluster": "slurm", "mem": "1500M"}
    config = {"train": "toy.py", "name": "toy", "max_steps": 4, "scheduler": wanted}
    (runs.parent / "toy.yaml").write_text(json.dumps(config))
    submitted = hpcresume("submit", "toy.yaml", cwd=runs.parent, **slurm.env)
    assert submitted.returncode == 0, submitted.stderr
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    deadline = time.monotonic() + 200
    while (document := told(said, "toy"))["state"] != "failed":
        assert time.monotonic() < deadline, document
        time.sleep(1)
    assert (document["cause"], document["rule"]) == ("out of host memory", "same_memory")
    assert [line["cause"] for line in document["chain"]] == ["out of host memory"] * 2
    assert document["next"][0]["command"] == "hpcresume resume toy --set scheduler.mem=3000M"


# ---- what to do next -----------------------------------------------------------------------

NEXT = {
    "out of host memory": "hpcresume resume toy --set scheduler.mem=96G",
    "out of GPU memory": "hpcresume resume toy",
    "non-finite": "hpcresume resume toy --set lr=0.05",
    "expired": "hpcresume resume toy --set scheduler.deadline=now+7days",
    "time limit": "hpcresume resume toy --time HH:MM:SS",
    "cancelled": "hpcresume resume toy",
    "node failure": "hpcresume resume toy",
    "storage": "hpcresume resume toy",
    "killed": "hpcresume resume toy",
}


@pytest.mark.parametrize("cause", NEXT)
def test_next_step_is_the_exact_command(runs: Path, said: Said, cause: str) -> None:
    run = make_run(runs, scheduler={"mem": "48G"}, args={"lr": 0.1})
    failed(run, cause)
    assert told(said, "toy")["next"][-1]["command"] == NEXT[cause]


@pytest.mark.parametrize(
    ("rule", "command"),
    [
        ("max_links", "hpcresume resume toy --set chain.max_links=8"),
        ("max_hours", "hpcresume resume toy --set chain.max_hours=3"),
        ("max_node_hours", "hpcresume resume toy --set chain.max_node_hours=24"),
    ],
)
def test_budget_that_is_used_up_is_answered_with_how_to_raise_it(
    runs: Path, said: Said, rule: str, command: str
) -> None:
    chain = {"max_links": 4, "max_hours": 1.5, "max_node_hours": 12}
    failed(make_run(runs, chain=chain), "deadline", rule)
    document = told(said, "toy")
    assert document["next"] == [{"why": "allow more", "command": command}]
    assert document["sentence"].startswith("toy was stopped at step 0: ")


def test_run_that_lies_elsewhere_is_named_by_its_path_in_commands(
    runs: Path, said: Said, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "my runs")
    failed(run, "cancelled")
    (step,) = told(said, str(run.path))["next"]
    assert shlex.split(step["command"]) == ["hpcresume", "resume", str(run.path)]


def test_committed_step_without_a_checkpoint_is_no_case_for_resume(runs: Path, said: Said) -> None:
    run = make_run(runs)
    link = add_link(run)
    with training(link) as journal:
        journal.write("saved", step=5, seconds=0.1)
    end_link(link, "stop", "user code", "boom")
    document = told(said, "toy")
    assert "step 5 was committed" in document["facts"]["saved"]
    assert [step["command"] for step in document["next"]] == [""]


# ---- damaged, old and new ------------------------------------------------------------------


def test_torn_and_foreign_lines_hide_nothing(runs: Path, said: Said) -> None:
    link = failed(make_run(runs), "user code", detail="ValueError: boom (step 3)")
    with link.journal.open("ab") as journal:
        journal.write(b'{"kind": "decided", "decision": "fin\n\xff\x00\n[1]\n{"kind": 3}\n{"v": 1')
    document = told(said, "toy")
    assert (document["state"], document["cause"]) == ("failed", "user code")


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "decided", "decision": "stop", "reason": 3, "rule": [], "numbers": "many"},
        {"kind": "decided", "decision": "stop", "numbers": {"links": "x", "hours": None}},
        {"kind": "ended", "cause": ["x"], "failure": {"step": []}, "nodes": 3, "seconds": "x"},
        {"kind": "stop_asked"},
        {"kind": "queued"},
        {"kind": "ended", "how": "hung", "rank": "x"},
    ],
    ids=str,
)
def test_record_of_odd_values_is_no_error(runs: Path, said: Said, record: dict[str, Any]) -> None:
    link = failed(make_run(runs), "killed")
    with link.journal.open("ab") as journal:
        journal.write(files.to_json({"v": 1, "t": 2e9, **record}))
    code, out, err = said("why", "toy")
    assert (code, err) == (0, "") and out.startswith("toy ")


@pytest.mark.parametrize("claim", [b"", b"[]", b'{"job": [], "nodes": 3, "num_tasks": "x"}'])
def test_claim_of_odd_values_is_no_error(runs: Path, said: Said, claim: bytes) -> None:
    link = failed(make_run(runs), "killed")
    link.claim.write_bytes(claim)
    assert said("why", "toy")[0] == 0


def test_journal_of_an_older_version_is_understood(runs: Path, said: Said) -> None:
    run = make_run(runs)
    end_link(add_link(run), "stop", "exception", "it is the code")
    document = told(said, "toy")
    assert (document["cause"], document["rule"]) == ("user code", "")


# ---- as text -------------------------------------------------------------------------------


def chain_of(run: RunDir, *causes: str) -> None:
    """Links that ended so, each ten steps further."""
    for number, cause in enumerate(causes):
        link = add_link(run, step=10 * number, job=str(100 + number), nodes=f"gpu{number % 2}")
        with training(link) as journal:
            journal.write("saved", step=10 * (number + 1), seconds=0.1)
        ended(link, cause)
    decided(link, "stop", causes[-1], f"{causes[-1]}, twice")


def table_of(text: str) -> list[str]:
    lines = text.splitlines()
    return lines[next(n for n, line in enumerate(lines) if line.startswith("LINK")) + 1 :]


def test_links_that_ended_alike_are_one_line(runs: Path, said: Said) -> None:
    chain_of(make_run(runs), *["deadline"] * 40, "preempted", "deadline", "deadline", "killed")
    rows = table_of(said("why", "toy")[1])
    assert [" ".join(row.split()) for row in rows] == [
        "1–40 100–139 2 nodes 0 → 400 0:40:00 deadline ×40",
        "41 140 gpu0 400 → 410 0:01:00 preempted",
        "42 141 gpu1 410 → 420 0:01:00 deadline",
        "43 142 gpu0 420 → 430 0:01:00 deadline",
        "44 143 gpu1 430 → 440 0:01:00 killed",
    ]


def test_json_folds_nothing(runs: Path, said: Said) -> None:
    chain_of(make_run(runs), *["deadline"] * 40)
    assert len(told(said, "toy")["chain"]) == 40


def test_json_is_one_document_with_its_version_and_sorted_keys(runs: Path, said: Said) -> None:
    failed(make_run(runs), "killed")
    out = said("why", "--json", "toy")[1]
    document = json.loads(out)
    assert document["schema_version"] == 1
    assert out == json.dumps(document, indent=2, sort_keys=True) + "\n"


def test_pipe_gets_whole_lines_without_colours(broken: RunDir, said: Said) -> None:
    broken.link(2).rank_log(3).write_text("x" * 500 + "\n")
    out = said("why", "toy")[1]
    assert "\x1b" not in out and "x" * 500 in out


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_but_a_command_or_a_path_is_wider_than_the_terminal(
    broken: RunDir, runs: Path, width: int
) -> None:
    broken.link(2).rank_log(3).write_text("loss 2.0 " * 40 + "\n")
    text = in_terminal("why", "toy", cwd=runs.parent, width=width, NO_COLOR="1")
    prose = [line for line in text.splitlines() if str(runs) not in line]
    assert max(map(len, prose)) <= width
    assert any("…" in line for line in prose)


def test_terminal_is_given_colours_unless_they_are_not_wanted(broken: RunDir, runs: Path) -> None:
    assert "\x1b[" in in_terminal("why", "toy", cwd=runs.parent)
    assert "\x1b[" not in in_terminal("why", "toy", cwd=runs.parent, NO_COLOR="1")


def test_message_of_an_exception_cannot_colour_the_terminal(runs: Path, said: Said) -> None:
    failed(make_run(runs), "killed", detail="\x1b[31mred\x1b[0m\n\x07next line")
    out = said("why", "toy")[1]
    assert "?[31mred?[0m ?next line" in out and "\x1b" not in out


# ---- at once -------------------------------------------------------------------------------


def test_why_imports_no_torch(broken: RunDir, runs: Path) -> None:
    probe = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, 'rich' in sys.modules))\n"
        "from hpcresume.cli import main\n"
        "main(['why', 'toy'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=runs.parent,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_why_says_something_before_a_slow_squeue_has_answered(runs: Path, tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path)
    fifo = tmp_path / "answer"
    os.mkfifo(fifo)
    slurm.program("squeue", f"read answer < {shlex.quote(str(fifo))}")
    run = make_run(runs, cluster="slurm")
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "why", "toy"],
        cwd=runs.parent,
        env={**ENVIRON, "PATH": slurm.path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        # squeue answers only after this line was read: it cannot have waited for it.
        assert process.stdout.readline() == f"{run.path}\n"
        with fifo.open("w") as answer:
            answer.write("\n")
        assert "stalled" in process.stdout.read()


def test_local_jobs_that_wait_for_each_other_are_named(runs: Path, said: Said) -> None:
    run = make_run(runs)
    first, second = queue_job(run), queue_job(run)
    with only_driver(run):
        assert told(said, "toy")["facts"]["queued"] == f"job {first}, job {second}"
