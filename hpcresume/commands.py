"""What can be said of a command before a job runs it: its name, and what is wrong with it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcresume.config import RunConfig
from hpcresume.errors import ConfigError

#: What a file that programs execute is called.
_SCRIPT = (".py", ".sh", ".bash")
#: What executes such a file.
_INTERPRETER = re.compile(r"(python|torchrun|accelerate|deepspeed|bash|sh|zsh|dash)[0-9.]*")


def name_of(command: Sequence[str]) -> str:
    """A name for a run: main for `python main.py`, train for `python -m my.train`."""
    script = _script(command)
    if script is not None:
        name = Path(script).stem
    elif "-m" in command[:-1]:
        name = command[command.index("-m") + 1].rpartition(".")[2]
    else:
        name = Path(command[0]).name
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:100] or "command"


def check_command(config: RunConfig, project: Path, environ: Mapping[str, str]) -> None:
    """Refuse a command that no job could start. Raises ConfigError.

    What a container holds, or what set-up lines put on the PATH, is not known here.
    """
    if config.scheduler.container is not None or config.scheduler.setup:
        return
    program = config.command[0]
    if "/" in program:
        path = project / program
        if not os.access(path, os.X_OK) or path.is_dir():
            raise ConfigError(f"command: {program} is no program in {project}: is it executable?")
    elif shutil.which(program, path=environ.get("PATH", os.defpath)) is None:
        raise ConfigError(f"command: there is no program {program} on the PATH.")
    script = _script(config.command)
    if script is not None and not (project / script).is_file():
        raise ConfigError(f"command: there is no file {script} in {project}.")


def _script(command: Sequence[str]) -> str | None:
    """The script that a command executes, where it is seen."""
    if command[0].endswith(_SCRIPT):
        return command[0]
    if not _INTERPRETER.fullmatch(Path(command[0]).name) or "-m" in command or "-c" in command:
        return None
    return next((word for word in command[1:] if word.endswith(_SCRIPT)), None)
