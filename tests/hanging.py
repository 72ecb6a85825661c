"""Trainings that hang: noisy.py, which sleeps in step 20, the first time or each time; and scripts
of other frameworks, which stand until they are told to leave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oracle import TRAINING, merged

from hpcresume.run_dir import RunDir

_PAUSE = '        time.sleep(args.get("pause_s", 0.0))\n'
_HANG = """
        hung = session.path / "hung"
        if session.global_step == 19 and not (args["once"] and hung.exists()):
            hung.touch()
            time.sleep(3600)
"""


def hanging(folder: Path, *, once: bool) -> dict[str, Any]:
    """Put the training into a project's folder; the settings that train it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (TRAINING / "noisy.py").read_text()
    assert _PAUSE in text
    (folder / "hanging.py").write_text(text.replace(_PAUSE, _PAUSE + _HANG))
    return {
        "train": "hanging.py:train",
        "args": {"once": once},
        # Longer than a save may wait for a busy disk.
        "chain": {"hang_s": 6},
        # Steps are short: a save that is being written would let the one at step 18 wait.
        "checkpoint": {"background": False},
    }


def standing(folder: Path) -> dict[str, Any]:
    """The same once, and nobody minds: it stands in step 20, behind the save of step 18, until
    something else ends its link."""
    return merged(hanging(folder, once=True), {"chain": {"hang_s": 0}})


def stands(run: RunDir) -> bool:
    """Whether the training has come to step 20."""
    return (run.path / "hung").exists()


def standing_script(text: str, line: str, step: str, *at: int) -> str:
    """A script that stands behind a `line` of it, in a step of each of its first links.

    `step` is the expression that gives its number. Whoever is to end a link in that step has all
    the time for it. A framework may look for the word to leave twice a second: until then no more
    than some steps are done.
    """
    assert text.count(line) == 1, line
    indent = line[: len(line) - len(line.lstrip())]
    links = {str(link): number for link, number in enumerate(at, 1)}
    stand = (
        "import os as _os, time as _time",
        f'if {step} >= {links}.get(_os.environ["HPCRESUME_LINK"], 1 << 60):',
        '    while not _os.path.exists(_os.environ["HPCRESUME_STOP"]):',
        "        _time.sleep(0.02)",
        "    _time.sleep(0.2)",
    )
    return text.replace(line, line + "".join(f"{indent}{row}\n" for row in stand))
