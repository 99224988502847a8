"""The package as it was at a revision, taken from git."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def package_of(revision: str, folder: Path) -> Path:
    """Write the package of a revision into a new folder, and return the folder."""
    folder.mkdir()
    command = ["git", "archive", revision, "swa_avg"]
    packed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
    return folder
