"""A training that hangs: noisy.py, which sleeps in step 20, the first time or each time."""

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
