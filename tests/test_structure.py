"""The wings and their modules: who may import whom, who may print, and what is not needed to begin.

A wing imports only wings above it in the list, and of another wing only what its
`__init__.py` exports. A module imports only modules of its own wing that stand before it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import swa_avg

PACKAGE = Path(swa_avg.__file__).parent
# From the ground up.
WINGS = {
    "storage": "prefetch given request_pool remote web fetching limits disk files temporary "
    "commit writeback partial targets output upload",
    "tensors": "tensor optimizers handmade floats strided cutting checksums",
    "pickles": "budget pickled references rebuilding unpickler modules",
    "formats": "checkpoint pickler zip_end zip_directory torch_zip torch_legacy "
    "safetensors single components sharded sharded_layout dcp_layout dcp bundles archives "
    "opening",
    "checkpoints": "tree words pieces names recorded families membership frameworks places "
    "halves entries layout contents metrics provenance reader",
    "planning": "arguments copies unfinished inputs opening order naming series ties treatments "
    "agreement notes select plan start_from settings",
    "kernel": "arithmetic elements rounding compensated few_bits settling exact inner_products "
    "findings tasks page_cache reading writing buffers workers mean",
    "batchnorm": "isolation calling batches loading moments layers estimators on_device "
    "statistics settings named userdata in_place recompute",
    "averaging": "origin wrapper destination distances report pictures sampling verification "
    "computing execution prepare sharing along heartbeat torchrun joint",
    "search": "scores candidates sweeping along plot",
    "cli": "ranks streams progress messages failures options usage show beside blas torch_import "
    "along command",
}
TOP = {"__init__", "__main__", "errors", "demo", "progress", "signals"}
ORDER = list(WINGS)
MODULES = [f"{wing}.{module}" for wing, modules in WINGS.items() for module in modules.split()]
PRINTERS = {"cli.failures", "cli.show", "demo"}


def tree(module: str) -> ast.Module:
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    return ast.parse(path.read_text(encoding="utf-8"))


def exported(wing: str) -> set[str]:
    """Return the names in a wing's `__all__`."""
    for node in tree(f"{wing}.__init__").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def imported(module: str) -> list[tuple[str, str]]:
    """Return what a module imports of the package, late imports included: place and name."""
    found = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if (node.module or "").startswith("swa_avg."):
                found += [((node.module or "")[8:], alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("swa_avg.") for alias in node.names)
    return found


def test_every_module_is_listed() -> None:
    """A module that is not in the list has no place yet; a folder that is none is the guide."""
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    inner = [".".join(path.parts) for path in paths if len(path.parts) > 1]
    assert sorted(name for name in inner if not name.endswith("__init__")) == sorted(MODULES)
    assert {str(path) for path in paths if len(path.parts) == 1} == TOP
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__", "guide"}
    assert folders == set(WINGS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module: str) -> None:
    """Wings import wings above them, by what these export; modules those before them."""
    wing, _, name = module.partition(".")
    before = WINGS[wing].split()[: WINGS[wing].split().index(name)]
    for place, what in imported(module):
        of, _, inner = place.partition(".")
        if place in TOP:
            continue
        if of == wing:
            assert (inner or what) in before, f"{module} imports {place}.{what}"
        else:
            assert ORDER.index(of) < ORDER.index(wing), f"{module} imports {place}"
            assert not inner and what in exported(of), f"{of} does not export {inner or what}"


@pytest.mark.parametrize("module", sorted({*MODULES, "errors"} - PRINTERS))
def test_only_the_command_line_prints(module: str) -> None:
    """What there is to say is data until the command line says it."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "click.echo", "sys.stdout.write", "sys.stderr.write")


def test_sizes() -> None:
    """The top level and each wing fit a glance: at most 6 and 16 modules, of at most 400 lines."""
    assert len(TOP) <= 6
    assert all(len(modules.split()) <= 16 for modules in WINGS.values())
    lines = {path.name: path.read_text().count("\n") for path in PACKAGE.rglob("*.py")}
    assert max(lines.values()) <= 400, lines


def run(code: str) -> None:
    """Run code in a fresh interpreter; it fails by raising."""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_import_is_light() -> None:
    """Neither `import swa_avg`, nor its errors or command line, bring in torch."""
    run(
        "import sys, swa_avg, swa_avg.cli, swa_avg.errors, swa_avg.planning\n"
        "heavy = {'torch', 'numpy', 'safetensors', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


def test_public_names_are_there() -> None:
    """Each name in __all__ can be had, and no other."""
    for name in swa_avg.__all__:
        assert getattr(swa_avg, name).__name__ == name
    assert set(swa_avg.__all__) <= set(dir(swa_avg))
    with pytest.raises(AttributeError, match="no_such_name"):
        swa_avg.no_such_name  # noqa: B018
