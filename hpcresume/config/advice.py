"""What a message proposes, read out of the schema: what a field takes, what a word was meant to be.

Used by `checks` alone.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from hpcresume.config.schema import RunConfig, SchedulerConfig

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
}


def alternatives(wanted: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return typing.get_args(wanted)
    return (wanted,)


def bare(kind: Any) -> Any:
    """A type without what `Annotated` adds."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def describe(wanted: Any) -> str:
    """What a field takes, in words."""
    return ", or ".join(map(_describe_one, alternatives(wanted)))


def meant_word(value: Any, wanted: Any) -> str:
    """For a misspelt word out of a fixed set: the end of a sentence that asks; else nothing."""
    literals = (kind for kind in alternatives(wanted) if typing.get_origin(kind) is Literal)
    choices = [word for kind in literals for word in typing.get_args(kind)]
    near = _nearest(value, choices) if isinstance(value, str) else None
    return f"; did you mean '{near}'?" if near else ""


def meant_key(key: str, struct: type[msgspec.Struct]) -> str:
    """Where an unknown key belongs, or what was meant, or what there is."""
    homes = [name for name, keys in _sections(RunConfig, "") if key in keys]
    if homes:
        places = [f"under '{name}'" if name else "at the top level" for name in homes]
        return f"'{key}' belongs {' or '.join(places)}"
    valid = struct.__struct_fields__
    near = _nearest(key, valid)
    if near:
        return f"did you mean '{near}'?"
    advice = "expected one of " + ", ".join(valid)
    if struct is RunConfig:
        return f"{advice}; what the training function takes goes under 'args'"
    if struct is SchedulerConfig:
        return f"{advice}; any other option of sbatch goes under 'scheduler.sbatch'"
    return advice


def _describe_one(kind: Any) -> str:
    meta = next((m for m in getattr(kind, "__metadata__", ()) if isinstance(m, msgspec.Meta)), None)
    if meta and meta.description:
        return meta.description
    plain = bare(kind)
    origin, inner = typing.get_origin(plain), typing.get_args(plain)
    if origin is Literal:
        return "one of " + ", ".join(inner)
    if origin is list:
        return "a list of " + describe(inner[0])
    return _KINDS.get(plain, "a mapping") + _describe_range(meta)


def _describe_range(meta: msgspec.Meta | None) -> str:
    if meta is None:
        return ""
    if meta.gt is not None:
        return f" above {meta.gt}"
    return f" of at least {meta.ge}" if meta.le is None else f" from {meta.ge} to {meta.le}"


def _sections(struct: type[msgspec.Struct], name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Dotted name and keys of a section and of all below it."""
    yield name, struct.__struct_fields__
    for field in msgspec.structs.fields(struct):
        for kind in alternatives(field.type):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                yield from _sections(kind, f"{name}.{field.name}".lstrip("."))


def _nearest(word: str, choices: Sequence[str]) -> str | None:
    by_form = {choice.lower(): choice for choice in choices}
    form = word.lower().replace("-", "_")
    near = difflib.get_close_matches(form, by_form, 1) or [
        choice for choice in by_form if len(form) > 2 and choice.startswith(form)
    ]
    return by_form[near[0]] if near else None
