"""Tab in a real bash: commands, options, names of runs, without asking the scheduler."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import FakeSlurm, make_run
from oracle import ENVIRON

#: Says on standard error what a Tab imported.
_PROGRAM = """#!{python}
import atexit, sys
told = ("torch", "numpy", "rich", "yaml", "hpcresume.cli.submit")
atexit.register(lambda: print([name for name in told if name in sys.modules], file=sys.stderr))
from hpcresume.cli import main
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three runs, an hpcresume on PATH and a Slurm whose queue tells when asked."""
    for name in ("quick", "quiet", "slow"):
        make_run(tmp_path / "runs", name, cluster="slurm")
    slurm = FakeSlurm(tmp_path)
    slurm.program("squeue", f"touch {shlex.quote(str(tmp_path / 'asked'))}")
    program = slurm.bin / "hpcresume"
    program.write_text(_PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return tmp_path


def tab(folder: Path, *words: str) -> tuple[list[str], str]:
    """What bash offers for the last word, and what was said on standard error."""
    script = (
        'eval "$(hpcresume completion bash 2>/dev/null)"\n'
        f"COMP_WORDS=({shlex.join(('hpcresume', *words))}) COMP_CWORD={len(words)}\n"
        "complete -p hpcresume >/dev/null && _hpcresume_completion hpcresume\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=folder,
        env={**ENVIRON, "PATH": f"{folder / 'bin'}:/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split(), done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ch"], ["checkpoints"]),
        (["logs", "qui"], ["quick", "quiet"]),
        (["status", "--runs", "elsewhere", ""], []),
        (["logs", "--met"], ["--metrics"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
    ],
    ids=["command", "run", "another-folder", "option", "choice"],
)
def test_a_tab_offers_what_there_is(folder: Path, words: list[str], offered: list[str]) -> None:
    found, _ = tab(folder, *words)
    assert sorted(found) == offered


def test_a_tab_for_a_run_imports_little_and_asks_no_scheduler(folder: Path) -> None:
    found, imported = tab(folder, "why", "s")
    assert (found, imported) == (["slow"], "[]")
    assert not (folder / "asked").exists()


def test_a_tab_for_a_command_imports_no_command(folder: Path) -> None:
    found, imported = tab(folder, "")
    assert {"submit", "logs", "completion"} <= set(found)
    assert "link" not in found, "what a job calls is nobody's to type"
    assert imported == "[]"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_how_to_ask(folder: Path, shell: str) -> None:
    done = subprocess.run(
        [folder / "bin" / "hpcresume", "completion", shell],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_HPCRESUME_COMPLETE={shell}_complete" in done.stdout
