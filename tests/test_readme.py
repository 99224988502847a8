"""The README shows what the code says. `python tests/test_readme.py` writes it anew."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from faults import test_corrupt, test_environment, test_malicious, test_mismatched, test_odd
from test_structure import MODULES, PACKAGE

from swa_avg.cli.command import command

README = Path(__file__).parent.parent / "README.md"
CATALOGUE = (
    test_malicious,
    test_corrupt,
    test_mismatched,
    test_odd,
    test_environment,
)
FAULTS = range(1, 108)


def help_text() -> str:
    width = {"terminal_width": 96, "max_content_width": 96}
    with command.make_context("swa-avg", [], resilient_parsing=True, **width) as context:
        return f"```text\n{command.get_help(context)}\n```\n"


def files_table() -> str:
    """The rooms from the ground up, each with the first sentence of its docstring."""
    lines = ["| file | what lives there |", "| --- | --- |"]
    for room in MODULES:
        path = PACKAGE / (room.replace(".", "/") + ".py")
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        name = path.relative_to(PACKAGE.parent).as_posix()
        lines.append(f"| [`{path.relative_to(PACKAGE)}`]({name}) | {said.splitlines()[0]} |")
    return "\n".join(lines) + "\n"


def faults() -> dict[int, list[tuple[str, ModuleType, tuple[str, ...]]]]:
    """The tests of each fault: name, module, and what the mark says of the fault."""
    found = defaultdict(list)
    for module in CATALOGUE:
        for name, test in vars(module).items():
            marked = dict.fromkeys(marks(test)) if name.startswith("test_") else {}
            for number, *said in marked:
                found[number].append((name, module, tuple(said)))
    return found


def marks(test: Any) -> Iterator[tuple[Any, ...]]:
    """The arguments of a test's marks of faults, those of single cases included."""
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "fault":
            yield mark.args
        elif mark.name == "parametrize":
            for case in mark.args[1]:
                yield from (m.args for m in getattr(case, "marks", ()) if m.name == "fault")


def faults_table() -> str:
    """Every fault of the catalogue, what happens, and the tests that hold it to that."""
    lines = ["| | fault | what happens | tests |", "| --- | --- | --- | --- |"]
    for number, tests in sorted(faults().items()):
        what, happens = next(said for _, _, said in tests if said)
        names = {
            f"[`{name}`](tests/{module.__name__.replace(chr(46), chr(47))}.py)": None
            for name, module, _ in tests
        }
        lines.append(f"| {number} | {what} | {happens} | {', '.join(names)} |")
    return "<details>\n<summary>All 107</summary>\n\n" + "\n".join(lines) + "\n\n</details>\n"


def rendered(text: str) -> str:
    """Return the README with its generated parts as they should be."""
    parts = {"help": help_text(), "files": files_table(), "faults": faults_table()}
    for name, content in parts.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->\n"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        assert found, f"no block {name}"
        text = before + start + content + end + after
    return text


def test_readme_is_generated() -> None:
    """Help, files and faults in the README are those of the code and its tests, to the letter."""
    assert README.read_text() == rendered(README.read_text())


def test_every_fault_has_its_test() -> None:
    """No number of the catalogue is without a test, and each says once what it is."""
    assert sorted(faults()) == list(FAULTS)
    for number, tests in faults().items():
        assert len([said for *_, said in tests if said]) == 1, number


def test_help_fits_two_screens() -> None:
    """The help of all options stays under two screens of 50 lines of 96 columns."""
    lines = help_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 96


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
