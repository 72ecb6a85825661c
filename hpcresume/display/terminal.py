"""Standard output where it is not what one hopes for: closed, or a terminal of few letters."""

from __future__ import annotations

import io
import os
import sys


def forgive() -> None:
    """Let nothing that is printed be an error.

    A question mark is shown for what the terminal's encoding lacks; where standard output is
    closed, nothing is.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def let_go_of_stdout() -> None:
    """The reader of our pipe has seen enough: what is still to be said goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
