"""What is kept, what may go, and whether the disk has room: pure, on made-up histories."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcresume.checkpoint import retention
from hpcresume.checkpoint.disk import (
    Held,
    Plan,
    Room,
    holdings,
    occupied_bytes,
    preflight,
    remove,
    room_of_disk,
)
from hpcresume.checkpoint.manifest import Committed, FileEntry, Manifest
from hpcresume.checkpoint.retention import (
    Policy,
    best_steps,
    kept,
    most_at_once,
    policy_of,
    to_make_room,
    to_remove,
)
from hpcresume.config import CheckpointConfig, from_mapping
from hpcresume.errors import ConfigError
from hpcresume.run_dir import RunDir


def manifest(step: int, value: float | None = None, mode: str = "min", **rest: float) -> Manifest:
    metric = None if value is None else {"name": "loss", "value": value, "mode": mode}
    fields = {"created": 0.0, **rest}
    return Manifest(
        step=step, epoch=0, link=1, run_id="", parent=None, files=(), metric=metric, **fields
    )


def of(*steps: int) -> list[Manifest]:
    return [manifest(step) for step in steps]


# ---- each rule -----------------------------------------------------------------------------


def test_the_newest_are_kept_by_their_steps() -> None:
    assert to_remove(of(9, 1000, 100, 10), Policy(last=2)) == [9, 10]


def test_the_best_is_kept_besides_the_newest() -> None:
    found = [manifest(1, 0.5), manifest(2, 0.1), manifest(3, 0.4), manifest(4, 0.3)]
    assert kept(found, Policy(last=1, best=1)) == {2: ("best",), 4: ("last",)}


def test_what_is_kept_by_several_rules_says_so() -> None:
    found = [manifest(10, 0.1), manifest(11, 0.2)]
    policy = Policy(last=2, best=1, every=10)
    assert kept(found, policy, [10]) == {
        10: ("last", "best", "every", "pinned"),
        11: ("last",),
    }


@pytest.mark.parametrize(
    ("steps", "stay"),
    [
        ([5, 10, 15, 20, 25], [10, 20, 25]),
        # By the clock a multiple is seldom met: the first after it stands for it.
        ([9, 12, 17, 31, 33, 58], [12, 31, 58]),
        # A jump over several multiples leaves one.
        ([10, 55, 56], [10, 55, 56]),
        ([1, 2, 3], [3]),
        ([0, 10], [10]),
    ],
)
def test_the_first_at_or_after_each_multiple_is_kept_for_good(
    steps: list[int], stay: list[int]
) -> None:
    assert list(kept(of(*steps), Policy(last=1, best=0, every=10))) == stay


def test_a_pinned_one_is_kept_for_good() -> None:
    assert to_remove(of(1, 2, 3, 4), Policy(last=1), pinned=[2]) == [1, 3]


def test_a_pin_without_a_checkpoint_keeps_nothing() -> None:
    assert to_remove(of(1, 2, 3), Policy(last=1), pinned=[77]) == [1, 2]


def test_nothing_goes_before_the_newest_is_verified() -> None:
    found = of(1, 2, 3)
    assert to_remove(found, Policy(last=1), verified=[1, 2]) == []
    assert to_remove(found, Policy(last=1), verified=[3]) == [1, 2]


def test_a_run_without_checkpoints_has_nothing_to_remove() -> None:
    assert to_remove([], Policy(), verified=[]) == []
    assert to_make_room([], Policy()) == []
    assert kept([], Policy()) == {}


@pytest.mark.parametrize(("last", "gone"), [(3, [1]), (2, [1, 2]), (1, [1, 2])])
def test_before_a_save_what_it_will_push_out_may_go_and_never_the_newest(
    last: int, gone: list[int]
) -> None:
    assert to_make_room(of(1, 2, 3), Policy(last=last)) == gone


def test_room_is_not_made_of_what_other_rules_keep() -> None:
    found = [manifest(1, 0.1), *of(10, 12, 13, 14)]
    policy = Policy(last=2, best=1, every=10)
    assert to_make_room(found, policy, pinned=[12]) == [13]


# ---- configuration -------------------------------------------------------------------------


def test_a_configuration_gives_its_policy() -> None:
    settings = CheckpointConfig(keep_last=3, keep_best=2, keep_every=1000)
    assert policy_of(settings) == Policy(last=3, best=2, every=1000)
    assert policy_of(CheckpointConfig()) == Policy(last=5, best=1, every=None)


def test_a_complete_run_keeps_all_unless_it_says_otherwise() -> None:
    final = CheckpointConfig(keep_every=10, on_finish="keep_final")
    assert policy_of(CheckpointConfig(), complete=True) == Policy()
    assert policy_of(final, complete=False) == Policy(every=10)
    assert policy_of(final, complete=True) == Policy(last=1, every=10)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("keep_every", 0, "a whole number of at least 1, or null"),
        ("on_finish", "keep_last", "one of keep_all, keep_final; did you mean 'keep_all'?"),
    ],
)
def test_a_policy_that_makes_no_sense_is_an_error(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_mapping({"checkpoint": {key: value}}, "test")
    assert f"checkpoint.{key}" in str(error.value)
    assert expected in str(error.value)


# ---- random histories ----------------------------------------------------------------------


@dataclasses.dataclass
class History:
    """A run of saves, damage, pins and retention, as they come by chance."""

    seed: int

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        self.policy = Policy(
            last=draw.randint(0, 4),
            best=draw.randint(0, 3),
            every=draw.choice([None, None, draw.randint(1, 400)]),
        )
        self.held: dict[int, Manifest] = {}
        self.verified: set[int] = set()
        self.pinned: set[int] = set()
        self.step = 0
        self.draw = draw

    def save(self) -> None:
        draw = self.draw
        self.step += draw.choice([1, 7, 50, 100, 333])
        value = draw.choice([None, math.nan, draw.random(), round(draw.random(), 1)])
        # The clock jumps, and copies have times of their own.
        created = draw.uniform(-1e9, 2e9)
        self.held[self.step] = manifest(self.step, value, "max", created=created)
        if draw.random() < 0.8:
            self.verified.add(self.step)

    def look(self) -> list[Manifest]:
        """What a listing finds, in no order."""
        found = list(self.held.values())
        self.draw.shuffle(found)
        return found

    def prune(self, *, before_a_save: bool) -> int:
        """Remove what the rule says, held to every promise; how many."""
        rule = to_make_room if before_a_save else to_remove
        found = self.look()
        going = rule(found, self.policy, pinned=self.pinned, verified=self.verified)
        self.check(found, going, before_a_save=before_a_save)
        for step in going:
            del self.held[step]
        self.verified &= self.held.keys()
        return len(going)

    def check(self, found: list[Manifest], going: list[int], *, before_a_save: bool) -> None:
        assert going == sorted(set(going))
        assert set(going) <= self.held.keys()
        if not found:
            return
        newest = max(self.held)
        stay = self.held.keys() - set(going)
        assert newest in stay
        assert self.pinned & self.held.keys() <= stay
        if going:
            assert newest in self.verified
        if self.verified:
            assert stay & self.verified, "no verified checkpoint would be left"
        number = max(self.policy.last - before_a_save, 1)
        assert set(sorted(self.held)[-number:]) <= stay
        assert set(best_steps(found, self.policy.best)) <= stay
        # No rule but the order of steps: the times say nothing, nor does the order of the list.
        timeless = [
            dataclasses.replace(m, created=0.0) for m in sorted(found, key=lambda m: m.step)
        ]
        rule = to_make_room if before_a_save else to_remove
        assert going == rule(timeless, self.policy, pinned=self.pinned, verified=self.verified)

    def pin(self) -> None:
        self.pinned.symmetric_difference_update({self.draw.choice([0, *self.held])})


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_random_histories_keep_every_promise(seed: int) -> None:
    removed = 0
    for number in range(100):
        history = History(seed * 100 + number)
        for _ in range(30):
            action = history.draw.random()
            if action < 0.5:
                history.save()
            elif action < 0.6:
                history.pin()
            else:
                removed += history.prune(before_a_save=action < 0.7)
    assert removed > 100


def kept_for_good(steps: list[int], every: int, last: int, *, at_once: bool) -> list[int]:
    """What is left of a run that saved at these steps, pruned after each save or at its end."""
    policy = Policy(last=last, best=0, every=every)
    held: list[int] = []
    for number, step in enumerate(steps, start=1):
        held.append(step)
        if not at_once or number == len(steps):
            held = sorted(set(held) - set(to_remove(of(*held), policy)))
    return held


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=30, unique=True).map(sorted),
    st.integers(1, 500),
    st.integers(1, 4),
)
def test_it_makes_no_difference_how_often_one_looks(
    steps: list[int], every: int, last: int
) -> None:
    often = kept_for_good(steps, every, last, at_once=False)
    assert often == kept_for_good(steps, every, last, at_once=True)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40, unique=True).map(sorted),
    st.integers(1, 5),
    st.integers(0, 3),
    st.none() | st.integers(1, 100),
    st.sets(st.integers(1, 300), max_size=3),
)
def test_a_run_never_holds_more_than_was_said(
    steps: list[int], last: int, best: int, every: int | None, pinned: set[int]
) -> None:
    policy = Policy(last=last, best=best, every=every)
    held: dict[int, Manifest] = {}
    said: list[int] = []
    most_held = 0
    for step in steps:
        if held:
            pins = pinned & held.keys()
            bound = most_at_once(list(held.values()), policy, pinned=pins, max_steps=300)
            said.append(bound + len(pinned - pins))
        held[step] = manifest(step, float(step % 7))
        most_held = max(most_held, len(held))
        for gone in to_remove(list(held.values()), policy, pinned=pinned):
            del held[gone]
    assert most_held <= min(said, default=1)


@pytest.mark.parametrize(
    ("found", "policy", "pinned", "max_steps", "most"),
    [
        (of(1), Policy(last=5, best=1), [], None, 6),
        ([manifest(1, 0.5)], Policy(last=5, best=1), [], None, 7),
        (of(1, 2), Policy(last=1, best=0), [1, 99], None, 3),
        (of(1), Policy(last=1, best=0, every=100), [], 1000, 12),
        (of(100, 250), Policy(last=1, best=0, every=100), [], None, 4),
    ],
)
def test_how_many_a_run_may_hold_is_the_sum_of_its_rules_and_one_being_written(
    found: list[Manifest],
    policy: Policy,
    pinned: list[int],
    max_steps: int | None,
    most: int,
) -> None:
    assert most_at_once(found, policy, pinned=pinned, max_steps=max_steps) == most


# ---- room ----------------------------------------------------------------------------------

GB = 10**9
OLD = [Held(step=1, bytes=GB, files=10), Held(step=2, bytes=GB, files=10)]


def disk(free_bytes: int | None = 100 * GB, free_files: int | None = None) -> Room:
    return Room(where="the disk of /runs/toy", free_bytes=free_bytes, free_files=free_files)


@pytest.mark.parametrize(
    ("free_bytes", "going"),
    [
        (None, ()),
        (3 * GB, ()),
        # The slack: 2 % and 1 MiB.
        (2 * GB, (1,)),
        (int(1.1 * GB), (1,)),
        (int(0.1 * GB), (1, 2)),
    ],
)
def test_as_few_go_as_make_room_the_oldest_first(
    free_bytes: int | None, going: tuple[int, ...]
) -> None:
    plan = preflight([disk(free_bytes)], needed_bytes=2 * GB, needed_files=5, candidates=OLD)
    assert plan == Plan(remove=going, refusal=None)


def test_files_are_counted_as_bytes_are() -> None:
    room = disk(free_files=12)
    plan = preflight([room], needed_bytes=1, needed_files=10, candidates=OLD)
    assert plan.remove == (1,)
    plan = preflight([room], needed_bytes=1, needed_files=40, candidates=OLD)
    assert plan == Plan(
        refusal="a checkpoint needs 40 files, and the disk of /runs/toy has room for 12 left, even "
        "without the 2 older checkpoints that may go: remove 16 there, or keep fewer "
        "(checkpoint.keep_last)"
    )


def test_where_there_is_no_room_even_so_nothing_goes_and_the_reason_is_said() -> None:
    plan = preflight([disk(GB)], needed_bytes=5 * GB, needed_files=5, candidates=OLD)
    assert plan == Plan(
        refusal="a checkpoint needs 5.1 GB, and the disk of /runs/toy has 1.0 GB left, even "
        "without the 2 older checkpoints that may go: free 2.1 GB there, or keep fewer "
        "(checkpoint.keep_last)"
    )


def test_without_candidates_none_are_spoken_of() -> None:
    plan = preflight([disk(GB)], needed_bytes=5 * GB, needed_files=5, candidates=[])
    assert plan.refusal is not None
    assert plan.refusal.startswith(
        "a checkpoint needs 5.1 GB, and the disk of /runs/toy has 1.0 GB left: free 4.1 GB there"
    )


def test_the_tightest_limit_decides() -> None:
    quota = Room(where="the user's quota on /runs", free_bytes=GB // 2, free_files=10**6)
    plan = preflight([disk(), quota], needed_bytes=GB, needed_files=5, candidates=OLD)
    assert plan.remove == (1,)
    plan = preflight([disk(), quota], needed_bytes=9 * GB, needed_files=5, candidates=OLD)
    assert plan.refusal is not None
    assert "the user's quota on /runs has 500.0 MB left" in plan.refusal


def test_a_quota_that_is_overdrawn_has_nothing_left() -> None:
    plan = preflight([disk(-5 * GB)], needed_bytes=GB, needed_files=5, candidates=[])
    assert plan.refusal is not None
    assert "has 0 B left: free 6.0 GB there" in plan.refusal


def with_files(folder: Path, step: int, **sizes: int) -> Committed:
    """A checkpoint with files of these sizes."""
    folder.mkdir()
    for name, size in sizes.items():
        (folder / name).write_bytes(bytes(size))
    entries = tuple(FileEntry(name=k, bytes=size, chunks=()) for k, size in sizes.items())
    return Committed(folder, dataclasses.replace(manifest(step), files=entries))


def test_what_checkpoints_hold_is_told_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    found = [with_files(tmp_path / "1", 1, a=5), with_files(tmp_path / "2", 2, a=5, b=7)]
    # The manifest and the directory are files too.
    assert holdings(found, [2, 1]) == [
        Held(step=2, bytes=12, files=4),
        Held(step=1, bytes=5, files=3),
    ]


def test_a_file_that_two_checkpoints_have_gives_no_room_when_one_goes(tmp_path: Path) -> None:
    found = [with_files(tmp_path / "1", 1, a=5), with_files(tmp_path / "2", 2, a=5, b=7)]
    (tmp_path / "2" / "a").unlink()
    (tmp_path / "2" / "a").hardlink_to(tmp_path / "1" / "a")
    assert holdings(found, [1]) == [Held(step=1, bytes=0, files=3)]
    assert occupied_bytes(found) == 12


rooms = st.builds(
    disk,
    st.none() | st.integers(-(10**7), 3 * 10**8),
    st.none() | st.integers(-10, 200),
)
held = st.builds(
    Held, step=st.integers(1, 99), bytes=st.integers(0, 10**8), files=st.integers(1, 20)
)


@settings(deadline=None, max_examples=500)
@given(
    st.lists(rooms, max_size=3),
    st.integers(0, 10**8),
    st.integers(1, 50),
    st.lists(held, max_size=5, unique_by=lambda h: h.step),
)
def test_a_plan_makes_room_or_says_why_not(
    limits: list[Room], needed_bytes: int, needed_files: int, candidates: list[Held]
) -> None:
    plan = preflight(
        limits, needed_bytes=needed_bytes, needed_files=needed_files, candidates=candidates
    )
    assert plan.remove == tuple(h.step for h in candidates[: len(plan.remove)])
    going = candidates if plan.refusal else candidates[: len(plan.remove)]
    bytes_more = sum(h.bytes for h in going) - needed_bytes
    files_more = sum(h.files for h in going) - needed_files
    fits = all(
        (room.free_bytes is None or room.free_bytes + bytes_more > 0)
        and (room.free_files is None or room.free_files + files_more > 0)
        for room in limits
    )
    if plan.refusal is None:
        assert fits
    else:
        assert plan.remove == ()


def test_the_room_of_a_disk_is_what_its_users_may_still_write(tmp_path: Path) -> None:
    room = room_of_disk(tmp_path)
    assert room.where == f"the disk of {tmp_path}"
    assert room.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert room.free_files is None or room.free_files > 0


def test_a_file_system_that_counts_no_files_has_no_limit_of_them() -> None:
    # /proc has neither blocks nor files.
    assert room_of_disk(Path("/proc")).free_files is None


def test_the_disk_of_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        room_of_disk(tmp_path / "gone")


# ---- on the disk ---------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "a 'run'")
    run.path.mkdir()
    return run


def test_a_removed_checkpoint_is_gone_with_all_that_is_in_it(run: RunDir) -> None:
    for step in (1, 2):
        run.checkpoint(step).mkdir()
        (run.checkpoint(step) / "manifest.json").write_text("{}")
    remove(run, 1)
    assert os.listdir(run.path) == ["checkpoint-2"]


def test_removing_what_is_gone_already_is_an_error(run: RunDir) -> None:
    with pytest.raises(FileNotFoundError):
        remove(run, 1)


def test_pins_are_found_by_their_names_alone(run: RunDir) -> None:
    for name in ("pinned-0", "pinned-7", "pinned-1000", "pinned-", "pinned-07", ".pinned-3"):
        (run.path / name).touch()
    assert run.pinned_steps() == [0, 7, 1000]
    assert [run.pin(step).name for step in (0, 1000)] == ["pinned-0", "pinned-1000"]
    assert run.checkpoint_steps() == []


def test_the_policy_and_its_defaults_are_those_of_the_configuration() -> None:
    names = {field.name for field in dataclasses.fields(retention.Policy)}
    assert {f"keep_{name}" for name in names} <= set(CheckpointConfig.__struct_fields__)
