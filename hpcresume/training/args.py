"""The configuration's `args`, as a training function reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpcresume.errors import UsageError


class _UnknownArg(UsageError, KeyError):
    """A KeyError as well, so that `args.get(name, default)` works."""

    __str__ = Exception.__str__


class Args(Mapping[str, Any]):
    """Values by attribute or by key. Raises UsageError for one that the configuration lacks."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            known = ", ".join(self._values) or "none"
            raise _UnknownArg(
                f"The training function reads args.{name}, which the configuration does not set "
                f"(args there: {known})."
            )
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)
