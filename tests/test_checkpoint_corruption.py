"""A thousand damaged checkpoints: each is found before the first step, and the older one used."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bug_links import assert_same, checkpoints, cut, link, make_run, ordinary, through
from fault_layer import Held, Saves, fast_folder, new_saves, payload
from torch import nn

import hpcresume
from hpcresume import files
from hpcresume.checkpoint.contents import Contents
from hpcresume.checkpoint.manifest import CHUNK_BYTES, NAME, FileEntry, digest_of
from hpcresume.journal import Lineage
from hpcresume.run_dir import RunDir

SEED = 20261121
#: How many of each kind; all kinds together are a thousand and some.
EACH = 32
OLD, NEW = 10, 20


@dataclass(frozen=True)
class Attack:
    """What a damage may use: dice, the newest checkpoint, the older one, another run's."""

    dice: random.Random
    saves: Saves
    foreign: Path
    """Checkpoint NEW of another run with other bytes."""

    @property
    def new(self) -> Path:
        return self.saves.run.checkpoint(NEW)

    @property
    def old(self) -> Path:
        return self.saves.run.checkpoint(OLD)

    @property
    def manifest(self) -> Path:
        return self.new / NAME

    def names(self) -> list[str]:
        """The files that the manifest names, in an order that does not depend on the disk."""
        return sorted(payload(self.new))

    def file(self) -> Path:
        """Any file, or the manifest."""
        return self.new / self.dice.choice([*self.names(), NAME])

    def payload_file(self) -> Path:
        return self.new / self.dice.choice(self.names())

    def edit(self, change: Callable[[dict[str, Any]], None], *, fits: bool) -> None:
        """Change the content of the manifest; its digest `fits` or is that of before."""
        content = json.loads(self.manifest.read_bytes())
        change(content)
        if fits:
            content["digest"] = _digest(content)
        self.manifest.write_bytes(files.to_json(content, indent=1))

    def edit_entry(self, **changes: Any) -> None:
        """Change the manifest's words about one file; the digest fits."""
        index = self.dice.randrange(len(self.names()))
        self.edit(lambda content: content["files"][index].update(changes), fits=True)


def _digest(content: dict[str, Any]) -> str:
    import hashlib

    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(files.to_json(rest)).hexdigest()


# Bytes


def flip_a_bit(attack: Attack) -> None:
    path = attack.file()
    data = bytearray(path.read_bytes())
    data[attack.dice.randrange(len(data))] ^= 1 << attack.dice.randrange(8)
    path.write_bytes(data)


def flip_a_burst(attack: Attack) -> None:
    path = attack.payload_file()
    data = bytearray(path.read_bytes())
    start = attack.dice.randrange(len(data))
    for at in range(start, min(start + attack.dice.randint(1, 64), len(data))):
        data[at] ^= attack.dice.randint(1, 255)
    path.write_bytes(data)


def truncate(attack: Attack) -> None:
    path = attack.file()
    # The last byte of the manifest is the end of its line, which no reader needs.
    size = path.stat().st_size - (path.name == NAME)
    os.truncate(path, attack.dice.randrange(size))


def grow(attack: Attack) -> None:
    path = attack.file()
    more = bytes(attack.dice.choice([0, 65, 255]) for _ in range(attack.dice.randint(1, 5000)))
    with path.open("ab") as file:
        file.write(more)


def grow_without_bytes(attack: Attack) -> None:
    # A file may claim more than any memory holds.
    path = attack.payload_file()
    os.truncate(path, 1 << attack.dice.randint(20, 42))


def zero_a_page(attack: Attack) -> None:
    path = attack.file()
    data = bytearray(path.read_bytes())
    start = 4096 * attack.dice.randrange(-(-len(data) // 4096))
    end = min(start + 4096, len(data))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def zero_the_tail(attack: Attack) -> None:
    path = attack.file()
    data = path.read_bytes()
    kept = attack.dice.randrange(len(data.rstrip(b"\n\0")))
    path.write_bytes(data[:kept] + bytes(len(data) - kept))


def swap_blocks(attack: Attack) -> None:
    path = attack.new / attack.dice.choice(["model.safetensors", "twin.safetensors"])
    data = path.read_bytes()
    size = attack.dice.choice([8, 64, 512])
    first, second = sorted(attack.dice.sample(range(len(data) // size), 2))
    a, b = (data[at * size : (at + 1) * size] for at in (first, second))
    assert a != b
    between = data[(first + 1) * size : second * size]
    path.write_bytes(data[: first * size] + b + between + a + data[(second + 1) * size :])


# Files


def swap_files_of_one_size(attack: Attack) -> None:
    one, two = attack.new / "model.safetensors", attack.new / "twin.safetensors"
    if attack.dice.random() < 0.5:
        # The same names in another run's checkpoint, or in the older one.
        two = attack.dice.choice([attack.foreign, attack.old]) / one.name
    assert one.stat().st_size == two.stat().st_size
    other = two.read_bytes()
    if two.parent == attack.new:
        two.write_bytes(one.read_bytes())
    one.write_bytes(other)


def remove_a_file(attack: Attack) -> None:
    attack.file().unlink()


def empty_a_file(attack: Attack) -> None:
    os.truncate(attack.file(), 0)


def leave_nothing(attack: Attack) -> None:
    shutil.rmtree(attack.new)
    attack.new.mkdir()
    if attack.dice.random() < 0.5:
        (attack.new / "templates").mkdir()


def put_a_directory(attack: Attack) -> None:
    path = attack.file()
    path.unlink()
    path.mkdir()
    if attack.dice.random() < 0.5:
        (path / "x").write_text("x")


def put_a_pipe(attack: Attack) -> None:
    """Whoever opens it waits for ever, unless he says that he will not."""
    path = attack.file()
    path.unlink()
    os.mkfifo(path)


def put_a_file_for_a_folder(attack: Attack) -> None:
    folder = attack.new / "templates"
    shutil.rmtree(folder)
    folder.write_bytes(attack.dice.randbytes(20))


def link_a_file(attack: Attack) -> None:
    """To the same content, to none, to itself, or to the older checkpoint's."""
    path = attack.file()
    elsewhere = attack.saves.run.path / "elsewhere"
    shutil.copy(path, elsewhere)
    target = attack.dice.choice([elsewhere, Path("nowhere"), Path(path.name), attack.old / NAME])
    path.unlink()
    path.symlink_to(target if attack.dice.random() < 0.5 else os.path.relpath(target, path.parent))


def link_a_folder(attack: Attack) -> None:
    folder = attack.new / "templates"
    elsewhere = attack.saves.run.path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere if attack.dice.random() < 0.5 else Path("..", "elsewhere"))


def link_the_checkpoint(attack: Attack) -> None:
    target = attack.dice.choice([attack.saves.run.path / "elsewhere", attack.old, attack.foreign])
    attack.new.rename(attack.saves.run.path / "elsewhere")
    attack.new.symlink_to(target)


def hard_link_to_another(attack: Attack) -> None:
    path = attack.file()
    targets = [attack.new / name for name in [*attack.names(), NAME]]
    targets += [attack.old / path.relative_to(attack.new), attack.old / NAME]
    content = path.read_bytes()
    target = attack.dice.choice([t for t in targets if t.read_bytes() != content])
    path.unlink()
    os.link(target, path)


# Manifests


def edit_without_the_digest(attack: Attack) -> None:
    metric = {"name": "x", "value": 1, "mode": "min"}
    edits: list[tuple[str, Any]] = [
        *[("step", 21), ("epoch", 1), ("link", 2), ("run_id", "run-2"), ("parent", "0" * 64)],
        *[("created", 1.5), ("metric", metric), ("files", []), ("format", 2), ("more", 1)],
        *[("digest", "0" * 64), ("digest", None)],
    ]
    key, value = attack.dice.choice(edits)
    attack.edit(lambda content: content.update({key: value}), fits=False)


def edit_with_the_digest(attack: Attack) -> None:
    edits: list[tuple[str, Any]] = [
        *[("step", 19), ("step", "20"), ("step", 20.0), ("step", True), ("step", -20)],
        *[("run_id", "run-2"), ("run_id", None), ("run_id", ""), ("format", 2), ("more", 1)],
        *[("format", "1"), ("files", {}), ("files", None), ("files", "abc"), ("files", [1])],
        *[("files", [[]]), ("files", [{}]), ("link", "1"), ("epoch", None), ("created", "x")],
        *[("parent", 5), ("metric", [1]), ("metric", {}), ("metric", {"name": 1})],
    ]
    key, value = attack.dice.choice(edits)
    attack.edit(lambda content: content.update({key: value}), fits=True)


def drop_a_key(attack: Attack) -> None:
    """Of the manifest, or of one of its entries; the digest fits."""
    content = json.loads(attack.manifest.read_bytes())
    place = attack.dice.choice([content, attack.dice.choice(content["files"])])
    place.pop(attack.dice.choice(sorted(place.keys() - {"digest", "metric"})))
    content["digest"] = _digest(content)
    attack.manifest.write_bytes(files.to_json(content, indent=1))


def name_outside(attack: Attack) -> None:
    """A name that leads to a file with the right bytes, outside."""
    name = attack.dice.choice(attack.names())
    index = next(
        n
        for n, entry in enumerate(json.loads(attack.manifest.read_bytes())["files"])
        if entry["name"] == name
    )
    shutil.copy(attack.new / name, attack.saves.run.path / "outside")
    step = attack.new.name
    ways = [
        *("../outside", f"../{step}/{name}", f"templates/../{name}", f"templates/../../{step}/x"),
        *("..", ".", "", "./outside", f"./{name}", f"{name}/", f"{name}/.", f"{name}\0"),
        *(f"{name}\n", f" {name}", f"a/b/{name}", f"//{name}", f"templates//{name}", NAME),
        *(".hidden", "~", "-rf"),
    ]
    way = attack.dice.choice(ways)
    attack.edit(lambda content: content["files"][index].update(name=way), fits=True)


def name_absolutely(attack: Attack) -> None:
    name = attack.dice.choice(attack.names())
    place = attack.dice.choice(
        [attack.new / name, attack.old / name, Path("/etc/passwd"), Path("/")]
    )
    attack.edit_entry(name=str(place))


def name_twice(attack: Attack) -> None:
    """Two entries of one name that say different things; the digest fits."""

    def double(content: dict[str, Any]) -> None:
        one, two = attack.dice.sample(content["files"], 2)
        at = attack.dice.randrange(len(content["files"]))
        content["files"].insert(at, {**two, "name": one["name"]})

    attack.edit(double, fits=True)


def lie_about_a_size(attack: Attack) -> None:
    attack.edit_entry(
        bytes=attack.dice.choice(
            [-1, 0, 1, -(2**63), 2**63, 2**200, 1e3, math.nan, math.inf, "5", None, True, [1]]
        )
    )


def lie_about_digests(attack: Attack) -> None:
    lies: list[Any] = [[], [""], ["0" * 32], ["0" * 32] * 2, [None], [5], [[]], "0" * 32, None, {}]
    attack.edit_entry(chunks=attack.dice.choice(lies))


def swap_digests(attack: Attack) -> None:
    def swap(content: dict[str, Any]) -> None:
        one, two = attack.dice.sample(content["files"], 2)
        one["chunks"], two["chunks"] = two["chunks"], one["chunks"]

    attack.edit(swap, fits=True)


def manifest_of_another_step(attack: Attack) -> None:
    data = (attack.old / NAME).read_bytes()
    if attack.dice.random() < 0.5:
        shutil.rmtree(attack.new)
        shutil.copytree(attack.old, attack.new)
    attack.manifest.write_bytes(data)


def manifest_of_another_run(attack: Attack) -> None:
    if attack.dice.random() < 0.5:
        shutil.rmtree(attack.new)
        shutil.copytree(attack.foreign, attack.new)
    shutil.copy(attack.foreign / NAME, attack.manifest)


def empty_manifest(attack: Attack) -> None:
    empty = [b"", b"\n", b" ", b"null", b"{}", b"[]", b"0", b'""', b"\0" * 500, b"\xef\xbb\xbf{}"]
    empty += [b'{"digest": null}', b'{"digest": 1, "format": 1}', b"NaN", b"{", b"\xff\xfe{\0}\0"]
    attack.manifest.write_bytes(attack.dice.choice(empty))


def nest_deeply(attack: Attack) -> None:
    depth = attack.dice.choice([1_000, 5_000, 100_000])
    text = attack.manifest.read_text()
    nests = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth]
    nest = attack.dice.choice(nests)
    key = attack.dice.choice(["metric", "parent", "files", ""])
    attack.manifest.write_text(
        text.replace(f'"{key}": ', f'"{key}": {nest}, "x": ', 1) if key else nest
    )


def write_huge_numbers(attack: Attack) -> None:
    digits = "9" * attack.dice.choice([30, 400, 5_000, 100_000])
    key = attack.dice.choice(["step", "epoch", "link", "created", "bytes", "rank"])
    text = attack.manifest.read_text()
    assert f'"{key}": ' in text
    attack.manifest.write_text(text.replace(f'"{key}": ', f'"{key}": {digits}', 1))


#: Found, every one of them.
DAMAGE: dict[str, Callable[[Attack], None]] = {
    each.__name__.replace("_", " "): each
    for each in (
        *(flip_a_bit, flip_a_burst, truncate, grow, grow_without_bytes, zero_a_page),
        *(zero_the_tail, swap_blocks, swap_files_of_one_size, remove_a_file, empty_a_file),
        *(leave_nothing, put_a_directory, put_a_pipe, put_a_file_for_a_folder, link_a_file),
        link_a_folder,
        *(link_the_checkpoint, hard_link_to_another, edit_without_the_digest),
        *(edit_with_the_digest, drop_a_key, name_outside, name_absolutely, name_twice),
        *(lie_about_a_size, lie_about_digests, swap_digests, manifest_of_another_step),
        *(manifest_of_another_run, empty_manifest, nest_deeply, write_huge_numbers),
    )
}


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def foreign(memory: Path) -> Path:
    """Checkpoint NEW of another run."""
    other = Saves(new_saves(memory / "foreign").run, "run-2")
    other.commit(NEW + 1000)
    committed = other.commit(NEW)
    # Its bytes are those of another step, so that they tell themselves apart.
    for name, data in payload(other.run.checkpoint(NEW + 1000)).items():
        if name.endswith(".safetensors"):
            _replace_file(committed.path, name, data)
    return committed.path


def _replace_file(checkpoint: Path, name: str, data: bytes) -> None:
    """Give a checkpoint another file, with a manifest to fit."""
    (checkpoint / name).write_bytes(data)
    content = json.loads((checkpoint / NAME).read_bytes())
    entry = next(entry for entry in content["files"] if entry["name"] == name)
    entry |= {"bytes": len(data), "chunks": [digest_of(data)]}
    content["digest"] = _digest(content)
    (checkpoint / NAME).write_bytes(files.to_json(content, indent=1))


@pytest.fixture(scope="module")
def bytes_of(memory: Path) -> dict[int, dict[str, bytes]]:
    """What an undamaged checkpoint of a step consists of."""
    saves = new_saves(memory / "whole")
    return {step: payload(saves.commit(step).path) for step in (OLD, NEW)}


def attacked(
    folder: Path, foreign: Path, kind: str, number: int, damage: Callable[[Attack], None]
) -> tuple[Saves, str]:
    """A run whose newest checkpoint was damaged, and the seed of it."""
    seed = f"{SEED} {kind} {number}"
    shutil.rmtree(folder, ignore_errors=True)
    saves = new_saves(folder)
    for step in (OLD, NEW):
        saves.commit(step)
    damage(Attack(random.Random(seed), saves, foreign))
    return saves, seed


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_older_checkpoint_used_byte_for_byte(
    memory: Path, foreign: Path, bytes_of: dict[int, dict[str, bytes]], kind: str
) -> None:
    for number in range(EACH):
        saves, seed = attacked(memory / "run", foreign, kind, number, DAMAGE[kind])
        found = saves.latest()
        assert found is not None and found.step == OLD, (seed, saves.told)
        assert payload(found.path) == bytes_of[OLD], seed
        # A link in its place is no directory of ours: it is passed over.
        linked = saves.run.checkpoint(NEW).is_symlink()
        assert linked or list(saves.told) == [NEW], (seed, saves.told)
        assert linked or not saves.run.checkpoint(NEW).exists(), seed


@pytest.mark.parametrize("kind", DAMAGE)
def test_step_that_was_damaged_is_saved_again_as_if_nothing_had_been(
    memory: Path, foreign: Path, bytes_of: dict[int, dict[str, bytes]], kind: str
) -> None:
    # Both where the damage was found before, and where the save itself meets it.
    for number in range(2):
        saves, seed = attacked(memory / "run", foreign, kind, number, DAMAGE[kind])
        if number:
            saves.latest()
        if saves.store.committed(Lineage())[-1].step == NEW:
            # Digests are not a save's matter: what looks whole is not saved again.
            saves.latest()
        saves.commit(NEW)
        found = saves.latest()
        assert found is not None and found.step == NEW, (seed, saves.told)
        assert payload(found.path) == bytes_of[NEW], seed


def put_a_file(path: Path) -> None:
    path.write_text("x")


def put_a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [put_a_file, put_a_dangling_link, os.mkfifo])
def test_what_stands_in_the_place_of_a_checkpoint_does_not_bar_the_way(
    memory: Path, bytes_of: dict[int, dict[str, bytes]], put: Callable[[Path], None]
) -> None:
    saves = new_saves(memory / put.__name__)
    saves.commit(OLD)
    put(saves.run.checkpoint(NEW))
    assert saves.latest_step() == OLD
    saves.commit(NEW)
    found = saves.latest()
    assert found is not None and payload(found.path) == bytes_of[NEW]


def test_damaged_checkpoints_are_a_thousand() -> None:
    assert EACH * len(DAMAGE) >= 1000


# What is never read


def add_files(attack: Attack) -> None:
    (attack.new / attack.dice.choice([".nfs0001", "x.safetensors", "late.json"])).write_text("x")


def add_a_folder(attack: Attack) -> None:
    (attack.new / "more").mkdir()
    (attack.new / "more" / "x").symlink_to(attack.dice.choice([".", "..", "/", "nowhere"]))


def write_the_manifest_otherwise(attack: Attack) -> None:
    content = json.loads(attack.manifest.read_bytes())
    items = list(content.items())
    attack.dice.shuffle(items)
    indent = attack.dice.choice([None, 0, 3])
    attack.manifest.write_text(json.dumps(dict(items), indent=indent) + attack.dice.choice("\n "))
    # Its digest goes by the order of the keys as they stand in the text.
    attack.edit(lambda content: None, fits=True)


def change_times(attack: Attack) -> None:
    for path in (attack.file(), attack.new):
        os.utime(path, (attack.dice.randrange(2**31), attack.dice.randrange(2**31)))


def name_the_same_twice(attack: Attack) -> None:
    attack.edit(lambda c: c["files"].append(dict(attack.dice.choice(c["files"]))), fits=True)


HARMLESS: dict[str, Callable[[Attack], None]] = {
    each.__name__.replace("_", " "): each
    for each in (
        *(add_files, add_a_folder, write_the_manifest_otherwise, change_times),
        name_the_same_twice,
    )
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_is_never_read_changes_no_byte_of_what_is(
    memory: Path, foreign: Path, bytes_of: dict[int, dict[str, bytes]], kind: str
) -> None:
    for number in range(EACH):
        saves, seed = attacked(memory / "run", foreign, kind, number, HARMLESS[kind])
        found = saves.latest()
        assert found is not None and found.step in (OLD, NEW), (seed, saves.told)
        named = {entry.name for entry in found.manifest.files}
        read = {name: data for name, data in payload(found.path).items() if name in named}
        assert read == bytes_of[found.step], seed
        into = saves.restored()
        assert into["config"] == {"step": found.step}, seed


# Files of several chunks


def test_swapped_chunks_are_found(memory: Path) -> None:
    dice = random.Random(SEED)
    chunks = [dice.randbytes(1 << 16) * (CHUNK_BYTES >> 16) for _ in range(3)]
    saves = new_saves(memory / "chunks")
    saves.commit(OLD)

    def write(folder: Path) -> list[FileEntry]:
        contents = Contents()
        tensor = torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8)
        contents.add("model", Held({"weight": tensor}))
        return contents.stage({}, [], {}).write(folder)

    saves.store.commit(
        write,
        **{"step": NEW, "epoch": 0, "link": 1, "parent": None, "metric": None},
        lineage=Lineage(),
        fence=lambda: None,
    )
    path = saves.run.checkpoint(NEW) / "model.safetensors"
    data = path.read_bytes()
    first, second = data[:CHUNK_BYTES], data[CHUNK_BYTES : 2 * CHUNK_BYTES]
    path.write_bytes(second + first + data[2 * CHUNK_BYTES :])
    assert saves.latest_step() == OLD and "model.safetensors" in saves.told[NEW]


# Links that begin with a damaged checkpoint


@pytest.fixture(scope="module")
def uncut(memory: Path) -> RunDir:
    return through(make_run(memory / "uncut", **SETTINGS), train=tied_sizes)


SETTINGS: dict[str, Any] = {"max_steps": 12, "checkpoint": {"keep_last": 9, "each_epoch": False}}


def tied_sizes(session: hpcresume.Session) -> None:
    """Ordinary training, with another module whose file is of the size of the model's."""
    from bug_links import Net

    session.register(other=Net(), second=nn.Linear(2, 2))
    ordinary(session)


def in_newest(name: str) -> Callable[[RunDir], Path]:
    return lambda run: checkpoints(run)[-1].path / name


def _flip_weights(run: RunDir) -> None:
    path = in_newest("model.safetensors")(run)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _swap_weights(run: RunDir) -> None:
    one, two = in_newest("model.safetensors")(run), in_newest("other.safetensors")(run)
    a, b = one.read_bytes(), two.read_bytes()
    assert len(a) == len(b) and a != b
    one.write_bytes(b)
    two.write_bytes(a)


def _truncate_state(run: RunDir) -> None:
    os.truncate(in_newest("state.json")(run), 100)


def _remove_manifest(run: RunDir) -> None:
    in_newest(NAME)(run).unlink()


def _give_random_state_of_before(run: RunDir) -> None:
    older, newer = checkpoints(run)[-2:]
    shutil.copy(older.path / "rng.json", newer.path / "rng.json")


def _lie_about_the_step(run: RunDir) -> None:
    newest = checkpoints(run)[-1]
    content = dataclasses.replace(newest.manifest, step=newest.step + 1)
    (newest.path / NAME).write_bytes(content.to_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        *(_flip_weights, _swap_weights, _truncate_state, _remove_manifest),
        *(_give_random_state_of_before, _lie_about_the_step),
    ],
    ids=lambda damage: damage.__name__.strip("_").replace("_", " "),
)
def test_link_resumes_from_the_older_checkpoint_and_completes_with_the_uncut_bytes(
    memory: Path, uncut: RunDir, damage: Callable[[RunDir], None]
) -> None:
    run = make_run(memory / f"run {damage.__name__}", **SETTINGS)
    cut(run, 4, tied_sizes)
    cut(run, 7, tied_sizes)
    damage(run)
    assert link(run, tied_sizes).how == "completed"
    (restored,) = [r for r in files.read_lines(run.link(3).training) if r["kind"] == "restored"]
    assert restored["step"] == 4
    assert_same(run, uncut)


# Files that several checkpoints share


def with_frozen_part(session: hpcresume.Session) -> None:
    """Ordinary training beside a module that is not trained."""
    session.register(frozen=nn.Linear(8, 8).requires_grad_(False))
    ordinary(session)


def damage_in_place(path: Path) -> None:
    """What a bad sector does: all names of the file lead to it."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_bad_sector_in_a_shared_file_costs_one_checkpoint_of_two_and_no_byte_of_the_end(
    memory: Path,
) -> None:
    uncut = through(make_run(memory / "frozen uncut", **SETTINGS), train=with_frozen_part)
    run = make_run(memory / "frozen", **SETTINGS)
    for step in (2, 3, 4, 6, 7):
        cut(run, step, with_frozen_part)
    files_of = {found.step: found.path / "frozen.safetensors" for found in checkpoints(run)}
    inodes = {step: path.stat().st_ino for step, path in files_of.items()}
    # Otherwise nothing is shared, or all of it is one file.
    assert 2 <= len(set(inodes.values())) < len(inodes)
    damage_in_place(files_of[7])
    assert link(run, with_frozen_part).how == "completed"
    (restored,) = [r for r in files.read_lines(run.link(6).training) if r["kind"] == "restored"]
    assert restored["step"] == max(step for step in inodes if inodes[step] != inodes[7]) >= 4
    assert_same(run, uncut)
