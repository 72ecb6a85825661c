"""The settings of a run: each with its type, its default, and under it what it means.

`checks` holds values against these structs before they are made; `advice` reads out of them what
a message may propose.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec

from hpcresume.errors import ConfigError

_AtLeast0 = Annotated[int, msgspec.Meta(ge=0)]
_AtLeast1 = Annotated[int, msgspec.Meta(ge=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Line = Annotated[
    str, msgspec.Meta(pattern=r"\A[^\0\r\n]+\Z", description="non-empty text on one line")
]
_Url = Annotated[
    str,
    msgspec.Meta(pattern=r"\Ahttps?://[^\s/]+(/\S*)?\Z", description="an http(s) address"),
]
_NodeRange = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A[1-9][0-9]{0,5}-[1-9][0-9]{0,5}\Z", description='a range of numbers ("2-4")'
    ),
]
_Signal = Literal[
    "TERM", "INT", "USR1", "USR2", "all:TERM", "all:INT", "all:USR1", "all:USR2", "none"
]
_Name = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\Z",
        description="at most 100 letters, digits, '.', '_' and '-', not starting with '.' or '-'",
    ),
]


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When checkpoints are saved, and how many are kept. The rules add up: any of them saves."""

    steps: _AtLeast1 | None = None
    """Save every so many steps; null: not by steps."""
    minutes: _Positive | Literal["auto"] | None = 30.0
    """Save when so many minutes have passed since the last save; auto: what saves are measured to
    cost and failures to lose gives the least loss (see `overhead`); null: not by time."""
    overhead: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.01
    """The share of the time that `minutes: auto` may let saves hold training up."""
    each_epoch: bool = True
    """Save at the end of every epoch."""
    background: bool = True
    """Train on while a save is being written; one that falls due meanwhile comes after it."""
    keep_last: _AtLeast1 = 5
    """How many of the newest checkpoints are kept."""
    keep_best: _AtLeast0 = 1
    """How many of the best checkpoints are kept besides, where the training names a metric."""
    keep_every: _AtLeast1 | None = None
    """Keep for good, besides, the first checkpoint at or after each multiple of so many steps."""
    on_non_finite: Literal["stop", "roll_back"] = "stop"
    """What follows a logged loss or grad_norm that is not finite, of which no state is ever saved;
    roll_back: go back `roll_back` checkpoints, and leave out the data from there to that step."""
    roll_back: _AtLeast1 = 1
    """How many checkpoints `on_non_finite: roll_back` goes back; 1: to the newest."""
    on_finish: Literal["keep_all", "keep_final"] = "keep_all"
    """What stays when training is complete; keep_final: of keep_last only the last one."""


class ChainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one job follows another, and the budgets that end the chain."""

    mode: Literal["auto", "prequeue", "resubmit", "requeue", "drive"] = "auto"
    """How the next job gets into the queue; auto: what suits the cluster; drive: by `hpcresume
    drive` on a login node, where compute nodes may not submit."""
    ahead: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """How many jobs wait behind the running one."""
    max_links: _AtLeast1 | None = None
    """Stop after so many links; null: no limit."""
    max_hours: _Positive | None = None
    """Stop when the links together have run so many hours; null: no limit."""
    max_node_hours: _Positive | None = None
    """Stop when the links together have used so many hours of nodes; null: no limit."""
    no_progress_links: _AtLeast1 = 3
    """Stop after so many links in a row that committed no new step."""
    max_crashes: _AtLeast0 = 3
    """Stop after more than so many crashes without progress between them."""
    hang_s: _NotNegative | None = None
    """Seconds without a sign of life after which ranks count as hung (their stacks go into the log,
    they are killed, the next link goes on); null: learned for each kind of work, at least 60; 0:
    never."""
    lead_s: _NotNegative | None = None
    """Seconds before the job's end at which saving starts; null: learned from measured saves."""
    signal_command: _Signal | None = None
    """The signal that tells a `command` to save and leave: to its first process, or with "all:" to
    every process of it; none: it watches $HPCRESUME_STOP and $HPCRESUME_DEADLINE; null: TERM, or
    with a `framework` none."""
    retry_s: _NotNegative | None = None
    """Start a `command` that has failed again in the same job, after so many seconds, while
    `max_crashes` allows it; null: the next job does."""


class ContainerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The container that the ranks run in. The supervisor stays outside."""

    image: _Line
    """Path or name of the image, as the runtime wants it."""
    runtime: Literal["apptainer", "singularity", "pyxis"] = "apptainer"
    """The program that starts the container."""
    mounts: list[_Line] = msgspec.field(default_factory=list)
    """Directories to mount, each as the runtime wants it ("/data:/data:ro")."""
    args: list[str] = msgspec.field(default_factory=list)
    """More arguments for the runtime, one word each."""
    python: _Line = "python3"
    """The interpreter inside the image."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each job of the chain asks the scheduler for; null leaves it to the scheduler."""

    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"
    """Where jobs run; auto: Slurm where sbatch is found, this machine otherwise."""
    time: _Line | None = None
    """Time limit of one job, in any form of sbatch: minutes, "02:00:00", "1-12"; see parse_time."""
    time_min: _Line | None = None
    """The least that Slurm may lower that limit to, so that the job starts earlier; at most `time`;
    null: the limit stands. Each link reads the end that its job was really given."""
    deadline: _Line | None = None
    """When the chain's last job must be over: "2026-12-24T18:00", "18:00", "now+3days" (from submit
    on; see parse_moment). Slurm starts no job that could not end before it; null: none."""
    nodes: _AtLeast1 | _NodeRange = 1
    """Nodes of one job; "2-4": as many of them as are free when it starts, so that links have
    different numbers of ranks (see docs/exact-resume.md)."""
    tasks_per_node: _AtLeast1 = 1
    """Ranks on each node."""
    cpus_per_task: _AtLeast1 | None = None
    """CPU cores of each rank."""
    gpus_per_node: _AtLeast0 | _Line | None = None
    """GPUs on each node: a number, or sbatch's "type:number"."""
    mem: _Line | None = None
    """Memory on each node, as for sbatch --mem: "64G"; a bare number is MiB."""
    partition: _Line | None = None
    """Partition, or several with commas."""
    account: _Line | None = None
    """Account that is charged."""
    qos: _Line | None = None
    """Quality of service."""
    constraint: _Line | None = None
    """Node features that are asked for."""
    pin_hardware: bool = False
    """Ask for nodes of the first link's kind (its features and type of GPU) in every later job."""
    exclude: _Line | None = None
    """Nodes never to be used, as for sbatch --exclude."""
    setup: list[str] = msgspec.field(default_factory=list)
    """Shell lines that run before the link starts: "module load cuda"."""
    container: ContainerConfig | None = None
    """The container for the ranks; null: none."""
    sbatch: dict[str, _Line | int | float | bool | None] = msgspec.field(default_factory=dict)
    """Other sbatch options by their long names, without dashes before them ("mail-type: END").

    true or null gives a bare flag; false drops what an earlier layer asked for.
    """
    grace_s: _NotNegative = 10.0
    """Local jobs only: seconds from TERM to KILL."""


class ProgressConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What tells from outside how far a `command` is, and whether it is done; paths are relative
    to the folder that it runs in."""

    done_when: list[_Line] = msgspec.field(default_factory=list)
    """A command that ends with 0 is done if, besides, one of these is true: a file is there (with
    wildcards; a trainer_state.json must say so itself), or "log:PATTERN" is found in what it
    prints; none: exit code 0 says it."""
    checkpoints: _Line | None = None
    """What it saves, with wildcards: "out/checkpoint-*"; the newest is its progress."""
    step_pattern: _Line | None = None
    """The pattern (a regular expression with one group) of the step in what it prints, if that is
    its progress; null: a step that looks like one is shown, and no decision depends on it."""


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the training writes down."""

    every_steps: _AtLeast1 = 100
    """A line of progress every so many steps."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severe message that is written."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = msgspec.field(
        default_factory=list
    )
    """Experiment trackers that are told what a training function logs, in one run over all links; a
    `command` has its own (see docs/trackers.md)."""


class NotifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is told how the chain ends. Mail is Slurm's own: scheduler.sbatch, `mail-type: END`."""

    url: _Url | None = None
    """The address (webhook) to which the event is posted as JSON, by the job; null: none."""
    events: list[Literal["finished", "stopped", "no_progress", "stalled"]] = msgspec.field(
        default_factory=lambda: ["finished", "stopped", "no_progress", "stalled"]
    )
    """Of what: training is complete; the chain stops, and why; it stops because link after link
    committed no new step (`chain.no_progress_links`); there is no next job, because Slurm refuses
    what `hpcresume drive` submits, which alone can tell of it."""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run, as it was asked for; see `load`."""

    name: _Name | None = None
    """The run's name and directory; null: chosen by whoever submits it."""
    train: str = ""
    """The training function: "file.py:func" or "package.module:func"; ":train" may be left out."""
    command: list[str] = msgspec.field(default_factory=list)
    """Instead of a training function, a command that every rank runs, one word an entry."""
    framework: Literal["huggingface", "lightning"] | None = None
    """The training framework in a `command`, whose trainer gets a callback of ours that stops it in
    time and tells how it is; null: none, or its script has the callback itself."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """What the training function finds in `session.args`; any keys, any JSON values."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    """Seed of all random number generators (NumPy's takes 32 bits)."""
    max_steps: _AtLeast1 | None = None
    """The training is complete after so many optimizer steps..."""
    epochs: _AtLeast1 | None = None
    """...or after so many passes over the data, whichever comes first."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, and a fixed number of threads; may be
    slower."""
    accept: list[Literal["dataset", "batch"]] = msgspec.field(default_factory=list)
    """Changes that a resumed training takes over although it is another one then: another dataset
    (the next epoch begins), another batch size or accumulation (see docs/exact-resume.md)."""
    override: dict[str, int | float] = msgspec.field(default_factory=dict)
    """Values of the optimizer ("lr", "weight_decay") that win over the code's and, once, over the
    checkpoint's. `hpcresume resume --set lr=0.01` writes them here."""
    resume: Literal["auto", "ask", "never"] = "auto"
    """What a new start does with checkpoints that are there already."""
    checkpoint: CheckpointConfig = msgspec.field(default_factory=CheckpointConfig)
    """When to save, what to keep."""
    chain: ChainConfig = msgspec.field(default_factory=ChainConfig)
    """How jobs follow each other."""
    progress: ProgressConfig = msgspec.field(default_factory=ProgressConfig)
    """What tells how far a command is."""
    scheduler: SchedulerConfig = msgspec.field(default_factory=SchedulerConfig)
    """What each job asks for."""
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    """What is written down."""
    notify: NotifyConfig = msgspec.field(default_factory=NotifyConfig)
    """Who is told of the end."""


def check_complete(config: RunConfig) -> None:
    """Raise ConfigError where something is missing that a run cannot be submitted without."""
    findings = []
    if config.command:
        findings = _wrong_with_command(config)
    elif config.framework:
        findings.append("'framework' is there without 'command'; it is what a command runs.")
    elif not config.train:
        findings.append("'train' is missing; expected 'file.py:function' or 'module:function'.")
    if not config.command and config.max_steps is None and config.epochs is None:
        findings.append("'max_steps' and 'epochs' are both missing; expected at least one of them.")
    if findings:
        raise ConfigError("\n".join(findings))


def _wrong_with_command(config: RunConfig) -> list[str]:
    findings = []
    if config.train:
        findings.append("'train' and 'command' are both there; expected one of them.")
    if not config.command[0] or any("\0" in word for word in config.command):
        findings.append("'command' begins with no program, or holds a null character.")
    watched = [entry.removeprefix("log:") for entry in config.progress.done_when if _in_log(entry)]
    for pattern in (*watched, *filter(None, [config.progress.step_pattern])):
        try:
            re.compile(pattern)
        except re.error as error:
            findings.append(f"'progress' holds the pattern {pattern!r}, which is none: {error}.")
    return findings


def _in_log(entry: str) -> bool:
    return entry.startswith("log:")


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """All settings as plain values, in the order of their declaration."""
    mapping: dict[str, Any] = msgspec.to_builtins(config)
    return mapping
