"""What is stored in a checkpoint: tensors as our own readers find them, records as zipfile does."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.formats.opening import open_checkpoint
from swa_avg.tensors.strided import read_tensor


def settled(path: Path) -> Path:
    """Have a file, or those of a folder, be a second old, and return it.

    Of a file that was written within the last tick of the clock the package waits for the next.
    """
    at = time.time() - 1
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            os.utime(file, (at, at))
    return path


def tensors(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(settled(path))
    try:
        state = find_state_dict(checkpoint, **options)
        return {name: read_tensor(ref) for name, ref in state.tensors.items()}
    finally:
        checkpoint.close()


def content(path: Path) -> dict[str, bytes]:
    """Return all bytes of a file, or of all files of a folder; nothing of what is not there."""
    if path.is_dir():
        inner = sorted(p for p in path.rglob("*") if p.is_file())
        return {str(p.relative_to(path)): p.read_bytes() for p in inner}
    return {"": path.read_bytes()} if path.exists() else {}


def records(path: Path) -> dict[str, bytes]:
    """Return the records of a torch zip, but for the one that says how it was made."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/swa_avg.json")]
        return {name: archive.read(name) for name in names}
