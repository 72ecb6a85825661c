"""What a link has compiled is there for the next one, whole or not at all, and private."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_layer import Call, States, fast_folder, forked, kill_here, result_of, struck
from made_run import make_run

from hpcresume.run_dir import RunDir
from hpcresume.training import warm
from hpcresume.training.warm import WarmStart, warm_start

KERNEL = "inductor/ab/cabcdef.main.so"
GRAPH = f"inductor/fxgraph/fg/f{'g' * 51}/one"
CUBIN = f"triton/{'K' * 52}/add.cubin"
MADE = {KERNEL: b"\x7fELF" + b"k" * 5000, GRAPH: b"a graph", CUBIN: b"cubin" * 99}

OLDER = {"inductor/zz/other.py": b"older"}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs")


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files lie; its name is one that JSON must escape."""
    return a_node(tmp_path, monkeypatch, "nodé-1")


def a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def begin(run: RunDir) -> WarmStart:
    """The folder of a new link, at the rank that fills it."""
    started = warm_start(run, run.claim_link({}), {}, keeper=True)
    assert started is not None
    return started


def compile_into(started: WarmStart, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = started.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def found(started: WarmStart) -> dict[str, bytes]:
    return {
        str(path.relative_to(started.folder)): path.read_bytes()
        for path in started.folder.rglob("*")
        if path.is_file()
    }


def kept_by_a_link(run: RunDir, files: dict[str, bytes] = MADE) -> None:
    started = begin(run)
    compile_into(started, files)
    started.keep()
    started.leave()


def archives(run: RunDir) -> list[Path]:
    return sorted(run.cache.glob("*/*"))


# ---- from link to link -----------------------------------------------------------------------


def test_a_link_finds_what_the_one_before_it_has_compiled_and_adds_what_is_new(
    run: RunDir,
) -> None:
    kept_by_a_link(run)
    second = begin(run)
    assert found(second) == MADE
    compile_into(second, {"inductor/zz/other.py": b"more"})
    second.keep()
    assert len(archives(run)) == 2
    with zipfile.ZipFile(archives(run)[1]) as added:
        assert added.namelist() == ["inductor/zz/other.py"]
    assert found(begin(run)) == {**MADE, "inductor/zz/other.py": b"more"}


def test_a_link_that_compiles_nothing_new_leaves_nothing_new(run: RunDir) -> None:
    kept_by_a_link(run)
    before = archives(run)
    second = begin(run)
    second.keep()
    second.keep()
    assert archives(run) == before


def test_a_file_that_has_changed_is_kept_as_it_is_now(run: RunDir) -> None:
    choices = "inductor/cache/choices"
    kept_by_a_link(run, {choices: b"{}"})
    kept_by_a_link(run, {choices: b'{"matmul": 3}'})
    assert found(begin(run)) == {choices: b'{"matmul": 3}'}


def test_all_that_lies_in_the_run_and_on_the_node_is_private(run: RunDir) -> None:
    kept_by_a_link(run)
    started = begin(run)
    for folder in (run.cache, *run.cache.iterdir(), started.folder):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_the_paths_in_tritons_lists_are_those_of_the_new_folder(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = f"triton/{'K' * 52}/__grp__add.json"
    first = begin(run)

    def paths(started: WarmStart) -> dict[str, str]:
        return {"add.cubin": str(started.folder / CUBIN)}

    listing = json.dumps({"child_paths": paths(first)}).encode()
    compile_into(first, {CUBIN: b"cubin", listed: listing})
    first.keep()
    a_node(tmp_path, monkeypatch, "another-nodé")
    second = begin(run)
    assert second.folder != first.folder
    told = json.loads((second.folder / listed).read_bytes())["child_paths"]
    assert told == paths(second)
    assert Path(told["add.cubin"]).read_bytes() == b"cubin"


def test_compiled_code_is_not_given_to_another_kind_of_processor(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_by_a_link(run)
    mine = warm.kind()
    with monkeypatch.context() as patch:
        patch.setattr(warm, "_processor", lambda: ["Some CPU", "sse2 avx2"])
        assert warm.kind() != mine
        assert found(begin(run)) == {}
    assert found(begin(run)) == MADE


def test_what_another_node_has_kept_meanwhile_is_not_kept_twice(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = run.claim_link({})
    first = warm_start(run, link, {}, keeper=True)
    a_node(tmp_path, monkeypatch, "node-2")
    second = warm_start(run, link, {}, keeper=True)
    assert first is not None and second is not None
    compile_into(first, MADE)
    first.keep()
    # The same graph is named otherwise, by the time that it took.
    own = {GRAPH.replace("one", "two"): b"the graph", "inductor/zz/stage2.py": b"its own"}
    compile_into(second, {KERNEL: MADE[KERNEL], CUBIN: MADE[CUBIN], **own})
    second.keep()
    assert found(begin(run)) == {**MADE, "inductor/zz/stage2.py": b"its own"}


def test_more_than_a_run_may_keep_is_not_kept_and_that_is_said(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept_by_a_link(run)
    before = archives(run)
    monkeypatch.setattr(warm, "LARGEST", 4000)
    second = begin(run)
    compile_into(second, {"inductor/zz/large.so": os.urandom(4000)})
    with caplog.at_level(logging.WARNING):
        second.keep()
    assert f"{run.cache} would hold more than 4.0 kB; remove it" in caplog.text
    assert archives(run) == before


# ---- what must not be copied -----------------------------------------------------------------


def test_locks_and_files_that_are_being_written_are_not_kept(run: RunDir) -> None:
    started = begin(run)
    unfinished = {
        "inductor/locks/cabcdef.lock": b"",
        "inductor/dynamo/code_state_1.pkl": b"shapes",
        "inductor/ab/.77.140.tmp": b"half",
        f"triton/{'K' * 52}/tmp.pid_7_1/add.cubin": b"half",
        f"triton/{'K' * 52}/add.json.tmp.pid_7_1": b"half",
    }
    compile_into(started, {**MADE, **unfinished})
    started.keep()
    assert found(begin(run)) == MADE


def test_a_library_that_is_being_built_is_kept_once_it_is_whole(run: RunDir) -> None:
    started = begin(run)
    lock = "inductor/locks/cabcdef.lock"
    compile_into(started, {**MADE, KERNEL: b"\x7fE", lock: b""})
    with (started.folder / lock).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started.keep()
        assert KERNEL not in found(begin(run))
    compile_into(started, {KERNEL: MADE[KERNEL]})
    started.keep()
    assert found(begin(run)) == MADE


# ---- the user's own choice -------------------------------------------------------------------


def test_a_folder_that_the_user_has_chosen_wins(run: RunDir) -> None:
    link = run.claim_link({})
    assert warm_start(run, link, {"TORCHINDUCTOR_CACHE_DIR": "/mine"}, keeper=True) is None
    started = warm_start(run, link, {}, keeper=True)
    assert started is not None
    assert started.settings({}) == {
        "TORCHINDUCTOR_CACHE_DIR": f"{started.folder}/inductor",
        "TRITON_CACHE_DIR": f"{started.folder}/triton",
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }
    own = {"TRITON_CACHE_DIR": "/x", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "1"}
    assert started.settings(own) == {"TORCHINDUCTOR_CACHE_DIR": f"{started.folder}/inductor"}


# ---- folders of others -----------------------------------------------------------------------


def _of_another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    (folder / "inductor").mkdir()
    os.chown(folder, 12345, 12345)


def _open_to_others(folder: Path) -> None:
    folder.mkdir()
    (folder / "inductor").mkdir()
    folder.chmod(0o777)


def _elsewhere(folder: Path) -> None:
    target = folder.parent.parent / "a trap"
    (target / "inductor").mkdir(parents=True)
    target.chmod(0o700)
    folder.symlink_to(target)


@pytest.mark.parametrize("keeper", [True, False], ids=["filling", "waiting"])
@pytest.mark.parametrize("trap", [_of_another_user, _open_to_others, _elsewhere])
def test_a_folder_that_somebody_else_has_made_is_refused(
    run: RunDir,
    node: Path,
    trap: Callable[[Path], None],
    keeper: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if trap is _of_another_user and os.getuid():
        pytest.skip("only root can give a folder to another user")
    kept_by_a_link(run)
    link = run.claim_link({})
    folder = node / f"hpcresume-{run.identify()['id']}-{link.number:04d}"
    trap(folder)
    with caplog.at_level(logging.WARNING):
        assert warm_start(run, link, {}, keeper=keeper) is None
    assert "compiled code is neither taken over nor kept" in caplog.text
    # Nothing of ours is put there, or is left beside it.
    assert [path.name for path in folder.rglob("*")] == ["inductor"]
    assert list(node.iterdir()) == [folder]


def test_a_place_where_others_may_rename_the_folder_is_refused(run: RunDir, node: Path) -> None:
    node.chmod(0o777)
    assert warm_start(run, run.claim_link({}), {}, keeper=True) is None
    node.chmod(0o1777)
    assert warm_start(run, run.claim_link({}), {}, keeper=True) is not None


def test_a_place_whose_path_the_compiler_would_take_apart_is_not_used(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_node(tmp_path, monkeypatch, "it's a node")
    monkeypatch.setattr(warm, "_PLAIN_PLACE", str(tmp_path / "plain"))
    (tmp_path / "plain").mkdir(mode=0o700)
    assert begin(run).folder.parent == tmp_path / "plain"


# ---- the other ranks of a node, and the end ---------------------------------------------------


def test_the_last_rank_of_a_node_to_leave_removes_the_folder(run: RunDir, node: Path) -> None:
    link = run.claim_link({})
    first = warm_start(run, link, {}, keeper=True)
    second = warm_start(run, link, {}, keeper=False)
    assert first is not None and second is not None
    assert second.folder == first.folder
    first.leave()
    assert first.folder.is_dir()
    second.leave()
    assert list(node.iterdir()) == []


def test_a_rank_that_waits_in_vain_goes_on_without(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "_PATIENCE_S", 0.05)
    assert warm_start(run, run.claim_link({}), {}, keeper=False) is None


def test_the_folder_of_a_killed_link_is_removed_and_that_of_a_living_one_stays(
    run: RunDir, node: Path
) -> None:
    def killed() -> None:
        compile_into(begin(run), MADE)
        kill_here()

    living = begin(run)
    assert forked(killed) == -signal.SIGKILL
    assert len(list(node.iterdir())) == 2
    third = begin(run)
    assert sorted(node.iterdir()) == [living.folder, third.folder]


# ---- copies that are cut short -----------------------------------------------------------------


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def _spoilt(archive: Path, how: str) -> None:
    data = bytearray(archive.read_bytes())
    if how == "cut":
        archive.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        archive.write_bytes(b"")
    else:
        with zipfile.ZipFile(archive) as content:
            at = content.getinfo(CUBIN).header_offset + 30 + len(CUBIN) + 4
        data[at] ^= 1
        archive.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "one bit"])
def test_a_damaged_copy_is_removed_and_the_others_are_used(
    run: RunDir, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept_by_a_link(run, {"inductor/zz/other.py": b"sound"})
    kept_by_a_link(run)
    _spoilt(archives(run)[1], how)
    with caplog.at_level(logging.WARNING):
        started = begin(run)
    assert "is damaged" in caplog.text
    assert len(archives(run)) == 1
    there = found(started)
    assert there.pop("inductor/zz/other.py") == b"sound"
    # What was read before the damage came up is whole.
    assert there.items() <= MADE.items()
    compile_into(started, MADE)
    started.keep()
    assert found(begin(run)) == {**MADE, "inductor/zz/other.py": b"sound"}


def _scene(folder: Path) -> RunDir:
    folder.mkdir(parents=True)
    tempfile.tempdir = str(folder / "node")
    os.mkdir(tempfile.tempdir, 0o700)
    run = make_run(folder / "runs")
    kept_by_a_link(run, OLDER)
    return run


def _work(run: RunDir) -> None:
    """Both copies: from the run to the node, and back."""
    started = warm_start(run, run.claim_link({}), {}, keeper=True)
    if started is not None:
        compile_into(started, MADE)
        started.keep()
        started.leave()


def _killed_everywhere(root: str) -> list[str]:
    """Kill the work in front of each change of the disk; what was wrong afterwards."""
    top = Path(root)
    states = States(top / "count")
    run = _scene(top / "count")
    with struck(top / "count", states.before):
        _work(run)
    wrong, complete = [], set()
    for number in states.numbers:
        folder = top / f"at-{number}"
        run = _scene(folder)

        def before(call: Call, number: int = number) -> None:
            if call.number == number:
                kill_here()

        def killed(run: RunDir = run, folder: Path = folder) -> None:
            with struck(folder, before):
                _work(run)

        if forked(killed) != -signal.SIGKILL:
            wrong.append(f"{number}: was not killed")
        then = begin(run)
        there = found(then)
        complete.add(len(there))
        if there not in (OLDER, {**OLDER, **MADE}):
            wrong.append(f"{number}: found {sorted(there)}")
        if list(then.folder.parent.iterdir()) != [then.folder]:
            wrong.append(f"{number}: left {list(then.folder.parent.iterdir())}")
        if len(states.numbers) < 20 or any(path.suffix != ".zip" for path in archives(run)):
            wrong.append(f"{number}: left {archives(run)}")
    return wrong if len(complete) == 2 else [*wrong, f"only {complete}"]


def test_a_copy_that_a_kill_cuts_short_is_whole_or_not_there(memory: Path) -> None:
    assert result_of(_killed_everywhere, str(memory / "kills")) == []


class Refusing:
    """Refuses one call of the copies' and counts them, over several stretches."""

    def __init__(self, number: int, error: int) -> None:
        self._number = number
        self._error = error
        self.calls = 0
        self.refused = ""

    def before(self, call: Call) -> None:
        # Without its journals and its identity a link fails in any case.
        if "/links" not in call.path and "run.json" not in call.path and call.name != "close":
            self.calls += 1
            if self.calls == self._number:
                self.refused = f"{call.name} {call.path}"
                raise OSError(self._error, os.strerror(self._error), call.path)


def _refused_work(run: RunDir, disk: Refusing) -> None:
    with struck(run.path.parents[1], disk.before):
        started = warm_start(run, run.claim_link({}), {}, keeper=True)
    if started is not None:
        compile_into(started, MADE)
        with struck(run.path.parents[1], disk.before):
            started.keep()
            started.leave()


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_disk_that_refuses_never_fails_the_link_and_spoils_nothing(
    memory: Path, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = getattr(errno, error)
    disk = Refusing(0, code)
    _refused_work(_scene(memory / error / "count"), disk)
    assert disk.calls > 60
    for number in range(1, disk.calls + 1):
        run = _scene(memory / error / str(number))
        disk = Refusing(number, code)
        _refused_work(run, disk)
        assert disk.refused
        there = found(begin(run)).items()
        assert OLDER.items() <= there <= {**OLDER, **MADE}.items(), disk.refused
