"""The chain on a real Slurm: jobs that are really cut, and the same bytes at the end.

Jobs have a limit of one minute, the shortest that Slurm knows; a configured lead time makes them
leave after some seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hanging import hanging, standing, stands
from oracle import (
    ENVIRON,
    assert_equivalent,
    fingerprint,
    hpcresume,
    merged,
    project,
    train_uncut,
)
from slurm_cluster import SlurmCluster

from hpcresume.config import parse_moment
from hpcresume.journal import LinkRecords, read_chain
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.driver_file import driver_alive

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(300)]
REPOSITORY = Path(__file__).parents[1]
#: Each link trains for some seconds: 60 s of limit less this lead time.
LEAD_S = 48
SHORT = {
    # More than two links have time for.
    "args": {"pause_s": 0.25},
    # A start that outlasts the few seconds of a link, on a busy machine, is not to end the chain.
    "chain": {"lead_s": LEAD_S, "no_progress_links": 10},
    "scheduler": {"time": "00:01:00", "cluster": "slurm"},
}


class Chain:
    """A run on the test cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path, name: str = "run") -> None:
        self.cluster = cluster
        self.folder = folder
        self.run = RunDir(folder / "runs" / name)

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return hpcresume(*argv, cwd=self.folder, **self.cluster.env)

    def submit(self, *argv: str) -> Chain:
        done = self.command("submit", *argv)
        assert done.returncode == 0, done.stdout + done.stderr
        return self

    def wait(self, what: Callable[[list[LinkRecords]], Any], timeout: float = 200) -> Any:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = what(read_chain(self.run))
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"timed out\n{self.story()}")

    def started(self, number: int = 1, step: int = 0) -> LinkRecords:
        """A link, once it trains and has committed a step."""

        def look(links: list[LinkRecords]) -> LinkRecords | None:
            for link in links:
                if link.number >= number and link.last("started"):
                    saved = link.last("saved")
                    if not step or (saved and int(saved["step"]) >= step):
                        return link
            return None

        return self.wait(look)

    def stands(self) -> LinkRecords:
        """The link whose training stands still; see `standing`."""
        found: LinkRecords = self.wait(lambda links: stands(self.run) and links[-1])
        return found

    def completed(self, timeout: float = 200) -> None:
        self.wait(lambda links: any(link.last("completed") for link in links), timeout)
        self.nothing_queued()

    def ended(self, timeout: float = 60) -> dict[str, Any]:
        """The record of the decision that ended the chain."""

        def look(links: list[LinkRecords]) -> Any:
            decided = [r for link in links for r in link.all("decided")]
            return next((r for r in decided if r["decision"] == "stop"), None)

        found = self.wait(look, timeout)
        self.nothing_queued()
        return dict(found)

    def nothing_queued(self) -> None:
        deadline = time.monotonic() + 40
        while mine := [j for j in self.cluster.queue() if j["name"] == self.run.name]:
            assert time.monotonic() < deadline, f"left in the queue: {mine}\n{self.story()}"
            time.sleep(0.2)

    def status(self) -> dict[str, Any]:
        done = self.command("status", self.run.name, "--json")
        return dict(json.loads(done.stdout)["runs"][0])

    def story(self) -> str:
        hidden = ("v", "kind", "link", "traceback")
        lines = [
            f"{link.number}: {r['kind']} { ({k: v for k, v in r.items() if k not in hidden}) }"
            for link in read_chain(self.run)
            for r in link.records
            if r["kind"] != "saved"
        ]
        for path in sorted(self.run.jobs.glob("*.log")):
            lines.append(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}")
        return "\n".join([*lines, str(self.cluster.queue())])


@pytest.fixture
def cluster(slurm: SlurmCluster) -> Iterator[SlurmCluster]:
    yield slurm
    slurm.cancel_all()
    for node in slurm.nodes:
        slurm.node_resume(node)
    slurm.wait_idle()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "it's a project"


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_uncut(tmp_path_factory.mktemp("uncut"))


def new_chain(cluster: SlurmCluster, folder: Path, **changes: Any) -> Chain:
    project(folder, **merged(SHORT, changes))
    return Chain(cluster, folder)


# ---- the main job --------------------------------------------------------------------------

QUICK = ("--set", "max_steps=130", "--set", "args.batch_size=4")


def quickstart_uncut(folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py", "--config", "configs/quickstart.yaml"]
        + ["--runs", str(folder), *QUICK],
        env=ENVIRON,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return fingerprint(RunDir(folder / "quickstart"))


def cut_short(folder: Path) -> Path:
    """A copy of the quickstart whose steps last long enough for three jobs."""
    (folder / "configs").mkdir(parents=True)
    (folder / "examples").mkdir()
    text = (REPOSITORY / "examples" / "quickstart.py").read_text()
    slower = text.replace(
        "    for batch in session.steps(loader):\n",
        "    for batch in session.steps(loader):\n        __import__('time').sleep(0.4)\n",
    )
    assert slower != text
    (folder / "examples" / "quickstart.py").write_text(slower)
    config = (REPOSITORY / "configs" / "quickstart.yaml").read_text()
    (folder / "configs" / "quickstart.yaml").write_text(config)
    return folder


def check_quickstart(chain: Chain, expected: dict[str, Any]) -> None:
    chain.completed()
    jobs = [str(link.claim["job"]) for link in read_chain(chain.run)]
    assert len(jobs) >= 3, chain.story()
    assert len(set(jobs)) == len(jobs)
    assert json.loads(chain.run.trainer_state.read_text())["completed"] is True
    for job in jobs:
        wait_for_row(chain.cluster, job, "COMPLETED")
    assert_equivalent(chain.run, expected)


def wait_for_row(cluster: SlurmCluster, job: str, state: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        rows = cluster.sacct(job)
        if rows and rows[0]["State"].startswith(state):
            return
        assert time.monotonic() < deadline, rows
        time.sleep(0.3)


def test_the_quickstart_is_chained_over_three_jobs_and_bit_identical_to_the_uncut_run(
    cluster: SlurmCluster, folder: Path, tmp_path: Path
) -> None:
    chain = Chain(cluster, cut_short(folder), "quickstart")
    # A link has 25 s: no more than 60 steps, and some even where its start takes half of that.
    chain.submit("--time=00:01:00", "--cluster=slurm", *QUICK, "--set", "chain.lead_s=35")
    check_quickstart(chain, quickstart_uncut(tmp_path / "uncut"))


def test_an_ordinary_user_gets_the_same_bytes(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any]
) -> None:
    python, path = ordinary_python(cluster.user)
    work = project(cluster.home / "a project", **SHORT)
    owned_by(work, cluster.user)
    argv = [python, "-m", "hpcresume", "submit"]
    environ = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HPCRESUME_SITE": os.devnull}
    setting = [f"{name}={value}" for name, value in environ.items()]
    shell = ["env", "-C", str(work), *setting]
    cluster.run(*shell, *argv, user=cluster.user)
    chain = Chain(cluster, work)
    chain.completed()
    assert len(read_chain(chain.run)) >= 3, chain.story()
    assert {j["User"] for j in cluster.sacct(1, "User") if j["User"]}
    assert_equivalent(chain.run, uncut)


def ordinary_python(user: str) -> tuple[str, str]:
    """A Python that an ordinary user may execute, and its path to our packages."""
    site = next(p for p in sys.path if p.endswith("site-packages"))
    path = f"{REPOSITORY}:{site}"
    version = f"python3.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}"):
        done = subprocess.run(
            ["env", "-i", f"PYTHONPATH={path}", python, "-c", "import hpcresume.session"],
            user=user,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return python, path
    pytest.skip(f"no {version} that {user} may execute: apt-get install -y python3")


def owned_by(folder: Path, user: str) -> None:
    account = pwd.getpwnam(user)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, account.pw_uid, account.pw_gid)


# ---- whatever kills a link -------------------------------------------------------------------


def kill_step(chain: Chain, link: LinkRecords) -> None:
    chain.cluster.run("scancel", "--signal=KILL", f"{link.claim['job']}.0")


def kill_rank(chain: Chain, link: LinkRecords) -> None:
    pattern = f"hpcresume rank {chain.run.path} --link {link.number}"
    found = subprocess.run(
        ["pgrep", "-f", re.escape(pattern)], capture_output=True, text=True, check=False
    )
    ranks = []
    for pid in map(int, found.stdout.split()):
        # What a rank is about to start has its words for a moment, and srun has them always.
        with contextlib.suppress(OSError):
            if "srun" not in Path(f"/proc/{pid}/comm").read_text():
                ranks.append(pid)
    assert ranks
    os.kill(ranks[0], signal.SIGKILL)


def kill_supervisor(chain: Chain, link: LinkRecords) -> None:
    os.kill(int(link.claim["pid"]), signal.SIGKILL)


def set_node_down(chain: Chain, link: LinkRecords) -> None:
    chain.cluster.node_down(str(link.claim["nodes"]))


@pytest.mark.parametrize("cut", [kill_step, kill_rank, kill_supervisor, set_node_down])
def test_a_chain_goes_on_by_itself_and_ends_with_the_same_bytes_after(
    cluster: SlurmCluster,
    folder: Path,
    uncut: dict[str, Any],
    cut: Callable[[Chain, LinkRecords], None],
) -> None:
    changes = merged(standing(folder), {"chain": {"lead_s": 5}, "args": {"pause_s": 0}})
    chain = new_chain(cluster, folder, **changes).submit()
    cut(chain, chain.stands())
    chain.completed()
    links = read_chain(chain.run)
    assert len(links) >= 2, chain.story()
    assert_equivalent(chain.run, uncut)


def test_a_link_that_dies_before_its_first_line_is_survived_by_the_spare_one(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any], tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    # The second job that starts has no link.
    setup = [f"echo >>'{jobs}'", f"[ $(wc -l <'{jobs}') = 2 ] && exit 3", "true"]
    chain = new_chain(cluster, folder, scheduler={"setup": setup}).submit()
    chain.completed()
    links = read_chain(chain.run)
    first, second = links[0].claim["job"], links[1].claim["job"]
    assert int(second) == int(first) + 2, "the job between them died before it could claim"
    assert_equivalent(chain.run, uncut)


def test_ranks_that_hang_print_their_stacks_and_the_chain_goes_on(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any]
) -> None:
    changes = merged(hanging(folder, once=True), {"chain": {"lead_s": 5}})
    chain = new_chain(cluster, folder, **changes).submit("--set=args.pause_s=0")
    chain.completed()
    first, second = read_chain(chain.run)
    assert first.all("ended")[-1]["cause"] == "hang", chain.story()
    assert 'hanging.py", line' in chain.run.link(1).rank_log(0).read_text()
    assert second.last("restored")["step"] == 18
    assert_equivalent(chain.run, uncut)


def test_two_ranks_on_two_nodes_give_the_same_bytes_after_a_cut(
    cluster: SlurmCluster, folder: Path
) -> None:
    nodes = {"scheduler": {"nodes": 2}}
    whole = new_chain(cluster, folder / "whole", chain={"lead_s": 0}, **nodes)
    whole.run = RunDir(folder / "whole" / "runs" / "whole")
    whole.submit("--name=whole", "--set=args.pause_s=0")
    changes = merged(standing(folder / "cut"), {"chain": {"lead_s": 44}, **nodes})
    cut = new_chain(cluster, folder / "cut", **changes).submit()
    kill_rank(cut, cut.stands())
    whole.completed()
    cut.completed()
    assert len(read_chain(whole.run)) == 1
    assert len(read_chain(cut.run)) >= 3, cut.story()
    assert_equivalent(cut.run, fingerprint(whole.run))


# ---- the end of a chain ----------------------------------------------------------------------


def test_scancel_of_the_running_link_ends_the_chain_and_status_says_who(
    cluster: SlurmCluster, folder: Path
) -> None:
    chain = new_chain(cluster, folder, chain={"lead_s": 5}).submit()
    cluster.run("scancel", str(chain.started(step=9).claim["job"]))
    assert "cancelled by root" in chain.ended()["reason"]
    status = chain.status()
    assert (status["state"], status["queued"]) == ("stopped", [])
    assert "cancelled by root" in status["why"]
    assert status["checkpoint_step"] >= 9


def test_scancel_of_the_successor_alone_ends_the_chain_after_this_link(
    cluster: SlurmCluster, folder: Path
) -> None:
    # More steps than the link has time for, and time enough to be looked at.
    changes = {"args": {"pause_s": 0.35}, "chain": {"lead_s": 30}}
    chain = new_chain(cluster, folder, **changes).submit()
    chain.started(step=9)
    waiting = chain.status()["queued"]
    assert len(waiting) == 2
    cluster.run("scancel", waiting[0])
    reason = chain.ended(120)["reason"]
    assert waiting[0] in reason
    assert "cancelled by root" in reason
    links = read_chain(chain.run)
    # Where Slurm tells it too late for this link, the next one does nothing else than to end it.
    assert [link.number for link in links if link.last("started")] == [1], chain.story()
    assert links[0].last("stop_asked")["reason"].startswith("deadline")
    assert chain.status()["state"] == "stopped"


def test_hpcresume_cancel_ends_the_chain_and_resume_goes_on_with_it(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any]
) -> None:
    chain = new_chain(cluster, folder, chain={"lead_s": 30}).submit()
    chain.started(step=9)
    done = chain.command("cancel", "run", "--yes")
    assert done.returncode == 0, done.stderr
    chain.ended()
    status = chain.status()
    assert status["state"] == "stopped"
    assert "cancelled by root" in status["why"]
    assert chain.command("resume", "run").returncode == 0
    chain.completed()
    assert_equivalent(chain.run, uncut)


def test_cancel_with_save_leaves_the_running_job_its_time_and_the_waiting_ones_go(
    cluster: SlurmCluster, folder: Path
) -> None:
    changes = {"args": {"pause_s": 0.5}, "chain": {"lead_s": 5}, "checkpoint": {"steps": 1000}}
    chain = new_chain(cluster, folder, **changes).submit()
    job = str(chain.started().claim["job"])
    chain.wait(lambda links: len(chain.status()["queued"]) == 2)
    done = chain.command("cancel", "run", "--yes", "--save")
    assert done.returncode == 0, done.stderr
    reason = chain.ended()["reason"]
    saved = read_chain(chain.run)[0].last("saved")
    assert saved is not None, chain.story()
    assert reason == f"cancelled by root (hpcresume cancel), saved at step {saved['step']}"
    # It ended by itself: for Slurm nobody has cancelled it.
    wait_for_row(cluster, job, "COMPLETED")


def test_without_accounting_a_cancelled_chain_ends_with_user_unknown(folder: Path) -> None:
    with SlurmCluster(accounting=False) as plain:
        chain = new_chain(plain, folder, chain={"lead_s": 5}).submit()
        plain.run("scancel", str(chain.started(step=9).claim["job"]))
        assert "user unknown" in chain.ended()["reason"]
        assert "user unknown" in chain.status()["why"]


# ---- other ways to begin and to go on --------------------------------------------------------


@pytest.mark.parametrize("mode", ["resubmit", "requeue"])
def test_the_other_ways_chain_as_well(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any], mode: str
) -> None:
    chain = new_chain(cluster, folder, chain={"mode": mode, "lead_s": 40}).submit()
    chain.completed()
    links = read_chain(chain.run)
    assert len(links) >= 2, chain.story()
    jobs = {link.claim["job"] for link in links}
    assert len(jobs) == (1 if mode == "requeue" else len(links))
    assert_equivalent(chain.run, uncut)


def test_sbatch_of_a_users_script_chains_with_the_options_of_the_command_line(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any]
) -> None:
    chain = new_chain(cluster, folder)
    text = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    text = text.replace("configs/quickstart.yaml", "hpcresume.yaml")
    text = text.replace("exec hpcresume", f"exec {sys.executable} -m hpcresume")
    (folder / "train.sbatch").write_text(text)
    options = ("-p", "high", "--time=00:01:00", "--job-name=run", "--mem=1000")
    environ = {**ENVIRON, **cluster.env}
    for expected in (0, 9):
        done = subprocess.run(
            ["sbatch", "--parsable", *options, "train.sbatch"],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
        job = done.stdout.strip()
        if not expected:
            chain.wait(lambda links: any(link.last("started") for link in links))
            continue
        # A second sbatch of a run that is live leaves at once, with 9.
        wait_for_row(cluster, job, "FAILED")
        assert cluster.sacct(job)[0]["ExitCode"] == "9:0"
    chain.completed()
    jobs = [str(link.claim["job"]) for link in read_chain(chain.run)]
    assert len(jobs) >= 3, chain.story()
    for job in jobs:
        wait_for_row(cluster, job, "COMPLETED")
        row = cluster.sacct(job, "Partition", "TimelimitRaw", "ReqMem")[0]
        assert (row["Partition"], row["TimelimitRaw"]) == ("high", "1"), row
        assert row["ReqMem"].startswith("1000M"), row
    assert_equivalent(chain.run, uncut)


def test_a_limit_above_the_partitions_is_refused_at_submit(
    cluster: SlurmCluster, folder: Path
) -> None:
    chain = new_chain(cluster, folder)
    done = chain.command("submit", "--time=03:00:00")
    assert done.returncode == 4
    assert "above the limit of partition main" in done.stderr
    assert not chain.run.path.exists()


def test_slurms_refusal_is_shown_verbatim(cluster: SlurmCluster, folder: Path) -> None:
    chain = new_chain(cluster, folder)
    done = chain.command("submit", "-p", "nowhere")
    assert done.returncode in (4, 6), done.stderr
    assert "nowhere" in done.stderr
    done = chain.command("submit", "--name=two", "--sbatch", "constraint=martian")
    assert done.returncode in (4, 6), done.stderr


# ---- queue shaping -----------------------------------------------------------------------------


@pytest.fixture
def soon_taken(cluster: SlurmCluster) -> Iterator[Callable[[], None]]:
    """All nodes are reserved for others in four minutes: only jobs that end before may start.

    What is given takes the reservation back.
    """
    nodes, owner = f"nodes={','.join(cluster.nodes)}", f"users={cluster.user}"
    about = ("reservationname=soon", "starttime=now+4minutes", "duration=60", nodes, owner)
    cluster.run("scontrol", "create", "reservation", *about)
    free = functools.partial(cluster.run, "scontrol", "delete", "reservationname=soon", check=False)
    yield lambda: str(free()) and None
    free()


SLOWER = {"args": {"pause_s": 0.5}, "chain": {"lead_s": 40}}


def test_a_link_whose_limit_slurm_has_shortened_saves_in_time(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any], soon_taken: Callable[[], None]
) -> None:
    chain = new_chain(cluster, folder, **SLOWER)
    chain.submit("--time=00:30:00", "--time-min=00:01:00")
    first = chain.wait(lambda links: links and links[0].last("decided") and links[0])
    given_s = json.loads(chain.run.link(1).deadline.read_text())["end"] - first.claim["t"]
    assert given_s < 245, "Slurm gave all that was asked for"
    asked = first.last("stop_asked")
    assert asked["reason"].startswith("deadline"), chain.story()
    assert first.last("saved")["step"] == asked["step"] > 0
    assert first.last("decided")["decision"] == "continue"
    limits = cluster.run("squeue", "-h", "--name=run", "--states=PENDING", "--format=%l")
    assert set(limits.split()) == {"30:00"}, "the next jobs ask for all of it again"
    soon_taken()
    chain.completed()
    assert len(read_chain(chain.run)) >= 2
    assert_equivalent(chain.run, uncut)


#: A link that lasts until its test has ended.
LONGER = {"args": {"pause_s": 1}, "chain": {"lead_s": 5}, "scheduler": {"time": None}}


def sbatch_own(chain: Chain, *options: str) -> None:
    """Begin a chain by a script of the user's own, and wait until two more of its jobs wait."""
    text = (REPOSITORY / "slurm" / "train.sbatch").read_text()
    text = text.replace("configs/quickstart.yaml", "hpcresume.yaml")
    text = text.replace("exec hpcresume", f"exec {sys.executable} -m hpcresume")
    script = chain.folder / "train.sbatch"
    script.write_text(text)
    place = ("--mem=1000", f"--chdir={chain.folder}", "--job-name=run")
    chain.cluster.run("sbatch", *place, *options, str(script))
    chain.started()
    chain.wait(lambda links: len(chain.status()["queued"]) == 2)


def told_of(cluster: SlurmCluster, state: str, form: str) -> list[str]:
    return cluster.run("squeue", "-h", "--name=run", f"--states={state}", form).split()


@pytest.mark.usefixtures("soon_taken")
def test_a_users_script_whose_limit_was_shortened_asks_for_all_of_it_again(
    cluster: SlurmCluster, folder: Path
) -> None:
    chain = new_chain(cluster, folder, **LONGER)
    sbatch_own(chain, "--time=00:30:00", "--time-min=1")
    given = json.loads(chain.run.script_options.read_text())
    assert {"--time=00:30:00", "--time-min=00:01:00"} <= set(given)
    assert told_of(cluster, "PENDING", "--format=%l") == ["30:00"] * 2
    assert told_of(cluster, "RUNNING", "--format=%l")[0] in ("1:00", "2:00", "3:00")


def test_the_jobs_of_a_users_script_share_one_deadline(cluster: SlurmCluster, folder: Path) -> None:
    chain = new_chain(cluster, folder, **LONGER)
    sbatch_own(chain, "--time=00:01:00", "--deadline=now+1day")
    (first,) = told_of(cluster, "RUNNING", "--Format=Deadline:30")
    assert told_of(cluster, "PENDING", "--Format=Deadline:30") == [first] * 2
    promised = chain.status()["deadline"].replace("Z", "+00:00")
    assert parse_moment(promised, now=0) == parse_moment(first, now=0)


def test_a_chain_whose_next_job_could_not_end_before_the_deadline_stops_and_says_so(
    cluster: SlurmCluster, folder: Path
) -> None:
    chain = new_chain(cluster, folder, **SLOWER)
    chain.submit("--deadline=now+100seconds")
    decided = chain.ended(timeout=150)
    assert (decided["cause"], decided["rule"]) == ("expired", "expired")
    assert (
        "a job of 00:01:00 that begins now could not end before the deadline" in decided["reason"]
    )
    status = chain.status()
    assert (status["state"], status["queued"]) == ("failed", [])
    told = chain.command("why", "run")
    assert "hpcresume resume run --set scheduler.deadline=\n" in told.stdout
    refused = chain.command("resume", "run")
    assert refused.returncode == 4, refused.stdout
    assert "could not end before the deadline" in refused.stderr
    before = len(read_chain(chain.run))
    resumed = chain.command("resume", "run", "--set", "scheduler.deadline=")
    assert resumed.returncode == 0, resumed.stderr
    assert chain.started(before + 1)


def test_a_dry_run_asks_slurm_when_the_first_job_would_start(
    cluster: SlurmCluster, folder: Path
) -> None:
    chain = new_chain(cluster, folder)
    done = chain.command("submit", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert re.match(r"Slurm would start the first job at once, on \S+, as the ", done.stderr)
    blocking = ("--exclusive", "--nodes=4", "--time=60", "--output=/dev/null", "--wrap=sleep 99")
    cluster.run("sbatch", "--mem=100", *blocking)
    chain.wait(lambda _: cluster.queue()[0]["state"] == "RUNNING")
    done = chain.command("submit", "--dry-run")
    assert re.match(r"Slurm would start the first job in (60|5\d) min, at ", done.stderr)
    assert not cluster.queue()[1:]
    assert not chain.run.path.exists()


def test_a_dry_run_of_what_slurm_refuses_shows_its_words(
    cluster: SlurmCluster, folder: Path
) -> None:
    chain = new_chain(cluster, folder)
    done = chain.command("submit", "--dry-run", "--sbatch", "constraint=martian")
    assert done.returncode == 4, "that is a field of its own"
    done = chain.command("submit", "--dry-run", "--set", "scheduler.constraint=martian")
    assert done.returncode == 6, done.stderr
    assert "Invalid feature specification" in done.stderr
    assert "#SBATCH --constraint=martian" in done.stdout


# ---- where compute nodes may not submit --------------------------------------------------------


def without_sbatch(folder: Path) -> dict[str, Any]:
    """Settings of jobs whose nodes have an sbatch and an scontrol that refuse, as sites have."""
    folder.mkdir(parents=True)
    for name in ("sbatch", "scontrol"):
        refusal = "error: Access/permission denied"
        (folder / name).write_text(f"#!/bin/sh\necho '{name}: {refusal}' >&2\nexit 1\n")
        (folder / name).chmod(0o755)
    return {"scheduler": {"setup": [f'export PATH="{folder}:$PATH"']}}


@contextlib.contextmanager
def driving(chain: Chain) -> Iterator[subprocess.Popen[str]]:
    """`hpcresume drive` in the background; killed at the end of the block."""
    argv = [sys.executable, "-m", "hpcresume", "drive", "run", "--every", "1"]
    with subprocess.Popen(
        argv,
        cwd=chain.folder,
        env={**ENVIRON, **chain.cluster.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def test_a_driver_on_the_login_node_chains_jobs_that_may_not_submit(
    cluster: SlurmCluster, folder: Path, uncut: dict[str, Any], tmp_path: Path
) -> None:
    refusing = without_sbatch(tmp_path / "a site's bin")
    mode = {"chain": {"mode": "drive", "lead_s": 40}}
    chain = new_chain(cluster, folder, **merged(refusing, mode))
    done = chain.command("submit")
    assert "way        drive: chain.mode is drive" in done.stdout, done.stdout + done.stderr
    assert "hpcresume drive run" in done.stdout
    with driving(chain) as first:
        chain.wait(lambda _: driver_alive(chain.run))
        chain.started()
        second = chain.command("drive", "run")
    assert second.returncode == 9, "two at once"
    assert f"process {first.pid}" in second.stderr
    # The first one was killed: the run has all that the next one needs.
    with driving(chain) as third:
        said, _ = third.communicate(timeout=200)
    assert third.returncode == 0, said + chain.story()
    assert "run is finished: training is complete" in said
    chain.nothing_queued()
    links = read_chain(chain.run)
    assert len(links) >= 2, chain.story()
    assert len({link.claim["job"] for link in links}) == len(links)
    assert not [record for link in links for record in link.all("queued")]
    assert_equivalent(chain.run, uncut)


def test_a_driver_that_is_interrupted_leaves_the_job_and_says_so(
    cluster: SlurmCluster, folder: Path
) -> None:
    changes = {"args": {"pause_s": 0.5}, "chain": {"mode": "drive", "lead_s": 5}}
    chain = new_chain(cluster, folder, **changes).submit()
    chain.started()
    with driving(chain) as driver:
        assert driver.stdout is not None
        assert "Driving run" in driver.stdout.readline()
        driver.send_signal(signal.SIGINT)
        said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "its job goes on; the next one is submitted by: hpcresume drive run" in said
    assert chain.status()["state"] == "running"
    cluster.run("scancel", str(read_chain(chain.run)[0].claim["job"]))
    with driving(chain) as driver:
        said, _ = driver.communicate(timeout=100)
    assert driver.returncode == 0
    assert "run stops: cancelled by root" in said
    chain.nothing_queued()


def test_a_driver_gives_up_on_jobs_that_die_before_their_link_begins(
    cluster: SlurmCluster, folder: Path
) -> None:
    dying = {"chain": {"mode": "drive"}, "scheduler": {"setup": ["exit 3"]}}
    chain = new_chain(cluster, folder, **dying).submit()
    with driving(chain) as driver:
        said, _ = driver.communicate(timeout=150)
    assert driver.returncode == 8, said
    assert "3 jobs in a row ended before their link began" in said
    assert "3 jobs in a row" in chain.status()["why"]


# ---- the way that suits ------------------------------------------------------------------------


def test_a_user_who_may_have_two_jobs_gets_one_ahead_and_is_told_why(folder: Path) -> None:
    with SlurmCluster(extra_conf={"AccountingStorageEnforce": "limits"}) as limited:
        limited.run("sacctmgr", "-i", "add", "account", "lab")
        limited.run("sacctmgr", "-i", "add", "user", "root", "account=lab", "maxsubmitjobs=2")
        chain = new_chain(limited, folder, scheduler={"account": "lab"}, chain={"lead_s": 5})
        done = chain.command("submit")
        assert done.returncode == 0, done.stderr
        assert "way        prequeue, 1 ahead: you may have 2 jobs at a time" in done.stdout
        chain.started(step=9)
        assert len(chain.status()["queued"]) == 1
        log = chain.run.train_log.read_text()
        assert "no further link could be queued" not in log
