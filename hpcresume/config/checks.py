"""What is wrong with settings, all of it, and the settings that fit as their fields want them.

Used by `loading`, which calls `check_section` for each layer and knows the place of each setting.
"""

from __future__ import annotations

import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hpcresume.config.advice import alternatives, bare, describe, meant_key, meant_word
from hpcresume.config.nodes import node_range
from hpcresume.config.times import parse_moment, parse_time
from hpcresume.config.wording import KeyPath, dotted, show
from hpcresume.config.yaml_text import MAX_DEPTH
from hpcresume.errors import ConfigError

#: Takes a finding: where it is, and a sentence without its full stop.
Report = Callable[[KeyPath, str], None]

#: sbatch options that have a field of their own, which would be written twice otherwise.
_FIELD_OF_OPTION = {
    "account": "account",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task",
    "deadline": "deadline",
    "exclude": "exclude",
    "gpus-per-node": "gpus_per_node",
    "mem": "mem",
    "nodes": "nodes",
    "ntasks-per-node": "tasks_per_node",
    "partition": "partition",
    "qos": "qos",
    "time": "time",
    "time-min": "time_min",
}

#: Fields whose text has a form of its own, and what reads it.
_READERS: dict[KeyPath, Callable[[str], object]] = {
    ("scheduler", "nodes"): node_range,
    ("scheduler", "time"): parse_time,
    ("scheduler", "time_min"): parse_time,
    ("scheduler", "deadline"): functools.partial(parse_moment, now=0.0),
}


def check_section(
    values: Mapping[Any, Any], struct: type[msgspec.Struct], path: KeyPath, report: Report
) -> dict[str, Any]:
    """The entries that fit, as their fields want them; everything else is reported."""
    types_of = _types_of(struct)
    fitting = {}
    for key, value in values.items():
        if key in types_of:
            fitting[key] = _check(value, types_of[key], (*path, key), report)
        else:
            advice = meant_key(str(key), struct)
            report((*path, str(key)), f"unknown key '{dotted((*path, str(key)))}'; {advice}")
    return fitting


@functools.cache
def _types_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """What each field wants; to find that out takes longer than to check a whole file."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def _check(value: Any, wanted: Any, path: KeyPath, report: Report) -> Any:
    """The value as the type wants it. What does not fit is reported, and comes back as it is."""
    kinds = [bare(kind) for kind in alternatives(wanted)]
    if Any in kinds:
        return _check_free(value, path, report)
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(value, Mapping):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                return check_section(value, kind, path, report)
            if origin is dict:
                return _check_entries(value, inner[1], path, report)
        elif isinstance(value, list | tuple) and origin is list:
            return [_check(item, inner[0], (*path, i), report) for i, item in enumerate(value)]
    return _check_word(value, wanted, path, report)


def _check_word(value: Any, wanted: Any, path: KeyPath, report: Report) -> Any:
    """A value with nothing below it."""
    kinds = [bare(kind) for kind in alternatives(wanted)]
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)  # `max_steps: 1e5`
    problem = _unfit(value)
    if problem:
        report(path, f"{dotted(path)} {problem}")
        return value
    if type(value) is int and str in kinds and int not in kinds:
        value = str(value)  # `time: 90`, `account: 1234`: the digits are meant.
    try:
        value = msgspec.convert(value, wanted)
    except msgspec.ValidationError:
        advice = meant_word(value, wanted)
        if isinstance(value, bool | float) and str in kinds:
            advice = "; put text in quotes"
        found = f"{dotted(path)} is {show(value)}"
        report(path, f"{found}; expected {describe(wanted)}{advice}")
        return value
    read = _READERS.get(path)
    if read is not None and value is not None:
        try:
            read(value)
        except ConfigError as error:
            report(path, f"{dotted(path)}: {str(error).rstrip('.')}")
    return value


def _check_entries(
    values: Mapping[Any, Any], wanted: Any, path: KeyPath, report: Report
) -> dict[str, Any]:
    """A mapping with free keys."""
    checked = {}
    for key, value in values.items():
        below = (*path, str(key))
        problem = _unfit_key(key, path)
        if problem:
            report(below, f"{dotted(path)} has the key {show(key)}; {problem}")
        else:
            checked[key] = _check(value, wanted, below, report)
    return checked


def _check_free(value: Any, path: KeyPath, report: Report) -> Any:
    """A value of the training function: whatever JSON can hold."""
    if len(path) > MAX_DEPTH:
        report(path, f"{dotted(path[:3])} is nested deeper than {MAX_DEPTH} levels")
        return None
    if isinstance(value, Mapping):
        return _check_entries(value, Any, path, report)
    if isinstance(value, list | tuple):
        return [_check_free(item, (*path, i), report) for i, item in enumerate(value)]
    problem = _unfit(value)
    if type(value) not in (str, bool, int, float, types.NoneType):
        problem = f"is {show(value)}; expected what YAML can hold"
    if problem:
        report(path, f"{dotted(path)} {problem}")
    return value


def _unfit(value: Any) -> str | None:
    """Why no field can hold a scalar."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; expected a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is too large; expected a whole number of at most 64 bits"
    if isinstance(value, str) and not _encodable(value):
        return f"is {show(value)}; expected text that UTF-8 can hold"
    return None


def _unfit_key(key: Any, path: KeyPath) -> str | None:
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
