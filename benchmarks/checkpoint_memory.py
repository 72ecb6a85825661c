"""What memory saves and restores take, each in a process that does nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from checkpoint_payload import Training, trim
from checkpoint_rows import Bar, Row, Unmeasurable, tell
from checkpoint_saves import Saves, contents_of, restore

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
#: What a save may take beyond the payload's size.
_ROOM_BYTES = 64 << 20
#: Of the saves over which memory is not to grow.
_GROWTH_BYTES = 64 << 20
#: The save after which all that is kept from save to save is there.
_SETTLED = 5


def memory_of_saves(tensors: int, size_bytes: int, folder: Path) -> Iterator[Row]:
    """The peak while three checkpoints are saved, beyond the live state."""
    tell(f"memory of a save, {tensors:,} tensors")
    training = Training(tensors, size_bytes)
    saves = Saves(contents_of(training.model, training.optimizer), folder / "memory")

    def extra_bytes() -> int:
        live = _begin_peak()
        for _ in range(3):
            saves.save()
        return _bytes_of("VmHWM") - live

    yield _row("extra memory of a save / payload", training, extra_bytes)
    saves.close()


def memory_of_restore(tensors: int, size_bytes: int, folder: Path) -> Iterator[Row]:
    """The peak while a new link restores, beyond the state that is live afterwards."""
    tell(f"memory of a restore, {tensors:,} tensors")
    training = Training(tensors, size_bytes, begun=False)

    def extra_bytes() -> int:
        _begin_peak()
        restore(training, folder / "memory")
        peak = _bytes_of("VmHWM")
        gc.collect()
        trim()
        return peak - _bytes_of("VmRSS")

    yield _row("extra memory of a restore / payload", training, extra_bytes)


def growth(tensors: int, size_bytes: int, num_saves: int, folder: Path) -> Iterator[Row]:
    """The memory of a process after many saves, over that after the first few."""
    size_bytes = min(size_bytes, _GROWTH_BYTES)
    tell(f"memory over {num_saves} saves")
    training = Training(tensors, size_bytes)
    saves = Saves(contents_of(training.model, training.optimizer), folder / "growth", keep=2)

    def size_after(count: int) -> int:
        for _ in range(count):
            training.step()
            saves.save()
        # Free memory that the allocator keeps comes and goes; what is held does not.
        trim()
        return _bytes_of("VmRSS")

    begun = size_after(_SETTLED)
    ended = size_after(num_saves - _SETTLED)
    saves.close()
    yield Row(
        figure="growth",
        name=f"memory after {num_saves} saves / after {_SETTLED}",
        tensors=tensors,
        bar=Bar(1.01),
        ratios=(ended / begun,),
        digits=3,
        note=f"{(ended - begun) / 2**20:+.1f} MiB of {begun / 2**20:.0f}; "
        f"payload {training.bytes / 2**20:.0f} MiB",
    )


def _row(name: str, training: Training, extra_bytes: Callable[[], int]) -> Row:
    row = Row(figure="memory", name=name, tensors=training.num_tensors)
    try:
        extra = extra_bytes()
    except Unmeasurable as error:
        return replace(row, note=str(error))
    # Asked afterwards: what is restored is there only now.
    size = training.bytes
    return replace(
        row,
        bar=Bar(1 + _ROOM_BYTES / size),
        ratios=(extra / size,),
        note=f"{(extra - size) / 2**20:+.0f} MiB beyond the payload",
    )


def _begin_peak() -> int:
    """Have the peak counted anew; returns what is resident now, in bytes."""
    trim()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        raise Unmeasurable(f"the peak cannot be counted anew ({error})") from None
    return _bytes_of("VmRSS")


def _bytes_of(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
