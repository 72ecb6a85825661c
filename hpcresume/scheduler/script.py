"""The batch script of a job, its sbatch options, and the container of its ranks, as text.

Pure: `slurm` submits what this renders, `submit --dry-run` prints it, `step` uses the container.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcresume.config import (
    ContainerConfig,
    SchedulerConfig,
    format_time,
    local_moment,
    node_range,
    parse_time,
)
from hpcresume.errors import ConfigError
from hpcresume.scheduler.hardware import pinned
from hpcresume.scheduler.job import JobSpec

#: sbatch options by their long names; None: a bare flag.
Options = dict[str, str | None]

#: What the chain must decide itself, and why.
_OWNED = {
    "array": "one job is one link of the chain",
    "comment": "the chain finds its jobs by their comment",
    "no-requeue": "chain.mode decides it",
    "parsable": "it does not describe a job",
    "requeue": "chain.mode decides it",
    "test-only": "it does not describe a job",
    "wait": "it does not describe a job",
    "wrap": "the link is what the job executes",
}
#: The most that sbatch takes.
_LONGEST_SIGNAL_S = 65535
_PLAIN = re.compile(r"[\w@%+=:,./\[\]*&()<>!?~^{}-]+", re.ASCII)


def render(
    spec: JobSpec,
    config: SchedulerConfig,
    command: Sequence[str],
    after: Sequence[str] = (),
    prepare: Sequence[str] = (),
) -> str:
    """The exact batch script of a job that ends in `exec command`.

    `prepare` are shell lines that belong to the command. Raises ConfigError where an option
    cannot be written into a script.
    """
    options = {**_resources(config), **_chain_options(spec, config, after)}
    options |= _users_options(config, taken=options)
    options = pinned(options, spec.hardware)
    lines = ["#!/bin/bash", *(f"#SBATCH {_written(item)}" for item in options.items()), ""]
    # Slurm's warning may come up to a minute early, and would end what does not listen yet.
    lines += ["trap '' USR1 USR2", *config.setup]
    lines += [f"export HPCRESUME_RUN={shlex.quote(str(spec.run))}", *prepare]
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


def script_arguments(spec: JobSpec, config: SchedulerConfig, after: Sequence[str]) -> list[str]:
    """sbatch's arguments for a batch script that a user wrote.

    The real options of its first job, so that the next one gets the same although they stood on
    sbatch's command line; then what the chain decides, which wins because it comes later.
    """
    options = _chain_options(spec, config, after)
    own: Options = {}
    for argument in spec.script_options:
        name, equals, value = argument.removeprefix("--").partition("=")
        own[name] = value if equals else None
    if "exclude" in own:
        options["exclude"] = joined(own.pop("exclude"), options.get("exclude"))
    if "deadline" in options:
        # The same moment, in the words of another time zone.
        own.pop("deadline", None)
    kept = pinned(own, spec.hardware)
    return [*map(argument_of, kept.items()), *map(argument_of, options.items())]


def argument_of(option: tuple[str, str | None]) -> str:
    """An option as sbatch takes it on its command line."""
    name, value = option
    return f"--{name}" if value is None else f"--{name}={value}"


def dependency(after: Sequence[str]) -> str:
    """The value of --dependency: start when all these have ended, however."""
    return "afterany:" + ":".join(after) if after else ""


def joined(*lists: str | None) -> str:
    """One node list of several, without repetitions."""
    return ",".join(dict.fromkeys(filter(None, lists)))


def output_pattern(log: Path) -> str:
    """A log for sbatch and srun, which make replacements (%j, %t) in its own name alone.

    Raises ConfigError for a path that they write no log to.
    """
    if "\\" in str(log):
        raise ConfigError(
            f"{log.parent} has a backslash, and Slurm writes no log to such a path: choose another "
            "folder of runs (--runs)."
        )
    return f"{str(log.parent).replace('%', '%%')}/{log.name}"


def container_prefix(config: ContainerConfig | None, run: Path) -> tuple[list[str], list[str]]:
    """What puts a rank into the container: options for srun, and words before its command.

    The run directory is mounted under its own path. Raises ConfigError where it cannot be.
    """
    if config is None:
        return [], []
    if re.search("[:,]", str(run)):
        raise ConfigError(
            f"{run} cannot be mounted into a container, because ':' and ',' separate mounts: "
            "choose another folder of runs (--runs)."
        )
    mounts = [f"{run}:{run}", *config.mounts]
    if config.runtime == "pyxis":
        flags = [f"--container-image={config.image}", f"--container-mounts={','.join(mounts)}"]
        return [*flags, *config.args], []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], [config.runtime, "exec", "--nv", *binds, *config.args, config.image]


def _resources(config: SchedulerConfig) -> Options:
    """What each job asks for.

    Of a range Slurm gives the least wherever the tasks are named, which fit into that; so their
    CPUs are, on each node, and `step` places the ranks.
    """
    least, most = node_range(config.nodes)
    cpus = config.tasks_per_node * (config.cpus_per_task or 1)
    ranged = least != most
    asked = {
        "nodes": config.nodes,
        "ntasks-per-node": None if ranged else config.tasks_per_node,
        "mincpus": cpus if ranged and cpus > 1 else None,
        "cpus-per-task": config.cpus_per_task,
        "gpus-per-node": config.gpus_per_node,
        "mem": config.mem,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
    }
    return {name: str(value) for name, value in asked.items() if value is not None}


def _chain_options(spec: JobSpec, config: SchedulerConfig, after: Sequence[str]) -> Options:
    """What the chain decides for every job."""
    options: Options = {
        "job-name": spec.name,
        "comment": spec.token,
        "chdir": str(spec.workdir),
        "output": output_pattern(spec.log),
        "open-mode": "append",
        "requeue" if spec.allow_requeue else "no-requeue": None,
    }
    if spec.time_s is not None:
        options["time"] = format_time(spec.time_s)
    elif config.time is not None:
        options["time"] = format_time(parse_time(config.time))
    if spec.time_min_s is not None:
        options["time-min"] = format_time(spec.time_min_s)
    if spec.deadline is not None:
        options["deadline"] = local_moment(spec.deadline)
    if spec.signal_s > 0:
        options["signal"] = f"B:USR2@{min(spec.signal_s, _LONGEST_SIGNAL_S)}"
    if spec.begin_delay_s > 0:
        options["begin"] = f"now+{spec.begin_delay_s}"
    if after:
        options["dependency"] = dependency(after)
    exclude = joined(config.exclude, *spec.exclude_nodes)
    if exclude:
        options["exclude"] = exclude
    return options


def _users_options(config: SchedulerConfig, taken: Mapping[str, str | None]) -> Options:
    """Other options that the user asked for; they win, except over a delay or a dependency."""
    options: Options = {}
    for name, value in config.sbatch.items():
        if name in _OWNED:
            raise ConfigError(f"scheduler.sbatch.{name} cannot be set: {_OWNED[name]}.")
        if value is False or (name in ("begin", "dependency") and name in taken):
            continue
        options[name] = None if value is True or value is None else str(value)
    return options


def _written(option: tuple[str, str | None]) -> str:
    """An option as a line of a batch script has it.

    sbatch's own reader takes a backslash for an escape even within single quotes, so that
    shlex.quote would lose it.
    """
    name, value = option
    if value is not None and re.search(r"[\n\r\0]", value):
        raise ConfigError(
            f"--{name} {value!r} has a line break, which no batch script can hold: choose another "
            "name or folder."
        )
    if value and not _PLAIN.fullmatch(value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        value = f'"{escaped}"'
    return argument_of((name, value))
