"""Entries of a folder whose names are those of checkpoints, and which are no whole checkpoints.

An interrupted save, copy or download leaves a temporary name, an empty file, or a folder
without weights. Git LFS leaves pointers. This module only finds such entries.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from swa_avg.checkpoints import names
from swa_avg.errors import SwaAvgError
from swa_avg.formats import open_checkpoint

# Names that programs use until a file or folder is complete: transformers, Lightning, Orbax, rsync,
# browsers, huggingface_hub, aria2.
_UNFINISHED = re.compile(
    r"tmp[-_.].+|.+[-_.]tmp"
    r"|.+\.(temp|partial|part|incomplete|unfinished|(cr|op)?download|filepart|aria2)"
    r"|.+\.orbax-checkpoint-tmp[-_.].+",
    re.IGNORECASE | re.DOTALL,
)
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".th", ".pth.tar", ".pt.tar")
# Other files have this suffix too, unless their names have a number of a checkpoint.
_COMMON = ".bin"


def is_unfinished(path: Path) -> bool:
    """Return whether a name marks a file or folder that was not completed."""
    return bool(_UNFINISHED.fullmatch(path.name))


def broken(others: Sequence[Path], found: Sequence[Path]) -> dict[Path, str]:
    """Return the entries whose names are those of checkpoints, each with what it is instead.

    Args:
        others: The entries of a folder that are no checkpoints.
        found: The checkpoints of the folder.
    """
    folders = {names.read(path).series for path in found if path.is_dir()}
    reasons: dict[Path, str] = {}
    for path in others:
        name = names.read(path)
        if path.is_dir():
            if name.is_placed and name.series in folders:
                reasons[path] = "a folder without weights"
        elif path.name.endswith(_SUFFIXES) or (name.is_placed and path.suffix == _COMMON):
            reasons[path] = _reason(path)
    return reasons


def _reason(path: Path) -> str:
    try:
        open_checkpoint(path).close()
    except SwaAvgError as error:
        return error.texts.found.removeprefix("is ")
    return "not a checkpoint"
