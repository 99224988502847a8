"""Fixtures of several test modules, and the profile of hypothesis."""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
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
# A shell ignores SIGINT for what runs in its background, and so would the commands of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the built-in demo has run, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "a folder"
    ended = subprocess.run(
        [sys.executable, "-m", "swa_avg.demo", str(folder)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder, ended.stdout


@pytest.fixture
def demo_folder(demo_run: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the demo's folder."""
    return Path(shutil.copytree(demo_run[0], tmp_path / "swa-demo"))
