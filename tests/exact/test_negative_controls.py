"""Each component that hpcresume restores is missed where it is left out: the oracle turns red.

CONTROLS is the inventory. A control that stays green is a defect, of the oracle or of hpcresume;
what a checkpoint holds and no control leaves out fails as well.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inventory
import leave_out
import links
import program
import pytest
import torch
from cells import Cell
from cuts import Cut, after
from leave_out import LeaveOut, kind_of, leaves, of_object, of_progress, of_rng
from links import RankPool, link_here, make_run, run_chain, story
from oracle import differing, fingerprint
from safetensors.torch import load_file

from hpcresume import files, session
from hpcresume.journal import lineage, read_chain
from hpcresume.run_dir import RunDir

#: In the middle of the first epoch with a save, and of the second with steps that are lost.
CUTS = (after(5), Cut("crash", 11))
CELLS = {
    "adamw": Cell(optimizer="adamw", noise="dropout", accumulate=3, ema=True),
    "sgd": Cell(optimizer="sgd", precision="scaled", noise="batchnorm", accumulate=4),
    "adafactor": Cell(optimizer="adafactor", noise="batchnorm"),
    "bf16": Cell(optimizer="sgd", precision="bf16"),
    "workers": Cell(optimizer="sgd", noise="workers-3"),
}
#: How the training of `inventory` is called.
OWN: dict[str, dict[str, Any]] = {
    "own": {"data": "sampler"},
    "drawn": {"data": "drawn"},
    "stream": {"data": "stream-0"},
    "stream-of-workers": {"data": "stream-2"},
    "edited": {"edited": True},
    "restless-sampler": {"data": "restless sampler"},
    "iterable": {"data": "iterable"},
    "placed-iterable": {"data": "placed iterable"},
    "own-loader": {"data": "loader of its own class"},
    "own-loader-of-workers": {"data": "loader of its own class, with workers"},
}
PROGRAMS = (*CELLS, *OWN)


# Runs and what they come to


def link(run: RunDir, cut: Cut | None) -> None:
    """One link of a run whose name is a program's; each has another number of threads at first."""
    train = program.train
    if run.path.name in OWN:
        train = functools.partial(inventory.train, **OWN[run.path.name])
    torch.set_num_threads(1 + run.newest_link() % 2)
    link_here(run, cut, train=train)


def begin(folder: Path, name: str) -> RunDir:
    """A run of a program in an empty folder."""
    return make_run(folder / name, CELLS.get(name, Cell()))


def account(run: RunDir) -> dict[str, Any]:
    """The oracle's fingerprint, and what must be the same although the fingerprint leaves it out:
    what was said to have changed, and the saved steps that the history of metrics lacks."""
    chain = read_chain(run)
    own = lineage(run, chain)
    saved = {
        record["step"]
        for each in chain
        for record in each.all("saved")
        if own.holds(each.number, record["step"])
    }
    shown = json.loads(run.trainer_state.read_text())["log_history"]
    return {
        **fingerprint(run),
        "said": [record["change"] for each in chain for record in each.all("changed")],
        "history": sorted(saved - {line["step"] for line in shown}),
    }


def failure(run: RunDir) -> str:
    """Why the newest link failed, in its own words; empty if it did not, or was killed."""
    ended = read_chain(run)[-1].last("ended")
    if ended is None or ended["how"] != "failed" or ended["reason"].startswith("Killed"):
        return ""
    return ended["reason"]


def whole_cuts(name: str) -> tuple[Cut, ...]:
    """How the run is cut that others are compared with."""
    # Between its links the code changes, so that no uncut run is like it.
    return CUTS if name == "edited" else ()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDir]:
    """The run of a program in which nothing is left out."""

    @functools.cache
    def made(name: str) -> RunDir:
        folder = tmp_path_factory.mktemp("whole")
        return run_chain(begin(folder, name), whole_cuts(name), link)

    return made


@pytest.mark.parametrize("name", PROGRAMS)
def test_chain_with_nothing_left_out_is_green(
    tmp_path: Path, whole: Callable[[str], RunDir], name: str
) -> None:
    chain = run_chain(begin(tmp_path, name), CUTS, link)
    assert differing(account(whole(name)), account(chain)) == []


# The inventory


@dataclass(frozen=True)
class Control:
    """One component, how it is left out, and what is to be seen then.

    `component` is named as `components` below names what it finds in a checkpoint, or says what
    hpcresume does. Either `parts` of the account differ, or a link fails `loud`ly.
    """

    component: str
    program: str
    leave_out: LeaveOut
    parts: tuple[str, ...] = ()
    loud: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """As a test's id."""
        return f"{self.component} {self.note}".strip()


def of(kind: str, name: str, *parts: str) -> Control:
    """A kind of part of a registered object."""
    owner, _, part = kind.partition(".")
    return Control(kind, name, of_object(owner, part), parts)


#: In every random draw that follows.
DRAWS = ("rng.json", "metrics", "model.safetensors")
WEIGHTS = ("model.safetensors", "metrics", "final")
MOMENTS = ("optimizer.safetensors", *WEIGHTS)

CONTROLS = [
    of("model.weight", "adamw", *WEIGHTS),
    of("model.bias", "adamw", *WEIGHTS),
    of("model.running_mean", "sgd", "model.safetensors", "final"),
    of("model.running_var", "sgd", "model.safetensors", "final"),
    of("model.num_batches_tracked", "sgd", "model.safetensors", "final"),
    of("optimizer.state.exp_avg", "adamw", *MOMENTS),
    of("optimizer.state.exp_avg_sq", "adamw", *MOMENTS),
    of("optimizer.state.step", "adamw", *MOMENTS),
    of("optimizer.state.momentum_buffer", "sgd", *MOMENTS),
    of("optimizer.state.row_var", "adafactor", *MOMENTS),
    of("optimizer.state.col_var", "adafactor", *MOMENTS),
    of("optimizer.state.variance", "adafactor", *MOMENTS),
    of("optimizer.param_groups.lr", "adamw", "objects", *MOMENTS),
    of("scheduler.last_epoch", "adamw", "objects", *WEIGHTS),
    of("scheduler._step_count", "adamw", "objects"),
    of("scheduler._last_lr", "adamw", "metrics"),
    of("scaler.scale", "sgd", "objects", "metrics"),
    of("scaler._growth_tracker", "sgd", "objects", "metrics"),
    of("ema.weight", "adamw", "ema.safetensors", "metrics"),
    of("ema.bias", "adamw", "ema.safetensors", "metrics"),
    of("centre.running_mean", "own", "centre.safetensors", *WEIGHTS),
    of("ema.running_mean", "own", "ema.safetensors"),
    of("ema.n_averaged", "adamw", "ema.safetensors"),
    of("restless.count", "own", "objects"),
    Control(
        "optimizer.state.momentum_buffer",
        "bf16",
        leave_out.exact_types,
        MOMENTS,
        note="in its exact type",
    ),
    Control("model._extra_state.calls", "own", leave_out.extra_state, ("objects", *WEIGHTS)),
    Control("model.aliases", "own", leave_out.aliases, loud="CheckpointError: 'model' does not"),
    Control("model.buffers.drift", "own", leave_out.buffer("drift"), WEIGHTS),
    Control("model.buffers.seen", "own", leave_out.buffer("seen"), WEIGHTS, note="which grows"),
    Control("curriculum", "own", leave_out.value("curriculum"), ("curriculum.json", *WEIGHTS)),
    Control("marks", "own", leave_out.value("marks"), WEIGHTS),
    Control("words", "own", leave_out.tokenizer, ("words.json",)),
    # What state.json says of them.
    Control("objects", "own", leave_out.of_state("objects"), loud="KeyError: 'objects'"),
    Control("values", "own", leave_out.of_state("values"), loud="KeyError: 'values'"),
    Control("moved", "own", leave_out.of_state("moved"), ("said",)),
    Control("progress", "own", leave_out.of_state("progress"), loud="KeyError: 'progress'"),
    # Random numbers.
    Control("rng.python", "adamw", of_rng("python"), DRAWS),
    Control("rng.python", "adamw", of_rng("python", 2), DRAWS, note="the second of two"),
    Control("rng.numpy", "adamw", of_rng("numpy"), DRAWS),
    Control("rng.numpy", "adamw", of_rng("numpy", 2), DRAWS, note="the place"),
    Control("rng.numpy", "adamw", of_rng("numpy", 3), DRAWS, note="the second of two"),
    Control("rng.torch", "adamw", of_rng("torch"), DRAWS),
    Control("rng.cuda", "own", of_rng("cuda"), DRAWS),
    *(
        Control(f"rng.generators.{name}", "own", of_rng("generators", name), DRAWS)
        for name in ("dice", "numpy_draws", "torch_draws", "numpy_state")
    ),
    # Where training is.
    Control(
        "progress.global_step",
        "adamw",
        of_progress("global_step", lambda _: 0),
        loud="HpcResumeError: checkpoint-3 is committed already",
    ),
    Control("progress.epoch", "adamw", of_progress("epoch", lambda _: 0), ("metrics",)),
    Control("progress.position", "adamw", of_progress("position", lambda _: 0), ("metrics",)),
    Control(
        "progress.position",
        "adamw",
        of_progress("position", lambda micro: micro // 3),
        ("metrics",),
        note="within a step",
    ),
    Control("progress.best", "own", of_progress("best", lambda _: None), ("progress",)),
    Control("progress.history", "own", of_progress("history", lambda _: []), ("history",)),
    Control("progress.lineage", "own", of_progress("lineage", lambda _: []), ("metrics",)),
    Control("progress.lineage", "own", leave_out.length_of_metrics, ("metrics",), note="its bytes"),
    Control("progress.machines", "own", of_progress("machines", lambda _: []), ("metrics",)),
    Control("progress.given", "edited", of_progress("given", lambda _: {}), ("said", *MOMENTS)),
    Control("progress.data", "own", of_progress("data", lambda _: []), WEIGHTS),
    Control("progress.data", "stream", of_progress("data", lambda _: []), WEIGHTS, note="stream"),
    *(
        Control(
            "progress.data",
            "stream-of-workers",
            of_progress("data", functools.partial(inventory.without_place, key=key)),
            WEIGHTS,
            note=f"stream's {key}",
        )
        for key in ("turn", "batches", "place")
    ),
    *(
        Control(f"progress.{key}", "own", leave_out.not_saved(key), loud=f"KeyError: '{key}'")
        for key in ("world_size", "max_steps", "loader")
    ),
]
#: What no checkpoint holds, because hpcresume does it.
RULES = [
    Control("random numbers last", "own", leave_out.order_of_restoring, DRAWS),
    Control("a save draws nothing", "own", leave_out.restoring_after_a_save, DRAWS),
    Control("keys of the data's noise", "workers", leave_out.keys_of_noise, WEIGHTS),
    Control("key of a sampler's draws", "drawn", leave_out.key_of_the_order, WEIGHTS),
    Control("order of an epoch", "adamw", leave_out.order_of_the_epoch, WEIGHTS),
]
#: Have tests of their own: below, and in test_non_finite.
APART = frozenset({"progress.train_seconds", "progress.skipped"})


def as_parameters(controls: list[Control]) -> list[Any]:
    cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return [
        pytest.param(c, id=c.name, marks=cuda if c.component == "rng.cuda" else ())
        for c in controls
    ]


def run_without(folder: Path, control: Control) -> RunDir:
    """The chain of a control, up to its end or to a link that fails."""
    run = begin(folder, control.program)
    with pytest.MonkeyPatch.context() as patch:
        control.leave_out(patch)
        for cut in (*CUTS, None):
            link(run, cut)
            if failure(run):
                break
    return run


@pytest.mark.parametrize("control", as_parameters([*CONTROLS, *RULES]))
def test_oracle_turns_red_where_a_component_is_left_out(
    tmp_path: Path, whole: Callable[[str], RunDir], control: Control
) -> None:
    run = run_without(tmp_path, control)
    if control.loud:
        assert re.match(control.loud, failure(run)), story(run)
        return
    assert not failure(run), story(run)
    red = differing(account(whole(control.program)), account(run))
    assert set(control.parts) <= set(red)


def components(run: RunDir) -> set[str]:
    """What of a checkpoint there is to be left out: what training changes, and what is kept about
    it."""
    first, *_, last = sorted(run.path.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    (state,) = files.read_json(last / "rng.json")
    generators = state.pop("generators", {})
    found = {f"rng.{key}" for key in state} | {f"rng.generators.{key}" for key in generators}
    kept = files.read_json(last / "state.json")
    found |= kept.keys() | {f"progress.{key}" for key in kept["progress"]} | {*kept["values"]}
    for name, content in kept["objects"].items():
        before = files.read_json(first / "state.json")["objects"][name]
        for path in changed_leaves(before["tree"], content["tree"]):
            words = [word for word in path if isinstance(word, str) and not word.startswith("$")]
            found.add(f"{name}.{'.'.join(words)}")
        if content["aliases"]:
            found.add(f"{name}.aliases")
    for file in sorted(last.glob("*.safetensors")):
        name = file.name.removesuffix(".safetensors")
        now, before = load_file(file), load_file(first / file.name)
        found |= {f"{name}.{kind_of(k)}" for k in now if not torch.equal(now[k], before[k])}
    return found


def changed_leaves(before: Any, now: Any) -> list[tuple[str | int, ...]]:
    """The paths of leaves that are not as before."""
    values = dict(leaves(before))
    return [path for path, value in leaves(now) if path not in values or values[path] != value]


def test_each_component_of_a_checkpoint_has_a_control(whole: Callable[[str], RunDir]) -> None:
    found = set().union(*(components(whole(name)) for name in PROGRAMS))
    named = {control.component for control in CONTROLS} | APART
    assert sorted(found - named) == [], "a control is missing"
    assert sorted(named - found - {"rng.cuda"}) == [], "no checkpoint holds it any more"


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "own"])
def test_hpcresume_itself_notices_whatever_of_an_object_does_not_arrive(
    tmp_path: Path, name: str
) -> None:
    found: list[str] = []
    missed: list[str] = []
    run = begin(tmp_path, name)
    link(run, CUTS[0])
    with pytest.MonkeyPatch.context() as patch:
        leave_out.guard(found, missed)(patch)
        link(run, None)
    assert not failure(run), story(run)
    assert missed == []
    assert len(found) > 10


# Training time


class Clock:
    """Moves when the training says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def clocked(folder: Path, cuts: tuple[Cut, ...], patch: pytest.MonkeyPatch) -> float:
    """Training seconds of a whole run in which each micro-batch takes one, and nothing else any."""
    clock, train = Clock(), program.train

    def train_by_the_clock(session: Any, interrupt: program.Interrupt) -> None:
        def tick(place: str, step: int) -> None:
            clock.now += float(place == "step")
            interrupt(place, step)

        train(session, tick)

    with patch.context() as inner:
        inner.setattr(session, "time", clock)
        inner.setattr(program, "train", train_by_the_clock)
        run = run_chain(begin(folder, "adamw"), cuts, link)
    seconds: float = json.loads(run.trainer_state.read_text())["train_seconds"]
    return seconds


def test_training_seconds_add_up_to_those_of_the_uncut_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncut = clocked(tmp_path / "uncut", (), monkeypatch)
    assert clocked(tmp_path / "cut", CUTS, monkeypatch) == uncut > 0


@pytest.mark.parametrize(
    "begun", [lambda _: 0.0, lambda saved: 2 * saved], ids=["forgotten", "counted twice"]
)
def test_training_seconds_that_are_left_out_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: Callable[[float], float]
) -> None:
    uncut = clocked(tmp_path / "uncut", (), monkeypatch)
    of_progress("train_seconds", begun)(monkeypatch)
    assert clocked(tmp_path / "cut", CUTS, monkeypatch) != uncut


# Several ranks


@pytest.fixture(scope="module")
def breakable_ranks(compiled: None) -> Iterator[RankPool]:
    """Rank processes that leave out what the name of a run says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "_serve_links", leave_out.serve_links)
        pool = RankPool()
        yield pool
    pool.close()


def test_oracle_turns_red_where_ranks_lose_what_is_their_own(
    tmp_path: Path, breakable_ranks: RankPool
) -> None:
    found = {}
    for name in ("uncut", "whole", *leave_out.OF_RANKS):
        cuts = () if name == "uncut" else CUTS
        run = run_chain(make_run(tmp_path / name, Cell(ranks=3)), cuts, breakable_ranks.link)
        found[name] = fingerprint(run)
    red = {name: differing(found["uncut"], other) for name, other in found.items()}
    assert red["whole"] == []
    assert set(DRAWS) <= set(red["states"])
    assert set(WEIGHTS) <= set(red["buckets"])
