"""The package as it is published: what the wheel and the sdist hold, and that the wheel works."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

import swa_avg

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the package, is not installed")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_wheel_and_sdist_hold_everything(built: Path) -> None:
    """The modules, the guide, the types and the licence; the sdist also the tests."""
    (wheel,) = built.glob("*.whl")
    (sdist,) = built.glob("*.tar.gz")
    package = ROOT / "swa_avg"
    shipped = {
        f"swa_avg/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"swa_avg/py.typed", "swa_avg/guide/python.md", "swa_avg/digits.bin.gz"} <= shipped
    info = f"swa_avg-{swa_avg.__version__}.dist-info"
    with ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = opened.read(f"{info}/METADATA").decode()
    assert {name for name in names if name.startswith("swa_avg/")} == shipped
    assert f"{info}/licenses/LICENSE" in names
    running = f"Programming Language :: Python :: {sys.version_info[0]}.{sys.version_info[1]}"
    assert running in metadata and "Author" in metadata and "Project-URL: Paper" in metadata
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert shipped | {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= inside
    assert "tests/test_package.py" in inside


def test_demo_runs_from_the_wheel(built: Path, tmp_path: Path) -> None:
    """Installed alone in a folder, with nothing of this checkout."""
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, *install, str(wheel)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import swa_avg; print(swa_avg.__file__)"]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    found = subprocess.run(where, check=True, **options)
    assert Path(found.stdout.strip()).is_relative_to(site)
    demo = subprocess.run([sys.executable, "-m", "swa_avg.demo"], **options)
    assert demo.returncode == 0, demo.stderr
    assert "swa-avg, BatchNorm recomputed" in demo.stdout
