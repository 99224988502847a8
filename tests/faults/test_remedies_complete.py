"""Every remedy in the source is followed by a test, or is in a table with the reason why not.

The remedies are the texts of `remedy=...` and of wrong usage. One is followed if a case of the
tests of remedies has its first words, or a test in `ELSEWHERE` follows it. A new message needs a
case, or a line in one of the two tables.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import swa_avg

PACKAGE, TESTS = Path(swa_avg.__file__).parent, Path(__file__).parents[1]
CASES = [*TESTS.glob("*/test_remedies*.py")]
RAISED = ("click.UsageError", "click.BadParameter")
# The first words of remedies, and the test that follows them.
ELSEWHERE = {
    "Apply torch.nn.utils": "planning/test_cases_a_tensors.py::"
    "test_orthogonal_parametrization_needs_one_base",
    "Average some of": "faults/test_commit.py::test_more_checkpoints_than_open_files",
    "Copy it to this machine": "storage/test_remote.py::test_folder_in_place",
    "Decompress it": "frameworks/test_bundles.py::test_compressed_archives_and_their_remedy",
    "Download the file": "storage/test_remote.py::test_server_that_answers_something_else",
    "Give all ranks": "ranks/test_ranks.py::test_ranks_that_do_not_share_a_folder",
    "Give the folder of one": "frameworks/test_cases_clusters.py::test_several_models_of_an_engine",
    "If each is a whole model": "planning/test_folders_of_runs.py::"
    "test_parts_of_other_tensors_or_shapes_are_refused",
    "If it is no checkpoint": "faults/test_environment.py::"
    "test_folder_in_a_folder_that_cannot_be_read",
    "If the machine ran out": "kernel/test_workers.py::test_killed_worker_ends_the_command",
    "Install it with": "search/test_sweep.py::test_without_matplotlib_no_work_is_done",
    "Name the file": "faults/test_commit.py::test_output_whose_name_says_something_else",
    "Name a new folder": "test_demo.py::test_nothing_of_the_users_is_deleted",
    "Run one batch": "batchnorm/test_batchnorm.py::test_lazy_layers_work_once_they_have_a_shape",
    "Run the command again": "averaging/test_verify.py::test_disk_that_writes_another_bit",
    "Start them with torchrun": "ranks/test_ranks.py::test_ranks_without_torchrun",
    "To install the packages": "storage/test_remote.py::test_missing_package",
    "Use DataLoader": "batchnorm/test_cases_d.py::"
    "test_d_stream_of_batches_is_refused_and_both_remedies_work",
    "Use the population": "ranks/test_ranks.py::test_torch_estimator_on_ranks",
    "Wait until the run": "storage/test_changing.py::test_input_that_changes_in_the_middle",
    "Write the output to": "storage/test_remote.py::test_web_refuses",
    "Write it to this machine": "storage/test_remote.py::test_folders_are_no_output",
    "Write to a file system": "ranks/test_ranks.py::test_ranks_that_do_not_share_a_folder",
}  # fmt: skip
CAUSE = "says what is wrong; there is nothing to type"
NOT_FOLLOWED = {
    "Check that its machine": "no machine is lost here",
    "A metric can be compared": CAUSE,
    "A power failure may": CAUSE,
    "It cannot be averaged": CAUSE,
    "It has no named tensors": CAUSE,
    "Something was appended": CAUSE,
    "The file ": CAUSE,
    "The limit protects": CAUSE,
    "The record is damaged": CAUSE,
    "The shards are from": CAUSE,
    "There is no folder": CAUSE,
    "is not a valid integer": CAUSE,
}
Scope = dict[str, list[ast.expr]]


def scope(tree: ast.Module) -> Scope:
    """Return what is assigned to each name of a module, and what each function returns."""
    found: Scope = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
            found.setdefault(node.name, []).extend(one for one in returned if one)
    return found


def texts(node: ast.AST, named: Scope, depth: int = 4) -> Iterator[str]:
    """Yield the literal parts of a text, of its alternatives, and of the names in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.strip(" .,;:")
    elif isinstance(node, ast.Name) and depth:
        for value in named.get(node.id, ()):
            yield from texts(value, named, depth - 1)
    elif not isinstance(node, ast.Compare):
        for child in ast.iter_child_nodes(node):
            yield from texts(child, named, depth)


def remedies() -> set[str]:
    """Return the parts of remedies that are instructions: those that begin a sentence."""
    found: set[str] = set()
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    returned = returns(trees)
    for tree in trees:
        named = imports(tree, returned) | scope(tree)
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                given = [one.value for one in call.keywords if one.arg == "remedy"]
                parts = [part for value in given for part in texts(value, named)]
                found.update(part for part in parts if re.match(r"[A-Z][a-z]* \w", part))
                if ast.unparse(call.func) in RAISED:
                    parts = [part for value in call.args for part in texts(value, {})]
                    found.update(part for part in parts if part.count(" ") > 1)
    return found


def returns(trees: list[ast.Module]) -> Scope:
    """Return what each function of the package returns, by its name."""
    found: Scope = {}
    for tree in trees:
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name, values in scope(tree).items():
            if name in names:
                found.setdefault(name, []).extend(values)
    return found


def imports(tree: ast.Module, returned: Scope) -> Scope:
    """Return what the functions return that a module imports from the package."""
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("swa_avg")
        for alias in node.names
    }
    return {name: returned[name] for name in names if name in returned}


def plain(text: str) -> str:
    """Return a text, or the pattern of it, without what only patterns have."""
    return re.sub(r"[\\()]", "", text)


def is_in(remedy: str, text: str) -> bool:
    """Return whether a text has the first or the last words of a remedy."""
    return remedy[:24] in text or remedy[-24:] in text


def test_every_remedy_is_followed() -> None:
    """By a case, by a test elsewhere, or not, for a reason; no table has a line too many."""
    constants = [
        plain(node.value)
        for path in CASES
        if path != Path(__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    found = remedies()
    assert len(found) > 100
    rest = {one for one in found if not any(is_in(plain(one), text) for text in constants)}
    tables = (*ELSEWHERE, *NOT_FOLLOWED)
    lacking = sorted(one for one in rest if not one.startswith(tables))
    assert not lacking, "\n".join(lacking)
    assert not {start for start in tables if not any(one.startswith(start) for one in rest)}
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), place
