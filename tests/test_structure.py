"""The rooms: who may import whom, who may print, and what is not needed to begin."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import swa_avg

PACKAGE = Path(swa_avg.__file__).parent
# From the ground up: a room imports only those before it.
ROOMS = (
    *("errors", "ahead", "remote", "fetching", "files", "tensors"),
    *(
        "formats.checkpoint",
        "formats.pickled",
        "formats.rebuilding",
        "formats.pickles",
        "formats.pickler",
    ),
    *("formats.zip_directory", "formats.headers", "formats.torch_zip"),
    *("formats.torch_legacy", "formats.safetensors", "formats.single"),
    *("formats.json_files", "formats.weights", "formats.components", "formats.side_files"),
    *("formats.sharded", "formats.sharded_layout", "formats.dcp_layout", "formats.dcp"),
    *("formats", "modules", "tree", "recorded", "layout", "gather", "metrics"),
    *("provenance", "copies"),
    *("select", "ties", "plan"),
    *("checksums", "reader", "continuing", "wrapper", "rounding", "exact", "grams"),
    *("findings", "temporary", "placing", "writeback", "draft", "output", "upload"),
    *("distances", "report"),
    *("cutting", "lookahead", "reading", "writing", "desk", "crew", "mean"),
    *("sampling", "verification", "settings", "averaging", "planning"),
    *("batches", "estimators", "batchnorm", "userdata", "pulse", "distributed", "joint"),
    *("in_place", "recompute", "judging", "trials", "messages", "sweeping", "plot"),
    *("demo", "options", "bars", "cli", "__main__"),
)
PRINTERS = {"cli", "demo"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    del found["__init__"]
    return found


MODULES = modules()


def imported(tree: ast.Module) -> set[str]:
    """Return the rooms that a module imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            of = node.module or ""
            names |= {f"{of}.{a.name}" if f"{of}.{a.name}"[8:] in MODULES else of
                      for a in node.names}  # fmt: skip
    return {name.removeprefix("swa_avg.") for name in names if name.startswith("swa_avg.")}


def test_every_module_is_a_room() -> None:
    """A module that is not in the list has no place yet."""
    assert sorted(MODULES) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward(room: str) -> None:
    """A room knows only those below it, however late it imports them."""
    below = set(ROOMS[: ROOMS.index(room)])
    assert imported(MODULES[room]) <= below


@pytest.mark.parametrize("room", sorted(set(ROOMS) - PRINTERS))
def test_only_the_command_line_prints(room: str) -> None:
    """What there is to say is data until cli.py says it."""
    for node in ast.walk(MODULES[room]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "click.echo", "sys.stdout.write", "sys.stderr.write")


def run(code: str) -> None:
    """Run code in a fresh interpreter; it fails by raising."""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_import_is_light() -> None:
    """Neither `import swa_avg`, nor its errors or command line, bring in torch."""
    run(
        "import sys, swa_avg, swa_avg.cli, swa_avg.errors, swa_avg.plan\n"
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


def test_numpy_is_not_needed(tmp_path: Path) -> None:
    """torch works without numpy, and so do we, in both formats and all dtypes."""
    run(
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "import torch, swa_avg\n"
        f"folder = {str(tmp_path)!r}\n"
        "for n in range(3):\n"
        "    w = torch.full((3, 4), float(n))\n"
        "    state = {'a': w.t(), 'b': w.bfloat16(), 'c': w.to(torch.complex64),\n"
        "             'd': w.to(torch.float8_e5m2), 'n': torch.tensor(n)}\n"
        "    torch.save(state, f'{folder}/{n}.pt')\n"
        "swa_avg.average(f'{folder}/?.pt', f'{folder}/o.safetensors')\n"
        "swa_avg.average(f'{folder}/?.pt', f'{folder}/o.pt')\n"
        "found = torch.load(f'{folder}/o.pt', weights_only=True)\n"
        "assert [found[k].flatten()[0].item() for k in 'abcdn'] == [1, 1, 1, 1, 2]\n"
    )
