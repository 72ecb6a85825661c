"""What a training framework in a command tells its link, and checkpoints that others wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_layer import Call, struck
from made_run import make_run
from oracle import ENVIRON
from safetensors.torch import save_file
from test_command import Chain, chain, script

from hpcresume import files
from hpcresume.adapters.ending import Attempt
from hpcresume.adapters.guest import Guest
from hpcresume.adapters.heard import Heard
from hpcresume.adapters.notes import Notes
from hpcresume.adapters.sight import Sight
from hpcresume.adapters.vouched import NAME, newest, numbered, read_voucher, vouch, why_not
from hpcresume.config import ProgressConfig, from_mapping
from hpcresume.errors import CheckpointError
from hpcresume.journal import LinkRecords, known_step, read_chain, read_metrics
from hpcresume.observe.metrics import MetricTail
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.successors import lead_s
from hpcresume.training.clock import MARGIN_S

__all__ = ["chain"]


def plain(folder: Path, step: int) -> Path:
    """A checkpoint as a plain Trainer leaves it."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.arange(64.0)}, path / "model.safetensors")
    torch.save({"state": torch.ones(16)}, path / "optimizer.pt")
    (path / "config.json").write_text("{}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


# ---- checkpoints that others wrote -------------------------------------------------------------


def test_a_vouched_checkpoint_is_whole_until_a_byte_of_it_changes(tmp_path: Path) -> None:
    path = plain(tmp_path, 5)
    voucher = vouch(path, 5, {"run": "r"})
    assert why_not(path) is None
    assert read_voucher(path) == voucher
    assert (voucher.step, voucher.about) == (5, {"run": "r"})
    assert voucher.num_bytes == sum(f.stat().st_size for f in path.iterdir() if f.name != NAME)
    for name in ("model.safetensors", "optimizer.pt", "config.json"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert why_not(path) == f"{name} is not what was saved: its digest differs"
        (path / name).write_bytes(data)
    assert why_not(path) is None


def spoil(path: Path, how: str) -> None:
    model, optimizer = path / "model.safetensors", path / "optimizer.pt"
    match how:
        case "missing":
            optimizer.unlink()
        case "shorter":
            os.truncate(model, model.stat().st_size - 4)
        case "voucher":
            (path / NAME).write_text('{"v": 1')
        case "escapes":
            content = json.loads((path / NAME).read_text())
            content["files"]["../../passwd"] = content["files"].pop("config.json")
            (path / NAME).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", "optimizer.pt is missing"),
        ("shorter", "model.safetensors has "),
        ("voucher", "hpcresume.json is damaged"),
        ("escapes", "hpcresume.json is damaged"),
    ],
)
def test_what_is_wrong_with_a_vouched_checkpoint_is_said(
    tmp_path: Path, how: str, expected: str
) -> None:
    path = plain(tmp_path, 5)
    vouch(path, 5)
    spoil(path, how)
    assert (why_not(path) or "").startswith(expected)


def test_a_checkpoint_saved_anew_and_cut_off_does_not_pass_for_the_one_that_was_vouched(
    tmp_path: Path,
) -> None:
    path = plain(tmp_path, 5)
    vouch(path, 5)
    save_file({"weight": torch.zeros(64)}, path / "model.safetensors")
    assert why_not(path) is not None


@pytest.mark.parametrize(
    ("spoiled", "expected"),
    [
        pytest.param(lambda p: None, None, id="whole"),
        pytest.param(
            lambda p: (p / "trainer_state.json").unlink(), "its save was cut off", id="state"
        ),
        pytest.param(
            lambda p: os.truncate(p / "model.safetensors", 100), "instead of", id="tensors"
        ),
        pytest.param(lambda p: os.truncate(p / "model.safetensors", 3), "cut off", id="head"),
        pytest.param(lambda p: os.truncate(p / "optimizer.pt", 300), "cut off", id="archive"),
        pytest.param(lambda p: flip(p / "optimizer.pt"), "is damaged", id="crc"),
        pytest.param(lambda p: (p / "config.json").write_text("{"), "is no JSON", id="json"),
        pytest.param(
            lambda p: (p / "trainer_state.json").write_text('{"global_step": 4}'),
            "tells of step 4",
            id="step",
        ),
        pytest.param(
            lambda p: (p / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
            ),
            "model-00001-of-00002.safetensors is missing",
            id="index",
        ),
        pytest.param(
            lambda p: (p / "model.safetensors.index.json").write_text("[]"),
            "names no weights",
            id="foreign-index",
        ),
        pytest.param(lambda p: encrypt(p / "optimizer.pt"), "not written by", id="encrypted"),
    ],
)
def test_of_a_plain_checkpoint_the_formats_tell_whether_it_is_whole(
    tmp_path: Path, spoiled: Callable[[Path], Any], expected: str | None
) -> None:
    path = plain(tmp_path, 5)
    spoiled(path)
    wrong = why_not(path)
    assert wrong is None if expected is None else expected in (wrong or "")


def flip(path: Path) -> None:
    """Change a byte of the tensor in an archive of torch.save."""
    data = bytearray(path.read_bytes())
    at = data.index(torch.ones(4).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)


def encrypt(path: Path) -> None:
    """Mark the members of an archive as encrypted."""
    data = bytearray(path.read_bytes())
    for head, at_flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(head)
        while at >= 0:
            data[at + at_flags] |= 1
            at = data.find(head, at + 4)
    path.write_bytes(data)


def test_of_one_file_the_digests_stand_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"x": torch.ones(8)}, path)
    assert why_not(path) is None
    vouch(path, 3)
    assert (tmp_path / "last.ckpt.hpcresume.json").is_file()
    assert why_not(path) is None
    flip(path)
    assert why_not(path) == "last.ckpt is not what was saved: its digest differs"


def test_the_newest_by_number_that_is_whole_is_found_and_the_others_are_named(
    tmp_path: Path,
) -> None:
    for step in (9, 10, 100):
        vouch(plain(tmp_path, step), step)
    spoil(tmp_path / "checkpoint-100", "shorter")
    (tmp_path / "checkpoint-200").mkdir()
    for name in ("best", "\N{SUPERSCRIPT TWO}"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    found = newest(numbered(tmp_path))
    assert found.path == tmp_path / "checkpoint-10"
    assert found.voucher is not None
    assert found.voucher.step == 10
    assert [path.name for path, _ in found.passed_over] == ["checkpoint-200", "checkpoint-100"]


# ---- what a guest hears ------------------------------------------------------------------------


@pytest.fixture
def link(tmp_path: Path) -> LinkDir:
    run = make_run(tmp_path)
    return run.claim_link({"job": "1"})


def environ(run: RunDir, link: LinkDir, **more: str) -> dict[str, str]:
    return {
        "HPCRESUME_RUN": str(run.path),
        "HPCRESUME_LINK": str(link.number),
        "HPCRESUME_LEAD_S": "5",
        **more,
    }


def guest_of(link: LinkDir, rank: int = 0) -> Guest:
    return Guest(environ(RunDir(link.path.parent.parent), link), rank=rank)


@pytest.fixture
def guest(link: LinkDir) -> Iterator[Guest]:
    guest = guest_of(link)
    guest.listen()
    yield guest
    guest.unlisten()


def test_a_guest_hears_its_links_stop_with_the_reason(link: LinkDir, guest: Guest) -> None:
    assert guest.why_stop() is None
    files.write_durably(link.stop, b"deadline: 9 s left\n")
    assert until(guest.why_stop) == "deadline: 9 s left"


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
    raise AssertionError("timed out")


def test_a_guest_stops_before_its_jobs_end_and_follows_an_end_that_moves(
    link: LinkDir, guest: Guest
) -> None:
    files.write_json(link.deadline, {"end": time.time() + 60})
    assert guest.why_stop() is None
    files.write_json(link.deadline, {"end": time.time() + 3})
    assert until(guest.why_stop).startswith("deadline: ")


@pytest.mark.parametrize("request_file", ["stop", "cancel"])
def test_a_guest_hears_what_is_asked_of_its_run(
    link: LinkDir, guest: Guest, request_file: str
) -> None:
    assert guest.run is not None
    getattr(guest.run, request_file).touch()
    assert until(guest.why_stop) == request_file.upper()


def test_a_signal_is_heard_and_the_users_own_handler_called(link: LinkDir) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        guest = guest_of(link)
        guest.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert until(guest.why_stop) == "SIGTERM"
        guest.unlisten()
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_a_link_a_guest_tells_nobody_and_stops_for_nothing_but_a_signal(
    tmp_path: Path,
) -> None:
    guest = Guest({}, rank=0)
    assert not guest.active
    assert guest.why_stop() is None
    guest.metrics(1, 0.0, {"loss": 1.0})
    voucher = guest.saved(5, plain(tmp_path, 5), 0.1)
    assert not guest.owns(voucher)
    assert why_not(tmp_path / "checkpoint-5") is None


# ---- what a guest tells ------------------------------------------------------------------------


def test_what_a_guest_tells_is_heard_as_it_grows_whole_lines_only(
    link: LinkDir, guest: Guest, tmp_path: Path
) -> None:
    heard = Heard(link.guest)
    assert not heard.look()
    guest.began(0, newest([]), looked_in=tmp_path)
    guest.progress(1, max_steps=9, epoch=0.5, epochs=3)
    assert [record["kind"] for record in heard.look()] == ["began", "progress"]
    assert (heard.step, heard.max_steps, heard.epoch, heard.epochs) == (1, 9, 0.5, 3)
    assert heard.missing() == "training is at step 1 of 9"
    with link.guest.open("ab") as file:
        file.write(b'{"t": 1, "kind": "comp')
    assert not heard.look()
    guest.completed(9, "step 9 of 9")
    # The torn line swallows what was appended to it, as after a kill: the next one is whole.
    guest.completed(9, "step 9 of 9")
    heard.look()
    assert heard.completed == "step 9 of 9"
    assert heard.missing() == ""


def test_only_the_first_rank_tells(link: LinkDir, tmp_path: Path) -> None:
    other = guest_of(link, rank=1)
    other.began(0, newest([]), looked_in=tmp_path)
    other.metrics(1, 0.0, {"loss": 1.0})
    other.completed(1, "x")
    assert not link.guest.exists()
    assert not link.metrics.exists()


def test_metrics_of_a_step_are_one_line_and_follow_the_checkpoint_that_is_restored(
    link: LinkDir, guest: Guest, tmp_path: Path
) -> None:
    run = guest.run
    assert run is not None
    guest.began(0, newest([]), looked_in=tmp_path)
    for step in (1, 2, 3):
        guest.metrics(step, 0.1, {"loss": float(step), "words": "no number"})
        guest.metrics(step, 0.1, {"eval_loss": 0.5})
        if step == 2:
            path = plain(tmp_path / "out", 2)
            guest.saved(2, path, 0.1)
    guest.completed(3, "x")
    second = guest_of(run.claim_link({"job": "2"}))
    found = newest(numbered(tmp_path / "out"))
    assert second.owns(found.voucher)
    second.began(2, found, looked_in=tmp_path / "out")
    # As the command's parent records it.
    record = Heard(run.link(2).guest).look()[0]
    files.LineWriter(run.link(2).training).append({**record, "kind": "restored"})
    second.metrics(2, 0.1, {"loss": 20.0})
    second.metrics(3, 0.1, {"loss": 30.0})
    second.completed(3, "x")
    lines = [(r["step"], r["loss"], r.get("eval_loss")) for r in read_metrics(run)]
    assert lines == [(1, 1.0, 0.5), (2, 2.0, 0.5), (3, 30.0, None)]


def test_a_step_or_an_epoch_that_a_script_logs_is_not_taken_for_the_trainings(
    link: LinkDir, guest: Guest
) -> None:
    for step in (10, 20):
        guest.metrics(step, 1.0, {"loss": 0.5, "step": 1.0, "epoch": 0.25})
    guest.completed(20, "x")
    lines = [*files.read_lines(link.metrics)]
    assert lines == [{"step": s, "epoch": 1, "loss": 0.5} for s in (10, 20)]


def test_the_metrics_before_a_checkpoint_are_on_the_disk_when_it_is_vouched_for(
    link: LinkDir, guest: Guest, tmp_path: Path
) -> None:
    path = plain(tmp_path / "out", 2)
    guest.metrics(2, 0.1, {"loss": 1.0})
    calls: list[Call] = []
    with struck(tmp_path, calls.append):
        guest.saved(2, path, 0.1)
    synced = [call.path for call in calls if call.name == "fsync"]
    assert synced.index(str(link.metrics)) < synced.index(str(path / "config.json"))
    written = [call.name for call in calls if call.path == str(link.metrics)]
    assert written.index("write") < written.index("fsync")


def test_metrics_of_the_links_before_are_there_while_a_guest_still_starts(
    link: LinkDir, guest: Guest, tmp_path: Path
) -> None:
    run = guest.run
    assert run is not None
    sight = Sight(ProgressConfig(), tmp_path)
    first = Notes(run, link, sight, tmp_path, job="1")
    guest.began(0, newest([]), looked_in=tmp_path)
    guest.metrics(1, 0.1, {"loss": 1.0})
    guest.saved(1, plain(tmp_path / "out", 1), 0.1)
    first.hear()
    second = run.claim_link({"job": "2"})
    notes = Notes(run, second, sight, tmp_path, job="2")
    notes.started()
    tail = MetricTail(run)
    assert [line["step"] for line in tail.look()] == [1]
    assert notes.known == known_step(read_chain(run)) == 1
    found = newest(numbered(tmp_path / "out"))
    following = guest_of(second)
    following.began(1, found, looked_in=tmp_path)
    following.metrics(2, 0.1, {"loss": 0.5})
    following.completed(2, "x")
    notes.hear()
    assert [line["step"] for line in tail.look()] == [2]
    assert [line["step"] for line in MetricTail(run).look()] == [1, 2]


def test_after_a_second_restore_in_a_link_what_was_known_before_it_counts_no_more(
    link: LinkDir,
) -> None:
    run = RunDir(link.path.parent.parent)
    writer = files.LineWriter(link.training)
    for kind, step in (("restored", 50), ("restored", 40), ("saved", 45)):
        writer.append({"v": 1, "t": 1.0, "kind": kind, "step": step})
    assert known_step(read_chain(run)) == 45


def test_the_first_lead_time_follows_the_saves_that_a_framework_has_measured() -> None:
    config = from_mapping({"command": ["true"]}, "test")
    saved = {"v": 1, "t": 0.0, "kind": "saved", "step": 1, "save_s": 90.0}
    assert lead_s(config, [LinkRecords(1, {}, [saved])]) == 180 + MARGIN_S
    left = {"v": 1, "t": 0.0, "kind": "saved", "step": 2, "seconds": 12.0}
    assert lead_s(config, [LinkRecords(1, {}, [saved, left])]) == 12 + MARGIN_S


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        pytest.param(Attempt(code=0, told="deadline", took_s=7.0), [7.0], id="left"),
        pytest.param(Attempt(code=-9, told="x", took_s=60.0, killed=True), [60.0], id="killed"),
        pytest.param(Attempt(code=0, told="deadline"), [], id="before-it-was-told"),
    ],
)
def test_how_long_a_framework_took_to_leave_is_learned_even_where_it_was_killed(
    link: LinkDir, guest: Guest, tmp_path: Path, attempt: Attempt, expected: list[float]
) -> None:
    assert guest.run is not None
    guest.began(3, newest([]), looked_in=tmp_path)
    notes = Notes(guest.run, link, Sight(ProgressConfig(), tmp_path), tmp_path, job="1")
    notes.ended(attempt)
    records = [r for k in read_chain(guest.run) for r in k.all("saved") if "seconds" in r]
    assert [r["seconds"] for r in records] == expected


# ---- in a chain --------------------------------------------------------------------------------

_GUEST = """
import os, sys, time
from pathlib import Path
from hpcresume.adapters.guest import Guest, Left
from hpcresume.adapters.vouched import newest, numbered
out = Path("out"); out.mkdir(exist_ok=True)
guest = Guest(os.environ, rank=0)
guest.listen()
found = newest(numbered(out))
step = found.voucher.step if found.voucher else 0
guest.began(step, found, looked_in=out)
while step < 60:
    time.sleep(0.05)
    step += 1
    guest.metrics(step, 0.0, {"loss": 1 / step})
    guest.progress(step, max_steps=60, epoch=step / 60, epochs=1)
    why = guest.why_stop()
    if why or step % 10 == 0:
        path = out / f"checkpoint-{step}"; path.mkdir(exist_ok=True)
        (path / "trainer_state.json").write_text('{"global_step": %d}' % step)
        (path / "weights.json").write_text(str(step))
        guest.saved(step, path, 0.01)
    print("at", step, flush=True)
    if why:
        guest.leaves(step, why)
        raise Left
guest.completed(60, "step 60 of 60")
"""

#: It stands at a step of each of the first links until it is told to leave, or killed.
_STANDS = """
    while step == {"1": 13, "2": 25}.get(os.environ["HPCRESUME_LINK"]) and not guest.why_stop():
        time.sleep(0.02)
"""


def test_a_guest_is_killed_and_asked_to_leave_and_its_chain_comes_to_the_end(
    chain: Chain,
) -> None:
    begin = "while step < 60:\n"
    assert begin in _GUEST
    name = script(chain, _GUEST.replace(begin, begin + _STANDS))
    argv = ("--set=chain.signal_command=none", "--", sys.executable, name)
    chain.submit(*argv, detach=True)
    chain.cut_guest(1, signal.SIGKILL, after="at 13\n")
    chain.cut_guest(2, signal.SIGTERM, after="at 25\n")
    chain.completed()
    assert chain.ends() == ["killed", "deadline", "completed"], chain.story()
    begun = [r for r in chain.records("restored") if r.get("guest")]
    assert [r["step"] for r in begun][:2] == [0, 10]
    assert begun[2]["step"] > 25
    assert begun[2]["verified"] is True
    # No `--checkpoints` and no pattern was given: the guest's steps are the progress.
    assert chain.status()["step"] == 60
    assert [r["step"] for r in read_metrics(chain.run)] == list(range(1, 61))
    state = json.loads(chain.run.trainer_state.read_text())
    assert (state["global_step"], state["max_steps"], state["completed"]) == (60, 60, True)


def test_a_guest_that_has_not_come_to_its_end_does_not_complete_its_run(chain: Chain) -> None:
    name = script(chain, _GUEST.replace("while step < 60", "while step < 20"))
    text = (chain.folder / name).read_text()
    (chain.folder / name).write_text(text.replace("guest.completed(60", "sys.exit(0)  # "))
    said = chain.submit("--", sys.executable, name)
    assert chain.code == 8, said
    assert "training is at step 20 of 60" in said


def test_a_chain_whose_checkpoints_are_all_gone_never_begins_afresh_in_silence(
    link: LinkDir, guest: Guest, tmp_path: Path
) -> None:
    from hpcresume.adapters.guest import nothing_left

    assert guest.run is not None
    assert guest.known_step(tmp_path / "out") == 0
    project = Path(guest.run.identify()["project"])
    path = os.path.relpath(tmp_path / "out" / "checkpoint-40", project)
    record = {"v": 1, "t": 1.0, "kind": "saved", "step": 40, "guest": True, "path": path}
    files.LineWriter(link.training).append(record)
    assert guest.known_step(tmp_path / "out") == 40
    assert guest.known_step(tmp_path / "other") == 0
    with pytest.raises(CheckpointError, match="had saved step 40"):
        raise nothing_left(guest.run, 40, tmp_path)


def test_the_modules_of_a_guest_do_without_torch() -> None:
    program = (
        "import sys, hpcresume.adapters.guest, hpcresume.adapters.heard; "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRON, check=False)
    assert done.returncode == 0
