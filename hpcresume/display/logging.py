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

from hpcresume.display.terminal import forgive

#: Module names as people know them.
_WORDS = {"session": "train", "saving": "checkpoint", "store": "checkpoint", "record": "train"}


class LineFormatter(logging.Formatter):
    """One line a record; a traceback follows it where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s [%(tag)s] %(message)s", datefmt="%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        module = record.name.rpartition(".")[2]
        tag = _WORDS.get(module, module)
        if record.getMessage().startswith("saved step"):
            tag = "checkpoint"
        record.tag = tag if record.levelno == logging.INFO else f"{tag}-{record.levelname}"
        return super().format(record)


class _Untroubled(logging.Handler):
    """Drops a line that its place refuses: a full disk, or a closed pipe, is no matter of ours."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Show only what is wrong with the call."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(_Untroubled, logging.StreamHandler):  # type: ignore[type-arg]
    pass


class _File(_Untroubled, logging.FileHandler):
    pass


@contextlib.contextmanager
def logging_to(
    *paths: Path, level: str = "INFO", console: bool = True, name: str = "hpcresume"
) -> Iterator[None]:
    """Send the log to the console at `level` and to files at `level` (the first at DEBUG)."""
    logger = logging.getLogger(name)
    handlers: list[logging.Handler] = []
    if console:
        forgive()
        stream = _Console(sys.stdout)
        stream.setLevel(level)
        handlers.append(stream)
    for index, path in enumerate(paths):
        with contextlib.suppress(OSError):
            file = _File(path, encoding="utf-8", delay=False)
            file.setLevel(logging.DEBUG if index == 0 and len(paths) > 1 else level)
            handlers.append(file)
    for handler in handlers:
        handler.setFormatter(LineFormatter())
        logger.addHandler(handler)
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.setLevel(before[0])
        logger.propagate = before[1]
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
