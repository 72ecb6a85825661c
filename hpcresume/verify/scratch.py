"""Where runs lie that are made only to find something out."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpcresume.errors import UsageError
from hpcresume.verify.links import LinkFailed


@contextlib.contextmanager
def scratch_folder(keep: Path | None, purpose: str) -> Iterator[Path]:
    """A folder: `keep`, or a temporary one, which stays only where a failure's log is in it.

    Raises UsageError where `keep` is in use.
    """
    if keep is not None:
        if keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
            raise UsageError(f"--keep {keep} exists: name a folder that is new or empty.")
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield keep.absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix=f"hpcresume-{purpose}-"))
    try:
        yield folder
    except LinkFailed as error:
        if error.log is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
