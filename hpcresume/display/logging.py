"""Log lines: `11-30 00:18:33 [checkpoint] saved step 500 of epoch 1 (1.2 GB in 0.8 s)`.

The same form from every module; `[module-WARNING]` where the level matters. Libraries log, this
module alone says where it goes.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcresume.display.terminal import forgive, styled, wants_colour

#: Module names as people know them.
_WORDS = {
    "account": "train",
    "monitor": "train",
    "record": "train",
    "saving": "checkpoint",
    "serving": "rank",
    "session": "train",
    "store": "checkpoint",
}
_LEVEL_STYLES = {"WARNING": "warning", "ERROR": "bad", "CRITICAL": "bad", "DEBUG": "dim"}


class LineFormatter(logging.Formatter):
    """One line a record; a traceback follows it where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s [%(tag)s] %(message)s", datefmt="%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        module = record.name.rpartition(".")[2]
        tag = _WORDS.get(module, module)
        record.tag = tag if record.levelno == logging.INFO else f"{tag}-{record.levelname}"
        return super().format(record)


class _ConsoleFormatter(LineFormatter):
    """The same line, quieter and louder in parts where colours are wanted."""

    def format(self, record: logging.LogRecord) -> str:
        return coloured(super().format(record))


def coloured(line: str) -> str:
    """A line of the log (or a record of several) in the colours of a terminal, where wanted."""
    if not wants_colour():
        return line
    time, tag, message = line[:14], *line[15:].partition("] ")[::2]
    if not tag.startswith("["):
        return line
    level = tag.rpartition("-")[2]
    first, newline, rest = message.partition("\n")
    if level in _LEVEL_STYLES:
        first = styled(first, _LEVEL_STYLES[level])
    elif first.startswith("━━━"):
        first = styled(first, "strong")
    shown = styled(f"{tag}]", _LEVEL_STYLES.get(level, "command"))
    return f"{styled(time, 'dim')} {shown} {first}{newline}{rest}"


class _Untroubled(logging.Handler):
    """Drops a line that its place refuses: a full disk, or a closed pipe, is no matter of ours."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Show only what is wrong with the call."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(_Untroubled, logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what standard output is at the time: a display that draws there takes it over."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


class _File(_Untroubled, logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            # One that is made by its first line may not be made.
            self.handleError(record)


@contextlib.contextmanager
def logging_to(
    *paths: Path, level: str = "INFO", console: bool = True, name: str = "hpcresume"
) -> Iterator[None]:
    """Send the log to the console and to files, at `level`; what `debug_to` adds goes at the end.

    A console without lines (`console=False`) is for those who draw what the lines tell.
    """
    logger = logging.getLogger(name)
    before = [*logger.handlers], logger.level, logger.propagate
    if console:
        forgive()
        _add(logger, _Console(sys.stdout), level)
    for path in paths:
        with contextlib.suppress(OSError):
            _add(logger, _File(path, encoding="utf-8"), level)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        for handler in [h for h in logger.handlers if h not in before[0]]:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[1])
        logger.propagate = before[2]


def debug_to(path: Path, name: str = "hpcresume") -> None:
    """Send everything to a file as well, until the `logging_to` around it ends.

    The file is made when something is said.
    """
    _add(logging.getLogger(name), _File(path, encoding="utf-8", delay=True), "DEBUG")


def _add(logger: logging.Logger, handler: logging.Handler, level: str) -> None:
    handler.setLevel(level)
    handler.setFormatter(_ConsoleFormatter() if isinstance(handler, _Console) else LineFormatter())
    logger.addHandler(handler)
