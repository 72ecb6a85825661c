"""`hpcresume checkpoints` as a user meets it: the list, verification, pruning, pins."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from fcntl import ioctl
from pathlib import Path

import pytest
from made_run import FakeSlurm, Said, add_link, complete, make_run, queue_job, readable
from oracle import ENVIRON
from terminal import in_terminal

from hpcresume import files
from hpcresume.checkpoint import disk
from hpcresume.checkpoint import manifest as manifests
from hpcresume.checkpoint.listing import list_checkpoints
from hpcresume.checkpoint.manifest import FileEntry, Manifest, hash_stream
from hpcresume.config import CheckpointConfig
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.driver_file import only_driver
from hpcresume.story import this_process

SIZE = 10_000


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of runs below a project, where the commands are typed."""
    project = tmp_path / "ada's project"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("HPCRESUME_RUNS", raising=False)
    return project / "runs"


@pytest.fixture
def said(said: Said) -> Said:
    """`hpcresume checkpoints`, run in this process: exit code, output, errors."""
    return lambda *argv: said("checkpoints", *argv)


def put(
    run: RunDir,
    step: int,
    *,
    loss: float | None = None,
    link: int = 1,
    size: int = SIZE,
    run_id: str | None = None,
    folder: Path | None = None,
) -> Path:
    """A checkpoint of one file, as a link commits it, or in another folder before it does."""
    path = folder or run.checkpoint(step)
    path.mkdir()
    data = (f"weights of step {step}\n" * (size // 10)).encode()[:size]
    (path / "model.safetensors").write_bytes(data)
    num_bytes, chunks = hash_stream([data])
    content = Manifest(
        step=step,
        epoch=step // 100,
        link=link,
        run_id=run_id or run.identify()["id"],
        parent=None,
        files=(FileEntry(name="model.safetensors", bytes=num_bytes, chunks=chunks),),
        created=time.time() - 3600 + step / 1000,
        metric=None if loss is None else {"name": "loss", "value": loss, "mode": "min"},
    )
    (path / manifests.NAME).write_bytes(content.to_bytes())
    return path


@pytest.fixture
def run(runs: Path) -> RunDir:
    """A run that rests, with seven checkpoints, of which the second is the best."""
    run = make_run(runs, max_steps=1000, checkpoint={"keep_last": 3})
    add_link(run)
    for step in range(100, 800, 100):
        put(run, step, loss=0.1 if step == 200 else 1 / step + 0.5)
    return run


def damage(run: RunDir, step: int) -> None:
    """Change one byte of a checkpoint."""
    path = run.checkpoint(step) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def everything(run: RunDir) -> dict[str, str]:
    """Every file of a run with a digest of its content."""
    return {
        str(path.relative_to(run.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.path.rglob("*"))
        if path.is_file()
    }


# ---- the list ------------------------------------------------------------------------------


def test_the_list_has_a_row_for_each_checkpoint_and_says_what_the_run_will_need(
    run: RunDir, said: Said
) -> None:
    run.pin(300).touch()
    code, out, err = said("toy")
    lines = out.splitlines()
    assert (code, err, lines[0]) == (0, "", str(run.path))
    assert lines[1].split() == ["STEP", "EPOCH", "AGE", "LINK", "METRIC", "SIZE", "NOTE"]
    assert [line.split()[0] for line in lines[2:9]] == [str(s) for s in range(100, 800, 100)]
    assert lines[2].split() == [
        *("100", "2", "60", "min", "1", "loss", "0.5100", "10.0", "kB", "may", "go"),
    ]
    assert lines[3].endswith("  loss 0.1000  10.0 kB  best")
    assert lines[4].endswith("  10.0 kB  pinned")
    assert lines[5].endswith("  10.0 kB  may go")
    assert lines[8].endswith("  10.0 kB")
    assert re.fullmatch(r"7 checkpoints hold 70\.0 kB; [0-9.]+ [MGTP]B are free\.", lines[9])


def test_what_a_run_will_need_is_what_its_policy_may_hold_at_a_time(runs: Path, said: Said) -> None:
    run = make_run(runs, max_steps=1000, checkpoint={"keep_every": 500})
    put(run, 100, loss=0.5)
    _, out, _ = said()
    assert (
        "1 checkpoint holds 10.0 kB. The run will need about 80.0 kB more: up to 9 at a time "
        "(keep_last 5 + keep_best 1 + keep_every 500 + 1 while saving), 10.0 kB each; "
    ) not in out
    files.write_json(run.trainer_state, {"total_steps": 1000})
    _, out, _ = said()
    assert (
        "1 checkpoint holds 10.0 kB. The run will need about 80.0 kB more: up to 9 at a time "
        "(keep_last 5 + keep_best 1 + keep_every 500 + 1 while saving), 10.0 kB each; "
    ) in out


def test_more_than_is_free_is_said(runs: Path, said: Said) -> None:
    run = make_run(runs)
    path = put(run, 100)
    # As large as a file of holes may be said to be: nobody reads it here.
    content = manifests.parse((path / manifests.NAME).read_bytes())
    size = 1 << 43
    os.truncate(path / "model.safetensors", size)
    entry = FileEntry(name="model.safetensors", bytes=size, chunks=())
    whole = Manifest(**{**content.__dict__, "files": (entry,)})
    (path / manifests.NAME).write_bytes(whole.to_bytes())
    _, out, _ = said()
    assert out.splitlines()[-1] == (
        "That is more than is free. Make room, or keep fewer: hpcresume resume toy --set "
        "checkpoint.keep_last=N."
    )


def test_a_complete_run_needs_no_more(runs: Path, said: Said) -> None:
    run = complete(make_run(runs))
    put(run, 10)
    assert "1 checkpoint holds 10.0 kB; " in said("toy")[1]


def test_a_run_without_checkpoints_says_so(runs: Path, said: Said) -> None:
    run = make_run(runs)
    assert said()[:2] == (0, f"{run.path}\ntoy has no checkpoint yet.\n")


def test_what_does_not_count_is_named_with_its_reason(run: RunDir, said: Said) -> None:
    (run.checkpoint(300) / "model.safetensors").unlink()
    run.checkpoint(900).mkdir()
    put(run, 800, run_id="another")
    _, out, _ = said()
    assert "checkpoint-300 does not count: model.safetensors is missing." in out
    assert "checkpoint-900 does not count: it has no readable manifest" in out
    assert "checkpoint-800 does not count: it belongs to another run." in out
    assert "6 checkpoints hold 60.0 kB" in out


def test_a_late_commit_of_a_fenced_link_does_not_count(run: RunDir, said: Said) -> None:
    add_link(run)
    _, out, _ = said()
    assert (
        "checkpoint-700 does not count: link 1 wrote it after a newer link had taken over." in out
    )


def test_saves_and_removals_of_a_living_link_are_never_taken_for_damage(runs: Path) -> None:
    run = make_run(runs)
    add_link(run)
    put(run, 1)
    over = threading.Event()

    def train() -> None:
        step = 1
        while not over.is_set():
            step += 1
            # As a link does: written elsewhere, renamed, and renamed again to be removed.
            private = run.partial("checkpoint")
            os.rename(put(run, step, folder=private), run.checkpoint(step))
            disk.remove(run, step - 1)

    link = threading.Thread(target=train)
    link.start()
    try:
        for _ in range(500):
            listing = list_checkpoints(run, CheckpointConfig(), complete=False)
            assert listing.left_out == {}
    finally:
        over.set()
        link.join()


def test_the_list_of_a_run_that_is_not_there_is_an_error(runs: Path, said: Said) -> None:
    make_run(runs, "other")
    code, _, err = said("toy")
    assert (code, "No run 'toy'" in err) == (3, True)


def test_json_is_one_document_with_a_schema_version(run: RunDir, said: Said) -> None:
    run.pin(300).touch()
    run.checkpoint(900).mkdir()
    code, out, err = said("--json")
    document = json.loads(out)
    assert (code, err, document["schema_version"], document["run"]) == (0, "", 1, "toy")
    assert document["policy"] == {"last": 3, "best": 1, "every": None}
    assert [c["step"] for c in document["checkpoints"]] == list(range(100, 800, 100))
    second = document["checkpoints"][1]
    assert {k: second[k] for k in ("best", "bytes", "files", "pinned", "kept", "verified")} == {
        "best": True,
        "bytes": SIZE,
        "files": 1,
        "pinned": False,
        "kept": ["best"],
        "verified": None,
    }
    assert second["metric"] == {"name": "loss", "value": 0.1, "mode": "min"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.*\+00:00", second["created"])
    assert document["checkpoints"][2]["kept"] == ["pinned"]
    assert [c["damaged"] for c in document["left_out"]] == [True]
    assert document["total_bytes"] == 7 * SIZE
    assert document["free_bytes"] > 0


def test_json_has_no_numbers_that_json_lacks(runs: Path, said: Said) -> None:
    put(make_run(runs), 100, loss=float("nan"))
    _, out, _ = said("--json")
    (found,) = json.loads(out, parse_constant=pytest.fail)["checkpoints"]
    assert found["metric"] == {"name": "loss", "value": None, "mode": "min"}


# ---- verify --------------------------------------------------------------------------------


def test_verify_reads_every_checkpoint_and_changes_nothing(run: RunDir, said: Said) -> None:
    before = everything(run)
    code, out, _ = said("--verify")
    assert code == 0
    assert re.findall(r"^checkpoint-(\d+)  verified  10\.0 kB in \d+\.\d s$", out, re.M) == [
        str(step) for step in range(100, 800, 100)
    ]
    assert out.endswith("7 checkpoints are as written, to the last byte.\n")
    assert everything(run) == before


def test_verify_finds_one_changed_byte_and_leaves_it_where_it_is(run: RunDir, said: Said) -> None:
    damage(run, 400)
    before = everything(run)
    code, out, _ = said("--verify", "toy")
    assert code == 7
    assert (
        "checkpoint-400  damaged   model.safetensors has changed between byte 0 and 10,000" in out
    )
    assert out.endswith(
        "1 of 7 damaged; nothing was changed. A link that comes upon a damaged checkpoint puts it "
        "aside and takes the next older one.\n"
    )
    assert everything(run) == before


@pytest.mark.parametrize(
    "argv", [["--verify", "400"], ["toy", "--verify", "400"], ["--verify", "400", "toy"]]
)
def test_verify_of_a_step_reads_that_one_alone(
    run: RunDir, said: Said, argv: Sequence[str]
) -> None:
    damage(run, 100)
    code, out, _ = said(*argv)
    assert (code, out.count("verified")) == (0, 1)
    assert out.endswith("1 checkpoint is as written, to the last byte.\n")


def test_verify_of_a_directory_that_lost_a_file_is_damage(run: RunDir, said: Said) -> None:
    (run.checkpoint(300) / "model.safetensors").unlink()
    code, out, _ = said("--verify")
    assert code == 7
    assert "checkpoint-300  damaged   model.safetensors is missing" in out
    assert said("--verify", "300")[0] == 7
    assert said("--verify", "400")[0] == 0


def test_verify_passes_over_what_another_run_left(run: RunDir, said: Said) -> None:
    put(run, 800, run_id="another")
    damage(run, 800)
    assert said("--verify")[0] == 0


def test_verify_of_a_step_that_is_not_there_names_those_that_are(run: RunDir, said: Said) -> None:
    code, _, err = said("--verify", "5")
    assert code == 3
    assert err == (
        "hpcresume: toy has no checkpoint of step 5 (there: 100, 200, 300, 400, 500, 600 and "
        "700).\n"
    )


def waiting(fd: int) -> int:
    """How many bytes wait in a pipe."""
    return int.from_bytes(ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_checkpoint_that_retention_removes_meanwhile_is_no_damage(runs: Path) -> None:
    run = make_run(runs)
    for step in range(1, 201):
        put(run, step, size=10)
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "checkpoints", "--verify"],
        cwd=runs.parent,
        env=ENVIRON,
        stdout=subprocess.PIPE,
        bufsize=0,
        pipesize=4096,
    ) as process:
        assert process.stdout is not None
        # Two hundred lines do not fit: the command waits until the first ones are taken.
        while waiting(process.stdout.fileno()) < 4000 and process.poll() is None:
            time.sleep(0.01)
        shutil.rmtree(run.checkpoint(200))
        out = process.stdout.read().decode()
    assert process.returncode == 0, out
    assert "checkpoint-200  gone      removed while it was read" in out
    assert out.endswith("199 checkpoints are as written, to the last byte.\n")


def test_verify_as_json_tells_each_verdict(run: RunDir, said: Said) -> None:
    damage(run, 400)
    code, out, err = said("--verify", "--json")
    found = {c["step"]: (c["verified"], c["damage"]) for c in json.loads(out)["checkpoints"]}
    assert (code, found[100]) == (7, (True, None))
    assert found[400] == (False, "model.safetensors has changed between byte 0 and 10,000")
    assert "checkpoint-400  damaged" in err


# ---- prune ---------------------------------------------------------------------------------


def test_prune_removes_what_the_policy_lets_go_after_it_has_read_the_newest(
    run: RunDir, said: Said
) -> None:
    run.pin(300).touch()
    code, out, err = said("--prune")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "removed checkpoint-100 (10.0 kB)",
        "removed checkpoint-400 (10.0 kB)",
        "20.0 kB are free again; checkpoint-700 was verified first.",
    ]
    assert run.checkpoint_steps() == [200, 300, 500, 600, 700]
    assert not list(run.path.glob(".*"))


def test_a_second_prune_has_nothing_to_do(run: RunDir, said: Said) -> None:
    said("--prune")
    _, out, _ = said("--prune")
    assert out.splitlines()[1:] == ["Nothing may go: 4 stay (keep_last 3, keep_best 1)."]


def test_a_dry_run_removes_nothing(run: RunDir, said: Said) -> None:
    before = everything(run)
    code, out, _ = said("--prune", "--dry-run")
    assert code == 0
    assert out.splitlines()[1:] == [
        "would remove checkpoint-100 (10.0 kB)",
        "would remove checkpoint-300 (10.0 kB)",
        "would remove checkpoint-400 (10.0 kB)",
        "30.0 kB would be free again; 4 stay (keep_last 3, keep_best 1).",
    ]
    assert everything(run) == before


def test_prune_removes_nothing_where_the_newest_is_damaged(run: RunDir, said: Said) -> None:
    damage(run, 700)
    before = everything(run)
    code, _, err = said("--prune")
    assert code == 7
    assert err == (
        "hpcresume: checkpoint-700 is damaged: model.safetensors has changed between byte 0 and "
        "10,000. It is the newest, so the older ones may be needed, and nothing is removed; "
        "`hpcresume resume toy` puts it aside.\n"
    )
    assert everything(run) == before


def test_prune_of_a_run_that_trains_is_refused(run: RunDir, said: Said) -> None:
    add_link(run, **this_process(), job=None, foreground=True)
    before = everything(run)
    code, _, err = said("--prune")
    assert code == 9
    assert f"toy is live: process {os.getpid()}" in err
    assert everything(run) == before
    assert said("--prune", "--dry-run")[0] == 0


def test_prune_of_a_run_with_a_waiting_job_is_refused(run: RunDir, said: Said) -> None:
    queue_job(run)
    with only_driver(run):
        assert said("--prune")[0] == 9
    assert len(run.checkpoint_steps()) == 7


@pytest.mark.parametrize(("on_finish", "left"), [("keep_all", [6, 8, 10]), ("keep_final", [10])])
def test_prune_of_a_complete_run_does_what_it_says_of_its_finish(
    runs: Path, said: Said, on_finish: str, left: list[int]
) -> None:
    run = complete(make_run(runs, checkpoint={"keep_last": 3, "on_finish": on_finish}))
    for step in (4, 6, 8, 10):
        put(run, step)
    assert said("toy", "--prune")[0] == 0
    assert run.checkpoint_steps() == left


def test_what_cannot_be_removed_is_said_and_hinders_no_other(run: RunDir, said: Said) -> None:
    (run.checkpoint(300) / "busy").mkdir()
    busy = str(run.checkpoint(300) / "busy")
    if subprocess.run(["chattr", "+i", busy], check=False, capture_output=True).returncode:
        pytest.skip("needs root and a file system with immutable files")
    try:
        code, out, err = said("--prune")
    finally:
        for path in run.path.rglob("busy"):
            subprocess.run(["chattr", "-i", str(path)], check=True)
    assert (code, "Operation not permitted" in err) == (5, True)
    assert "20.0 kB are free again" in out
    assert run.checkpoint_steps() == [200, 500, 600, 700]


def test_prune_leaves_alone_what_does_not_count(run: RunDir, said: Said) -> None:
    (run.checkpoint(100) / "model.safetensors").unlink()
    put(run, 50, run_id="another")
    said("--prune")
    assert run.checkpoint_steps() == [50, 100, 200, 500, 600, 700]


def test_prune_as_json_tells_what_is_gone_and_what_is_left(run: RunDir, said: Said) -> None:
    dry = json.loads(said("--prune", "--dry-run", "--json")[1])
    assert (dry["would_remove"], len(dry["checkpoints"])) == ([100, 300, 400], 7)
    done = json.loads(said("--prune", "--json")[1])
    assert done["removed"] == [100, 300, 400]
    assert [c["step"] for c in done["checkpoints"]] == [200, 500, 600, 700]
    assert done["total_bytes"] == 4 * SIZE


# ---- pins ----------------------------------------------------------------------------------


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(run: RunDir, said: Said) -> None:
    code, out, _ = said("--pin", "100")
    assert (code, out.splitlines()[1]) == (
        0,
        "checkpoint-100 is pinned: it stays until `hpcresume checkpoints toy --unpin 100`.",
    )
    said("--prune")
    assert run.checkpoint_steps() == [100, 200, 500, 600, 700]
    code, out, _ = said("--unpin", "100")
    assert (code, out.splitlines()[1]) == (
        0,
        "checkpoint-100 is not pinned any more; the policy decides.",
    )
    said("--prune")
    assert run.checkpoint_steps() == [200, 500, 600, 700]


def test_pinning_twice_is_pinning(run: RunDir, said: Said) -> None:
    assert [said("--pin", "100")[0] for _ in range(2)] == [0, 0]
    assert run.pinned_steps() == [100]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--pin", "5"], "toy has no checkpoint of step 5 (there: 100, 200,"),
        (["--unpin", "100"], "Step 100 of toy is not pinned (pinned: none)."),
    ],
)
def test_a_pin_of_what_is_not_there_is_an_error(
    run: RunDir, said: Said, argv: Sequence[str], words: str
) -> None:
    code, _, err = said(*argv)
    assert (code, words in err) == (3, True), err
    assert run.pinned_steps() == []


def test_a_damaged_directory_cannot_be_pinned(run: RunDir, said: Said) -> None:
    (run.checkpoint(100) / "model.safetensors").unlink()
    assert said("--pin", "100")[0] == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prune", "--verify"], "give one at a time"),
        (["--pin", "100", "--unpin", "100"], "give one at a time"),
        (["--dry-run"], "--dry-run goes with --prune"),
        (["toy", "--verify", "newest"], "takes the step of a checkpoint, not 'newest'"),
    ],
)
def test_options_that_make_no_sense_together_are_an_error(
    run: RunDir, said: Said, argv: Sequence[str], words: str
) -> None:
    before = everything(run)
    code, _, err = said(*argv)
    assert (code, words in err) == (2, True), err
    assert everything(run) == before


# ---- a login node --------------------------------------------------------------------------

#: Runs a command line and says at the end, on standard error, whether torch was imported.
PROBE = (
    "import atexit, sys\n"
    "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    "from hpcresume.cli import main\n"
    "main(sys.argv[1:])\n"
)


@pytest.mark.parametrize("argv", [[], ["--verify"], ["--prune"], ["--json"]], ids=" ".join)
def test_the_command_does_without_torch(run: RunDir, argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "checkpoints", *argv],
        cwd=run.path.parent.parent,
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "False"), done.stderr


def test_the_first_line_is_there_before_slurm_has_answered(runs: Path, tmp_path: Path) -> None:
    run = make_run(runs, cluster="slurm")
    put(run, 100)
    slurm = FakeSlurm(tmp_path / "slurm")
    os.mkfifo(tmp_path / "answer")
    slurm.program("squeue", f"cd '{tmp_path}' && test -p answer && cat answer && rm answer; exit 0")
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "checkpoints", "--prune"],
        cwd=runs.parent,
        env={**ENVIRON, "PATH": slurm.path},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = readable(process.stdout, 30)
        first = process.stdout.readline() if said else ""
        # squeue has asked until here, and gets its answer now.
        (tmp_path / "answer").write_text("")
        rest = process.stdout.read()
    assert (first, process.returncode) == (f"{run.path}\n", 0)
    assert rest == "Nothing may go: 1 stays (keep_last 5).\n"


def shown(run: RunDir, *argv: str, width: int, **environ: str) -> str:
    """What the command writes to a terminal of that width."""
    return in_terminal("checkpoints", *argv, cwd=run.path.parent.parent, width=width, **environ)


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (40, "STEP METRIC SIZE NOTE"),
        (45, "STEP AGE METRIC SIZE NOTE"),
        (120, "STEP EPOCH AGE LINK METRIC SIZE NOTE"),
    ],
)
def test_a_narrow_terminal_gets_fewer_columns_and_no_line_too_long(
    run: RunDir, width: int, head: str
) -> None:
    run.checkpoint(900).mkdir()
    lines = ESCAPES.sub("", shown(run, width=width)).splitlines()
    assert lines[1].split() == head.split()
    assert max(len(line) for line in lines[1:]) <= min(width, 100)


def test_without_colours_there_is_no_escape_sequence(run: RunDir) -> None:
    assert "\x1b" in shown(run, width=80)
    assert "\x1b" not in shown(run, width=80, NO_COLOR="1")


def test_a_terminal_sees_a_bar_while_checkpoints_are_read_and_lines_afterwards(
    run: RunDir,
) -> None:
    out = shown(run, "--verify", width=80)
    assert "━" in out
    # The bar's line is wiped before the verdict is written there.
    assert "\x1b[1A\x1b[2K7 checkpoints are as written, to the last byte." in out
    assert ESCAPES.sub("", out).count("verified") == 7
