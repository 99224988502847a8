"""The README shows what the command says. `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

import click

from swa_avg.cli import command

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(?<=<!-- help -->\n```text\n).*?(?=```)", re.DOTALL)


def help_text() -> str:
    context = click.Context(command, info_name="swa-avg", terminal_width=96, max_content_width=96)
    return command.get_help(context) + "\n"


def test_help_in_readme_is_the_commands_own() -> None:
    """The help in the README is, letter for letter, what `swa-avg --help` prints."""
    shown = BLOCK.search(README.read_text())
    assert shown is not None
    assert shown.group() == help_text()


def test_help_fits_two_screens() -> None:
    """The help of all options stays under two screens of 50 lines of 96 columns."""
    lines = help_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 96


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda _: help_text(), README.read_text()))
