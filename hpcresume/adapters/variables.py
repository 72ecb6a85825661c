"""What a command finds in its environment. Pure."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from pathlib import Path

from hpcresume.adapters import inject
from hpcresume.scheduler.environment import NODES, PLACE_VARIABLES, RankPlace

#: Between the supervisor and its ranks; a command that starts a session of ours would obey them.
_NOT_FOR_COMMANDS = frozenset(
    {"HPCRESUME_SUPERVISOR", "HPCRESUME_SAVES_S", "HPCRESUME_CRASHES", "HPCRESUME_RESUME", NODES}
)


def command_environment(
    environ: Mapping[str, str],
    place: RankPlace,
    *,
    deadline: float | None,
    left_s: float | None,
    restarts: int,
    resume: Path | None,
    framework: str | None = None,
) -> dict[str, str]:
    """The environment of a command, out of that of its rank.

    `deadline` is Unix time, `left_s` how many seconds there are until then; whole numbers come
    out, because shells count with nothing else. `restarts`: how often it was started before. A
    trainer of the `framework` gets our callback.
    """
    dropped = PLACE_VARIABLES | _NOT_FOR_COMMANDS
    given = {name: value for name, value in environ.items() if name not in dropped}
    # Through a pipe Python would hold lines back, and a killed process would lose them.
    given.setdefault("PYTHONUNBUFFERED", "1")
    given["HPCRESUME_RESTARTS"] = str(restarts)
    given.pop("HPCRESUME_DEADLINE", None)
    if deadline is not None:
        at = datetime.datetime.fromtimestamp(int(deadline), tz=datetime.timezone.utc)
        given["HPCRESUME_DEADLINE"] = str(int(deadline))
        given["HPCRESUME_DEADLINE_TIME"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    if left_s is not None:
        given["HPCRESUME_LEFT_S"] = str(max(0, int(left_s)))
    if resume is not None:
        given["HPCRESUME_RESUME"] = str(resume)
    if framework is not None:
        given |= inject.variables(given, framework)
    if place.world_size > 1:
        # What torch.distributed asks for; MASTER_ADDR and MASTER_PORT are there already.
        given |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
        }
    if place.world_size > 1 and environ.get(NODES) == str(place.world_size):
        given |= _meeting_place(environ, place)
    return given


def _meeting_place(environ: Mapping[str, str], place: RankPlace) -> dict[str, str]:
    """What torchrun, and accelerate, which is built on it, take where a node has one of them.

    The defaults of its options, from torch/distributed/argparse_util.py. The static rendezvous
    numbers the nodes as Slurm does, in each link alike.
    """
    return {
        "PET_NNODES": str(place.world_size),
        "PET_NODE_RANK": str(place.rank),
        "PET_RDZV_BACKEND": "static",
        "PET_RDZV_ENDPOINT": f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
        "PET_RDZV_ID": f"hpcresume-{environ['HPCRESUME_LINK']}",
    }


def launcher_patience(environ: Mapping[str, str], signal: str, lead_s: float) -> dict[str, str]:
    """What torchrun needs to pass `signal` (chain.signal_command) on, and to wait for its workers.

    It knows SIGTERM and three others, and would die of the rest; and it kills after 30 s what has
    not left. What the user has set holds.
    """
    wanted = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, math.ceil(lead_s)))}
    name = signal.removeprefix("all:")
    if name in ("USR1", "USR2"):
        wanted["PET_SIGNALS_TO_HANDLE"] = f"SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIG{name}"
    return {name: value for name, value in wanted.items() if name not in environ}
