"""Extras are really extras: without them everything works that is not about them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from oracle import ENVIRON

TESTS = Path(__file__).parent

_COMMANDS = """
import contextlib, io, sys
import hpcresume
from hpcresume import cli
from hpcresume.cli import _COMMANDS

def run(*argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main(list(argv))
        except SystemExit as left:
            return left.code, said.getvalue()

for name in _COMMANDS:
    assert run(name, "--help")[0] == 0, name
for argv in (["submit", "--cluster=local", "--name=x", "--", "true"], ["status"], ["why", "x"]):
    more = ["--dry-run"] if argv[0] == "submit" else []
    code, said = run(*argv[:1], *more, *argv[1:])
    assert code in (0, 3), (argv, code, said)
code, said = run("web")
assert code and "hpcresume[web]" in said, (code, said)
for name in hpcresume.__all__:
    getattr(hpcresume, name)
"""


def python(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python without the extras."""
    environ = {**ENVIRON, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    return subprocess.run(
        [sys.executable, *argv], cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


def test_every_command_and_public_name_is_there_without_the_extras(tmp_path: Path) -> None:
    done = python("-c", f"import without_extras\n{_COMMANDS}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_left_out_is_really_not_there(tmp_path: Path) -> None:
    done = python("-c", "import without_extras, starlette", cwd=tmp_path)
    assert "No module named 'starlette'" in done.stderr


@pytest.mark.long
def test_every_test_file_can_be_read_without_the_extras() -> None:
    options = ("-p", "without_extras", "-p", "no:cacheprovider", "--collect-only", "-q")
    done = python("-m", "pytest", *options, "tests", cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-3000:]


#: A GPU's is of no use without one; these are too large to be installed for each run.
NOT_INSTALLED = {"test", "gpu", "wandb", "mlflow", "trackio"}


def test_the_tests_install_every_extra_of_moderate_size() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python has it from 3.11 on")
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (own,) = [entry for entry in extras["test"] if entry.startswith("hpcresume[")]
    assert {*own.partition("[")[2].rstrip("]").split(",")} == extras.keys() - NOT_INSTALLED
