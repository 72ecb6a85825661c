"""The pages about trainings of one's own: their lines can be typed, their diffs are short."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

import pytest
from made_run import Said

REPOSITORY = Path(__file__).parent.parent
PAGES = {
    name: (REPOSITORY / "docs" / "integrations" / f"{name}.md").read_text()
    for name in ("fsdp", "pytorch", "torchrun")
}
LINES = [
    (name, line.removeprefix("+"))
    for name, page in PAGES.items()
    for line in page.splitlines()
    if line.removeprefix("+").startswith("hpcresume submit")
]


@pytest.mark.parametrize(
    ("page", "line"), LINES, ids=[f"{page}-{n}" for n, (page, _) in enumerate(LINES)]
)
def test_the_lines_of_the_pages_can_be_typed_as_they_stand(
    tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch, page: str, line: str
) -> None:
    (tmp_path / "main.py").touch()
    for name in ("configs", "examples"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCRESUME_SITE", os.devnull)
    monkeypatch.setenv("XDG_CONFIG_HOME", os.devnull)
    words = shlex.split(line)[1:]
    code, _, errors = said(words[0], "--dry-run", "--cluster=local", *words[1:])
    assert code == 0, errors


@pytest.mark.parametrize("page", PAGES)
def test_a_page_changes_at_most_five_lines(page: str) -> None:
    for block in PAGES[page].split("```diff\n")[1:]:
        added = [line for line in block.split("```")[0].splitlines() if line.startswith("+")]
        assert 1 <= len(added) <= 5
