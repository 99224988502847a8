"""Fixtures of several test modules, and the profile of hypothesis."""

from __future__ import annotations

import compileall
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from injection import Commands

import swa_avg

# The tests start the command many times, also where Python writes no bytecode: compile it once.
compileall.compile_dir(Path(swa_avg.__file__).parent, quiet=2)
# Several processes run tests at once, and torch's threads would wait for each other busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No deadlines: the machines that run these tests are shared, and a slow example is not wrong.
settings.register_profile("shared machine", deadline=None, max_examples=50)
settings.load_profile("shared machine")
# A shell ignores SIGINT for what runs in its background, and nohup SIGHUP; so would the commands
# of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """What runs the command with faults put into it."""
    try:
        made = Commands(tmp_path_factory.mktemp("faults"))
    except LookupError as missing:
        pytest.skip(str(missing))
    yield made
    made.close()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel and the sdist, and in `site` what pip installs of the wheel."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the package, is not installed")

    def build(folder: Path) -> None:
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        (wheel,) = folder.glob("*.whl")
        install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
        target = ["--target", str(folder / "site"), str(wheel)]
        subprocess.run([sys.executable, *install, *target], check=True, capture_output=True)

    return made_once(tmp_path_factory, "dist", build)


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, built: Path) -> tuple[Path, str]:
    """The folder in which the built-in demo of the wheel has run, and what it printed.

    The wheel is installed alone in a folder, with nothing of this checkout.
    """

    def run(folder: Path) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "swa_avg.demo", str(folder / "a folder")],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(built / "site")},
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        (folder / "stdout").write_text(ended.stdout)

    made = made_once(tmp_path_factory, "demo", run)
    return made / "a folder", (made / "stdout").read_text()


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]
) -> Path:
    """Return a folder that one of the processes of pytest-xdist has made for all of them."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with Path(f"{place}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "is made").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            make(place)
            (place / "is made").touch()
    return place


@pytest.fixture
def demo_folder(demo_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the demo's folder."""
    return Path(shutil.copytree(demo_run[0], tmp_path / "swa-demo"))
