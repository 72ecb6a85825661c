"""Standard output where it is not what one hopes for: a closed pipe, a terminal of few letters."""

from __future__ import annotations

import io
import os
import sys


def forgive_letters() -> None:
    """Show a question mark for what the terminal's encoding lacks, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def let_go_of_stdout() -> None:
    """The reader of our pipe has seen enough: what is still to be said goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
