"""A folder for the front of a command's PYTHONPATH: its `sitecustomize` puts our callback in.

So a script needs no change, however it is started: `python`, `torchrun`, `accelerate launch`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

#: Names the framework that `sitecustomize` waits for.
VARIABLE = "HPCRESUME_FRAMEWORK"


def variables(environ: Mapping[str, str], framework: str) -> dict[str, str]:
    """What to set in a command's environment so that a framework in it gets our callback."""
    before = environ.get("PYTHONPATH")
    folders = [str(Path(__file__).parent), *([before] if before else [])]
    return {VARIABLE: framework, "PYTHONPATH": os.pathsep.join(folders)}
