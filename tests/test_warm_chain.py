"""Warm starts of real chains on the local backend, with torch's real compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from oracle import ENVIRON, TRAINING, Chain, assert_equivalent, fingerprint, merged, project

from hpcresume.journal import LinkRecords
from hpcresume.run_dir import RunDir

LENIENT = {"chain": {"no_progress_links": 30, "max_crashes": 30, "lead_s": 1.0}}
#: Notes each library that it makes: the number of the link, and the file.
COMPILER = """#!/bin/sh
{compiler} "$@" || exit
while [ $# -gt 1 ]; do
    [ "$1" = -o ] && echo "${{HPCRESUME_LINK:-none}} $2" >> '{notes}'
    shift
done
exit 0
"""
#: As much as a compiler does with its cache: it makes what it does not find, and uses what it does.
STAND_IN = """
    import os, pathlib
    made = pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "ab", "kernel.so")
    spoilt = made.exists() and args["spoilt"]
    made.parent.mkdir(parents=True, exist_ok=True)
    if not made.exists():
        made.write_text("code")
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of the chain lie."""
    folder = tmp_path / "node"
    folder.mkdir(mode=0o700)
    monkeypatch.setitem(ENVIRON, "TMPDIR", str(folder))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delitem(ENVIRON, name, raising=False)
    return folder


@pytest.fixture
def compiler_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the C++ compiler notes what it makes."""
    real = shutil.which("g++")
    if real is None:
        pytest.skip("torch.compile needs a C++ compiler: apt-get install g++")
    notes, folder = tmp_path / "made", tmp_path / "bin"
    folder.mkdir()
    (folder / "g++").write_text(COMPILER.format(compiler=real, notes=notes))
    (folder / "g++").chmod(0o755)
    monkeypatch.setitem(ENVIRON, "PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setitem(ENVIRON, "TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Or torch tries out ten kinds of vectors first, which takes longer than the kernels do.
    monkeypatch.setitem(ENVIRON, "TORCHINDUCTOR_VEC_ISA_OK", "0")
    return notes


def variant(folder: Path, **lines: tuple[str, str]) -> dict[str, Any]:
    """noisy.py with some lines replaced, in a project's folder; the settings that train it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (TRAINING / "noisy.py").read_text()
    for old, new in lines.values():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "other.py").write_text(text)
    return {"train": "other.py:train"}


def compiled(folder: Path) -> dict[str, Any]:
    return variant(
        folder,
        compiled=("model: nn.Module = Tied()\n", "model = Tied()\n    model.compile()\n"),
        # Few kernels: each takes the compiler seconds.
        small=("nn.BatchNorm1d(32)", "nn.Identity()"),
    )


def uncut(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint of a run without a break, which compiles for itself."""
    project(folder, **merged(changes, compiled(folder)))
    command = [sys.executable, "other.py", "--config", "hpcresume.yaml"]
    environ = {
        **ENVIRON,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "own-cache"),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return fingerprint(RunDir(folder / "runs" / "run"))


def test_only_the_first_link_compiles_and_the_bytes_are_those_of_a_run_that_compiled_for_itself(
    tmp_path: Path, node: Path, compiler_notes: Path
) -> None:
    folder = tmp_path / "it's a project"
    changes = merged(LENIENT, {"max_steps": 60, "args": {"pause_s": 0.1, "size": 304}})
    chain = Chain(folder, **merged(changes, compiled(folder)))
    # What was copied after the first step outlives the process.
    chain.wait_for(lambda _: list(chain.run.cache.glob("*/*.zip")), timeout=240)
    chain.cut(chain.links()[0], "kill rank")
    second = chain.wait_for(lambda links: len(links) > 1 and links[1].last("saved"), timeout=120)
    assert second, chain.story()
    chain.cut(chain.links()[1], "term rank")
    chain.wait_completed()
    assert len(chain.links()) == 3, chain.story()
    made = Counter(line.split()[0] for line in compiler_notes.read_text().splitlines())
    assert made["1"] > 1, "the notes tell nothing"
    assert set(made) == {"1"}
    quick = merged(changes, {"args": {"pause_s": 0}})
    assert_equivalent(chain.run, uncut(tmp_path / "uncut", quick))
    made_afresh = len(compiler_notes.read_text().splitlines()) - sum(made.values())
    assert made_afresh >= made["1"], "the uncut run has taken kernels over"


def stand_in(folder: Path, spoilt: bool) -> dict[str, Any]:
    loss = "        loss = nn.functional"
    check = '        if spoilt: raise OSError("kernel.so: file too short")\n'
    settings = variant(
        folder,
        cache=("    args = session.args\n", f"    args = session.args\n{STAND_IN}"),
        step=(loss, check + loss),
    )
    return merged(LENIENT, {**settings, "args": {"spoilt": spoilt, "pause_s": 0.05}})


def test_a_link_that_fails_in_its_first_step_is_followed_by_one_that_compiles_for_itself(
    tmp_path: Path, node: Path
) -> None:
    folder = tmp_path / "project"
    chain = Chain(folder, **stand_in(folder, spoilt=True))
    chain.wait_for(lambda _: list(chain.run.cache.glob("*/*.zip")))
    chain.cut(chain.links()[0], "kill rank")
    chain.wait_completed()
    _, second, third = chain.links()
    assert second.all("ended")[-1]["cause"] == "user code", chain.story()
    assert second.last("started") and not second.last("stepped")
    assert third.last("completed")


def test_a_link_that_was_only_stopped_in_its_first_step_takes_nothing_from_the_next(
    tmp_path: Path, node: Path
) -> None:
    folder = tmp_path / "project"
    changes = merged(stand_in(folder, spoilt=False), {"checkpoint": {"steps": 1000}})
    chain = Chain(folder, **changes)
    chain.wait_for(lambda _: list(chain.run.cache.glob("*/*.zip")))
    chain.cut(chain.links()[0], "term rank")
    chain.wait_completed()
    assert len(list(chain.run.cache.glob("*/*.zip"))) == 1, "the second link found all there was"
    # Both have removed what they had on the node.
    assert not list(node.glob("hpcresume-*"))


PARTS = ["supervisor", "launch", "imports", "caches", "code", "ranks"]
PARTS += ["checkpoint", "restore", "batch", "step"]


def test_each_link_journals_how_long_its_start_took_and_what_with(
    tmp_path: Path, node: Path
) -> None:
    chain = Chain(tmp_path / "project", **merged(LENIENT, {"args": {"pause_s": 0.05}}))
    chain.wait_for(lambda links: links and links[0].last("saved"))
    chain.cut(chain.links()[0], "term rank")
    chain.wait_completed()
    for link in chain.links():
        _assert_start_up_is_told(link)


def _assert_start_up_is_told(link: LinkRecords) -> None:
    (before,), (after,) = link.all("started"), link.all("stepped")
    assert list(before["start_up"]) == PARTS[:-2]
    assert list(after["start_up"]) == PARTS
    assert all(seconds >= 0 for seconds in after["start_up"].values())
    assert after["seconds"] == pytest.approx(sum(after["start_up"].values()), abs=0.01)
    assert after["step"] == before["step"] + 1
