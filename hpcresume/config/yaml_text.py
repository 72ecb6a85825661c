"""YAML, read and written so that a value means what it looks like. The only user of `yaml`.

YAML here means YAML 1.2's scalars: `1:30:00` is text and not 5400, `no` is text and not false,
`1e-3` is a number, `007` is text. Keys are always text. Tags, anchors and aliases are refused,
which also keeps a small file small in memory. Used by `layers` (what people write), `loading`
(the frozen file) and `changes` (whether a text needs quotes).
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from hpcresume.config.wording import KeyPath, dotted
from hpcresume.errors import ConfigError

#: How deep mappings and lists may stand in each other.
MAX_DEPTH = 32

_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    # Only to be refused later with a sentence, where they would pass for text otherwise.
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INT = re.compile(r"-?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def scalar(text: str) -> Any:
    """What a word without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse(text: str, source: str) -> tuple[Any, dict[KeyPath, str]]:
    """The one value in a text, and "source:line" of every key and item; None out of nothing.

    Raises ConfigError with the line.
    """
    document = _Document(text, source)
    try:
        return document.root(), document.marks
    except yaml.MarkedYAMLError as error:
        marks = [mark.line + 1 for mark in (error.problem_mark, error.context_mark) if mark]
        line = min(marks[0], max(1, len(text.splitlines())))  # The end counts as a line of its own.
        what = f"{error.problem}, {error.context}" if error.context else error.problem
        begun = f" that begins on line {marks[1]}" if marks[1:] and marks[1] != line else ""
        raise ConfigError(f"{source}:{line}: not valid YAML: {what}{begun}.") from None
    except yaml.reader.ReaderError as error:
        line = text.encode(errors="replace").count(b"\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {error.reason}.") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{source}: not text that UTF-8 can hold.") from None


def to_text(mapping: dict[str, Any]) -> str:
    """YAML that `parse` reads back as an equal mapping, and other readers too."""
    text: str = yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Document:
    """Plain values out of the events of yaml's parser, and where each key and item stands.

    yaml's own way from there to values drops the first of two equal keys, recurses as deep as
    the text does, and means YAML 1.1.
    """

    def __init__(self, text: str, source: str) -> None:
        self.marks: dict[KeyPath, str] = {}
        self._source = source
        self._events = yaml.parse(text, Loader=_Loader)

    def root(self) -> Any:
        root, documents = None, 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    where = self._where(event)
                    raise ConfigError(f"{where}: a second document starts; expected one mapping.")
            elif isinstance(event, yaml.NodeEvent):
                root = self._value(event, ())
        return root

    def _value(self, event: Any, path: KeyPath) -> Any:
        self._refuse_decoration(event)
        if isinstance(event, yaml.ScalarEvent):
            return scalar(event.value) if event.implicit[0] else event.value
        if len(path) >= MAX_DEPTH:
            raise ConfigError(f"{self._where(event)}: nested deeper than {MAX_DEPTH} levels.")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        return self._list(path)

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            self._refuse_decoration(event)
            where = self._where(event)
            if not isinstance(event, yaml.ScalarEvent) or not event.value:
                raise ConfigError(f"{where}: a key must be a word; expected 'key: value'.")
            key = event.value
            entry = (*path, key)
            if key in mapping:
                first = self.marks[entry]
                raise ConfigError(f"{where}: '{dotted(entry)}' is given twice, first at {first}.")
            self.marks[entry] = where
            mapping[key] = self._value(next(self._events), entry)
        return mapping

    def _list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            entry = (*path, len(items))
            self.marks[entry] = self._where(event)
            items.append(self._value(event, entry))
        return items

    def _refuse_decoration(self, event: Any) -> None:
        if event.anchor is not None:
            raise ConfigError(
                f"{self._where(event)}: anchors and aliases ('&', '*') are not supported here; "
                "write the value out, or put text in quotes."
            )
        if event.tag is not None:
            raise ConfigError(
                f"{self._where(event)}: tags ('!') are not supported here; put text in quotes."
            )

    def _where(self, event: Any) -> str:
        return f"{self._source}:{event.start_mark.line + 1}"


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `scalar` would not read back as the same text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    style = None if scalar(data) is data else "'"
    if not data.isprintable():
        style = '"'  # The only style that keeps every kind of line break.
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _represent_text)
