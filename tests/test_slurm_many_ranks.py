"""The examples of several ranks on a real Slurm: on two nodes, and on as many as are free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import differing, fingerprint
from slurm_cluster import SlurmCluster
from test_many_ranks import FSDP, assert_nothing_lost_or_repeated, copied, let_go, standing
from test_many_ranks import at as locally
from test_slurm_command import Chain

pytestmark = [
    pytest.mark.long,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(600),
]
JOBS = (*FSDP, "--time=00:10:00", "--mem=1800", "--set=chain.lead_s=20")


@pytest.fixture
def chain(slurm: SlurmCluster, tmp_path: Path) -> Iterator[Chain]:
    yield Chain(slurm, copied(tmp_path / "it's a project"))
    slurm.cancel_all()
    for node in slurm.nodes:
        slurm.node_resume(node)
    slurm.wait_idle()


def cut(chain: Chain, number: int, sent: str) -> None:
    """Signal the ranks of a link that has saved."""
    chain.wait(lambda: [k for k in chain.links() if k.number == number and k.last("saved")])
    chain.cluster.run("scancel", f"--signal={sent}", chain.step(number))


def test_fsdp_on_two_nodes_ends_with_the_bytes_of_the_uncut_run_on_slurm(
    chain: Chain, tmp_path: Path
) -> None:
    uncut = locally(tmp_path / "uncut")
    uncut.submit(*FSDP)
    standing(chain.folder)
    chain.submit(*JOBS)
    cut(chain, 1, "KILL")
    cut(chain, 2, "TERM")
    let_go(chain.run)
    chain.finished()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert not differing(fingerprint(uncut.run), fingerprint(chain.run))


def test_every_node_of_a_range_has_its_tasks_and_their_cpus(chain: Chain) -> None:
    (chain.folder / "job.sh").write_text(
        'echo "rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME, $SLURM_CPUS_PER_TASK CPUs"\n'
    )
    drain(chain, chain.cluster.nodes[3])
    asked = ("--nodes=2-4", "--tasks-per-node=2", "--cpus-per-task=2")
    chain.submit(*asked, "--", "bash", "job.sh")
    chain.finished()
    assert chain.ends() == ["completed"], chain.story()
    for rank in range(6):
        node = chain.cluster.nodes[rank // 2]
        assert f"rank {rank} of 6 on {node}, 2 CPUs" in chain.printed(1, rank), chain.story()


def drain(chain: Chain, *nodes: str) -> None:
    """Keep nodes from any further job."""
    names = f"nodename={','.join(nodes)}"
    chain.cluster.run("scontrol", "update", names, "state=drain", "reason=test")


def test_links_train_on_as_many_nodes_as_are_free(chain: Chain) -> None:
    _, other, *rest = chain.cluster.nodes
    drain(chain, *rest)
    standing(chain.folder)
    chain.submit(*JOBS, "--nodes=1-2")
    chain.wait(lambda: [k for k in chain.links() if k.last("saved")])
    drain(chain, other)
    cut(chain, 1, "KILL")
    chain.wait(lambda: [k for k in chain.links() if k.number == 2])
    chain.cluster.node_resume(other)
    cut(chain, 2, "TERM")
    let_go(chain.run)
    chain.finished()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    assert [link.claim["num_nodes"] for link in chain.links()] == [2, 1, 2], chain.story()
    assert_nothing_lost_or_repeated(chain.run)
