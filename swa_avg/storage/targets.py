"""Checks of an output path: whether it can be written, and what must not be replaced.

This module writes nothing. `output.py` repeats the checks at the commit.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from tempfile import gettempdir

from swa_avg.errors import OutputError, counted, in_bytes, listed
from swa_avg.storage.files import InputFile
from swa_avg.storage.partial import write_error
from swa_avg.storage.remote import is_remote

# Names of weight files. Hugging Face: with or without shards, the number of another model, or
# a variant. torch.distributed.checkpoint: one file for each rank and `.metadata`.
_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(_\d+)?(-\d+-of-\d+)?(\.\w+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
    r"|__\d+_\d+\.distcp|\.metadata"
)
_STEMS = (
    "model",
    "pytorch_model",
    "diffusion_pytorch_model",
    "adapter_model",
    "open_clip_model",
    "pytorch_lora_weights",
)


def check_target(
    target: Path, inputs: Iterable[InputFile], *, force: bool, folder: bool = False
) -> None:
    """Refuse an output path that must not be written, before any tensor is read.

    Args:
        target: The path of the output.
        inputs: Files that must not be overwritten.
        force: Whether an existing output may be replaced.
        folder: Whether the output is a folder.

    Raises:
        OutputError: The path is an input, exists without `force`, or is a folder where a
            file is needed, or the reverse.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise write_error(target, error) from error
    for file in inputs:
        beneath = folder and _is_beneath(file.path, target)
        if file.identity == (found.st_dev, found.st_ino) or beneath:
            raise OutputError(
                "contains one of the inputs" if beneath else "is one of the inputs",
                file=target,
                remedy="Choose another output with -o",
            )
    fits = stat.S_ISDIR(found.st_mode) if folder else stat.S_ISREG(found.st_mode)
    if not fits:
        raise OutputError(
            "is a folder" if stat.S_ISDIR(found.st_mode) else "is not a regular file",
            file=target,
            expected=f"the name of a {'folder' if folder else 'file'} to write",
        )
    if not force:
        raise OutputError(
            "exists already",
            file=target,
            remedy="Choose another output, or replace it with --force",
        )


def check_room(outputs: Iterable[tuple[Path, int]], *, temporary: bool = False) -> None:
    """Refuse outputs that together do not fit on their disks, before any tensor is read.

    Args:
        outputs: The paths and sizes of the outputs; a URL is written to this machine first.
        temporary: Whether they are in the temporary folder and become no outputs.

    Raises:
        OutputError: A disk has less space.
    """
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for path, size in outputs:
        try:
            by_disk.setdefault(_disk(path).stat().st_dev, []).append((path, size))
        except OSError:
            continue  # a missing folder is reported when the file is opened
    for together in by_disk.values():
        first, needed = together[0][0], sum(size for _, size in together)
        free = shutil.disk_usage(_disk(first)).free
        if needed > free:
            what = counted(len(together), "temporary file" if temporary else "output")
            moved = temporary or is_remote(first)
            raise OutputError(
                f"{what} need{'s' if len(together) == 1 else ''} {in_bytes(needed)} of disk "
                f"space, but {in_bytes(free)} are free",
                file=_disk(first) if moved else first,
                remedy="Set TMPDIR to a folder on another disk"
                if moved
                else "Write to another disk with -o",
            )


def _disk(path: Path) -> Path:
    """Return the folder in which an output is written."""
    return Path(gettempdir()) if is_remote(path) else Path(os.path.realpath(path)).parent


def _is_beneath(path: Path, folder: Path) -> bool:
    """Return whether a file, or the file behind its link, is below a folder."""
    if is_remote(path):
        return False
    places = (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name))
    return any(Path(os.path.realpath(folder)) in place.parents for place in places)


def check_replaceable(target: Path, names: Iterable[str], called: Path | None = None) -> None:
    """Refuse to replace a folder that contains files other than weights.

    Files that the new folder has too may be replaced. Weights may be removed from the
    sub-folders in which the new folder has files, not from other sub-folders.

    Args:
        target: The folder, which may not exist.
        names: The files of the new folder.
        called: The path for messages, if the folder has been moved away.

    Raises:
        OutputError: A file in the folder would be lost.
    """
    if not target.is_dir():
        return
    kept = {PurePosixPath(name) for name in names}
    homes = {home for name in kept for home in name.parents}
    there = {PurePosixPath(path.relative_to(target).as_posix()) for path in target.rglob("*")}
    lost = sorted(
        name.as_posix()
        for name in there - kept - homes
        if name.parent not in homes or not _are_weights(name, kept)
    )
    if lost:
        raise OutputError(
            f"contains files that would be lost: {listed(lost)}",
            file=called or target,
            remedy="Choose another output with -o, or move the folder away first",
        )


def _are_weights(name: PurePosixPath, new: Iterable[PurePosixPath]) -> bool:
    """Return whether a file name is one of weights: a usual name, or one of the new files."""
    found = _WEIGHTS.fullmatch(name.name)
    others = (_WEIGHTS.fullmatch(other.name) for other in new)
    stems = {*_STEMS, *(other["stem"] for other in others if other)}
    return found is not None and (found["stem"] or _STEMS[0]) in stems
