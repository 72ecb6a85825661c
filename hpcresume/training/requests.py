"""The files that ask a link to save and leave; read by ranks, without torch."""

from __future__ import annotations

import contextlib

from hpcresume.run_dir import LinkDir, RunDir


def requested(run: RunDir, link: LinkDir) -> str | None:
    """Why a request file asks for the link's end, or None where there is none."""
    for path in (link.stop, run.stop, run.cancel):
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace").strip()
            if path == link.stop:
                return text or path.name
            return path.name if path == run.cancel or not text else f"STOP: {text}"
    return None
