"""Entries of a folder that do not belong to its run, by their names or their content.

An interrupted save, copy or download leaves a temporary name, an empty file, or a folder
without weights. Git LFS leaves pointers. People and programs keep backups beside the
originals, and the weights that a run began with. This module only finds such entries.
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
    r"|.+\.tmp\.(pt|pth|ckpt|bin|safetensors)"
    r"|.+\.orbax-checkpoint-tmp[-_.].+",
    re.IGNORECASE | re.DOTALL,
)
# Names of backups: epoch_3.pt.bak, epoch_3.pt~, and epoch_3 (1).pt, epoch_3 - Copy.pt.
_BACKUP = re.compile(
    r"(?:copy of |kopie von )(?P<copied>.+)"
    r"|(?P<of>.+?)(?:\.(?:bak|backup|old|orig|prev)[0-9]*|~)"
    r"|(?P<stem>.+?)(?: ?\([0-9]+\)"
    r"|[ _.-]+(?:copy|copie|copia|kopie|backup|bak|old|orig)(?: ?[0-9]+)?)"
    r"(?P<suffix>(?:\.[a-z]+)*)",
    re.IGNORECASE | re.DOTALL,
)
# Lightning's learning rate finder saves the weights before it trains with them.
_OF_FINDER = re.compile(r"\.?(?:lr_?find|scale_batch_size).*", re.IGNORECASE | re.DOTALL)
_BEGINNING = frozenset({"init", "initial", "initialization", "initialisation", "untrained"})
_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors", ".th", ".pth.tar", ".pt.tar")
# Other files have this suffix too, unless their names have a number of a checkpoint.
_COMMON = ".bin"


def is_unfinished(path: Path) -> bool:
    """Return whether a name marks a file or folder that was not completed."""
    return bool(_UNFINISHED.fullmatch(path.name))


def backups(found: Sequence[Path]) -> list[Path]:
    """Return the checkpoints of a folder whose names mark copies of others in it.

    Args:
        found: The checkpoints of the folder.
    """
    there = {path.name for path in found}
    matched = [(path, _BACKUP.fullmatch(path.name)) for path in found]
    return [
        path
        for path, match in matched
        if match and (match["copied"] or match["of"] or match["stem"] + match["suffix"]) in there
    ]


def beginnings(found: Sequence[Path]) -> list[Path]:
    """Return the checkpoints of a folder whose names mark the weights before the training.

    Args:
        found: The checkpoints of the folder; without one that has a number, all are kept.
    """
    if not any(_OF_FINDER.fullmatch(path.name) or _is_of_beginning(path.name) for path in found):
        return []  # names need not be parsed
    read = [names.read(path) for path in found]
    if not any(name.is_placed and not _OF_FINDER.fullmatch(name.path.name) for name in read):
        return []
    return [
        name.path
        for name in read
        if _OF_FINDER.fullmatch(name.path.name)
        or (not name.is_placed and _is_of_beginning(name.text))
    ]


def _is_of_beginning(text: str) -> bool:
    return not _BEGINNING.isdisjoint(re.split(r"[^a-z]+", text.lower()))


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
