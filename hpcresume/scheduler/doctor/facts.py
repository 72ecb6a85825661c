"""What is known about a cluster and a machine, as plain values; `checks` judges them.

Whatever could not be learned is empty or None, and never a reason to fail here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Grade = Literal["good", "warning", "failure"]
Mode = Literal["prequeue", "resubmit", "requeue", "drive"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check, for a line of its own."""

    name: str
    grade: Grade
    what: str
    remedy: str = ""
    """What to do about it; empty where all is good."""


def good(name: str, what: str) -> Finding:
    """A finding that needs nobody."""
    return Finding(name=name, grade="good", what=what)


def warning(name: str, what: str, remedy: str) -> Finding:
    """Something that may cost time or work, and what to do about it."""
    return Finding(name=name, grade="warning", what=what, remedy=remedy)


def failure(name: str, what: str, remedy: str) -> Finding:
    """Something that a chain cannot live with, and what to do about it."""
    return Finding(name=name, grade="failure", what=what, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the chain to be asks for; from the configuration."""

    cluster: str = "slurm"
    """slurm, local or debug."""
    chosen: bool = False
    """Somebody named the cluster; else it follows from whether sbatch is found."""
    mode: str = "auto"
    ahead: int = 2
    time_s: int | None = None
    nodes: int = 1
    """The least that a job must have."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus: bool = False
    """Whether jobs ask for GPUs."""
    container: str = ""
    """The image that the ranks run in; empty: none."""
    lead_s: float | None = None
    """How long before a job's end a link saves, in seconds; None: learned from the run."""
    signal_s: int = 90
    """How long before a job's end Slurm is asked for its signal."""

    @property
    def signal(self) -> str:
        """The signal that Slurm is asked for, as sbatch --signal takes it."""
        return f"B:USR2@{self.signal_s}"


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """Why a program gave no answer that can be used."""

    words: str
    silent: bool = False
    """It gave none in time, and was killed."""


@dataclass(frozen=True, kw_only=True)
class SlurmFacts:
    """What Slurm's clients tell on this machine."""

    missing: tuple[str, ...] = ()
    """Clients that are not on PATH."""
    config: Mapping[str, str] = field(default_factory=dict)
    """`scontrol show config`."""
    partitions: tuple[Mapping[str, str], ...] = ()
    associations: tuple[Mapping[str, str], ...] = ()
    """This user's: Account, Partition, DefaultQOS, MaxSubmit, GrpSubmit."""
    qos: tuple[Mapping[str, str], ...] = ()
    """Name, MaxSubmitPU, MaxSubmitPA, GrpSubmit."""
    complaints: Mapping[str, Complaint] = field(default_factory=dict)
    """By question: config, partitions, associations, qos, records."""


@dataclass(frozen=True, kw_only=True)
class LocalFacts:
    """Whether this machine can be driven as a cluster of one: the local backend."""

    complaint: str = ""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """One limit of this user on a file system; in bytes, or in files."""

    unit: Literal["bytes", "files"]
    used: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What was tried in the folder that runs will lie in."""

    root: Path
    """The folder of runs, which may not be there yet."""
    base: Path | None = None
    """The folder that was tried: `root`, or the nearest above it that exists."""
    complaint: str = ""
    """Why nothing could be tried."""
    errors: Mapping[str, str] = field(default_factory=dict)
    """What was refused: "atomic rename", "exclusive names", "fsync" or "permissions", and why."""
    file_system: str = ""
    """ext4, nfs4, lustre…"""
    mount: str = ""
    fsync_s: float | None = None
    """Median duration of one small fsync."""
    free_bytes: int | None = None
    total_bytes: int | None = None
    free_inodes: int | None = None
    """None where the file system does not count them."""
    quotas: tuple[Quota, ...] | None = None
    """None where neither `quota` nor `lfs` told."""
    open_to_others: bool = False
    """Anybody may rename what lies in `base`."""
    scratch: str = ""
    """What makes it look like scratch: a word of its path, or a variable."""
    skew_s: float | None = None
    """The file server's clock less this machine's."""


@dataclass(frozen=True, kw_only=True)
class PythonFacts:
    """The interpreter, what a child of it says about torch, and the driver."""

    executable: str
    version: str
    torch: str | None = None
    """Version; None where it did not answer."""
    cuda: str | None = None
    """The CUDA (or ROCm) that torch was built for; None: CPU only."""
    gpus: tuple[str, ...] = ()
    """Those that torch can use here."""
    import_s: float | None = None
    complaint: str = ""
    driver: str | None = None
    """Version of the NVIDIA driver; None where nvidia-smi tells none."""
    cards: tuple[str, ...] = ()
    """The GPUs that nvidia-smi sees."""
    driver_complaint: str = ""
    """What nvidia-smi said where it is there and failed."""


@dataclass(frozen=True, kw_only=True)
class ProbeFacts:
    """What a small job told from a compute node."""

    job: str | None = None
    """Its id; None where Slurm refused it."""
    complaint: str = ""
    """Why nothing is known from a compute node."""
    refused: bool = False
    """Slurm would not have the job."""
    waited_s: float = 0.0
    invisible: bool = False
    """The job ran, and did not find the folder of runs."""
    left_behind: str = ""
    """Why the job could not be cancelled; empty: it is gone."""
    answer: Mapping[str, str] = field(default_factory=dict)
    """What it wrote down; see `probe`."""
    skew_s: float | None = None
    """The node's clock less this machine's; None where it could not be told."""
    torch: PythonFacts | None = None
    """The node's torch, where GPUs are asked for."""

    def can(self, program: str) -> bool | None:
        """Whether a client works on the compute node; None where that is not known."""
        code = self.answer.get(f"{program}_code")
        return None if code is None else code == "0"
