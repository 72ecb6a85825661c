"""docs/cli.md and the help texts, held against the commands and flags that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from hpcresume import errors, status
from hpcresume.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
CONTEXT = click.Context(cli, info_name="hpcresume")
NAMES = cli.list_commands(CONTEXT)


def command(name: str) -> click.Command:
    found = cli.get_command(CONTEXT, name)
    assert found is not None
    return found


def sections() -> dict[str, str]:
    """The page's text by its headings, in order."""
    _, *parts = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def section(name: str) -> str:
    return sections()[f"hpcresume {name}"]


def flags(found: click.Command) -> set[str]:
    options = (param for param in found.params if isinstance(param, click.Option))
    return {flag for option in options if not option.hidden for flag in option.opts}


def examples_in_help(name: str) -> list[str]:
    _, _, below = (command(name).help or "").partition("Examples:\n")
    return [line.strip() for line in below.splitlines() if line.strip()]


def examples_on_page(name: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", section(name), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_page_has_a_section_for_every_command_and_for_nothing_else() -> None:
    assert list(sections()) == [*(f"hpcresume {name}" for name in NAMES), "Exit codes"]


def test_the_help_shows_every_command_on_a_line_of_its_own() -> None:
    shown = cli.get_help(click.Context(cli, terminal_width=80))
    _, _, below = shown.partition("Commands:\n")
    assert [line.split()[0] for line in below.splitlines()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_names_every_flag_of_a_command_and_no_other(name: str) -> None:
    rows = [line for line in section(name).splitlines() if line.startswith("| `")]
    named = [
        flag for row in rows for flag in re.findall(r"`(--?[a-zA-Z][a-z-]*)", row.split(" | ")[0])
    ]
    assert sorted(named) == sorted(flags(command(name)))
    anywhere = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section(name)))
    known = {flag for other in NAMES for flag in flags(command(other))}
    assert anywhere <= known


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_explains_every_option_and_ends_with_examples(name: str) -> None:
    found = command(name)
    unexplained = [
        param.opts[-1]
        for param in found.params
        if isinstance(param, click.Option) and not (param.help or "").strip()
    ]
    assert unexplained == []
    assert examples_in_help(name)
    assert max(map(len, (found.help or "").splitlines())) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_a_command_line_that_is_understood(name: str) -> None:
    for line in [*examples_in_help(name), *examples_on_page(name)]:
        typed = re.split(r"\s+(?:>>?|#)\s", line)[0]
        program, first, *words = shlex.split(typed)
        assert (program, first) == ("hpcresume", name), line
        context = command(name).make_context(name, words, parent=CONTEXT)
        assert not context.args, line


def test_the_page_tells_every_exit_code() -> None:
    kinds = (kind for kind in vars(errors).values() if isinstance(kind, type))
    ours = {kind.exit_code for kind in kinds if issubclass(kind, errors.HpcResumeError)}
    told = set(map(int, re.findall(r"^\| (\d+)", sections()["Exit codes"], flags=re.MULTILINE)))
    assert ours <= told
    for state, code in status.EXIT_CODES.items():
        assert f"{code} {state}" in sections()["Exit codes"]
