"""The configuration of a run: every setting with its unit and default, and where values come from.

`submit` calls `load`, which merges layers, the later winning: the site's file, the user's file,
the run's file, SBATCH_* variables, the flags of the command line, `--set`. The result is frozen
into the run directory with `dump`; a link reads that alone, with `read_frozen`. Whatever is wrong
is said at once: one ConfigError, one sentence for each finding, naming file and line.

YAML here means YAML 1.2's scalars, so that a value means what it looks like: `1:30:00` is text
and not 5400, `no` is text and not false, `1e-3` is a number, `007` is text. Keys are always
text. Tags, anchors and aliases are refused, which also keeps a small file small in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

from hpcresume.errors import ConfigError, NotFound

_AtLeast0 = Annotated[int, msgspec.Meta(ge=0)]
_AtLeast1 = Annotated[int, msgspec.Meta(ge=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]
_Line = Annotated[
    str, msgspec.Meta(pattern=r"\A[^\0\r\n]+\Z", description="non-empty text on one line")
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
    minutes: _Positive | None = 30.0
    """Save when so many minutes have passed since the last save; null: not by time."""
    each_epoch: bool = True
    """Save at the end of every epoch."""
    keep_last: _AtLeast1 = 5
    """How many of the newest checkpoints are kept."""
    keep_best: _AtLeast0 = 1
    """How many of the best checkpoints are kept besides, where the training names a metric."""


class ChainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one job follows another, and the budgets that end the chain."""

    mode: Literal["auto", "prequeue", "resubmit", "requeue"] = "auto"
    """How the next job gets into the queue; auto: what suits the cluster."""
    ahead: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """How many jobs wait behind the running one."""
    max_links: _AtLeast1 | None = None
    """Stop after so many links; null: no limit."""
    max_hours: _Positive | None = None
    """Stop when the links together have run so many hours; null: no limit."""
    no_progress_links: _AtLeast1 = 3
    """Stop after so many links in a row that committed no new step."""
    max_crashes: _AtLeast0 = 3
    """Stop after more than so many crashes without progress between them."""
    lead_s: _NotNegative | None = None
    """Seconds before the job's end at which saving starts; null: learned from measured saves."""


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
    nodes: _AtLeast1 = 1
    """Nodes of one job."""
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


class LogConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the training writes down."""

    every_steps: _AtLeast1 = 100
    """A line of progress every so many steps."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severe message that is written."""


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run, as it was asked for; see `load`."""

    name: _Name | None = None
    """The run's name and directory; null: chosen by whoever submits it."""
    train: str = ""
    """The training function: "file.py:func" or "package.module:func"; ":train" may be left out."""
    args: dict[str, Any] = msgspec.field(default_factory=dict)
    """What the training function finds in `session.args`; any keys, any JSON values."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    """Seed of all random number generators (NumPy's takes 32 bits)."""
    max_steps: _AtLeast1 | None = None
    """The training is complete after so many optimizer steps..."""
    epochs: _AtLeast1 | None = None
    """...or after so many passes over the data, whichever comes first."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time; may be slower."""
    resume: Literal["auto", "ask", "never"] = "auto"
    """What a new start does with checkpoints that are there already."""
    checkpoint: CheckpointConfig = msgspec.field(default_factory=CheckpointConfig)
    """When to save, what to keep."""
    chain: ChainConfig = msgspec.field(default_factory=ChainConfig)
    """How jobs follow each other."""
    scheduler: SchedulerConfig = msgspec.field(default_factory=SchedulerConfig)
    """What each job asks for."""
    log: LogConfig = msgspec.field(default_factory=LogConfig)
    """What is written down."""


def check_complete(config: RunConfig) -> None:
    """Raise ConfigError where something is missing that a run cannot be submitted without."""
    findings = []
    if not config.train:
        findings.append("'train' is missing; expected 'file.py:function' or 'module:function'.")
    if config.max_steps is None and config.epochs is None:
        findings.append("'max_steps' and 'epochs' are both missing; expected at least one of them.")
    _raise(findings)


_TIME_FORMS = "MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED"
_TIME = re.compile(
    r"(?P<minutes>[0-9]{1,9})(:(?P<seconds>[0-9]{1,2}))?"
    r"|(?P<h>[0-9]{1,9}):(?P<m>[0-9]{1,2}):(?P<s>[0-9]{1,2})"
    r"|(?P<days>[0-9]{1,9})-(?P<hours>[0-9]{1,9})(:(?P<mm>[0-9]{1,2})(:(?P<ss>[0-9]{1,2}))?)?"
)


def parse_time(text: str) -> int | None:
    """Seconds of a time limit in any of sbatch's forms; None where it says that there is none.

    Stricter than sbatch, which takes 0 for "no limit" and carries 61 seconds into the minutes:
    both are more often a slip than a wish. Raises ConfigError.
    """
    word = text.strip()
    if word.upper() in ("UNLIMITED", "INFINITE", "-1"):
        return None
    match = _TIME.fullmatch(word)
    if match:
        part = {name: int(digits or 0) for name, digits in match.groupdict().items()}
        minutes = part["minutes"] + part["m"] + part["mm"]
        seconds = part["seconds"] + part["s"] + part["ss"]
        hours = part["days"] * 24 + part["hours"] + part["h"]
        total = hours * 3600 + minutes * 60 + seconds
        if total and seconds < 60 and (minutes < 60 or match["minutes"]):
            return total
    raise ConfigError(
        f"{_show(text)} is not a time limit; expected {_TIME_FORMS}, more than zero, "
        "with seconds and the minutes of an hour below 60."
    )


def format_time(seconds: int | None) -> str:
    """sbatch's HH:MM:SS, or D-HH:MM:SS from one day on; UNLIMITED for None."""
    if seconds is None:
        return "UNLIMITED"
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return (f"{day}-" if day else "") + f"{hour:02}:{minute:02}:{second:02}"


_Path = tuple[str | int, ...]

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 32
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    # Only to be refused later with a sentence, where they would pass for text otherwise.
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INT = re.compile(r"-?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _scalar(text: str) -> Any:
    """What a word without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


@dataclasses.dataclass
class _Layer:
    """Settings from one place, and the words that name the place of each."""

    source: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    marks: dict[_Path, str] = dataclasses.field(default_factory=dict)
    assigned: tuple[str, ...] = ()
    """The one path that a `--set` names."""

    def where(self, path: _Path) -> str:
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, self.source)

    def put(self, path: Sequence[str], value: Any, mark: str | None = None) -> None:
        values = self.values
        for key in path[:-1]:
            values = values.setdefault(key, {})
        values[path[-1]] = value
        if mark is not None:
            self.marks[tuple(path)] = mark


class _Builder:
    """Turns the events of a YAML parser into plain values, without recursion."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.root: Any = None
        self.marks: dict[_Path, str] = {}
        self._open: list[tuple[dict[str, Any] | list[Any], _Path]] = []
        self._key: list[str | None] = []
        self._documents = 0

    def take(self, event: Any) -> None:
        where = f"{self.source}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise ConfigError(f"{where}: a second document starts; expected one mapping.")
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            self._key.pop()
        elif isinstance(event, yaml.NodeEvent):
            self._node(event, where)

    def _node(self, event: Any, where: str) -> None:
        if event.anchor is not None:
            raise ConfigError(
                f"{where}: anchors and aliases ('&', '*') are not supported here; "
                "write the value out, or put text in quotes."
            )
        if event.tag is not None:
            raise ConfigError(f"{where}: tags ('!') are not supported here; put text in quotes.")
        if self._open and isinstance(self._open[-1][0], dict) and self._key[-1] is None:
            self._begin_entry(event, where)
        elif isinstance(event, yaml.ScalarEvent):
            self._place(_scalar(event.value) if event.implicit[0] else event.value, where)
        else:
            value: dict[str, Any] | list[Any]
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
            path = self._place(value, where)
            if len(self._open) >= _MAX_DEPTH:
                raise ConfigError(f"{where}: nested deeper than {_MAX_DEPTH} levels.")
            self._open.append((value, path))
            self._key.append(None)

    def _begin_entry(self, event: Any, where: str) -> None:
        mapping, path = self._open[-1]
        if not isinstance(event, yaml.ScalarEvent) or not event.value:
            raise ConfigError(f"{where}: a key must be a word; expected 'key: value'.")
        entry = (*path, event.value)
        if event.value in mapping:
            first = self.marks[entry]
            raise ConfigError(f"{where}: '{_dotted(entry)}' is given twice, first at {first}.")
        self.marks[entry] = where
        self._key[-1] = event.value

    def _place(self, value: Any, where: str) -> _Path:
        """Put a value where the parser stands; returns its path."""
        if not self._open:
            self.root = value
            return ()
        parent, path = self._open[-1]
        if isinstance(parent, list):
            parent.append(value)
            path = (*path, len(parent) - 1)
        else:
            key = self._key[-1]
            assert key is not None
            parent[key] = value
            self._key[-1] = None
            path = (*path, key)
        self.marks.setdefault(path, where)
        return path


def _parse_yaml(text: str, source: str) -> _Builder:
    """The one document in a text. Raises ConfigError with the line."""
    builder = _Builder(source)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        marks = [mark.line + 1 for mark in (error.problem_mark, error.context_mark) if mark]
        line = min(marks[0], max(1, len(text.splitlines())))  # The end counts as a line of its own.
        what = f"{error.problem}, {error.context}" if error.context else error.problem
        begun = f" that begins on line {marks[1]}" if marks[1:] and marks[1] != line else ""
        raise ConfigError(f"{source}:{line}: not valid YAML: {what}{begun}.") from None
    except yaml.reader.ReaderError as error:
        line = text.encode(errors="replace").count(b"\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {error.reason}.") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{source}: not text that UTF-8 can hold.") from None
    return builder


def _read(path: Path, *, may_be_empty: bool = False) -> _Layer:
    """The settings in a file. Raises NotFound or ConfigError."""
    source = _printable(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{source}: longer than 1 MB; expected a YAML file of settings.")
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise NotFound(f"{source}: no such file; expected a YAML file of settings.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}:{line}: not UTF-8 text; expected a YAML file.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{source}: cannot be read ({reason}); expected a YAML file.") from None
    builder = _parse_yaml(text, source)
    if builder.root is None and may_be_empty:
        return _Layer(source)
    if not isinstance(builder.root, dict):
        found = "is empty" if builder.root is None else f"holds {_show(builder.root)}"
        raise ConfigError(f"{source}: {found}; expected a mapping ('train: train.py').")
    values = _without_empty(builder.root, to_mapping(RunConfig()))
    return _Layer(source, values, builder.marks)


def _without_empty(values: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Without sections and lists of which only the key is there, the rest being commented out."""
    kept = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            kept[key] = _without_empty(value, default)
        elif value is not None or not isinstance(default, dict | list):
            kept[key] = value
    return kept


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_scalar` would not read back as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    style = None if _scalar(data) is data else "'"
    if not data.isprintable():
        style = '"'  # The only style that keeps every kind of line break.
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _represent_text)


_Report = Callable[[_Path, str], None]

#: sbatch options that have a field of their own, which would be written twice otherwise.
_FIELD_OF_OPTION = {
    "account": "account",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task",
    "exclude": "exclude",
    "gpus-per-node": "gpus_per_node",
    "mem": "mem",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "partition": "partition",
    "qos": "qos",
    "time": "time",
}


def _check_section(
    values: Mapping[Any, Any], struct: type[msgspec.Struct], path: _Path, report: _Report
) -> dict[str, Any]:
    """The entries that fit, as their fields want them; everything else is reported."""
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    fitting = {}
    for key, value in values.items():
        if key in fields:
            fitting[key] = _check(value, fields[key].type, (*path, key), report)
        else:
            advice = _advice(str(key), struct)
            report((*path, str(key)), f"unknown key '{_dotted((*path, str(key)))}'; {advice}")
    return fitting


def _check(value: Any, wanted: Any, path: _Path, report: _Report) -> Any:
    """The value as the type wants it. What does not fit is reported, and comes back as it is."""
    kinds = [_bare(kind) for kind in _alternatives(wanted)]
    if Any in kinds:
        return _check_free(value, path, report)
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(value, Mapping):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                return _check_section(value, kind, path, report)
            if origin is dict:
                return _check_entries(value, inner[1], path, report)
        elif isinstance(value, list | tuple) and origin is list:
            return [_check(item, inner[0], (*path, i), report) for i, item in enumerate(value)]
    return _check_word(value, wanted, path, report)


def _check_word(value: Any, wanted: Any, path: _Path, report: _Report) -> Any:
    """A value with nothing below it."""
    kinds = [_bare(kind) for kind in _alternatives(wanted)]
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)  # `max_steps: 1e5`
    problem = _unfit(value)
    if problem:
        report(path, f"{_dotted(path)} {problem}")
        return value
    if type(value) is int and str in kinds and int not in kinds:
        value = str(value)  # `time: 90`, `account: 1234`: the digits are meant.
    try:
        value = msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        advice = _near_advice(value, kinds)
        if isinstance(value, bool | float) and str in kinds:
            advice = "; put text in quotes"
        found = f"{_dotted(path)} is {_show(value)}"
        report(path, f"{found}; expected {_describe(wanted)}{advice}")
        return value
    if path == ("scheduler", "time") and value is not None:
        try:
            parse_time(value)
        except ConfigError as error:
            report(path, f"{_dotted(path)}: {str(error).rstrip('.')}")
    return value


def _check_entries(
    values: Mapping[Any, Any], wanted: Any, path: _Path, report: _Report
) -> dict[str, Any]:
    """A mapping with free keys."""
    checked = {}
    for key, value in values.items():
        below = (*path, str(key))
        problem = _unfit_key(key, path)
        if problem:
            report(below, f"{_dotted(path)} has the key {_show(key)}; {problem}")
        else:
            checked[key] = _check(value, wanted, below, report)
    return checked


def _check_free(value: Any, path: _Path, report: _Report) -> Any:
    """A value of the training function: whatever JSON can hold."""
    if len(path) > _MAX_DEPTH:
        report(path, f"{_dotted(path[:3])} is nested deeper than {_MAX_DEPTH} levels")
        return None
    elif isinstance(value, Mapping):
        return _check_entries(value, Any, path, report)
    elif isinstance(value, list | tuple):
        return [_check_free(item, (*path, i), report) for i, item in enumerate(value)]
    elif type(value) not in (str, bool, int, float, types.NoneType):
        report(path, f"{_dotted(path)} is {_show(value)}; expected what YAML can hold")
    else:
        problem = _unfit(value)
        if problem:
            report(path, f"{_dotted(path)} {problem}")
    return value


def _unfit(value: Any) -> str | None:
    """Why no field can hold a scalar."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; expected a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is too large; expected a whole number of at most 64 bits"
    if isinstance(value, str) and not _encodable(value):
        return f"is {_show(value)}; expected text that UTF-8 can hold"
    return None


def _unfit_key(key: Any, path: _Path) -> str | None:
    """Why a mapping with free keys cannot have this one."""
    if not isinstance(key, str) or not key or not _encodable(key):
        return "expected text"
    if path == ("scheduler", "sbatch"):
        name = key.lstrip("-").replace("_", "-")
        if name in _FIELD_OF_OPTION:
            return f"write scheduler.{_FIELD_OF_OPTION[name]} instead"
        if not re.fullmatch("[a-z][a-z0-9-]+", key) or name != key:
            return "expected the long name of an sbatch option, as in 'mail-type: END'"
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return typing.get_args(wanted)
    return (wanted,)


def _bare(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _describe(wanted: Any) -> str:
    """What a field takes, in words."""
    words = [_describe_one(kind) for kind in _alternatives(wanted)]
    return ", or ".join(words)


def _describe_one(kind: Any) -> str:
    meta = next((m for m in getattr(kind, "__metadata__", ()) if isinstance(m, msgspec.Meta)), None)
    bare = _bare(kind)
    origin, inner = typing.get_origin(bare), typing.get_args(bare)
    if meta and meta.description:
        return meta.description
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is list:
        return "a list of " + _describe(inner[0])
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        types.NoneType: "null",
    }
    return words.get(bare, "a mapping") + _describe_range(meta)


def _describe_range(meta: msgspec.Meta | None) -> str:
    if meta is None:
        return ""
    if meta.gt is not None:
        return f" above {meta.gt}"
    return f" of at least {meta.ge}" if meta.le is None else f" from {meta.ge} to {meta.le}"


def _near_advice(value: Any, kinds: Sequence[Any]) -> str:
    """For a misspelt word out of a fixed set."""
    literals = (typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal)
    choices = [word for words in literals for word in words]
    near = _nearest(value, choices) if isinstance(value, str) else None
    return f"; did you mean '{near}'?" if near else ""


def _advice(key: str, struct: type[msgspec.Struct]) -> str:
    """Where an unknown key belongs, or what was meant, or what there is."""
    homes = [name for name, keys in _sections(RunConfig, "") if key in keys]
    if homes:
        places = [f"under '{name}'" if name else "at the top level" for name in homes]
        return f"'{key}' belongs {' or '.join(places)}"
    valid = list(struct.__struct_fields__)
    near = _nearest(key, valid)
    if near:
        return f"did you mean '{near}'?"
    advice = "expected one of " + ", ".join(valid)
    if struct is RunConfig:
        return f"{advice}; what the training function takes goes under 'args'"
    if struct is SchedulerConfig:
        return f"{advice}; any other option of sbatch goes under 'scheduler.sbatch'"
    return advice


def _sections(struct: type[msgspec.Struct], name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted name and keys of a section and of all below it."""
    yield name, struct.__struct_fields__
    for field in msgspec.structs.fields(struct):
        for kind in _alternatives(field.type):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                yield from _sections(kind, f"{name}.{field.name}".lstrip("."))


def _nearest(word: str, choices: Sequence[str]) -> str | None:
    by_form = {choice.lower(): choice for choice in choices}
    form = word.lower().replace("-", "_")
    near = difflib.get_close_matches(form, by_form, 1) or [
        choice for choice in by_form if len(form) > 2 and choice.startswith(form)
    ]
    return by_form[near[0]] if near else None


def _show(value: Any) -> str:
    """A value in a message: short, printable, recognisable."""
    if value is None or isinstance(value, bool | int | float):
        return "null" if value is None else str(value).lower()[:60]
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _dotted(path: _Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_printable(part[:60])}"
    return text.lstrip(".")


def _raise(findings: Sequence[str]) -> None:
    if findings:
        raise ConfigError("\n".join(findings))


#: SBATCH_* variables that have a field of their own.
_VARIABLE_FIELDS = {
    "ACCOUNT": "account",
    "CONSTRAINT": "constraint",
    "GPUS_PER_NODE": "gpus_per_node",
    "MEM_PER_NODE": "mem",
    "PARTITION": "partition",
    "QOS": "qos",
    "TIMELIMIT": "time",
}
#: Those that go to sbatch as options, from sbatch(1). Left out is what the chain itself decides
#: (ARRAY_INX ERROR EXPORT INPUT JOB_NAME NO_REQUEUE OPEN_MODE OUTPUT REQUEUE SIGNAL WAIT) and
#: what is no wish about the job (DEBUG GET_USER_ENV IGNORE_PBS).
# fmt: off
_VARIABLE_OPTIONS = frozenset({
    "ACCTG_FREQ", "BATCH", "CLUSTERS", "CONTAINER", "CONTAINER_ID", "CORE_SPEC", "CPUS_PER_GPU",
    "DELAY_BOOT", "DISTRIBUTION", "EXCLUSIVE", "GPUS", "GPUS_PER_TASK", "GPU_BIND", "GPU_FREQ",
    "GRES", "GRES_FLAGS", "HINT", "MEM_BIND", "MEM_PER_CPU", "MEM_PER_GPU", "NETWORK", "NO_KILL",
    "OVERCOMMIT", "POWER", "PROFILE", "REQ_SWITCH", "RESERVATION", "SEGMENT_SIZE", "SPREAD_JOB",
    "THREADS_PER_CORE", "THREAD_SPEC", "TRES_BIND", "TRES_PER_TASK", "USE_MIN_NODES",
    "WAIT_ALL_NODES", "WCKEY",
})
# fmt: on
_RENAMED_OPTIONS = {"REQ_SWITCH": "switches", "SEGMENT_SIZE": "segment"}
_FLAGS = frozenset({"OVERCOMMIT", "SPREAD_JOB", "USE_MIN_NODES"})
_OPTIONAL_VALUE = frozenset({"EXCLUSIVE", "NO_KILL"})

#: sbatch takes one of these: a later layer that names one takes back the others.
_MEMORY: tuple[_Path, ...] = (
    ("scheduler", "mem"),
    ("scheduler", "sbatch", "mem-per-cpu"),
    ("scheduler", "sbatch", "mem-per-gpu"),
)


def load(
    path: Path | None,
    *,
    sets: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    environ: Mapping[str, str],
) -> RunConfig:
    """The configuration of a run from all its layers, the later winning, mappings merged.

    In order: the site's file ($HPCRESUME_SITE, else /etc/hpcresume.yaml), the user's file
    ($XDG_CONFIG_HOME/hpcresume/config.yaml), the file at `path`, SBATCH_* variables of `environ`
    (Slurm's own order), `options` from flags (nested; None means not given), `sets` ("a.b=VALUE",
    VALUE as in YAML; nothing after "=" is null). Raises NotFound where `path` or $HPCRESUME_SITE
    names no file, ConfigError with all findings otherwise.
    """
    layers = list(_default_layers(environ))
    if path is not None:
        layers.append(_read(path))
    layers.append(_variables(environ))
    layers.append(_Layer("command line", _without_none(options or {})))
    layers.extend(map(_assignment, sets))
    return _resolve(layers)


def from_mapping(mapping: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration in a mapping; `source` names it in errors. Raises ConfigError."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: holds {_show(mapping)}; expected a mapping.")
    return _resolve([_Layer(source, dict(mapping))])


def read_frozen(path: Path) -> RunConfig:
    """The configuration that `dump` wrote; no other layer counts. Raises NotFound, ConfigError."""
    return _resolve([_read(path)])


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """All settings as plain values, in the order of their declaration."""
    mapping: dict[str, Any] = msgspec.to_builtins(config)
    return mapping


def dump(config: RunConfig) -> str:
    """YAML of all settings, defaults included; `read_frozen` gives an equal configuration."""
    text: str = yaml.dump(
        to_mapping(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def default_path(cwd: Path) -> Path | None:
    """The configuration that is meant where none is named; None where there is none."""
    candidates = (cwd / "hpcresume.yaml", cwd / "configs" / "quickstart.yaml")
    return next((path for path in candidates if os.path.isfile(path)), None)


def _default_layers(environ: Mapping[str, str]) -> Iterator[_Layer]:
    """The site's and the user's file, where there are such."""
    site = environ.get("HPCRESUME_SITE")
    if site:
        yield _read(Path(site), may_be_empty=True)
    base = environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):  # A relative one is to be ignored, says the XDG specification.
        base = f"{environ['HOME']}/.config" if environ.get("HOME") else ""
    paths = [] if site else [Path("/etc/hpcresume.yaml")]
    if base:
        paths.append(Path(base, "hpcresume", "config.yaml"))
    for path in paths:
        with contextlib.suppress(NotFound):
            yield _read(path, may_be_empty=True)


def _variables(environ: Mapping[str, str]) -> _Layer:
    """What SBATCH_* variables wish for."""
    layer = _Layer("environment")
    for variable in sorted(environ):
        word, value = variable.removeprefix("SBATCH_"), environ[variable]
        if word == variable:
            continue
        if word in _VARIABLE_FIELDS and value:
            field = _VARIABLE_FIELDS[word]
            number = _scalar(value) if field == "gpus_per_node" else value
            layer.put(("scheduler", field), number, variable)
        elif word in _VARIABLE_OPTIONS:
            option = _RENAMED_OPTIONS.get(word, word.lower().replace("_", "-"))
            meant = _option_value(word, value)
            if meant is not None:
                if word == "REQ_SWITCH" and environ.get("SBATCH_WAIT4SWITCH"):
                    meant = f"{meant}@{environ['SBATCH_WAIT4SWITCH']}"
                layer.put(("scheduler", "sbatch", option), meant, variable)
    return layer


def _option_value(word: str, text: str) -> str | bool | None:
    """What a variable means for its option, by the rules of sbatch(1); None: not set."""
    if word in _FLAGS:
        return True if re.fullmatch("|yes|[0-9]*[1-9][0-9]*", text, re.IGNORECASE) else None
    if word in _OPTIONAL_VALUE:
        return text or True
    return text or None


def _assignment(text: str) -> _Layer:
    """The one setting of a `--set`."""
    source = f"--set {_printable(text if len(text) <= 80 else text[:77] + '...')}"
    dotted, equals, word = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{source}: expected KEY=VALUE, like checkpoint.steps=500.")
    word = word.strip()
    # Only brackets and quotes make it YAML: in a word, ': ' and ' #' are just characters.
    is_yaml = word.startswith(("[", "{", '"', "'"))
    layer = _Layer(source, assigned=tuple(keys))
    layer.put(keys, _parse_yaml(word, source).root if is_yaml else _scalar(word))
    return layer


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _resolve(layers: Sequence[_Layer]) -> RunConfig:
    """Check every layer, merge them. Raises ConfigError with the findings of all."""
    findings: list[str] = []
    merged: dict[str, Any] = {}
    for layer in layers:
        report = _reporter(layer, findings)
        fitting = _check_section(layer.values, RunConfig, (), report)
        _check_way(layer.assigned, merged, report)
        if any(_lookup(fitting, path) not in (None, False) for path in _MEMORY):
            for path in _MEMORY:
                _remove(merged, path)
        merged = _merge(merged, fitting)
    path = ("scheduler", "container")
    container = _lookup(merged, path)
    if isinstance(container, Mapping) and "image" not in container:
        layer = next(layer for layer in reversed(layers) if _lookup(layer.values, path) is not None)
        _reporter(layer, findings)(path, "scheduler.container.image is missing; expected an image")
    _raise(findings)
    return msgspec.convert(merged, RunConfig)


def _reporter(layer: _Layer, findings: list[str]) -> _Report:
    def report(path: _Path, what: str) -> None:
        findings.append(f"{layer.where(path)}: {what}" + ("" if what.endswith("?") else "."))

    return report


def _check_way(way: tuple[str, ...], merged: Mapping[str, Any], report: _Report) -> None:
    """A `--set` may make new mappings below `args`, but not out of values that are there."""
    for end in range(2, len(way)) if way[:1] == ("args",) else ():
        value = _lookup(merged, way[:end])
        if not isinstance(value, Mapping | None):
            report(way, f"{_dotted(way[:end])} is {_show(value)}; expected a mapping")
            return


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _lookup(values: Any, path: _Path) -> Any:
    """The value at a path, None where there is none."""
    for key in path:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def _remove(values: dict[str, Any], path: _Path) -> None:
    parent = _lookup(values, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


_ABSENT = object()


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """A line for each setting that is not the same: "scheduler.time: 01:00:00 -> 02:00:00"."""
    return list(_differences(to_mapping(old), to_mapping(new), ()))


def _differences(old: Any, new: Any, path: _Path) -> Iterator[str]:
    sides = [{} if side is None or side is _ABSENT else side for side in (old, new)]
    if all(isinstance(side, dict) for side in sides) and any(sides):
        for key in {**sides[0], **sides[1]}:
            old_below, new_below = (side.get(key, _ABSENT) for side in sides)
            yield from _differences(old_below, new_below, (*path, key))
    elif _ABSENT in (old, new) or _json(old) != _json(new):
        yield f"{_dotted(path)}: {_word(old)} -> {_word(new)}"


def _word(value: Any) -> str:
    """A value as one would write it in YAML: text has quotes only where it needs them."""
    if value is _ABSENT:
        return "(not set)"
    if isinstance(value, str) and _scalar(value) is value and value.isprintable():
        return value
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
