"""What SBATCH_* variables wish for: people set them once, in their shell's profile.

sbatch itself never sees them, because its environment is scrubbed; so they are read here, by the
rules of sbatch(1). Used by `loading` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hpcresume.config.layers import Layer
from hpcresume.config.yaml_text import scalar

#: Variables that have a field of their own.
_FIELDS = {
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
_OPTIONS = (
    "ACCTG_FREQ", "BATCH", "CLUSTERS", "CONTAINER", "CONTAINER_ID", "CORE_SPEC", "CPUS_PER_GPU",
    "DELAY_BOOT", "DISTRIBUTION", "EXCLUSIVE", "GPUS", "GPUS_PER_TASK", "GPU_BIND", "GPU_FREQ",
    "GRES", "GRES_FLAGS", "HINT", "MEM_BIND", "MEM_PER_CPU", "MEM_PER_GPU", "NETWORK", "NO_KILL",
    "OVERCOMMIT", "POWER", "PROFILE", "REQ_SWITCH", "RESERVATION", "SEGMENT_SIZE", "SPREAD_JOB",
    "THREADS_PER_CORE", "THREAD_SPEC", "TRES_BIND", "TRES_PER_TASK", "USE_MIN_NODES",
    "WAIT_ALL_NODES", "WCKEY",
)
# fmt: on
_RENAMED = {"REQ_SWITCH": "switches", "SEGMENT_SIZE": "segment"}
_FLAGS = ("OVERCOMMIT", "SPREAD_JOB", "USE_MIN_NODES")
_OPTIONAL_VALUE = ("EXCLUSIVE", "NO_KILL")


def variables(environ: Mapping[str, str]) -> Layer:
    """The settings of all SBATCH_* variables that are about the job."""
    layer = Layer("environment")
    for word in (*_FIELDS, *_OPTIONS):
        variable = f"SBATCH_{word}"
        value = _meant(word, environ.get(variable), environ)
        if value is not None:
            layer.put(_place(word), value)
            layer.marks[_place(word)] = variable
    return layer


def _place(word: str) -> tuple[str, ...]:
    if word in _FIELDS:
        return ("scheduler", _FIELDS[word])
    return ("scheduler", "sbatch", _RENAMED.get(word, word.lower().replace("_", "-")))


def _meant(word: str, text: str | None, environ: Mapping[str, str]) -> Any:
    """What a variable means for its field or option; None: not set."""
    if text is None:
        return None
    if word in _FLAGS:
        return True if re.fullmatch("|yes|[0-9]*[1-9][0-9]*", text, re.IGNORECASE) else None
    if word in _OPTIONAL_VALUE:
        return text or True
    if word == "GPUS_PER_NODE":
        return scalar(text)
    if word == "REQ_SWITCH" and text and environ.get("SBATCH_WAIT4SWITCH"):
        return f"{text}@{environ['SBATCH_WAIT4SWITCH']}"
    return text or None
