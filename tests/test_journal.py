"""Journals, claims and the lineage: what is read, however links die, race, or come back late."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpcresume
from hpcresume import files, journal
from hpcresume.journal import (
    Journal,
    Lineage,
    Segment,
    known_step,
    lineage,
    read_chain,
    read_metrics,
)
from hpcresume.run_dir import LinkDir, RunDir

ROOT = Path(hpcresume.__file__).parents[1]
#: A directory whose name needs quoting everywhere.
ODD = "a 'run' with \"all\"\nof it $HOME"

NewRun = Callable[[], RunDir]


def make(path: Path) -> RunDir:
    run = RunDir(path)
    run.create("", cluster="none", project=path.parent, versions={})
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make(tmp_path / ODD)


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """Makes another run at each call."""
    numbers = iter(range(10_000))
    return lambda: make(tmp_path / f"{next(numbers)} {ODD}")


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file of this process can grow beyond a size: what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def python(script: str, *args: str | Path, wrapper: tuple[str, ...] = ()) -> Any:
    """Run a script in a process of its own; its last line is JSON."""
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", script, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Lines


def test_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"n":1}\n{"n":2}\n{"n":3')
    assert [line["n"] for line in files.read_lines(path)] == [1, 2]


def test_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"n":1}\n\n\xff\xfe\n\0\0\0\n{"n":2}\n')
    assert [line["n"] for line in files.read_lines(path)] == [1, 2]


def test_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert list(files.read_lines(tmp_path / "lines")) == []


def test_append_after_a_line_torn_anywhere_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    first, torn = files.to_json({"n": 1}), files.to_json({"n": "née\n"})
    for cut in range(len(torn)):
        path.write_bytes(first + torn[:cut])
        writer = files.LineWriter(path)
        writer.append({"n": 3})
        writer.close()
        read = [line["n"] for line in files.read_lines(path)]
        assert read[0] == 1 and read[-1] == 3, cut


def test_text_of_a_record_cannot_break_its_line(tmp_path: Path) -> None:
    text = "a\nb\r\u2028\0\"'\\ é"
    writer = files.LineWriter(tmp_path / "lines")
    writer.append({"text": text}, {"n": 2})
    writer.close()
    assert list(files.read_lines(tmp_path / "lines")) == [{"text": text}, {"n": 2}]


def test_append_that_a_full_disk_cut_is_an_error(tmp_path: Path) -> None:
    writer = files.LineWriter(tmp_path / "lines")
    with files_end_at(10), pytest.raises(OSError, match="File too large"):
        writer.append({"text": "longer than ten bytes"})
    writer.close()


def test_lines_before_one_that_a_full_disk_cut_stay_readable(tmp_path: Path) -> None:
    writer = files.LineWriter(tmp_path / "lines")
    writer.append({"n": 1})
    with files_end_at(15), pytest.raises(OSError, match="File too large"):
        writer.append({"text": "longer than fifteen bytes"})
    writer.close()
    assert list(files.read_lines(tmp_path / "lines")) == [{"n": 1}]


def test_lines_are_whole_and_in_order_once_a_full_disk_has_room_again(tmp_path: Path) -> None:
    writer = files.LineWriter(tmp_path / "lines")
    for size in range(0, 60, 7):
        with files_end_at(size), contextlib.suppress(OSError):
            writer.append({"n": size})
    writer.append({"n": 60})
    writer.close()
    read = [line["n"] for line in files.read_lines(tmp_path / "lines")]
    assert read == [*range(0, 60, 7), 60]


def test_a_file_whose_sync_failed_is_never_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed, synced = os.fsync, set[int](), list[int]()

    def fsync(fd: int) -> None:
        inode = os.fstat(fd).st_ino
        if not synced and path.exists() and inode == path.stat().st_ino:
            failed.add(inode)
            raise OSError(errno.EIO, "Input/output error")
        synced.append(inode)
        real(fd)

    path = tmp_path / "lines"
    writer = files.LineWriter(path)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        writer.append({"n": 1}, sync=True)
    writer.append({"n": 2})
    writer.sync()
    writer.append({"n": 3}, sync=True)
    writer.close()
    assert failed and not failed & set(synced)
    assert path.stat().st_ino in synced and path.stat().st_mode & 0o777 == 0o600
    assert [line["n"] for line in files.read_lines(path)] == [1, 2, 3]


# Durable files


def test_file_that_cannot_be_written_leaves_its_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    files.write_json(path, {"step": 1})
    with files_end_at(10), pytest.raises(OSError, match="File too large"):
        files.write_json(path, {"step": 2, "text": "x" * 100})
    assert files.read_json(path) == {"step": 1}


def test_file_that_cannot_be_written_leaves_nothing_half_written(tmp_path: Path) -> None:
    with files_end_at(10), pytest.raises(OSError, match="File too large"):
        files.write_json(tmp_path / "state.json", {"text": "x" * 100})
    assert list(tmp_path.iterdir()) == []


def test_reader_never_sees_half_of_a_file_that_is_being_replaced(tmp_path: Path) -> None:
    script = """
import json, os, sys
from pathlib import Path
from hpcresume import files
path = Path(sys.argv[1])
files.write_json(path, ["x"] * 3, sync=False)
reader = os.fork()
if reader == 0:
    try:
        for _ in range(1500):
            assert len(set(files.read_json(path))) == 1
    except BaseException:
        os._exit(1)
    os._exit(0)
while os.waitpid(reader, os.WNOHANG) == (0, 0):
    for text in "xyz":
        files.write_json(path, [text] * 5000, sync=False)
print(0)
"""
    # The status of a child that has been waited for is in the loop's last call.
    script = script.replace(
        "while os.waitpid(reader, os.WNOHANG) == (0, 0):",
        "while (ended := os.waitpid(reader, os.WNOHANG)) == (0, 0):",
    ).replace("print(0)", "print(ended[1])")
    assert python(script, tmp_path / "state.json") == 0


DURABLE = """
import sys
from pathlib import Path
from hpcresume import files
from hpcresume.journal import Journal
from hpcresume.run_dir import RunDir
root = Path(sys.argv[1])
files.write_json(root / "state", {"a": 1})
journal = Journal(root / "journal", link=1, job=None)
journal.write("saved", step=1)
journal.write("saved", step=2)
RunDir(root).claim_link({})
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The calls with which a file, a journal and a claim are written, and their paths."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace, to see the calls")
    root = tmp_path_factory.mktemp("durable")
    (root / "links").mkdir()
    log = root.with_name("durable.log")
    trace = ("strace", "-f", "-y", "-o", str(log), "-e", "trace=write,fsync,rename")
    python(f"{DURABLE}\nprint(0)", root, wrapper=trace)
    found = re.findall(r"^\d+ +(\w+)\((?:\d+<([^>]*)>|\"([^\"]*)\")", log.read_text(), re.M)
    paths = [(call, Path(by_fd or by_name)) for call, by_fd, by_name in found]
    below = [
        (call, str(path.relative_to(root))) for call, path in paths if root in (path, *path.parents)
    ]
    return [f"{call} {re.sub('[.](state|claim)[^/]*', 'new', path)}" for call, path in below]


def test_replaced_file_is_durable_by_its_own_sync_and_its_directory_s(
    calls: list[str],
) -> None:
    assert calls[:4] == ["write new", "fsync new", "rename new", "fsync ."]


def test_record_is_durable_by_the_sync_of_the_line_and_of_the_new_file_s_name(
    calls: list[str],
) -> None:
    assert calls[4:9] == ["fsync .", *["write journal", "fsync journal"] * 2]


def test_claim_is_durable_by_the_sync_of_all_that_it_is_made_of(calls: list[str]) -> None:
    assert calls[9:] == [
        "write links/new/claim.json",
        "fsync links/new/claim.json",
        "fsync links/new",
        "rename links/new",
        "fsync links",
    ]


# Claims


def test_claims_are_numbered_from_one(run: RunDir) -> None:
    assert [run.claim_link({}).number for _ in range(3)] == [1, 2, 3]


def test_claim_keeps_what_the_claimant_said(run: RunDir) -> None:
    link = run.claim_link({"job": "4711", "host": "n'1\n"})
    claim = files.read_json(link.claim)
    assert (claim["job"], claim["host"], claim["link"]) == ("4711", "n'1\n", 1)


RACE = """
import json, os, sys, time
from pathlib import Path
from hpcresume import files
from hpcresume.run_dir import RunDir

def race(run):
    go = time.monotonic() + 0.02
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                while time.monotonic() < go:
                    pass
                number = run.claim_link({"pid": os.getpid()}).number
            except BaseException:
                number = 255
            os._exit(number)
        children.append(child)
    torn = 0
    numbers = []
    while children:
        for number in run.link_numbers():
            claim = files.read_json_or_none(run.link(number).claim)
            torn += not claim or claim["link"] != number
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.remove(child)
                numbers.append(os.waitstatus_to_exitcode(status))
    left = sorted(p.name for p in run.links.iterdir() if p.name.startswith("."))
    return {"numbers": sorted(numbers), "torn": torn, "left": left}

print(json.dumps([race(RunDir(Path(path))) for path in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def races(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Twelve races of eight processes each, for the next link of a run."""
    root = tmp_path_factory.mktemp("races")
    runs = [make(root / f"{number} {ODD}") for number in range(12)]
    found = python(RACE, *(run.path for run in runs))
    assert isinstance(found, list)
    return found


def test_eight_racing_claimants_get_the_numbers_one_to_eight(races: list[dict[str, Any]]) -> None:
    assert [race["numbers"] for race in races] == [list(range(1, 9))] * len(races)


def test_content_of_a_claim_is_there_whenever_the_claim_is(races: list[dict[str, Any]]) -> None:
    assert [race["torn"] for race in races] == [0] * len(races)


def test_claimants_that_lost_a_number_leave_nothing_behind(races: list[dict[str, Any]]) -> None:
    assert [race["left"] for race in races] == [[]] * len(races)


def test_claim_after_a_link_that_is_not_the_newest_is_refused(run: RunDir) -> None:
    first, second = run.claim_after(0, {"job": "1"}), run.claim_after(0, {"job": "2"})
    assert first is not None and second is None
    assert [path.name for path in run.links.iterdir()] == ["0001"]
    assert files.read_json(run.link(1).claim)["job"] == "1"


CLAIM = """
import sys
from pathlib import Path
from hpcresume.run_dir import RunDir
RunDir(Path(sys.argv[1])).claim_link({"job": "1"})
"""


@pytest.mark.parametrize(
    "point", ["mkdir:1", "write:1", "fsync:1", "fsync:2", "rename:1", "fsync:3"]
)
def test_claimant_killed_anywhere_leaves_a_whole_claim_or_none(run: RunDir, point: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    call, count = point.split(":")
    killed = subprocess.run(
        ["strace", "-f", "-o", os.devnull, "-e", f"trace={call}"]
        + ["-e", f"inject={call}:signal=KILL:when={count}"]
        + [sys.executable, "-c", CLAIM, str(run.path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    found = [files.read_json(run.link(number).claim)["job"] for number in run.link_numbers()]
    assert found == (["1"] if point == "fsync:3" else [])
    assert run.claim_link({"job": "2"}).number == len(found) + 1


def test_claim_that_a_full_disk_prevents_is_an_error(run: RunDir) -> None:
    with files_end_at(0), pytest.raises(OSError, match="File too large"):
        run.claim_link({"job": "1"})


def test_claim_that_a_full_disk_prevents_leaves_nothing_behind(run: RunDir) -> None:
    with files_end_at(0), contextlib.suppress(OSError):
        run.claim_link({"job": "1"})
    assert list(run.links.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["7", "0007.bak", ".claim.1.ab", "00007", "٠٠٠٧", "x0007", "-0007"]
)
def test_stray_name_among_the_links_is_no_claim(run: RunDir, name: str) -> None:
    run.claim_link({})
    (run.links / name).mkdir()
    assert run.link_numbers() == [1]


def test_link_after_number_9999_is_number_10000(run: RunDir) -> None:
    run.link(9999).path.mkdir()
    assert run.claim_link({}).number == 10_000
    assert run.newest_link() == 10_000


# Journals


def write(link: LinkDir, kind: str, **fields: Any) -> None:
    """Append a record as the link's rank 0 does."""
    training = Journal(link.training, link=link.number, job="1")
    training.write(kind, **fields)
    training.close()


def kinds(run: RunDir, number: int) -> list[str]:
    return [record["kind"] for record in read_chain(run)[number - 1].records]


def test_record_is_read_back_as_it_was_written(run: RunDir) -> None:
    link = run.claim_link({})
    written = Journal(link.journal, link=1, job="7").write("queued", text='a "b"\n', after=["5"])
    assert journal.read_link(run, 1).last("queued") == written


def test_records_survive_a_move_of_the_run(run: RunDir, tmp_path: Path) -> None:
    write(run.claim_link({}), "started")
    moved = RunDir(run.path.rename(tmp_path / "somewhere\nelse"))
    assert kinds(moved, 1) == ["started"]


@pytest.mark.parametrize("which", ["journal", "training"])
def test_what_a_link_writes_after_the_next_has_claimed_is_not_read(run: RunDir, which: str) -> None:
    link = run.claim_link({})
    late = Journal(getattr(link, which), link=1, job=None)
    late.write("started")
    run.claim_link({})
    late.write("saved", step=9)
    assert kinds(run, 1) == ["started"]
    assert [r["kind"] for r in journal.read_link(run, 1).records] == ["started"]


def test_newest_link_is_read_to_its_end(run: RunDir) -> None:
    run.claim_link({})
    link = run.claim_link({})
    write(link, "started")
    write(link, "saved", step=9)
    assert kinds(run, 2) == ["started", "saved"]


def test_record_that_was_half_written_at_the_claim_is_not_read(run: RunDir) -> None:
    link = run.claim_link({})
    write(link, "started")
    whole = files.to_json({"v": 1, "t": 1.0, "kind": "saved", "step": 9})
    with link.training.open("ab") as file:
        file.write(whole[:20])
        file.flush()
        run.claim_link({})
        file.write(whole[20:])
    assert kinds(run, 1) == ["started"]


def test_records_of_both_writers_come_in_the_order_of_time(run: RunDir) -> None:
    link = run.claim_link({})
    for path, times in ((link.journal, (1, 4)), (link.training, (2, 3))):
        writer = files.LineWriter(path)
        writer.append(*({"t": t, "kind": str(t)} for t in times))
    assert kinds(run, 1) == ["1", "2", "3", "4"]


def test_order_of_a_writer_survives_a_clock_that_jumps_back(run: RunDir) -> None:
    link = run.claim_link({})
    files.LineWriter(link.journal).append({"t": 50, "kind": "claimed"})
    writer = files.LineWriter(link.training)
    writer.append(
        *({"t": t, "kind": k} for t, k in ((90, "started"), (10, "stepped"), (11, "ended")))
    )
    assert [k for k in kinds(run, 1) if k != "claimed"] == ["started", "stepped", "ended"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"5",
        b'"text"',
        b"null",
        b'{"adopted": 5}',
        b'{"adopted": {"journal": "x", "training": -1}}',
        b'{"adopted": {"journal": null, "training": []}}',
    ],
)
def test_chain_can_be_read_although_a_claim_is_damaged(run: RunDir, content: bytes) -> None:
    write(run.claim_link({}), "started")
    write(run.claim_link({}), "started")
    run.link(2).claim.write_bytes(content)
    assert [link.number for link in read_chain(run)] == [1, 2]
    assert kinds(run, 2) == ["started"]
    assert journal.read_link(run, 2).claim is not None


@settings(
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), max_size=8))
def test_journal_can_be_read_whatever_is_in_it(new_run: NewRun, lines: list[bytes]) -> None:
    run = new_run()
    link = run.link(1)
    link.path.mkdir()
    record = b'{"t": 1, "kind": "started"}'
    link.training.write_bytes(b"\n".join([*lines, record, b"[1]", b'{"t": "x", "kind": 1}']))
    assert "started" in kinds(run, 1)


# Lineage


def restored(link: LinkDir, step: int, segments: tuple[Segment, ...]) -> Lineage:
    """What a link records when it has restored a checkpoint; returns what it builds upon."""
    write(link, "restored", step=step, segments=journal.segments_to_json(segments))
    return Lineage(segments, link.number)


def test_run_without_links_holds_everything(run: RunDir) -> None:
    assert lineage(run).holds(1, 100)


def test_lineage_holds_what_was_adopted_and_nothing_beyond(run: RunDir) -> None:
    run.claim_link({})
    restored(run.claim_link({}), 100, (Segment(1, 100, 0),))
    over = lineage(run)
    assert [over.holds(1, step) for step in (99, 100, 101)] == [True, True, False]


def test_lineage_is_the_newest_one_that_was_adopted(run: RunDir) -> None:
    run.claim_link({})
    restored(run.claim_link({}), 100, (Segment(1, 100, 0),))
    run.claim_link({})
    assert lineage(run) == Lineage((Segment(1, 100, 0),), 2)


def test_fresh_start_leaves_every_earlier_link_off_the_lineage(run: RunDir) -> None:
    restored(run.claim_link({}), 0, ())
    restored(run.claim_link({}), 0, ())
    assert not lineage(run).holds(1, 1)


def test_fallback_leaves_the_later_work_off_the_lineage(run: RunDir) -> None:
    for _ in range(3):
        run.claim_link({})
    restored(run.link(3), 100, (Segment(1, 100, 0),))
    assert not lineage(run).holds(2, 150)


def test_lineage_that_a_fenced_link_adopts_late_does_not_count(run: RunDir) -> None:
    run.claim_link({})
    second = run.claim_link({})
    run.claim_link({})
    restored(second, 100, (Segment(1, 100, 0),))
    assert lineage(run) == Lineage()


def test_segments_survive_json() -> None:
    segments = (Segment(1, 100, 4096), Segment(7, 250, 0))
    text = json.dumps(journal.segments_to_json(segments))
    assert journal.segments_from_json(json.loads(text)) == segments


@pytest.mark.parametrize("value", [None, 5, "ab", [[1, 2]], [["a", 1, 1]], [None]])
def test_segments_refuse_anything_else(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        journal.segments_from_json(value)


# The step that is known


def test_run_that_has_not_trained_knows_no_step(run: RunDir) -> None:
    run.claim_link({})
    assert known_step(read_chain(run)) == 0


def test_known_step_is_the_newest_commit(run: RunDir) -> None:
    link = run.claim_link({})
    restored(link, 0, ())
    for step in (10, 20):
        write(link, "saved", step=step)
    assert known_step(read_chain(run)) == 20


def test_known_step_of_a_link_that_died_early_is_that_of_the_links_before(run: RunDir) -> None:
    write(run.claim_link({}), "saved", step=20)
    run.claim_link({})
    assert known_step(read_chain(run)) == 20


def test_known_step_after_a_fallback_is_where_it_fell_back_to(run: RunDir) -> None:
    write(run.claim_link({}), "saved", step=20)
    restored(run.claim_link({}), 10, (Segment(1, 10, 0),))
    assert known_step(read_chain(run)) == 10


def test_commit_that_a_fenced_link_records_late_is_not_known(run: RunDir) -> None:
    link = run.claim_link({})
    write(link, "saved", step=20)
    run.claim_link({})
    write(link, "saved", step=30)
    assert known_step(read_chain(run)) == 20


# Metrics along the lineage


class Link:
    """A link that trains: one metric line a step, as sessions do it."""

    def __init__(self, run: RunDir, start: int = 0, base: tuple[Segment, ...] = ()) -> None:
        self.dir = run.claim_link({})
        self.step = start
        self.over = restored(self.dir, start, base)
        self.metrics = files.LineWriter(self.dir.metrics)

    def train(self, steps: int) -> Link:
        for _ in range(steps):
            self.step += 1
            self.metrics.append({"step": self.step, "link": self.dir.number})
        return self

    def commit(self) -> tuple[Segment, ...]:
        """The lineage that goes into a checkpoint of now."""
        return self.over.extended(self.dir.number, self.step, self.metrics.size_bytes())


def merged(run: RunDir) -> list[tuple[int, int]]:
    """(step, link) of each line of the merged metrics."""
    return [(line["step"], line["link"]) for line in read_metrics(run)]


def test_steps_after_the_last_checkpoint_count_once(run: RunDir) -> None:
    first = Link(run).train(3)
    saved = first.commit()
    first.train(2)
    Link(run, 3, saved).train(4)
    assert merged(run) == [(s, 1) for s in (1, 2, 3)] + [(s, 2) for s in (4, 5, 6, 7)]


def test_metrics_of_a_link_without_a_step_are_those_before_it(run: RunDir) -> None:
    saved = Link(run).train(3).commit()
    Link(run, 3, saved)
    Link(run, 3, saved)
    assert merged(run) == [(1, 1), (2, 1), (3, 1)]


def test_metrics_after_a_fallback_drop_what_was_given_up(run: RunDir) -> None:
    old = Link(run).train(2).commit()
    Link(run, 2, old).train(5).commit()
    Link(run, 2, old).train(1)
    assert merged(run) == [(1, 1), (2, 1), (3, 3)]


def test_metrics_that_a_fenced_link_writes_late_are_not_read(run: RunDir) -> None:
    first = Link(run).train(3)
    saved = first.commit()
    Link(run, 3, saved).train(1)
    first.train(5)
    assert merged(run) == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_metrics_written_late_are_not_read_before_the_next_link_has_restored(run: RunDir) -> None:
    first = Link(run).train(3)
    run.claim_link({})
    first.train(5)
    assert merged(run) == [(1, 1), (2, 1), (3, 1)]


def test_metrics_of_the_running_link_are_read_to_the_end(run: RunDir) -> None:
    link = Link(run).train(2)
    link.commit()
    link.train(2)
    assert merged(run) == [(1, 1), (2, 1), (3, 1), (4, 1)]


@settings(
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_merged_metrics_hold_each_step_once_and_from_the_link_that_counts(
    new_run: NewRun, data: st.DataObject
) -> None:
    run = new_run()
    standing: list[tuple[int, tuple[Segment, ...], list[tuple[int, int]]]] = [(0, (), [])]
    fenced: list[Link] = []
    expected: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 6), label="links")):
        # A fallback forgets the checkpoints after the one that is used.
        del standing[data.draw(st.integers(1, len(standing)), label="of the checkpoints") :]
        start, base, expected = standing[-1]
        link = Link(run, start, base)
        expected = list(expected)
        for steps in data.draw(st.lists(st.integers(0, 3), max_size=3), label="steps"):
            link.train(steps)
            expected += [(link.step - k, link.dir.number) for k in reversed(range(steps))]
            if data.draw(st.booleans(), label="saved"):
                standing.append((link.step, link.commit(), list(expected)))
        for zombie in fenced:
            zombie.train(data.draw(st.integers(0, 2), label="late steps"))
        fenced.append(link)
    assert merged(run) == expected
