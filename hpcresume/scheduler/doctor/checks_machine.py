"""Judges the folder of runs and this machine. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from hpcresume.files import size_words
from hpcresume.scheduler.doctor.facts import (
    FileFacts,
    Finding,
    LocalFacts,
    PythonFacts,
    Wishes,
    failure,
    good,
    warning,
)
from hpcresume.scheduler.doctor.texts import version_of
from hpcresume.scheduler.doctor.words import ASK_ADMIN, clock, dotted, names_counted

OLDEST_TORCH = (2, 10)
GIB = 1 << 30
#: Below the first number a failure, below the second a warning.
LEAST_BYTES, FEW_BYTES = GIB, 20 * GIB
LEAST_INODES, FEW_INODES = 1_000, 20_000
SLOW_FSYNC_S = 1.0
SLOW_IMPORT_S = 30.0
FULL_QUOTA = 0.9
#: File systems that are this machine's memory.
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def judge_files(facts: FileFacts, wishes: Wishes) -> Iterator[Finding]:
    """What runs meet in their folder."""
    elsewhere = "choose another folder of runs (--runs or $HPCRESUME_RUNS)"
    if facts.complaint:
        where = facts.base or facts.root
        yield failure("folder", f"{where}: {facts.complaint}", elsewhere)
        return
    yield _place(facts, wishes, elsewhere)
    for name, does in _OPERATIONS.items():
        error = facts.errors.get(name)
        if error is not None:
            yield failure(name, error, f"{elsewhere}: checkpoints would not be safe here")
        elif name == "fsync" and (facts.fsync_s or 0.0) > SLOW_FSYNC_S:
            yield warning(
                name,
                f"{facts.fsync_s:.1f} s for a small file: every save waits for some",
                elsewhere,
            )
        elif name == "fsync" and facts.fsync_s is not None:
            yield good(name, f"{1000 * facts.fsync_s:.1f} ms for a small file")
        else:
            yield good(name, does)
    if facts.open_to_others and "permissions" not in facts.errors:
        yield warning(
            "folder mode",
            f"{facts.base} can be written by anybody, who may then move your runs",
            f"chmod o-w '{facts.base}'",
        )
    yield from _space(facts, elsewhere)
    yield _quota(facts)
    if facts.scratch:
        yield warning(
            "scratch",
            f"{facts.scratch}: old files may be removed there",
            "see how old, or choose another folder of runs (--runs)",
        )
    if facts.skew_s is not None:
        harm = "ages that are shown are wrong"
        yield clock("clock", "the file server's clock", facts.skew_s, harm=harm)


_OPERATIONS = {
    "fsync": "works",
    "atomic rename": "files are replaced, folders named, in one step",
    "exclusive names": "a name is given once: no two links claim the same",
    "permissions": "what is private stays private",
}


def _place(facts: FileFacts, wishes: Wishes, elsewhere: str) -> Finding:
    kind = facts.file_system or "of an unknown kind"
    what = f"{facts.base} ({kind})"
    if facts.file_system in _IN_MEMORY:
        grade = failure if wishes.cluster == "slurm" else warning
        return grade("folder", f"{what} lies in this machine's memory", elsewhere)
    if wishes.cluster == "slurm" and facts.file_system == "overlay":
        return warning("folder", f"{what} is a container's own: other nodes lack it", elsewhere)
    return good("folder", what)


def _space(facts: FileFacts, elsewhere: str) -> Iterator[Finding]:
    remedy = f"delete what is not needed, or {elsewhere}"
    if facts.free_bytes is not None and facts.total_bytes:
        what = f"{size_words(facts.free_bytes)} of {size_words(facts.total_bytes)}"
        yield _left("free space", what, remedy, facts.free_bytes, LEAST_BYTES, FEW_BYTES)
    if facts.free_inodes is not None:
        what = f"room for {facts.free_inodes:,} more files"
        yield _left("inodes", what, remedy, facts.free_inodes, LEAST_INODES, FEW_INODES)


def _left(name: str, what: str, remedy: str, left: int, least: int, few: int) -> Finding:
    """A failure below `least`, a warning below `few`."""
    if left >= few:
        return good(name, what)
    return (failure if left < least else warning)(name, what, remedy)


def _quota(facts: FileFacts) -> Finding:
    if facts.quotas is None:
        return good("quota", "none told: neither `quota` nor `lfs` is here")
    if not facts.quotas:
        return good("quota", "none")
    worst = max(facts.quotas, key=lambda quota: quota.used / quota.limit)
    share = worst.used / worst.limit
    if worst.unit == "bytes":
        what = f"{size_words(worst.used)} of {size_words(worst.limit)} used ({100 * share:.0f}%)"
    else:
        what = f"{worst.used:,} of {worst.limit:,} files used ({100 * share:.0f}%)"
    if share >= 1:
        return failure("quota", what, "delete what is not needed, or ask for more")
    if share >= FULL_QUOTA:
        return warning("quota", what, "delete what is not needed, or ask for more")
    return good("quota", what)


# ---- this machine ------------------------------------------------------------------------


def judge_local(facts: LocalFacts, wishes: Wishes) -> Iterator[Finding]:
    """Whether jobs can be processes of this machine."""
    if facts.complaint:
        grade = failure if wishes.cluster == "local" else warning
        yield grade("local jobs", facts.complaint, "use another machine for --cluster local")
    else:
        yield good("local jobs", "process groups can be started, seen and ended")


def judge_python(facts: PythonFacts, wishes: Wishes, *, on_node: bool = False) -> Iterator[Finding]:
    """Whether training finds its torch and its GPUs; a login node may lack GPUs."""
    if not on_node:
        yield good("python", f"{facts.version}, {facts.executable}")
    if wishes.container and not on_node:
        yield good("torch", f"the container's, which is not looked into: {wishes.container}")
    else:
        yield _torch(facts)
    yield from _gpu(facts, wishes, on_node=on_node)


def _torch(facts: PythonFacts) -> Finding:
    oldest = dotted(OLDEST_TORCH)
    if facts.torch is None:
        return failure(
            "torch",
            f"does not import: {facts.complaint}",
            f'install it into this environment: pip install "torch>={oldest}"',
        )
    built = f"CUDA {facts.cuda}" if facts.cuda else "CPU only"
    what = f"{facts.torch}, {built}"
    if version_of(facts.torch) < OLDEST_TORCH:
        return failure(
            "torch", f"{what}: older than {oldest}", f'pip install --upgrade "torch>={oldest}"'
        )
    if facts.import_s is not None and facts.import_s > SLOW_IMPORT_S:
        return warning(
            "torch",
            f"{what}, imported in {facts.import_s:.0f} s: every link waits for that",
            "put the environment on a faster file system, or into a container",
        )
    took = "" if facts.import_s is None else f", imported in {facts.import_s:.1f} s"
    return good("torch", f"{what}{took}")


def _gpu(facts: PythonFacts, wishes: Wishes, *, on_node: bool) -> Iterator[Finding]:
    needed = wishes.gpus and (on_node or wishes.cluster != "slurm")
    grade = failure if needed else warning
    if facts.gpus:
        driver = f", driver {facts.driver}" if facts.driver else ""
        yield good("GPUs", f"{names_counted(facts.gpus)}{driver}")
    elif wishes.gpus and facts.torch is not None and not facts.cuda and not wishes.container:
        yield failure(
            "GPUs",
            "jobs ask for GPUs, and this torch is built for the CPU only",
            "install a torch with CUDA (pytorch.org/get-started)",
        )
    elif facts.cards:
        yield grade(
            "GPUs",
            f"torch (CUDA {facts.cuda or 'none'}) cannot use {names_counted(facts.cards)}, driver "
            f"{facts.driver}",
            "install a torch for this driver's CUDA, or have the driver updated",
        )
    elif facts.driver_complaint:
        yield grade(
            "GPUs", f"nvidia-smi: {facts.driver_complaint}", f"{ASK_ADMIN} to mend the driver"
        )
    elif needed:
        yield failure(
            "GPUs", "jobs ask for GPUs, and none is here", "ask for none (gpus_per_node: 0)"
        )
    else:
        where = "here; the jobs' nodes are another matter (--probe)" if wishes.gpus else "here"
        yield good("GPUs", f"none {where}")
