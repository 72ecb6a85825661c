"""Commands on a real Slurm, whose signals reach only the direct children of its daemon."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import hpcresume
from slurm_cluster import SlurmCluster
from test_command import digits
from test_launchers import TORCHRUN, by_torchrun

from hpcresume.journal import LinkRecords, read_chain
from hpcresume.run_dir import RunDir

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(300)]
EXAMPLES = Path(__file__).parent.parent / "examples"


class Chain:
    """A run of a command on the test cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run = RunDir(folder / "runs" / "run")

    def submit(self, *argv: str, **environ: str) -> None:
        options = ("--cluster=slurm", "--name=run", "--time=00:01:00", "--mem=300")
        done = hpcresume("submit", *options, *argv, cwd=self.folder, **self.cluster.env, **environ)
        assert done.returncode == 0, done.stdout + done.stderr

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return hpcresume(*argv, cwd=self.folder, **self.cluster.env)

    def links(self) -> list[LinkRecords]:
        return read_chain(self.run)

    def ends(self) -> list[str]:
        records = (record for link in self.links() for record in link.all("ended"))
        return [record["cause"] for record in records if "cause" in record]

    def printed(self, link: int, rank: int = 0) -> str:
        log = self.run.link(link).rank_log(rank)
        return log.read_text() if log.exists() else ""

    def wait(self, what: Callable[[], Any], timeout: float = 200) -> Any:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = what()
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"timed out\n{self.story()}")

    def finished(self) -> None:
        def over() -> bool:
            decided = [record for link in self.links() for record in link.all("decided")]
            return bool(decided) and decided[-1]["decision"] == "finished"

        self.wait(over)
        self.wait(lambda: not self.cluster.queue(), 40)

    def step(self, number: int) -> str:
        """Slurm's name for the ranks of a link."""
        link = next(link for link in self.links() if link.number == number)
        return f"{link.claim['job']}.0"

    def story(self) -> str:
        lines = [f"{link.number}: {record}" for link in self.links() for record in link.records]
        logs = [path.read_text(errors="replace") for path in self.run.jobs.glob("*.log")]
        return "\n".join([*lines, *logs, str(self.cluster.queue())])


@pytest.fixture
def chain(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Chain]:
    folder = tmp_path / "it's a project"
    folder.mkdir()
    yield Chain(slurm, folder)
    slurm.cancel_all()
    slurm.wait_idle()


def test_a_script_that_counts_is_chained_over_three_jobs_one_of_them_killed(chain: Chain) -> None:
    shutil.copy(EXAMPLES / "count.sh", chain.folder)
    argv = ("--set=chain.lead_s=44", "--checkpoints=count.txt", "--", "bash", "count.sh", "150")
    chain.submit(*argv, PAUSE="0.15")
    chain.wait(lambda: "step 12\n" in chain.printed(1))
    chain.cluster.run("scancel", "--signal=KILL", chain.step(1))
    chain.finished()
    assert (chain.folder / "count.txt").read_text() == "150\n"
    causes = chain.ends()
    assert (causes[0], causes[-1]) == ("killed", "completed"), chain.story()
    assert len(causes) >= 3
    assert {*causes[1:-1]} == {"deadline"}, chain.story()
    steps = [
        int(line.split()[1])
        for number in range(1, len(causes) + 1)
        for line in chain.printed(number).splitlines()
        if line.startswith("step")
    ]
    assert steps == sorted({*steps}), "no number came twice"
    status = chain.command("status", "run").stdout
    assert "complete" in status
    assert "step 150" in status


@pytest.mark.long
def test_a_plain_script_ends_with_the_bytes_of_the_uncut_run_on_slurm(
    chain: Chain, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="the example's data come with scikit-learn")
    shutil.copy(EXAMPLES / "command.py", chain.folder)
    uncut = digits(tmp_path)
    command = (sys.executable, "command.py", "--epochs=4", "--pause=1")
    options = ("--time=00:05:00", "--mem=1800", "--set=chain.lead_s=10", "--checkpoints=out.pt")
    chain.submit(*options, "--", *command)
    for number, sent in ((1, "KILL"), (2, "TERM")):
        chain.wait(lambda number=number: f"epoch {number}" in chain.printed(number))
        chain.cluster.run("scancel", f"--signal={sent}", chain.step(number))
    chain.finished()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert (chain.folder / "out.pt").read_bytes() == uncut


@pytest.mark.long
def test_torchrun_meets_on_two_nodes_and_ends_with_the_bytes_of_the_uncut_run(
    chain: Chain, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLES / "ddp_torchrun.py", chain.folder)
    uncut = by_torchrun(tmp_path)
    options = ("--nodes=2", "--time=00:05:00", "--mem=1800", "--set=chain.lead_s=20")
    told = ("--signal-command=none", "--checkpoints=ddp.pt")
    chain.submit(*options, *told, "--", *TORCHRUN, "ddp_torchrun.py", "--pause=0.1")
    for number, (sent, after) in enumerate((("KILL", "step 40 "), ("TERM", "step 80 ")), 1):
        chain.wait(lambda number=number, after=after: after in chain.printed(number))
        chain.cluster.run("scancel", f"--signal={sent}", chain.step(number))
    chain.finished()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert [link.claim["num_nodes"] for link in chain.links()] == [2, 2, 2]
    assert (chain.folder / "ddp.pt").read_bytes() == uncut


_SAVES = """
[ -e saved-$SLURM_PROCID ] && exit 0
trap 'sleep 1; touch saved-$SLURM_PROCID; exit 0' TERM
echo "ready $SLURM_PROCID $RANK $WORLD_SIZE"
sleep 1000 & wait
"""


def test_what_slurm_sends_reaches_the_command_of_every_rank_on_every_node(chain: Chain) -> None:
    (chain.folder / "job.sh").write_text(_SAVES)
    chain.submit("--nodes=2", "--set=chain.lead_s=20", "--", "bash", "job.sh")
    for rank in (0, 1):
        chain.wait(lambda rank=rank: f"ready {rank} {rank} 2" in chain.printed(1, rank))
    # To the first process of each task, and to no other.
    chain.cluster.run("scancel", "--signal=TERM", chain.step(1))
    chain.finished()
    assert {path.name for path in chain.folder.glob("saved-*")} == {"saved-0", "saved-1"}
    assert chain.ends() == ["deadline", "completed"], chain.story()


def test_nothing_of_a_command_outlives_the_supervisor_of_its_job(chain: Chain) -> None:
    (chain.folder / "job.sh").write_text(
        "echo $$ >> pids\nsetsid sleep 1000 & echo $! >> pids\n[ $HPCRESUME_LINK = 2 ] && exit 0\n"
        "echo ready; wait"
    )
    chain.submit("--", "bash", "job.sh")
    chain.wait(lambda: "ready" in chain.printed(1))
    os.kill(int(chain.links()[0].claim["pid"]), signal.SIGKILL)
    chain.finished()
    assert len(chain.links()) == 2, chain.story()
    pids = [int(pid) for pid in (chain.folder / "pids").read_text().split()]
    assert len(pids) == 4
    chain.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60)
