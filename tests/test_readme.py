"""The README shows what the code says. `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import ast
from pathlib import Path

from test_structure import PACKAGE, ROOMS

from swa_avg.cli import command

README = Path(__file__).parent.parent / "README.md"


def help_text() -> str:
    width = {"terminal_width": 96, "max_content_width": 96}
    with command.make_context("swa-avg", [], resilient_parsing=True, **width) as context:
        return f"```text\n{command.get_help(context)}\n```\n"


def files_table() -> str:
    """The rooms from the ground up, each with the first sentence of its docstring."""
    lines = ["| file | what lives there |", "| --- | --- |"]
    for room in ROOMS:
        path = PACKAGE / (room.replace(".", "/") + ".py")
        if not path.exists():
            path = PACKAGE / room / "__init__.py"
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        name = path.relative_to(PACKAGE.parent).as_posix()
        lines.append(f"| [`{path.relative_to(PACKAGE)}`]({name}) | {said.splitlines()[0]} |")
    return "\n".join(lines) + "\n"


def rendered(text: str) -> str:
    """Return the README with its generated parts as they should be."""
    for name, content in (("help", help_text()), ("files", files_table())):
        start, end = f"<!-- {name} -->\n", "<!-- end -->\n"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        assert found, f"no block {name}"
        text = before + start + content + end + after
    return text


def test_readme_is_generated() -> None:
    """The help and the list of files in the README are those of the code, to the letter."""
    assert README.read_text() == rendered(README.read_text())


def test_help_fits_two_screens() -> None:
    """The help of all options stays under two screens of 50 lines of 96 columns."""
    lines = help_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 96


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
