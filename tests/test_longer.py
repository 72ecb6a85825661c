"""A run goes on with other settings than it began with, above all beyond its first end.

The trainings are real, on the local backend. Two of them, one complete and one that failed, are
made once; each test gets a copy, because a run may be moved.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hanging import standing, stands
from made_run import add_link, complete, end_link, make_run, training
from oracle import ENVIRON, Chain, assert_equivalent, hpcresume, merged, project, train_uncut

from hpcresume.cancel import cancel
from hpcresume.cli.options import chosen_run
from hpcresume.config import RunConfig, read_frozen, to_mapping
from hpcresume.errors import NotFound, UsageError
from hpcresume.journal import Journal, read_submissions
from hpcresume.observe.metrics import MetricTail
from hpcresume.resumption import OPTIMIZER_OPTIONS, ready_to_resume
from hpcresume.run_dir import RunDir
from hpcresume.status import read_status
from hpcresume.story import read_story

#: Ten steps an epoch, and a checkpoint after each 9 steps and each epoch.
SMALL: dict[str, Any] = {
    "args": {"size": 80, "fail_at": -1},
    "scheduler": {"cluster": "local"},
    "checkpoint": {"steps": 9, "background": False},
}
BROKEN: dict[str, Any] = {"args": {"fail_at": 29}, "chain": {"max_links": 1}}
#: What mends BROKEN.
MENDED = ("--set", "args.fail_at=-1", "--set", "chain.max_links=null")


def submitted(folder: Path, code: int, **changes: Any) -> Path:
    """A project whose run has trained as far as it could; `code` is what submit left with."""
    project(folder, **{**SMALL, **changes})
    done = hpcresume("submit", cwd=folder)
    assert done.returncode == code, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is complete after 2 epochs, which are 20 steps."""
    return submitted(tmp_path_factory.mktemp("complete"), 0, epochs=2)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 epochs that failed in the last one; step 27 is its newest checkpoint."""
    args = {**SMALL["args"], **BROKEN["args"]}
    return submitted(tmp_path_factory.mktemp("broken"), 8, epochs=3, **{**BROKEN, "args": args})


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fingerprint of 4 epochs without a break, which are 40 steps."""
    return train_uncut(tmp_path_factory.mktemp("uncut"), **SMALL, epochs=4)


def copied(source: Path, folder: Path) -> RunDir:
    shutil.copytree(source, folder)
    return RunDir(folder / "runs" / "run")


@pytest.fixture
def done(two_epochs: Path, tmp_path: Path) -> RunDir:
    return copied(two_epochs, tmp_path / "it's moved")


@pytest.fixture
def failed(broken: Path, tmp_path: Path) -> RunDir:
    return copied(broken, tmp_path / "it's moved")


def resume(run: RunDir, *argv: str) -> subprocess.CompletedProcess[str]:
    return hpcresume("resume", str(run.path), *argv, cwd=run.path.parent.parent)


def state(run: RunDir) -> tuple[str, int, bool]:
    """What `status` says, the step, and `completed` of trainer_state.json."""
    told = read_status(run, [])
    return told.state, told.step, json.loads(run.trainer_state.read_text())["completed"]


def content(run: RunDir) -> tuple[bytes, ...]:
    """What a refused change must leave as it was."""
    paths = (run.config, run.identity, run.submissions, run.trainer_state)
    return tuple(path.read_bytes() for path in paths)


def weights(run: RunDir) -> bytes:
    return (run.final_model / "model.safetensors").read_bytes()


# ---- a complete run ------------------------------------------------------------------------


def test_a_complete_run_with_more_epochs_ends_with_the_bytes_of_a_run_that_had_them_at_once(
    done: RunDir, uncut: dict[str, Any]
) -> None:
    assert state(done) == ("complete", 20, True)
    before = weights(done)
    longer = resume(done, "--set", "epochs=4")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert "run is complete: 40 steps" in longer.stdout
    assert state(done) == ("complete", 40, True)
    assert weights(done) != before
    assert_equivalent(done, uncut)
    assert resume(done).returncode == 2


@pytest.mark.parametrize(
    "sets", [[], ["seed=3"], ["epochs=2"], ["epochs=1"], ["max_steps=20"], ["lr=0.1"]]
)
def test_a_complete_run_whose_end_is_not_raised_stays_as_it_is(
    done: RunDir, sets: list[str]
) -> None:
    before = content(done)
    with pytest.raises(UsageError) as error:
        ready_to_resume(done, sets=sets, environ=ENVIRON)
    assert str(error.value) == (
        f"run is complete: {done.final_model}. To train it longer, raise epochs above 2 or "
        f"max_steps above 100: hpcresume resume run --set epochs=N."
    )
    assert content(done) == before


def test_a_limit_that_was_reached_must_be_raised_as_well(done: RunDir) -> None:
    before = content(done)
    with pytest.raises(UsageError, match="stands at epoch 2, and epochs=2 lets it go no further"):
        ready_to_resume(done, sets=["max_steps=200"], environ=ENVIRON)
    with pytest.raises(UsageError, match="stands at step 20, and max_steps=20 lets it go no"):
        ready_to_resume(done, sets=["epochs=3", "max_steps=20"], environ=ENVIRON)
    with pytest.raises(UsageError, match="max_steps=19 lies below step 20"):
        ready_to_resume(done, sets=["epochs=3", "max_steps=19"], environ=ENVIRON)
    assert content(done) == before


def test_a_limit_that_is_taken_away_makes_a_run_longer(done: RunDir) -> None:
    config = ready_to_resume(done, sets=["epochs=null"], environ=ENVIRON)
    assert (config.epochs, config.max_steps) == (None, 100)
    assert not read_story(done).completed


def test_nobody_takes_a_run_for_complete_from_the_moment_that_it_is_longer(done: RunDir) -> None:
    before = done.trainer_state.read_text().splitlines()
    ready_to_resume(done, sets=["epochs=4"], environ=ENVIRON)
    assert state(done) == ("stalled", 20, False)
    assert chosen_run(None, str(done.path.parent)) == done
    after = done.trainer_state.read_text().splitlines()
    assert [line for line in after if "completed" not in line] == [
        line for line in before if "completed" not in line
    ]
    assert after[-2] == '  "completed": false'
    assert weights(done), "the model stays until the next one takes its place"
    cancel(done, ENVIRON)
    assert state(done) == ("stopped", 20, False)


def test_a_change_that_was_cut_off_after_its_record_can_be_given_again(done: RunDir) -> None:
    write(done, "changed", changes=["epochs: 2 -> 4"], after_link=1, reopened=True)
    assert ready_to_resume(done, sets=["epochs=4"], environ=ENVIRON).epochs == 4
    assert read_frozen(done.config).epochs == 4


def test_the_foreground_goes_on_with_a_run_that_was_made_longer(
    done: RunDir, two_epochs: Path, uncut: dict[str, Any]
) -> None:
    ready_to_resume(done, sets=["epochs=4"], environ=ENVIRON)
    argv = [sys.executable, "noisy.py", "--resume", str(done.path)]
    trained = subprocess.run(
        argv, cwd=two_epochs, env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert state(done) == ("complete", 40, True)
    assert_equivalent(done, uncut)


# ---- an unfinished run ---------------------------------------------------------------------


def test_an_unfinished_run_with_more_epochs_ends_with_the_bytes_of_a_run_that_had_them_at_once(
    failed: RunDir, uncut: dict[str, Any]
) -> None:
    assert state(failed) == ("failed", 27, False)
    longer = resume(failed, "--set", "epochs=4", *MENDED)
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert state(failed) == ("complete", 40, True)
    assert_equivalent(failed, uncut)
    changed = [r for r in read_submissions(failed) if r["kind"] == "changed"]
    assert [(r["after_link"], "reopened" in r) for r in changed] == [(1, False)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("max_steps=26", "max_steps=26 lies below step 27, which run has saved already: name at"),
        ("epochs=2", "epochs=2 lies below epoch 2.7, which run has saved already: name at least 3"),
    ],
)
def test_an_end_before_the_newest_checkpoint_is_refused_with_both_numbers(
    failed: RunDir, change: str, sentence: str
) -> None:
    before = content(failed)
    refused = resume(failed, "--set", change)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"hpcresume: {sentence}")
    assert content(failed) == before


def test_an_end_at_the_newest_checkpoint_completes_the_run_there_until_it_is_raised_again(
    failed: RunDir, uncut: dict[str, Any]
) -> None:
    shorter = resume(failed, "--set", "max_steps=27", *MENDED)
    assert shorter.returncode == 0, shorter.stdout + shorter.stderr
    assert state(failed) == ("complete", 27, True)
    longer = resume(failed, "--set", "max_steps=40", "--set", "epochs=null")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert_equivalent(failed, uncut)


# ---- whose completion counts ---------------------------------------------------------------


def write(run: RunDir, kind: str, **fields: Any) -> None:
    journal = Journal(run.submissions, link=0, job=None)
    journal.write(kind, **fields)
    journal.close()


def test_only_a_completion_after_the_newest_reopening_counts(tmp_path: Path) -> None:
    run = complete(make_run(tmp_path / "runs"))
    assert read_story(run).completed
    write(run, "changed", changes=["seed: 0 -> 1"], after_link=1)
    assert read_story(run).completed
    write(run, "changed", changes=["max_steps: 10 -> 20"], after_link=1, reopened=True)
    assert not read_story(run).completed
    assert read_story(run).decided() is None, "that it was finished is settled as well"
    link = add_link(run, step=10)
    assert not read_story(run).completed
    with training(link) as journal:
        journal.write("completed", step=20, epoch=2)
    assert read_story(run).completed
    write(run, "changed", changes=["max_steps: 20 -> 30"], after_link=2, reopened=True)
    assert not read_story(run).completed


def test_a_run_that_was_made_longer_can_be_cancelled_and_a_complete_one_cannot(
    tmp_path: Path,
) -> None:
    run = complete(make_run(tmp_path / "runs"))
    with pytest.raises(NotFound, match="nothing to cancel"):
        cancel(run, ENVIRON)
    write(run, "changed", changes=["max_steps: 10 -> 20"], after_link=1, reopened=True)
    cancel(run, ENVIRON)
    assert read_status(run, []).state == "stopped"


# ---- values for the optimizer --------------------------------------------------------------


def changes(run: RunDir) -> list[str]:
    """The lines of the newest change."""
    records = [r for r in read_submissions(run) if r["kind"] == "changed"]
    return list(records[-1]["changes"]) if records else []


def test_a_plain_optimizer_option_is_an_override_and_is_journalled(failed: RunDir) -> None:
    config = ready_to_resume(failed, sets=["lr=0.1", " eps = 1e-6"], environ=ENVIRON)
    assert config.override == {"lr": 0.1, "eps": 1e-6}
    assert read_frozen(failed.config).override == config.override
    assert changes(failed) == ["override.lr: (not set) -> 0.1", "override.eps: (not set) -> 1e-06"]
    ready_to_resume(failed, sets=["lr=0.2", "override.momentum=0.9"], environ=ENVIRON)
    assert read_frozen(failed.config).override == {"lr": 0.2, "eps": 1e-6, "momentum": 0.9}
    assert changes(failed) == ["override.lr: 0.1 -> 0.2", "override.momentum: (not set) -> 0.9"]


def test_what_a_resumed_training_accepts_is_a_list(failed: RunDir) -> None:
    config = ready_to_resume(failed, sets=["accept=[dataset, batch]"], environ=ENVIRON)
    assert config.accept == ["dataset", "batch"]
    assert changes(failed) == ['accept: [] -> ["dataset", "batch"]']


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("epoch=3", "--set epoch=3: unknown key 'epoch'; did you mean 'epochs'?"),
        ("nu=0.1", "--set nu=0.1: unknown key 'nu'; expected one of name,"),
        ("lr=fast", "--set override.lr=fast: override.lr is 'fast'; expected a whole number"),
        ("accept=dataset", "--set accept=dataset: accept is 'dataset'; expected a list of one of"),
        ("accept=[all]", "--set accept=[all]: accept[0] is 'all'; expected one of dataset, batch"),
    ],
)
def test_a_misspelt_change_is_said_and_changes_nothing(
    failed: RunDir, change: str, sentence: str
) -> None:
    before = content(failed)
    refused = resume(failed, "--set", change)
    assert refused.returncode == 4
    assert refused.stderr.startswith(f"hpcresume: {sentence}")
    assert content(failed) == before


def test_at_submit_the_code_says_what_the_optimizer_gets(tmp_path: Path) -> None:
    folder = project(tmp_path / "new", **SMALL)
    refused = hpcresume("submit", "--set", "lr=0.1", cwd=folder)
    assert refused.returncode == 4
    assert "unknown key 'lr'" in refused.stderr


def test_the_names_are_numbers_of_torchs_optimizers_and_no_settings_of_a_run() -> None:
    weight = [torch.nn.Parameter(torch.zeros(2, 2))]
    found: set[str] = set()
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and kind is not torch.optim.Optimizer:
            defaults = kind(weight).param_groups[0].items()
            found |= {name for name, value in defaults if type(value) in (int, float)}
    assert found >= OPTIMIZER_OPTIONS
    assert not to_mapping(RunConfig()).keys() & OPTIMIZER_OPTIONS


# ---- logs --metrics ------------------------------------------------------------------------


def test_metrics_have_each_step_once_although_a_link_was_killed_after_its_last_checkpoint(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "it's killed"
    settings = {"max_steps": 40, "args": {"size": 80}, "log": {"every_steps": 1}}
    chain = Chain(folder, **merged(standing(folder), settings))
    with subprocess.Popen(
        [sys.executable, "-m", "hpcresume", "logs", "--metrics", "--follow", "run"],
        cwd=chain.folder,
        env=ENVIRON,
        stdout=subprocess.PIPE,
        text=True,
    ) as following:
        try:
            metrics = [chain.run.link(number).metrics for number in (1, 2)]
            # Step 19 is in the log of the first link, and in no checkpoint.
            chain.wait_for(lambda links: stands(chain.run) and len(lines(metrics[0])) == 19)
            chain.cut(chain.links()[0], "kill rank")
            chain.wait_completed()
            followed, _ = following.communicate(timeout=120)
        finally:
            following.kill()
    assert following.returncode == 0
    assert sum(map(len, map(lines, metrics))) > 40, "nothing was trained twice"
    done = hpcresume("logs", "--metrics", "run", cwd=chain.folder)
    for text in (done.stdout, followed):
        records = list(map(json.loads, text.splitlines()))
        assert [record["step"] for record in records] == list(range(1, 41))
        assert all(record.keys() == {"step", "epoch", "loss", "lr", "noise"} for record in records)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


@pytest.fixture
def measured(tmp_path: Path) -> RunDir:
    """Link 1 logged six steps, of which link 2 adopted four; it logs the fifth otherwise."""
    run = make_run(tmp_path / "runs")
    first = "".join(f'{{"step":{n},"link":1}}\n' for n in range(1, 7))
    add_link(run).metrics.write_text(first)
    second = run.claim_link({"job": "2", "host": "gpu017", "pid": 7, "num_tasks": 1})
    with training(second) as journal:
        journal.write("restored", step=4, segments=[[1, 4, first.index('{"step":5')]])
    second.metrics.write_text('{"step":5,"link":2}\n{"step":6,"li')
    return run


def logged(run: RunDir, *argv: str) -> tuple[int, list[str], str]:
    done = hpcresume("logs", "--metrics", *argv, cwd=run.path.parent.parent)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_metrics_are_what_the_newest_link_builds_upon_and_its_own_whole_lines(
    measured: RunDir,
) -> None:
    adopted = [f'{{"step":{n},"link":1}}' for n in range(1, 5)]
    assert logged(measured, "toy") == (0, [*adopted, '{"step":5,"link":2}'], "")
    assert logged(measured, "toy", "-n", "2") == (0, [adopted[-1], '{"step":5,"link":2}'], "")
    assert logged(measured, "toy", "-n", "0") == (0, [], "")


def test_following_metrics_shows_each_step_once_at_every_look(measured: RunDir) -> None:
    tail = MetricTail(measured)

    def seen() -> list[tuple[int, int]]:
        return [(record["step"], record["link"]) for record in tail.look()]

    assert seen() == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2)]
    assert seen() == [], "the last line is half-written"
    append(measured, 2, 'nk":2}\n')
    assert seen() == [(6, 2)]
    append(measured, 2, '{"step":7,"link":2}\n')
    third = measured.claim_link({"job": "3", "host": "gpu017", "pid": 7, "num_tasks": 1})
    append(measured, 2, '{"step":8,"link":2}\n')
    assert seen() == [(7, 2)], "link 2 is overtaken: what it writes from here on is nobody's"
    assert seen() == []
    sizes = {number: measured.link(number).metrics.read_bytes().index for number in (1, 2)}
    adopted = [[1, 4, sizes[1](b'{"step":5')], [2, 6, sizes[2](b'{"step":7')]]
    append(measured, 3, '{"step":7,"link":3}\n{"step":8,"link":3}\n')
    with training(third) as journal:
        journal.write("restored", step=6, segments=adopted)
    assert seen() == [(8, 3)], "step 7 was shown already, as link 2 had it"
    append(measured, 3, '{"step":9,"link":3}\n{"step":10,"link":3}\n')
    fourth = measured.claim_link({"job": "4", "host": "gpu017", "pid": 7, "num_tasks": 1})
    whole = len(measured.link(3).metrics.read_bytes())
    with training(fourth) as journal:
        journal.write("restored", step=10, segments=[*adopted, [3, 10, whole]])
    append(measured, 4, '{"step":11,"link":4}\n')
    assert seen() == [(9, 3), (10, 3), (11, 4)], "link 3 ended between two looks"


def append(run: RunDir, number: int, text: str) -> None:
    with run.link(number).metrics.open("a") as file:
        file.write(text)


def test_metrics_of_one_link_or_rank_are_refused_and_none_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    assert logged(run, "toy") == (3, [], "hpcresume: toy has logged no metrics yet.\n")
    for argv in (("--link", "1"), ("--rank", "1")):
        code, out, err = logged(run, "toy", *argv)
        assert (code, out) == (2, []) and "whole run" in err


def test_metrics_are_read_without_torch(measured: RunDir) -> None:
    script = (
        "import sys\nfrom hpcresume.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)\n"
    )
    argv = ["logs", "--metrics", "toy", "--runs", str(measured.path.parent)]
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1] == "False False"


@pytest.mark.parametrize(("decision", "over"), [("continue", False), ("stop", True)])
def test_following_waits_for_the_next_link_unless_the_chain_has_ended(
    tmp_path: Path, decision: str, over: bool
) -> None:
    run = make_run(tmp_path / "runs")
    end_link(add_link(run), decision, "deadline", "the job's time was nearly over")
    assert read_story(run).over is over
