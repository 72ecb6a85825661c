"""The real options of a job, out of what `scontrol show job` tells about it.

A user's own batch script may have got options on sbatch's command line. The next link is submitted
with the same script and these options, so that it gets the same job. Used by `slurm` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from hpcresume.config import format_moment, parse_time
from hpcresume.errors import ConfigError

#: Fields whose value is what the option takes.
_SAME = {
    "Partition": "partition",
    "TimeLimit": "time",
    "TimeMin": "time-min",
    "NumNodes": "nodes",
    "Account": "account",
    "QOS": "qos",
    "Features": "constraint",
    "BatchFeatures": "batch",
    "Reservation": "reservation",
    "ExcNodeList": "exclude",
    "ReqNodeList": "nodelist",
    "Licenses": "licenses",
    "Network": "network",
    "Nice": "nice",
    "CoreSpec": "core-spec",
    "MinTmpDiskNode": "tmp",
    "Socks/Node": "sockets-per-node",
    "WCKey": "wckey",
    "MailUser": "mail-user",
    "MailType": "mail-type",
}
#: Fields with one entry for each kind of resource, of which GPUs and other gres are taken.
_GRES = {
    "TresPerNode": "gres",
    "TresPerJob": "gpus",
    "TresPerSocket": "gpus-per-socket",
    "TresPerTask": "gpus-per-task",
    "CpusPerTres": "cpus-per-gpu",
    "MemPerTres": "mem-per-gpu",
}
_SHARING = {
    "NO": "--exclusive",
    "USER": "--exclusive=user",
    "MCS": "--exclusive=mcs",
    "YES": "--oversubscribe",
}


def frozen_options(fields: Mapping[str, str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """sbatch's long options for a job like the one in `fields`.

    `environ` is the environment of that very job where this is called inside it: only that tells
    whether tasks and their CPUs were asked for or are Slurm's default. Giving a default as a wish
    is not the same: with one CPU asked for each task, srun binds a rank of a whole node to it.
    """
    inside = environ.get("SLURM_JOB_ID") == fields.get("JobId")
    options = [
        f"--{option}={fields[field]}"
        for field, option in _SAME.items()
        if fields.get(field, "") not in ("", "0", "*", "Partition_Limit")
    ]
    if fields.get("Deadline", "").isdigit():
        options.append(f"--deadline={format_moment(int(fields['Deadline']))}")
    options += _tasks(fields, environ if inside else None)
    options += _memory(fields)
    options += _gres(fields, environ if inside else {})
    options += _layout(fields)
    sharing = _SHARING.get(fields.get("OverSubscribe", ""))
    contiguous = ["--contiguous"] if fields.get("Contiguous") == "1" else []
    return (*options, *([sharing] if sharing else []), *contiguous)


_TIME_OPTION = re.compile(r"(?:^|\s)(?:--time(?:=|\s+)|-t\s*)(\S+)")


def asked_limit(submit_line: str, environ: Mapping[str, str], script: str) -> str | None:
    """The time limit that a job was submitted with, as its command line and script tell.

    With --time-min Slurm lowers the limit when the job starts, and keeps no other: a chain that
    took that one over would get shorter from job to job. None where nobody named a limit.
    """
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    variable = environ.get("SBATCH_TIMELIMIT", "")
    for found in (
        _TIME_OPTION.findall(submit_line),
        [variable] if variable else [],
        [value for line in lines for value in _TIME_OPTION.findall(line)],
    ):
        for value in reversed([value.strip("\"'") for value in found]):
            try:
                parse_time(value)
            except ConfigError:
                continue  # A word of something else.
            return str(value)
    return None


_NODES_OPTION = re.compile(r"(?:^|\s)(?:--nodes(?:=|\s+)|-N\s*)(\S+)")
_RANGE = re.compile(r"\d+-\d+")


def asked_nodes(script: str, submit_line: Callable[[], str]) -> str | None:
    """The range of nodes that a job's script asks for, of which Slurm keeps what it gave.

    None where it asks for none, or where `submit_line`, read only then, names another number.
    """
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    found = [value for line in lines for value in _NODES_OPTION.findall(line)]
    if not found or not _RANGE.fullmatch(found[-1]):
        return None
    named = [*found, *_NODES_OPTION.findall(submit_line())][-1]
    return named if _RANGE.fullmatch(named) else None


def _tasks(fields: Mapping[str, str], environ: Mapping[str, str] | None) -> list[str]:
    options = []
    tasks, cpus = fields.get("NumTasks", "1"), fields.get("CPUs/Task", "1")
    if "SLURM_NTASKS" in environ if environ is not None else tasks != fields.get("NumNodes", "1"):
        options.append(f"--ntasks={tasks}")
    asked = "SLURM_CPUS_PER_TASK" in environ if environ is not None else cpus != "1"
    # sbatch takes CPUs for each task or for each GPU, not both.
    if asked and "CpusPerTres" not in fields:
        options.append(f"--cpus-per-task={cpus}")
    return options


def _memory(fields: Mapping[str, str]) -> list[str]:
    """Of the three ways to ask for memory the one that counts. 0 is a value: all of the node."""
    if "MemPerTres" in fields:
        return []
    for field, option in {"MinMemoryNode": "mem", "MinMemoryCPU": "mem-per-cpu"}.items():
        if field in fields:
            return [f"--{option}={fields[field]}"]
    return []


def _gres(fields: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    options = []
    gpus = environ.get("SLURM_GPUS_PER_NODE")
    for field, option in _GRES.items():
        entries = re.split(",(?=gres)", fields.get(field, ""))
        # "gres:gpu:a100:2" in 22.05, later with "/" after gres and perhaps "=" before the number.
        wanted = [entry[5:].replace("=", ":") for entry in entries if entry.startswith("gres")]
        if option == "gres" and f"gpu:{gpus}" in wanted:
            # --gres beside a --gpus-per-node in the script would be asked for twice.
            wanted.remove(f"gpu:{gpus}")
            options.append(f"--gpus-per-node={gpus}")
        elif option != "gres":
            wanted = [entry.removeprefix("gpu:") for entry in wanted if entry.startswith("gpu:")]
        if wanted:
            options.append(f"--{option}={','.join(wanted)}")
    return options


def _layout(fields: Mapping[str, str]) -> list[str]:
    """Tasks for each node, socket and core, and which sockets, cores and threads are wanted."""
    options = []
    per = {"NtasksPerN:B:S:C": ("ntasks-per-node", "", "ntasks-per-socket", "ntasks-per-core")}
    per["ReqB:S:C:T"] = ("", "", "cores-per-socket", "threads-per-core")
    for field, names in per.items():
        for name, value in zip(names, fields.get(field, "").split(":"), strict=False):
            if name and value.isdigit() and value != "0":
                options.append(f"--{name}={value}")
    return options
