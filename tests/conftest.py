"""Fixtures that more than one test file uses."""

from collections.abc import Iterator

import pytest
import surroundings  # noqa: F401
from made_run import Said
from slurm_cluster import SlurmCluster, missing

from hpcresume import cli


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm cluster, one for each pytest process; `slurm.env` is the way to it."""
    if reason := missing():
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """A command line, run in this process: exit code, output, errors."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(list(argv))
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return run


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slurm: uses a real Slurm; set by the fixture slurm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")
