"""What a command finds in its environment. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

from hpcresume.scheduler.environment import PLACE_VARIABLES, RankPlace

#: Between the supervisor and its ranks; a command that starts a session of ours would obey them.
_NOT_FOR_COMMANDS = frozenset(
    {"HPCRESUME_SUPERVISOR", "HPCRESUME_SAVES_S", "HPCRESUME_CRASHES", "HPCRESUME_RESUME"}
)


def command_environment(
    environ: Mapping[str, str],
    place: RankPlace,
    *,
    deadline: float | None,
    left_s: float | None,
    restarts: int,
    resume: Path | None,
) -> dict[str, str]:
    """The environment of a command, out of that of its rank.

    `deadline` is Unix time, `left_s` how many seconds there are until then; whole numbers come
    out, because shells count with nothing else. `restarts`: how often it was started before.
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
    if place.world_size > 1:
        # What torch.distributed asks for; MASTER_ADDR and MASTER_PORT are there already.
        given |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
        }
    return given
