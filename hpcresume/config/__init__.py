"""The configuration of a run: every setting with its unit and default, and where values come from.

`submit` calls `load`, which merges layers, the later winning: the site's file, the user's file,
the run's file, SBATCH_* variables, the flags of the command line, `--set`. The result is frozen
into the run directory with `dump`; a link reads that alone, with `read_frozen`. Whatever is wrong
is said at once: one ConfigError, one sentence for each finding, naming file and line.

Imports point one way: loading -> variables -> layers -> schema, loading -> checks -> advice ->
schema, changes -> schema. nodes, times, yaml_text and wording know no setting and serve all of
them.
The names are loaded when they are first used: who asks for the schema does not wait for YAML.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcresume.config.changes import difference
    from hpcresume.config.loading import default_path, dump, from_mapping, load, read_frozen
    from hpcresume.config.nodes import node_range, nodes_in_turn
    from hpcresume.config.schema import (
        ChainConfig,
        CheckpointConfig,
        ContainerConfig,
        LogConfig,
        NotifyConfig,
        ProgressConfig,
        RunConfig,
        SchedulerConfig,
        check_complete,
        to_mapping,
    )
    from hpcresume.config.times import (
        format_moment,
        format_time,
        local_moment,
        parse_moment,
        parse_time,
    )

__all__ = [
    "ChainConfig",
    "CheckpointConfig",
    "ContainerConfig",
    "LogConfig",
    "NotifyConfig",
    "ProgressConfig",
    "RunConfig",
    "SchedulerConfig",
    "check_complete",
    "default_path",
    "difference",
    "dump",
    "format_moment",
    "format_time",
    "from_mapping",
    "load",
    "local_moment",
    "node_range",
    "nodes_in_turn",
    "parse_moment",
    "parse_time",
    "read_frozen",
    "to_mapping",
]

_HOMES = {
    "difference": "changes",
    "default_path": "loading",
    "dump": "loading",
    "from_mapping": "loading",
    "load": "loading",
    "read_frozen": "loading",
    "format_moment": "times",
    "format_time": "times",
    "local_moment": "times",
    "node_range": "nodes",
    "nodes_in_turn": "nodes",
    "parse_moment": "times",
    "parse_time": "times",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hpcresume.config' has no attribute '{name}'")
    home = importlib.import_module(f"hpcresume.config.{_HOMES.get(name, 'schema')}")
    return getattr(home, name)
