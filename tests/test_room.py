"""Quotas, as the program tells them that is there, limit a save as the disk itself does."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcresume.training.room import Quotas

TELLS = """#!/bin/sh
echo asked >> "$0.log"
cat <<'END'
Disk quotas for user ada (uid 1000):
     Filesystem   blocks   quota   limit   grace   files   quota   limit   grace
/dev/sda1    1500    1800    2000             90      95     100
END
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "quota"
    path.write_text(TELLS.replace("             90", " 0 90").replace("     100\n", "     100 0\n"))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return path


def test_what_a_quota_leaves_is_known(program: Path, tmp_path: Path) -> None:
    size, files = Quotas(tmp_path).rooms()
    assert (size.free_bytes, size.free_files) == (500 << 10, None)
    assert (files.free_bytes, files.free_files) == (None, 10)
    assert size.where == f"your quota on the file system of {tmp_path}"


def test_a_quota_is_not_asked_for_at_every_save(program: Path, tmp_path: Path) -> None:
    quotas = Quotas(tmp_path)
    assert quotas.rooms() == quotas.rooms()
    assert program.with_suffix(".log").read_text() == "asked\n"


def test_without_a_program_there_is_no_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Quotas(tmp_path).rooms() == []
