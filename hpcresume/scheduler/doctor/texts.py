"""What programs print, as values: pure functions of text, used by the gathering modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from hpcresume.scheduler.doctor.facts import Quota

_SETTING = re.compile(r"^(\w[\w() /-]*?)\s*=\s?(.*)$")
_NOTHING = ("", "(null)", "N/A", "NONE", "None")


def parse_config(text: str) -> dict[str, str]:
    """The settings that `scontrol show config` prints, those that say nothing left out."""
    found = (_SETTING.match(line) for line in text.splitlines())
    pairs = {match[1]: match[2].strip() for match in found if match}
    return {name: value for name, value in pairs.items() if value not in _NOTHING}


def parse_rows(text: str, fields: Sequence[str]) -> tuple[dict[str, str], ...]:
    """The rows of sacctmgr --parsable2 --noheader; a line of another form is passed over."""
    rows = (line.split("|") for line in text.splitlines())
    return tuple(dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields))


def first_number(text: str | None) -> int | None:
    """The number that a text begins with ("30 sec"); None where it begins with none."""
    match = re.match(r"\s*(\d+)", text or "")
    return int(match[1]) if match else None


def version_of(text: str | None) -> tuple[int, ...]:
    """The leading numbers of a version: "22.05.8" gives (22, 5, 8); () where there are none."""
    match = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(map(int, match[0].split("."))) if match else ()


def exit_codes(text: str | None) -> set[int]:
    """The codes of RequeueExit: "1,3-5"."""
    codes: set[int] = set()
    for part in (text or "").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit():
            codes.update(range(int(first), int(last or first) + 1))
    return codes


def mount_of(path: PurePath, mounts: str) -> tuple[str, str]:
    """Mount point and type of the file system of a path, by the text of /proc/self/mounts."""
    found = ("", "")
    for line in mounts.splitlines():
        words = line.split(" ")
        if len(words) >= 3:
            point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), words[1])
            # Of several on one point the last one is seen.
            if path.is_relative_to(point) and len(point) >= len(found[0]):
                found = (point, words[2])
    return found


def parse_quota(text: str) -> tuple[Quota, ...]:
    """The limits in the answer of `quota -wp` or `lfs quota -q`, both of which count in KiB.

    Columns: file system, used, soft, hard, grace, files, soft, hard, grace. Where there is a
    hard limit it counts, else the soft one; a limit of 0 is none.
    """
    words = text.split()
    quotas: list[Quota] = []
    for at in range(len(words)):
        row = [word.rstrip("*").strip("[]") for word in words[at : at + 9]]
        if len(row) == 9 and all(row[i].isdigit() for i in (1, 2, 3, 5, 6, 7)) and "/" in row[0]:
            used, soft, hard, files, files_soft, files_hard = (
                int(row[i]) for i in (1, 2, 3, 5, 6, 7)
            )
            if hard or soft:
                quotas.append(Quota(unit="bytes", used=used * 1024, limit=(hard or soft) * 1024))
            if files_hard or files_soft:
                quotas.append(Quota(unit="files", used=files, limit=files_hard or files_soft))
    return tuple(quotas)


def parse_answer(text: str) -> dict[str, str]:
    """The lines "name=value" that the probe job wrote."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: value.strip() for name, equals, value in pairs if equals}
