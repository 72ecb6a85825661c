"""From layers to a configuration, and from a frozen file back to the same one.

`submit` and `rank` load and freeze; links and the commands that look at a run read it back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hpcresume.config import layers, yaml_text
from hpcresume.config.checks import Report, check_section
from hpcresume.config.layers import Layer
from hpcresume.config.schema import RunConfig, to_mapping
from hpcresume.config.variables import variables
from hpcresume.config.wording import KeyPath, dotted, show
from hpcresume.errors import ConfigError

#: sbatch takes one of these: a later layer that names one takes back the others.
_MEMORY: tuple[KeyPath, ...] = (
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
    return _resolve(
        [
            *layers.defaults(environ),
            *([layers.read(path)] if path is not None else []),
            variables(environ),
            Layer("command line", _without_none(options or {})),
            *map(layers.assignment, sets),
        ]
    )


def from_mapping(mapping: Mapping[str, Any], source: str) -> RunConfig:
    """The configuration in a mapping; `source` names it in errors. Raises ConfigError."""
    return _resolve([Layer(source, dict(mapping))])


def read_frozen(path: Path) -> RunConfig:
    """The configuration that `dump` wrote; no other layer counts. Raises NotFound, ConfigError."""
    return _resolve([layers.read(path)])


def dump(config: RunConfig) -> str:
    """YAML of all settings, defaults included; `read_frozen` gives an equal configuration."""
    return yaml_text.to_text(to_mapping(config))


def default_path(cwd: Path) -> Path | None:
    """The configuration that is meant where none is named; None where there is none."""
    candidates = (cwd / "hpcresume.yaml", cwd / "configs" / "quickstart.yaml")
    return next((path for path in candidates if os.path.isfile(path)), None)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }


def _resolve(sources: Sequence[Layer]) -> RunConfig:
    """Check every layer, merge them. Raises ConfigError with the findings of all."""
    findings: list[str] = []
    merged: dict[str, Any] = {}
    for layer in sources:
        report = _reporter(layer, findings)
        fitting = check_section(layer.values, RunConfig, (), report)
        _check_way(layer.assigned, merged, report)
        if any(_lookup(fitting, path) not in (None, False) for path in _MEMORY):
            for path in _MEMORY:
                _remove(merged, path)
        merged = _merge(merged, fitting)
    path = ("scheduler", "container")
    container = _lookup(merged, path)
    if isinstance(container, Mapping) and "image" not in container:
        layer = next(s for s in reversed(sources) if _lookup(s.values, path) is not None)
        _reporter(layer, findings)(path, "scheduler.container.image is missing; expected an image")
    if findings:
        raise ConfigError("\n".join(findings))
    return msgspec.convert(merged, RunConfig)


def _reporter(layer: Layer, findings: list[str]) -> Report:
    def report(path: KeyPath, what: str) -> None:
        findings.append(f"{layer.where(path)}: {what}" + ("" if what.endswith("?") else "."))

    return report


def _check_way(way: tuple[str, ...], merged: Mapping[str, Any], report: Report) -> None:
    """A `--set` may make new mappings below `args`, but not out of values that are there."""
    for end in range(2, len(way)) if way[:1] == ("args",) else ():
        value = _lookup(merged, way[:end])
        if not isinstance(value, Mapping | None):
            report(way, f"{dotted(way[:end])} is {show(value)}; expected a mapping")
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


def _lookup(values: Any, path: KeyPath) -> Any:
    """The value at a path, None where there is none."""
    for key in path:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    parent = _lookup(values, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
