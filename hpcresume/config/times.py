"""Time limits and moments in the forms that sbatch reads and squeue writes, to seconds and back."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

from hpcresume.config.wording import show
from hpcresume.errors import ConfigError

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
        f"{show(text)} is not a time limit; expected {_TIME_FORMS}, more than zero, "
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


_MOMENT_FORMS = "YYYY-MM-DD[THH:MM[:SS]], HH:MM[:SS] or now+COUNT[minutes, hours, days or weeks]"
_UNITS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_FROM_NOW = re.compile(r"now\+([0-9]{1,9})(second|minute|hour|day|week)?s?")
_OF_A_DAY = re.compile(r"[0-9]{2}:[0-9]{2}(:[0-9]{2})?")
_OF_A_YEAR = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}(:[0-9]{2})?([+-][0-9]{2}:[0-9]{2})?)?"
)


def parse_moment(text: str, *, now: float) -> float:
    """Unix seconds of a moment in sbatch's forms that mean the same everywhere, or with an offset.

    A time of day is the next one after `now`; without an offset it is local time, as Slurm takes
    it. Left out are the forms of which readers differ (11/12, 4pm, 1112). Raises ConfigError.
    """
    word = text.strip()
    later = _FROM_NOW.fullmatch(word.lower())
    try:
        if later:
            return now + int(later[1]) * _UNITS_S[later[2] or "second"]
        if _OF_A_YEAR.fullmatch(word):
            return datetime.fromisoformat(word).timestamp()
        if _OF_A_DAY.fullmatch(word):
            today = datetime.fromtimestamp(now)
            at = datetime.combine(today, time.fromisoformat(word))
            return (at if at > today else at + timedelta(days=1)).timestamp()
    except (ValueError, OverflowError, OSError):
        pass
    raise ConfigError(f"{show(text)} is not a moment; expected {_MOMENT_FORMS}.")


def format_moment(seconds: float) -> str:
    """A moment that means the same in every time zone: 2026-11-23T14:20:00+01:00."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def local_moment(seconds: float) -> str:
    """A moment in local time, as Slurm writes and reads it: 2026-11-23T14:20:00."""
    return datetime.fromtimestamp(seconds).isoformat(timespec="seconds")
