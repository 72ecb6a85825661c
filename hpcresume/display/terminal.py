"""Standard output: closed, a pipe, or a terminal of some width, letters and colours.

Needs no rich.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import textwrap

#: Longer lines are hard to read, however wide the terminal is.
WIDEST = 100
_STYLES = {
    "dim": "2",
    "strong": "1",
    "good": "32",
    "warning": "33",
    "bad": "1;31",
    "command": "36",
}


#: What stands for our own signs where the encoding has no more than ASCII.
_PLAIN = str.maketrans(
    {
        "━": "=", "─": "-", "│": "|", "·": "|", "•": "|", "…": "...", "→": "->", "–": "-",
        "×": "x", "█": "#", "✔": "+", "✖": "x", "▲": "!", "★": "*", "✓": "+", "╸": "=",
        "●": "*", "○": "o", "■": "#",
    }
)  # fmt: skip


def plain(text: str) -> str:
    """A text of ours in ASCII; a question mark for what has no likeness there."""
    return text.translate(_PLAIN).encode("ascii", "replace").decode()


def printable(text: str) -> str:
    """A text of somebody else on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def bar(share: float, cells: int, style: str) -> str:
    """A bar of so many letters, full up to a share of it in a style."""
    halves = round(2 * cells * max(0.0, min(1.0, share)))
    full = "━" * (halves // 2) + "╸" * (halves % 2)
    rest = "─" * (cells - len(full))
    return (styled(full, style) if full else "") + (styled(rest, "dim") if rest else "")


def _likeness(error: UnicodeError) -> tuple[str, int]:
    """Error handler for streams."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


def forgive() -> None:
    """Let nothing that is printed be an error.

    What the terminal's encoding lacks is shown by its likeness in ASCII, or a question mark; where
    standard output is closed, nothing is.
    """
    codecs.register_error("hpcresume.likeness", _likeness)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    codecs.register(_plain_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="hpcresume.likeness")
            if codecs.lookup(stream.encoding).name == "ascii":
                # By its own name, click takes it for a mistake and writes UTF-8.
                stream.reconfigure(encoding=_ASCII, errors="hpcresume.likeness")


_ASCII = "hpcresume_ascii"


def _plain_ascii(name: str) -> codecs.CodecInfo | None:
    if name != _ASCII:
        return None
    known = codecs.lookup("ascii")
    return codecs.CodecInfo(
        *(known.encode, known.decode, known.streamreader, known.streamwriter),
        *(known.incrementalencoder, known.incrementaldecoder),
        name=_ASCII,
    )


def let_go_of_stdout() -> None:
    """The reader of our pipe has seen enough: what is still to be said goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def styled(text: str, style: str) -> str:
    """Text in a style of the table above or in an ANSI code, where colours are wanted."""
    if not wants_colour():
        return text
    return f"\x1b[{_STYLES.get(style, style)}m{text}\x1b[0m"


def wants_colour() -> bool:
    """Whether what is printed may be coloured."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def can_redraw() -> bool:
    """Whether standard output is a terminal in which lines can be drawn over."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def terminal_width() -> int:
    """Columns to write in; all that are wanted where it is no terminal."""
    if not sys.stdout.isatty():
        return sys.maxsize
    # As shutil.get_terminal_size does it, which brings the modules of all archive formats along.
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


def wrapped(text: str, *, indent: str = "", hang: str = "", width: int | None = None) -> str:
    """Text as a terminal shows it best: broken between words, after `indent`, then `hang`.

    In one piece where it is no terminal. `width` is what there is; None: the terminal's.
    """
    if not sys.stdout.isatty():
        return indent + text
    return textwrap.fill(
        text,
        max(min(terminal_width() if width is None else width, WIDEST), len(hang) + 20),
        initial_indent=indent,
        subsequent_indent=hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
