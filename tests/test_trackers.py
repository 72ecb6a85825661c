"""Trackers hear what a training logs, each step once over all links, and never change a link."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hanging import standing, stands
from made_run import add_link, make_run, training
from oracle import ENVIRON, Chain, assert_equivalent, hpcresume, merged, project, train_uncut

from hpcresume import files
from hpcresume.config import from_mapping, read_frozen, to_mapping
from hpcresume.errors import ConfigError
from hpcresume.journal import Lineage, Segment
from hpcresume.rehearse import _scratch
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.trackers.beside import WAKE, Beside
from hpcresume.trackers.choice import check_installed
from hpcresume.trackers.lines import Lines
from hpcresume.trackers.memory import Memory
from hpcresume.verify.links import make_run as verified_run

NAMES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
LENIENT = {"no_progress_links": 30, "max_crashes": 30, "lead_s": 1.0}

# ---- what trackers have, read by their own means ----------------------------------------------


def event_files(run: RunDir) -> Iterator[Any]:
    """The events of all event files, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(run.tensorboard.iterdir()):
        data, at = path.read_bytes(), 0
        # A record is its length (8 bytes), a checksum (4), the event, a checksum (4).
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):
                break
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def in_tensorboard(run: RunDir, name: str = "loss") -> list[tuple[int, float]]:
    """What TensorBoard shows: a start purges all from its step on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    shown: list[tuple[int, float]] = []
    for event in event_files(run):
        if event.session_log.status == SessionLog.START:
            shown = [point for point in shown if point[0] < event.step]
        for value in event.summary.value:
            if value.tag == name:
                shown.append((event.step, round(value.simple_value, 5)))
    return shown


def in_wandb(run: RunDir) -> list[tuple[int, float]]:
    """What `wandb sync` would send of the folders of all links; later values of a step are lost."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[int, float] = {}
    folders = sorted(run.trackers.glob("wandb/offline-run-*"))
    assert {path.name.rpartition("-")[2] for path in folders} == {run.identify()["id"]}
    for path in folders:
        for data in _wandb_records(next(path.glob("*.wandb"))):
            record = Record.FromString(data)
            for item in record.history.item:
                if "loss" in (item.key, *item.nested_key):
                    found.setdefault(record.history.step.num, json.loads(item.value_json))
    return list(found.items())


def _wandb_records(path: Path) -> Iterator[bytes]:
    """A LevelDB log behind a header of 7 bytes: blocks of 32 KiB, records in one piece or more."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if left < 7 or kind == 0:
            at += left
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def in_mlflow(run: RunDir) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{run.path.parent / 'mlruns'}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == Memory(run, "mlflow").id
    history = client.get_metric_history(found.info.run_id, "loss")
    return [(metric.step, metric.value) for metric in history]


def in_trackio(run: RunDir) -> list[tuple[int, float]]:
    import sqlite3

    (store,) = (run.path.parent / "trackio").glob("*.db")
    database = sqlite3.connect(store)
    rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    database.close()
    assert {name for name, _, _ in rows} == {Memory(run, "trackio").id}
    points = [(step, json.loads(metrics)) for _, step, metrics in rows]
    return [(step, metrics["loss"]) for step, metrics in points if "loss" in metrics]


READERS: dict[str, Callable[[RunDir], list[tuple[int, float]]]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
    "mlflow": in_mlflow,
    "trackio": in_trackio,
}


@pytest.fixture(params=sorted(NAMES))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each tracker whose package is installed; those of the extra `test` are."""
    name: str = request.param
    if importlib.util.find_spec(NAMES[name]) is None:
        pytest.skip(f"{NAMES[name]} is not installed: pip install 'hpcresume[{name}]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return name


# ---- the contract of all trackers -------------------------------------------------------------


class Followed:
    """A link whose training logs by the hand of a test, and the process that tells a tracker."""

    def __init__(self, run: RunDir, name: str) -> None:
        self.run, self.name = run, name
        self.told: dict[int, float] = {}

    def link(self, restored: int, segments: list[list[int]], logged: range, how: str) -> LinkDir:
        """Train a link to its end; "killed": the process is killed as soon as it has told all."""
        link = self.run.claim_link({"job": "1"})
        with training(link) as journal:
            journal.write("restored", step=restored, segments=segments)
        lines = files.LineWriter(link.metrics)
        for step in logged:
            lines.append({"step": step, "epoch": 0, "loss": value(link.number, step)})
        lines.close()
        process = self.follow(link)
        if how == "killed":
            self.wait_told(logged[-1])
            process.kill()
        else:
            with training(link) as journal:
                journal.write("ended", how=how)
            process.send_signal(WAKE)
        assert process.wait(60) == (-signal.SIGKILL if how == "killed" else 0), self.words()
        assert " is off " not in self.words()
        return link

    def follow(self, link: LinkDir, rank_pid: int | None = None) -> subprocess.Popen[bytes]:
        argv = ["tracker", str(self.run.path), f"--link={link.number}", f"--name={self.name}"]
        argv += [f"--rank-pid={rank_pid or os.getpid()}"]
        with link.tracker_log(self.name).open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "hpcresume", *argv],
                env=ENVIRON | self._environ(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _environ(self) -> dict[str, str]:
        place = self.run.path.parent
        return {
            "WANDB_MODE": "offline",
            "MLFLOW_TRACKING_URI": f"file:{place / 'mlruns'}",
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "TRACKIO_DIR": str(place / "trackio"),
            "XDG_CONFIG_HOME": str(place),
        }

    def wait_told(self, step: int) -> None:
        deadline = time.monotonic() + 60
        while Memory(self.run, self.name).told < step and time.monotonic() < deadline:
            time.sleep(0.02)
        assert Memory(self.run, self.name).told >= step, self.words()

    def words(self) -> str:
        logs = self.run.links.glob(f"*/{self.run.link(1).tracker_log(self.name).name}")
        return "".join(path.read_text() for path in sorted(logs))


def value(link: int, step: int) -> float:
    """What a link logs in a step: links that replay a step of another can be told apart."""
    return round(link + step / 1000, 5)


def test_all_links_are_one_tracker_run_that_has_each_step_once(tmp_path: Path, name: str) -> None:
    followed = Followed(make_run(tmp_path), name)
    first = followed.link(0, [], range(1, 7), "stopped")
    segments = [[1, 6, files.size_or_zero(first.metrics)]]
    followed.link(6, segments, range(7, 11), "completed")
    steps = [(step, value(1 if step <= 6 else 2, step)) for step in range(1, 11)]
    assert READERS[name](followed.run) == steps


def test_steps_that_are_replayed_after_a_crash_are_there_once(tmp_path: Path, name: str) -> None:
    followed = Followed(make_run(tmp_path), name)
    first = followed.link(0, [], range(1, 7), "failed")
    upto_4 = sum(len(line) for line in first.metrics.read_bytes().splitlines(keepends=True)[:4])
    followed.link(4, [[1, 4, upto_4]], range(5, 11), "completed")
    # TensorBoard shows what stands, the others what they were told first.
    kept = 4 if name == "tensorboard" else 6
    steps = [(step, value(1 if step <= kept else 2, step)) for step in range(1, 11)]
    assert READERS[name](followed.run) == steps


def test_what_one_link_could_not_tell_the_next_one_does(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path)
    first = add_link(run)
    lines = files.LineWriter(first.metrics)
    lines.append(*({"step": step, "epoch": 0, "loss": value(1, step)} for step in range(1, 9)))
    lines.close()
    followed = Followed(run, name)
    upto_6 = sum(len(line) for line in first.metrics.read_bytes().splitlines(keepends=True)[:6])
    followed.link(6, [[1, 6, upto_6]], range(7, 9), "completed")
    steps = [(step, value(1 if step <= 6 else 2, step)) for step in range(1, 9)]
    assert READERS[name](run) == steps


def test_the_id_is_in_the_run_before_anything_is_told(tmp_path: Path, name: str) -> None:
    followed = Followed(make_run(tmp_path), name)
    followed.link(0, [], range(0), "stopped")
    before = Memory(followed.run, name).id
    followed.link(0, [], range(1, 3), "completed")
    assert Memory(followed.run, name).id == before
    assert (before is None) == (name == "tensorboard")


# ---- a real chain -----------------------------------------------------------------------------


def test_event_files_of_a_chain_that_was_killed_hold_each_step_once_in_order(
    tmp_path: Path,
) -> None:
    """Killed, with the process that tells, behind the last checkpoint: so steps are replayed."""
    uncut = train_uncut(tmp_path / "uncut")
    changes = {
        "chain": LENIENT,
        "checkpoint": {"steps": 12},
        "log": {"every_steps": 5, "trackers": ["tensorboard"]},
    }
    folder = tmp_path / "it's a project"
    chain = Chain(folder, **merged(standing(folder), changes))
    link = chain.wait_for(lambda links: stands(chain.run) and links[-1])
    _, (rank,) = chain.pids(link)
    logged = [line["step"] for line in files.read_lines(chain.run.link(1).metrics)]
    assert logged[-1] > link.last("saved")["step"] == 12
    chain.wait_for(lambda _: Memory(chain.run, "tensorboard").told == logged[-1])
    beside = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    assert beside, "nobody tells the tracker"
    for pid in (*map(int, beside), rank):
        os.kill(pid, signal.SIGKILL)
    chain.wait_completed()
    assert len(chain.links()) >= 2, chain.story()
    assert_equivalent(chain.run, uncut)
    raw = [event.step for event in event_files(chain.run) if event.summary.value]
    assert len(raw) > len(set(raw)), "nothing was replayed"
    losses = [float.fromhex(line["loss"]) for line in uncut["metrics"]]
    shown = in_tensorboard(chain.run)
    assert [step for step, _ in shown] == list(range(1, 101))
    assert [value for _, value in shown] == pytest.approx(losses, abs=2e-5)
    assert "tracker-" not in chain.run.train_log.read_text()


def before(folder: Path) -> str:
    """A search path that begins with a folder."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


# ---- what goes wrong --------------------------------------------------------------------------


def test_a_tracker_that_fails_is_one_line_of_the_log_and_the_run_is_complete(
    tmp_path: Path,
) -> None:
    project(tmp_path, max_steps=20, log={"trackers": ["trackio"]})
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "trackio.py").write_text("def init(**_):\n    raise OSError('no\\nnetwork')\n")
    done = hpcresume("submit", "--cluster", "debug", cwd=tmp_path, PYTHONPATH=before(packages))
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / "runs" / "run")
    assert json.loads(run.trainer_state.read_text())["completed"]
    (line,) = [line for line in run.train_log.read_text().splitlines() if "[tracker" in line]
    assert line.endswith("[tracker-WARNING] trackio is off for the rest of this link: no network")


@pytest.mark.parametrize("says", ["hangs", "leaves", "raises"])
def test_a_package_of_any_behaviour_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    what = {"hangs": "time.sleep(600)", "leaves": "os._exit(3)", "raises": "raise KeyError('x')"}
    (tmp_path / "trackio.py").write_text(f"import os, time\n{what[says]}\n")
    monkeypatch.setenv("PYTHONPATH", before(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path / "runs")
    link = add_link(run)
    beside = Beside(run, link, ["trackio"])
    with training(link) as journal:
        journal.write("ended", how="completed")
    beside.end(1.0 if says == "hangs" else 60.0)
    said = [record.getMessage() for record in caplog.records]
    told = {
        "hangs": "trackio was not done within 1 s: the next link tells it the rest",
        "leaves": f"trackio was off at the end (code 3): see {link.tracker_log('trackio')}",
    }
    assert said == ([told[says]] if says in told else [])
    if says == "raises":
        assert "trackio is off for the rest of this link: 'x'" in run.train_log.read_text()


def test_a_package_that_is_missing_is_said_at_submit(tmp_path: Path) -> None:
    missing = [name for name in NAMES if importlib.util.find_spec(NAMES[name]) is None]
    if not missing:
        pytest.skip("all packages are installed")
    project(tmp_path, log={"trackers": missing[:1]})
    done = hpcresume("submit", "--cluster", "debug", cwd=tmp_path)
    assert done.returncode == ConfigError.exit_code
    assert f"pip install 'hpcresume[{missing[0]}]'" in done.stderr
    assert not (tmp_path / "runs" / "run").exists()
    with pytest.raises(ConfigError, match="not installed here"):
        check_installed(missing)


def test_a_package_that_is_missing_in_a_link_is_one_line_and_no_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = [name for name in NAMES if importlib.util.find_spec(NAMES[name]) is None]
    if not missing:
        pytest.skip("all packages are installed")
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path)
    link = add_link(run)
    Beside(run, link, missing[:1]).end(60.0)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{missing[0]} is off for this link: ") and "pip install" in said
    assert not link.tracker_log(missing[0]).exists()


def test_what_is_no_training_tells_no_tracker(tmp_path: Path) -> None:
    asked = {"train": "a.py:train", "max_steps": 1, "name": "run"}
    asked |= {"log": {"trackers": ["wandb"]}, "notify": {"url": "http://localhost/x"}}
    config = from_mapping(asked, "test")
    verified = verified_run(tmp_path / "run", config, tmp_path)
    assert to_mapping(read_frozen(verified.config))["log"]["trackers"] == []
    assert _scratch(config).log.trackers == []
    assert _scratch(config).notify.url is None


# ---- what is told -----------------------------------------------------------------------------


def test_only_what_stands_of_earlier_links_is_told_and_numbers_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first, second = add_link(run), add_link(run)
    first.metrics.write_text(
        '{"step":1,"epoch":0,"loss":1.0}\n{"step":2,"loss":2}\n{"step":3,"loss":9.0}\n'
    )
    first.monitor.write_text('{"t":5.0,"step":1,"lr":0.5}\nnonsense\n{"t":9.0,"step":4,"lr":9}\n')
    second.metrics.write_text(
        f'{{"step":3,"loss":3.0,"note":"a word","ok":true,"all":[1],"much":{10**400}}}\n'
        '["step"]\n{"step":4,"loss":NaN}\n{"step":5,"lo'
    )
    second.monitor.write_text('{"t":7.0,"step":3,"lr":0.25}\n')
    lines = Lines(run, Lineage((Segment(1, 2, 10**6),), 2), 0)
    seen = [(line.step, dict(line.values)) for line in lines.look()]
    assert seen[:3] == [
        (1, {"loss": 1.0, "monitor/lr": 0.5}),
        (2, {"loss": 2.0}),
        (3, {"loss": 3.0, "monitor/lr": 0.25}),
    ]
    ((step, values),) = seen[3:]
    assert step == 4 and values["loss"] != values["loss"]
    assert lines.look() == []
    with second.metrics.open("a") as file:
        file.write('ss":5.0}\n')
    assert [(line.step, line.values) for line in lines.look()] == [(5, {"loss": 5.0})]


def test_nothing_is_told_of_a_link_that_was_overtaken(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = add_link(run)
    add_link(run)
    first.metrics.write_text('{"step":1,"loss":1.0}\n')
    assert Followed(run, "tensorboard").follow(first).wait(60) == 0
    assert in_tensorboard(run) == []
    assert Memory(run, "tensorboard").told == 0


def test_what_the_next_link_remembers_is_left_alone_by_one_that_was_overtaken(
    tmp_path: Path,
) -> None:
    followed = Followed(make_run(tmp_path), "tensorboard")
    first = add_link(followed.run)
    first.metrics.write_text('{"step":1,"loss":1.0}\n')
    process = followed.follow(first)
    followed.wait_told(1)
    Memory(followed.run, "tensorboard").reached(9)
    add_link(followed.run)
    process.send_signal(WAKE)
    assert process.wait(60) == 0
    assert Memory(followed.run, "tensorboard").told == 9


def test_where_the_rank_is_gone_before_its_tracker_has_begun_all_is_told(tmp_path: Path) -> None:
    followed = Followed(make_run(tmp_path), "tensorboard")
    link = add_link(followed.run)
    link.metrics.write_text('{"step":1,"loss":1.0}\n')
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert followed.follow(link, gone.pid).wait(60) == 0
    assert in_tensorboard(followed.run) == [(1, 1.0)]
