"""The README, the guide and the tables say what the code does.

`python tests/test_readme.py` writes the generated parts anew.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))

from command import run  # noqa: E402
from faults import (  # noqa: E402
    test_commit,
    test_corrupt,
    test_environment,
    test_hostile_files,
    test_malicious,
    test_mismatched,
    test_odd,
    test_signals,
)
from storage import test_remote  # noqa: E402
from test_structure import MODULES, PACKAGE, WINGS  # noqa: E402

from swa_avg.cli.command import command  # noqa: E402

README = ROOT / "README.md"
PAGES = [
    README,
    *sorted((PACKAGE / "guide").glob("*.md")),
    PACKAGE / "README.md",
    ROOT / "tests/README.md",
    ROOT / "tests/bench/README.md",
]
CATALOGUE = (
    test_malicious,
    test_corrupt,
    test_mismatched,
    test_odd,
    test_environment,
    test_hostile_files,
    test_signals,
    test_commit,
    test_remote,
)
FAULTS = {*range(1, 124), *range(140, 152)}
RUN = "<!-- run in swa-demo -->"


def help_text() -> str:
    width = {"terminal_width": 96, "max_content_width": 96}
    with command.make_context("swa-avg", [], resilient_parsing=True, **width) as context:
        return f"```text\n{command.get_help(context)}\n```\n"


def modules_table() -> str:
    """The modules from the ground up, each with the first sentence of its docstring."""
    lines = []
    for wing in WINGS:
        said = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text())) or ""
        lines += [f"### {wing}", "", " ".join(said.split()), ""]
        lines += ["| module | what it does |", "| --- | --- |"]
        for module in MODULES:
            if module.startswith(f"{wing}."):
                path = PACKAGE / f"{module.replace('.', '/')}.py"
                first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]
                name = path.relative_to(PACKAGE).as_posix()
                lines.append(f"| [`{path.name}`]({name}) | {first} |")
        lines.append("")
    return "\n".join(lines)


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
    """Every fault of the catalogue, what happens, and its tests."""
    lines = ["| | fault | what happens | tests |", "| --- | --- | --- | --- |"]
    for number, tests in sorted(faults().items()):
        what, happens = next(said for _, _, said in tests if said)
        places = ((name, module.__name__.replace(".", "/")) for name, module, _ in tests)
        names = dict.fromkeys(f"[`{name}`]({place}.py)" for name, place in places)
        lines.append(f"| {number} | {what} | {happens} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


GENERATED = {
    PACKAGE / "guide/command.md": {"help": help_text},
    PACKAGE / "README.md": {"modules": modules_table},
    ROOT / "tests/README.md": {"faults": faults_table},
}


def rendered(page: Path) -> str:
    """Return a page with its generated parts as they should be."""
    text = page.read_text()
    for name, content in GENERATED[page].items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->\n"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        assert found, f"no block {name}"
        text = before + start + content() + end + after
    return text


@pytest.mark.parametrize("page", GENERATED, ids=lambda page: page.stem)
def test_pages_are_generated(page: Path) -> None:
    """Help, modules and faults are those of the code and its tests, to the letter."""
    assert page.read_text() == rendered(page)


def test_every_fault_has_its_test() -> None:
    """No number of the catalogue is without a test, and each says once what it is."""
    assert set(faults()) == FAULTS
    for number, tests in faults().items():
        assert len([said for *_, said in tests if said]) == 1, number


def test_help_fits_two_screens() -> None:
    """The help of all options stays under two screens of 50 lines of 96 columns."""
    lines = help_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 96


def test_readme_is_short() -> None:
    """The README has at most 250 lines and 20 kB."""
    assert len(README.read_text().splitlines()) <= 250
    assert README.stat().st_size <= 20_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file or folder, and an anchor a heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, target


def commands(page: Path) -> list[str]:
    """Return the lines of the page's blocks that are marked as ones that run."""
    blocks = re.findall(rf"{RUN}\n```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [line.split("  #")[0] for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", [p for p in PAGES if RUN in p.read_text()], ids=lambda p: p.stem)
def test_commands_run(page: Path, demo_folder: Path) -> None:
    """Each marked command line, typed in the demo's folder in its order, does its work."""
    assert commands(page)
    for line in commands(page):
        program, *arguments = shlex.split(line)
        assert program == "swa-avg"
        ended = run(demo_folder, *arguments)
        assert ended.returncode == 0, (line, ended.stderr)


if __name__ == "__main__":
    for generated in GENERATED:
        generated.write_text(rendered(generated))
