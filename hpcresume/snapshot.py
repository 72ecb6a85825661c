"""What a run keeps of the project that it is submitted from: its code, and the versions around it.

What a link imports is this copy, whatever becomes of the project while the chain runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from hpcresume.config import RunConfig
from hpcresume.errors import ConfigError
from hpcresume.run_dir import RunDir
from hpcresume.scheduler import process

#: The most code that is frozen with a run, and the largest file in it.
CODE_BYTES = 64 << 20
CODE_FILE_BYTES = 8 << 20
_NOT_CODE = frozenset({"__pycache__", "node_modules", "runs", "venv", "env", "site-packages"})


def versions() -> dict[str, str]:
    """Python and every installed package."""
    found = {"python": sys.version.split()[0]}
    for dist in importlib.metadata.distributions():
        name = dist.metadata["Name"]
        if name:
            found[name] = dist.version
    return dict(sorted(found.items()))


def freeze_code(project: Path, train: str, target: Path) -> None:
    """Copy the code below `project`: what git tracks, as it is now, and all Python files.

    Raises ConfigError where it is more than 64 MiB; single files above 8 MiB are data, and stay.
    """
    target.mkdir(mode=0o700)
    total = 0
    for name in _code_files(project, train):
        source = project / name
        try:
            size = source.stat().st_size
        except OSError:
            continue
        if not source.is_file() or size > CODE_FILE_BYTES:
            continue
        total += size
        if total > CODE_BYTES:
            raise ConfigError(
                f"The code below {project} is larger than {CODE_BYTES >> 20} MiB: keep data out "
                f"of what git tracks, or submit from the folder of the code."
            )
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copy(source, copy)


def _code_files(project: Path, train: str) -> list[str]:
    names = _git_files(project)
    # A module that was written a minute ago is imported like one that git knows.
    new = _git_files(project, "--others", "--exclude-standard", "*.py")
    names += [name for name in new if _is_code(Path(name))]
    if not names:
        found = (path.relative_to(project) for path in sorted(project.rglob("*.py")))
        names = [str(path) for path in found if _is_code(path)]
    entry = train.rpartition(":")[0] or train
    if entry.endswith(".py") and entry not in names:
        names.append(entry)
    return names


def _git_files(project: Path, *options: str) -> list[str]:
    """What git lists below a folder; nothing where there is no git."""
    argv = ["git", "ls-files", "-z", *options]
    listed = process.run(argv, environ=os.environ, timeout_s=30, cwd=project)
    return [name for name in listed.out.split("\0") if name] if listed.code == 0 else []


def _is_code(path: Path) -> bool:
    return not any(part.startswith(".") or part in _NOT_CODE for part in path.parts)


def check_entry(train: str, project: Path) -> None:
    """What can be said about a train entry without importing it. Raises ConfigError."""
    target, _, function = train.partition(":")
    if not target or not (function or "train").isidentifier():
        raise ConfigError(
            f"train is {train!r}; expected 'file.py:function' or 'package.module:function'."
        )
    if Path(target).is_absolute() or ".." in Path(target).parts:
        raise ConfigError(f"train: {target} must lie below the folder that you submit from.")
    if target.endswith(".py") and not (project / target).is_file():
        raise ConfigError(f"train: there is no file {target} in {project}.")


def check_train(run: RunDir, config: RunConfig, environ: Mapping[str, str]) -> None:
    """Import the training function from the frozen code, in a child process.

    Raises ConfigError with the child's sentence.
    """
    argv = [sys.executable, "-m", "hpcresume", "rank", str(run.path), "--check"]
    done = process.run(argv, environ=process.scrubbed(environ), timeout_s=300)
    if done.code == 0 and config.train in done.out:
        return
    said = done.err.replace(f"{run.code}/", "")
    if done.code == ConfigError.exit_code and "hpcresume: " in said:
        # What the code printed itself stands before it.
        raise ConfigError(said.rpartition("\nhpcresume: ")[2].removeprefix("hpcresume: ").strip())
    end = f"ended with signal {-done.code}" if done.code < 0 else f"left with code {done.code}"
    end = "gave no answer in 300 s" if done.timed_out else end
    last = "\n  ".join(["", *said.strip().splitlines()[-12:]])
    raise ConfigError(f"train: {config.train} does not import: the process that tried {end}.{last}")
