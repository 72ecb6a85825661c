"""Time limits in the forms that sbatch reads and squeue writes, to seconds and back."""

from __future__ import annotations

import re

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
