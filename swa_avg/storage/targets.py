"""The name of an output: what may be written there, and what must not be replaced.

Nothing is written here; `output` asks again when it puts the output in its place.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from swa_avg.errors import OutputError, listed
from swa_avg.storage.files import InputFile
from swa_avg.storage.partial import refusal
from swa_avg.storage.remote import is_remote

# Files of weights in a folder: of Hugging Face, in shards or not, with the number of a further
# model, for a variant; and of a distributed one.
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
    """Refuse a target that may not be written, before anything is read.

    Args:
        target: The output.
        inputs: Files that must not be overwritten.
        force: Whether it may be replaced if it exists.
        folder: Whether it will be a folder.

    Raises:
        OutputError: It is an input, exists without `force`, or is of another kind.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise refusal(target, error) from error
    for file in inputs:
        beneath = folder and _is_beneath(file.path, target)
        if file.identity == (found.st_dev, found.st_ino) or beneath:
            raise OutputError(
                "holds one of the inputs" if beneath else "is one of the inputs",
                file=target,
                remedy="Choose another output with -o",
            )
    fits = stat.S_ISDIR(found.st_mode) if folder else stat.S_ISREG(found.st_mode)
    if not fits:
        raise OutputError(
            "is a folder" if stat.S_ISDIR(found.st_mode) else "is no regular file",
            file=target,
            expected=f"the name of a {'folder' if folder else 'file'} to write",
        )
    if not force:
        raise OutputError(
            "exists already",
            file=target,
            remedy="Choose another output, or replace it with --force",
        )


def _is_beneath(path: Path, folder: Path) -> bool:
    """Tell whether a file is in a folder, however deep, under either of its names."""
    if is_remote(path):
        return False
    places = (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent), path.name))
    return any(Path(os.path.realpath(folder)) in place.parents for place in places)


def check_replaceable(target: Path, names: Iterable[str], called: Path | None = None) -> None:
    """Refuse to replace a folder that holds more than weights and what takes its place.

    Weights may go where the new folder has files, not from other sub-folders.

    Args:
        target: The output, a folder that may exist.
        names: The files that the new folder will have.
        called: What it is called, where it has been moved away.

    Raises:
        OutputError: Something in it would be lost.
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
            f"holds what would be lost: {listed(lost)}",
            file=called or target,
            remedy="Choose another output with -o, or move it away first",
        )


def _are_weights(name: PurePosixPath, new: Iterable[PurePosixPath]) -> bool:
    """Tell whether a file holds weights, under a usual name or one that a new file has."""
    found = _WEIGHTS.fullmatch(name.name)
    others = (_WEIGHTS.fullmatch(other.name) for other in new)
    stems = {*_STEMS, *(other["stem"] for other in others if other)}
    return found is not None and (found["stem"] or _STEMS[0]) in stems
