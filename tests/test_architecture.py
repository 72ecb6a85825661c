"""The import rows of the house: a module imports only from below, within a row only to the left."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcresume

ROOT = Path(hpcresume.__file__).parent

#: Rows from the ground up; a tuple within a row is ordered, what stands together is equal.
ROWS: list[list[str]] = [
    ["errors", "files", "signals", "config", "run_dir", "journal"],
    ["checkpoint", "scheduler", "data"],
    ["training", "chain", "session"],
    ["story", "history", "status", "observe", "display", "why", "trackers"],
    [
        "serving",
        "foreground",
        "rank",
        "ways",
        "successors",
        "notify",
        "link",
        "commands",
        "snapshot",
        "submit",
        "resumption",
        "batch",
        "preview",
        "cancel",
        "drive",
    ],
    ["lm", "adapters", "verify", "rehearse", "display.web"],
    ["cli", "__main__"],
]
#: Engines never import each other, although they stand in one row.
STRANGERS = {"checkpoint", "scheduler", "data"}
#: One module for each third-party package.
HOMES = {
    "yaml": "config/yaml_text.py",
    "msgspec": "config",
    "rich": "display",
    "lightning": "adapters/lightning",
    "submitit": "scheduler/launcher.py",
    "click": "cli",
    "subprocess": "scheduler/process.py",
    "starlette": "display/web",
    "uvicorn": "display/web",
    "tensorboardX": "trackers/tensorboard.py",
    "wandb": "trackers/wandb.py",
    "mlflow": "trackers/mlflow.py",
    "trackio": "trackers/trackio.py",
}
PLACE = {name: (row, at) for row, names in enumerate(ROWS) for at, name in enumerate(names)}


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def top(path: Path) -> str:
    """The name of a module's place in the house."""
    return place_of(path.relative_to(ROOT).with_suffix("").parts)


def place_of(parts: tuple[str, ...] | list[str]) -> str:
    """A package within another one may have a place of its own."""
    return next((name for name in PLACE if name.split(".") == list(parts[:2])), parts[0])


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    found = [name.split(".")[1:] for name in imports(path) if name.startswith("hpcresume.")]
    names = {place_of(parts) for parts in found}
    return {name for name in names if name in PLACE}


def test_every_module_has_a_place_in_the_house() -> None:
    unplaced = {top(path) for path in sources()} - PLACE.keys() - {"__init__"}
    assert not unplaced


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_rows_below_or_from_its_left(path: Path) -> None:
    own = top(path)
    if own == "__init__":
        return
    row, at = PLACE[own]
    for name in own_imports(path) - {own}:
        other_row, other_at = PLACE[name]
        assert (other_row, other_at) < (row, at), f"{own} imports {name}, which is above it"
        assert not {own, name} <= STRANGERS, f"{own} imports {name}: engines are strangers"


@pytest.mark.parametrize("package", sorted(HOMES))
def test_a_third_party_package_is_imported_in_one_place(package: str) -> None:
    home = HOMES[package]
    for path in sources():
        used = any(name.split(".")[0] == package for name in imports(path))
        at_home = str(path.relative_to(ROOT)).startswith(home)
        assert not used or at_home, f"{path.relative_to(ROOT)} imports {package}"


def test_the_public_names_are_at_most_twelve_and_all_there() -> None:
    assert len(hpcresume.__all__) <= 12
    assert sorted(hpcresume.__all__) == list(hpcresume.__all__)
    for name in hpcresume.__all__:
        assert getattr(hpcresume, name) is not None
