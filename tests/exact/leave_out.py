"""Ways to leave one component out of a resume: each breaks hpcresume at one seam, in place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import links
import program
import pytest
import torch
from cuts import Cut

from hpcresume import files
from hpcresume.checkpoint import contents, loading, reader, registered, rng
from hpcresume.checkpoint.images import Images
from hpcresume.checkpoint.manifest import Committed
from hpcresume.checkpoint.tensors import Split, plain_state
from hpcresume.journal import Segment
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.environment import RankPlace
from hpcresume.session import Session
from hpcresume.training import buckets, loader, noise, saving
from hpcresume.training.saving import Saver

#: Breaks hpcresume until the MonkeyPatch is undone.
LeaveOut = Callable[[pytest.MonkeyPatch], None]


def kind_of(path: str) -> str:
    """What a leaf of a state is, without its place: "state.0.step" is "state.step".

    Of a module's tensors the last word: "between.running_mean" is "running_mean".
    """
    words = [word for word in re.split(r"\.", path) if not word.isdigit()]
    return ".".join(words) if words[0] in ("state", "param_groups") else words[-1]


# ---- registered objects ----------------------------------------------------------------------


def of_object(name: str, kind: str) -> LeaveOut:
    """A part of a registered object stays as the code made it; nobody looks whether it arrived."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        load = loading.load

        def load_without(what: str, value: Any, *saved: Any) -> None:
            made = _as_made(value) if what == name else {}
            load(what, value, *saved)
            if what == name:
                _forget(value, kind, made)

        patch.setattr(loading, "load", load_without)
        patch.setattr(reader, "check_arrived", lambda *_: None)

    return leave_out


def _as_made(value: Any) -> Mapping[str, Any]:
    if isinstance(value, torch.nn.Module):
        return {key: t.detach().clone() for key, t in plain_state(value, "").items()}
    if isinstance(value, torch.optim.Optimizer):
        return {"param_groups": [dict(group) for group in value.param_groups]}
    return dict(value.state_dict())


def _forget(value: Any, kind: str, made: Mapping[str, Any]) -> None:
    found: Any
    if isinstance(value, torch.nn.Module):
        state = plain_state(value, "")
        found = {k: t.detach() for k, t in state.items() if kind_of(k) == kind}
        for key, tensor in found.items():
            tensor.copy_(made[key])
    elif isinstance(value, torch.optim.Optimizer):
        part, _, key = kind.partition(".")
        if part == "state":
            found = [state[key] for state in value.state.values() if key in state]
            for tensor in found:
                tensor.zero_()
        else:
            found = value.param_groups
            for group, before in zip(value.param_groups, made["param_groups"], strict=True):
                group[key] = before[key]
    else:
        found = value.state_dict()
        value.load_state_dict({**found, kind: made[kind]})
    assert found, f"nothing is of kind {kind}"


def exact_types(patch: pytest.MonkeyPatch) -> None:
    """Moments stay as torch's load_state_dict casts them; nobody looks, the program neither."""
    patch.setattr(reader, "keep_dtypes", lambda *_: None)
    patch.setattr(reader, "check_arrived", lambda *_: None)
    patch.setattr(program, "check_moments", lambda _: None)


def extra_state(patch: pytest.MonkeyPatch) -> None:
    """No module is given its extra state."""
    load = loading.load

    def load_without(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(loading, "extra_states", lambda *_: {})
            inner.setattr(reader, "copy_into", _copy_known(reader.copy_into))
            load(*args)

    patch.setattr(loading, "load", load_without)
    patch.setattr(reader, "check_arrived", lambda *_: None)


def _copy_known(copy_into: Callable[..., None]) -> Callable[..., None]:
    def copy(live: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> None:
        copy_into(live, {key: saved[key] for key in live}, what)

    return copy


def aliases(patch: pytest.MonkeyPatch) -> None:
    """It is forgotten which names mean the same memory."""
    load = loading.load

    def load_without(name: str, value: Any, committed: Committed, saved: Any) -> None:
        load(name, value, committed, {**saved, "aliases": {}})

    patch.setattr(loading, "load", load_without)


def buffer(kind: str) -> LeaveOut:
    """A buffer that no state dict holds stays as the code made it."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        held_in = reader.held_in

        def held_without(file: str, image: memoryview) -> reader.Held:
            held = held_in(file, image)
            if file == registered.buffers_file(file.partition(".")[0]):
                del held.tensors[kind]
            return held

        patch.setattr(reader, "held_in", held_without)

    return leave_out


def value(name: str) -> LeaveOut:
    """A registered JSON value stays as the code made it."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        restore = contents.Contents._restore_value

        def restore_without(self: Any, what: str, was: Any, state: Any) -> list[str]:
            return [] if what == name else restore(self, what, was, state)

        patch.setattr(contents.Contents, "_restore_value", restore_without)

    return leave_out


def tokenizer(patch: pytest.MonkeyPatch) -> None:
    """A tokenizer is not saved."""
    patch.setattr(registered, "tokenizer_files", lambda _: {})


def of_state(key: str) -> LeaveOut:
    """A part of state.json is not saved."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        state_text = contents._state_text

        def text_without(*args: Any) -> bytes:
            state = json.loads(state_text(*args))
            return files.to_json({k: v for k, v in state.items() if k != key})

        patch.setattr(contents, "_state_text", text_without)

    return leave_out


# ---- random numbers --------------------------------------------------------------------------


def of_rng(*path: str | int) -> LeaveOut:
    """A part of the random state, as `rng.capture` has it, stays as it is."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        restore = rng.restore

        def restore_without(state: Any, generators: Mapping[str, Any]) -> list[str]:
            return restore(_replaced(state, path, rng.capture(generators)), generators)

        patch.setattr(rng, "restore", restore_without)

    return leave_out


def _replaced(state: Any, path: tuple[str | int, ...], other: Any) -> Any:
    """`state` with what `other` has at a place."""
    if not path:
        return other
    first, rest = path[0], path[1:]
    part = _replaced(state[first], rest, other[first])
    if isinstance(state, dict):
        return {**state, first: part}
    return [part if number == first else item for number, item in enumerate(state)]


def order_of_restoring(patch: pytest.MonkeyPatch) -> None:
    """Random numbers are restored with the objects, and not last."""
    register, restore_rng = Session.register, Session._restore_rng

    def register_and_restore(self: Session, **objects: Any) -> None:
        register(self, **objects)
        if self._contents.generators:
            restore_rng(self)

    patch.setattr(Session, "register", register_and_restore)
    patch.setattr(Session, "_restore_rng", lambda self: None)


def restoring_after_a_save(patch: pytest.MonkeyPatch) -> None:
    """What a save draws is not put back."""
    restore, restore_rng = rng.restore, Session._restore_rng

    def restore_really(self: Session) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(rng, "restore", restore)
            restore_rng(self)

    patch.setattr(Session, "_restore_rng", restore_really)
    patch.setattr(rng, "restore", lambda *_: [])


def keys_of_noise(patch: pytest.MonkeyPatch) -> None:
    """A worker draws a sample's noise from whatever state its generators are in."""
    patch.setattr(noise, "seed", lambda *_: None)


def key_of_the_order(patch: pytest.MonkeyPatch) -> None:
    """A sampler draws an epoch's order from whatever state the generators are in."""
    patch.setattr(loader, "seed", lambda *_: None)


def order_of_the_epoch(patch: pytest.MonkeyPatch) -> None:
    """An epoch's order is drawn anew where training goes on."""

    def order(self: loader.ResumableLoader, epoch: int) -> torch.Tensor:
        return torch.randperm(self.length)

    patch.setattr(loader.ResumableLoader, "order", order)


# ---- the session's own progress --------------------------------------------------------------


def of_progress(key: str, begun: Callable[[Any], Any]) -> LeaveOut:
    """A part of the progress is as `begun` makes it of what was saved."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        progress = Saver.progress.fget

        def progress_without(self: Saver) -> dict[str, Any]:
            saved = progress(self)
            return {**saved, key: begun(saved[key])}

        patch.setattr(Saver, "progress", property(progress_without))

    return leave_out


def not_saved(key: str) -> LeaveOut:
    """A part of the progress is not in the checkpoint."""

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        progress = Session._progress

        def progress_without(self: Session) -> dict[str, Any]:
            return {k: v for k, v in progress(self).items() if k != key}

        patch.setattr(Session, "_progress", progress_without)

    return leave_out


def length_of_metrics(patch: pytest.MonkeyPatch) -> None:
    """How much of a link's metric log was adopted is not known: all of it is read."""
    from_json = saving.segments_from_json

    def without(value: Any) -> tuple[Segment, ...]:
        return tuple(Segment(s.link, s.upto_step, 2**20) for s in from_json(value))

    patch.setattr(saving, "segments_from_json", without)


# ---- several ranks ---------------------------------------------------------------------------


def states_of_ranks(patch: pytest.MonkeyPatch) -> None:
    """Every rank takes rank 0's random state."""
    read = Images.json

    def read_one(self: Images, name: str) -> Any:
        content = read(self, name)
        return [content[0]] * len(content) if name == contents.RNG else content

    patch.setattr(Images, "json", read_one)


def layout_of_buckets(patch: pytest.MonkeyPatch) -> None:
    """DDP lays its buckets out in the link's first step."""
    patch.setattr(buckets, "settle", lambda _: [])


#: By the name of the run that is to be broken.
OF_RANKS: dict[str, LeaveOut] = {"states": states_of_ranks, "buckets": layout_of_buckets}


def serve_links(rank: int, pipe: Connection) -> None:
    """A rank of a RankPool that leaves out what the run's name says."""
    link_here = links.link_here

    def link(run: RunDir, cut: Cut | None, place: RankPlace) -> None:
        with pytest.MonkeyPatch.context() as patch:
            OF_RANKS.get(run.path.name, lambda _: None)(patch)
            link_here(run, cut, place)

    links.link_here = link
    _serve(rank, pipe)


#: As it was before a test replaced it by the function above.
_serve = links._serve_links


# ---- what arrives ----------------------------------------------------------------------------


def guard(found: list[str], missed: list[str]) -> LeaveOut:
    """Before each look whether an object arrived, the same look with each of its parts changed.

    `found` gets the parts that were named, `missed` the others.
    """

    def leave_out(patch: pytest.MonkeyPatch) -> None:
        check = reader.check_arrived

        def look(committed: Committed, name: str, live: Split, tree: Any, saved: Any) -> None:
            for part, without in _each_without(live):
                try:
                    check(committed, name, without, tree, saved)
                except contents.CheckpointError as error:
                    (found if part in str(error) else missed).append(f"{name}.{part}")
                else:
                    missed.append(f"{name}.{part}")
            check(committed, name, live, tree, saved)

        patch.setattr(reader, "check_arrived", look)

    return leave_out


def _each_without(live: Split) -> list[tuple[str, Split]]:
    """Every part's path, and the state with this part alone changed."""
    variants = []
    for path, _ in leaves(live.tree):
        tree = _changed(live.tree, path)
        variants.append((".".join(map(str, path)), Split(tree, live.tensors, live.aliases)))
    for name, tensor in live.tensors.items():
        changed = tensor.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[-1] += 1
        variants.append((name, Split(live.tree, {**live.tensors, name: changed}, live.aliases)))
    return variants


def leaves(tree: Any) -> list[tuple[tuple[str | int, ...], Any]]:
    """A JSON tree's leaves with their paths, but for tensors."""
    if isinstance(tree, dict):
        parts = [] if "$tensor" in tree else list(tree.items())
    elif isinstance(tree, list):
        parts = list(enumerate(tree))
    else:
        return [((), tree)]
    return [((key, *path), leaf) for key, part in parts for path, leaf in leaves(part)]


def _changed(tree: Any, path: tuple[str | int, ...]) -> Any:
    if not path:
        return "left out"
    first, rest = path[0], path[1:]
    if isinstance(tree, dict):
        return {**tree, first: _changed(tree[first], rest)}
    return [_changed(part, rest) if n == first else part for n, part in enumerate(tree)]
