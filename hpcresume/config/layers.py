"""Settings from one place each: a file, or one `--set`; `variables` adds those of SBATCH_*.

Nothing here says whether a setting exists or fits: `loading` has the layers checked and merges
them.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcresume.config import yaml_text
from hpcresume.config.schema import RunConfig, to_mapping
from hpcresume.config.wording import KeyPath, printable, show
from hpcresume.errors import ConfigError, NotFound

_MAX_BYTES = 1_000_000


@dataclass
class Layer:
    """Settings from one place, and the words that name the place of each."""

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[KeyPath, str] = field(default_factory=dict)
    assigned: tuple[str, ...] = ()
    """The one path that a `--set` names."""

    def where(self, path: KeyPath) -> str:
        """The place of a setting: its own, or that of the nearest mapping around it."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path, self.source)

    def put(self, path: tuple[str, ...], value: Any) -> None:
        """Set one value, making the mappings above it."""
        values = self.values
        for key in path[:-1]:
            values = values.setdefault(key, {})
        values[path[-1]] = value


def read(path: Path, *, may_be_empty: bool = False) -> Layer:
    """The settings in a file. Raises NotFound or ConfigError."""
    source = printable(str(path))
    root, marks = yaml_text.parse(_text(path, source), source)
    if root is None and may_be_empty:
        return Layer(source)
    if not isinstance(root, dict):
        found = "is empty" if root is None else f"holds {show(root)}"
        raise ConfigError(f"{source}: {found}; expected a mapping ('train: train.py').")
    return Layer(source, _without_empty(root, to_mapping(RunConfig())), marks)


def defaults(environ: Mapping[str, str]) -> Iterator[Layer]:
    """The site's and the user's file, where there are such."""
    site = environ.get("HPCRESUME_SITE")
    if site:
        yield read(Path(site), may_be_empty=True)
    base = environ.get("XDG_CONFIG_HOME", "")
    if not base.startswith("/"):  # A relative one is to be ignored, says the XDG specification.
        base = f"{environ['HOME']}/.config" if environ.get("HOME") else ""
    paths = [] if site else [Path("/etc/hpcresume.yaml")]
    if base:
        paths.append(Path(base, "hpcresume", "config.yaml"))
    for path in paths:
        with contextlib.suppress(NotFound):
            yield read(path, may_be_empty=True)


def assignment(text: str) -> Layer:
    """The one setting of a `--set`. Raises ConfigError."""
    source = f"--set {printable(text if len(text) <= 80 else text[:77] + '...')}"
    dotted_keys, equals, word = text.partition("=")
    keys = tuple(dotted_keys.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"{source}: expected KEY=VALUE, like checkpoint.steps=500.")
    word = word.strip()
    # Only brackets and quotes make it YAML: in a word, ': ' and ' #' are just characters.
    is_yaml = word.startswith(("[", "{", '"', "'"))
    layer = Layer(source, assigned=keys)
    layer.put(keys, yaml_text.parse(word, source)[0] if is_yaml else yaml_text.scalar(word))
    return layer


#: What is wrong with a path, and not with the disk.
_NO_FILE = frozenset({errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP})


def _text(path: Path, source: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{source}: longer than 1 MB; expected a YAML file of settings.")
        return data.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{source}: no such file; expected a YAML file of settings.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}:{line}: not UTF-8 text; expected a YAML file.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FILE:
            # The disk's trouble, which passes, and not the file's.
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{source}: cannot be read ({reason}); expected a YAML file.") from None


def _without_empty(values: dict[str, Any], fallback: Mapping[str, Any]) -> dict[str, Any]:
    """Without sections and lists of which only the key is there, the rest being commented out."""
    kept = {}
    for key, value in values.items():
        default = fallback.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            kept[key] = _without_empty(value, default)
        elif value is not None or not isinstance(default, dict | list):
            kept[key] = value
    return kept
