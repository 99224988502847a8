"""Checks of an output path: whether it can be written, and what must not be replaced.

This module writes nothing. `output.py` repeats the checks at the commit.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from tempfile import gettempdir
from typing import cast

from swa_avg.errors import FileError, OutputError, counted, in_bytes, listed
from swa_avg.storage.files import InputFile
from swa_avg.storage.partial import write_error
from swa_avg.storage.remote import RemotePath, is_remote, reason

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_READ_ONLY = ("http", "https")
_IS = {"file": "is a file", "folder": "is a folder", "other": "is not a regular file"}

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


@dataclass(frozen=True)
class _Found:
    """What is at the path of an output.

    Attributes:
        identity: The identity that an `InputFile` of it has.
        kind: `file`, `folder` or `other`.
    """

    identity: object
    kind: str


def check_target(
    target: Path, inputs: Iterable[InputFile], *, force: bool, folder: bool = False
) -> None:
    """Refuse an output path or URL that must not be written, before any tensor is read.

    Args:
        target: The path or URL of the output.
        inputs: Files that must not be overwritten.
        force: Whether an existing output may be replaced.
        folder: Whether the output is a folder.

    Raises:
        OutputError: The path is an input, exists without `force`, is a folder where a file
            is needed, or the reverse, or is a URL that cannot be written.
    """
    found = _at_url(cast(RemotePath, target), folder) if is_remote(target) else _on_disk(target)
    if found is None:
        return
    for file in inputs:
        beneath = folder and _is_beneath(file.path, target)
        if file.identity == found.identity or beneath:
            raise OutputError(
                "contains one of the inputs" if beneath else "is one of the inputs",
                file=target,
                remedy="Choose another output with -o",
            )
    if found.kind != ("folder" if folder else "file"):
        inside = f"{str(target).rstrip('/')}/swa.pt"
        raise OutputError(
            _IS[found.kind],
            file=target,
            expected=f"the name of a {'folder' if folder else 'file'} to write",
            remedy=f"Name a file in it, as in -o {quote(inside)}"
            if found.kind == "folder"
            else "Choose another output with -o",
        )
    if not force:
        raise OutputError(
            "exists already",
            file=target,
            remedy="Choose another output with -o, or replace it with --force",
        )


def _on_disk(target: Path) -> _Found | None:
    """Return what is at a path of this machine."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise write_error(target, error) from error
    of_mode = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}
    kind = of_mode.get(stat.S_IFMT(found.st_mode), "other")
    return _Found((found.st_dev, found.st_ino), kind)


def _at_url(target: RemotePath, folder: bool) -> _Found | None:
    """Return what is at a URL, and refuse one that cannot be written."""
    if target.protocol in _READ_ONLY:
        raise OutputError(
            f"cannot be written: {target.protocol} URLs are read-only",
            file=target,
            remedy="Write the output to this machine, then upload it",
        )
    if folder:
        raise OutputError(
            "would be a folder, and no store can replace a folder in one step",
            file=target,
            remedy="Write it to this machine and copy it, or name a file: swa.safetensors",
        )
    try:
        found = target.info(fresh=True)
        if found is None and target.protocol in OBJECT_STORES:
            _check_bucket(target)
    except FileError as error:
        text, _, remedy = error.texts
        raise OutputError(text, file=target, remedy=remedy) from error
    if found is None:
        return None
    return _Found((target.fs, target.key), "folder" if found["type"] == "directory" else "file")


def _check_bucket(remote: RemotePath) -> None:
    """Refuse a bucket that does not exist; accept one whose existence is not readable."""
    try:
        remote.fs.info(remote.key.partition("/")[0])
    except FileNotFoundError as error:
        raise OutputError("cannot be written: there is no such bucket", file=remote) from error
    except PermissionError:
        return
    except Exception as error:
        raise OutputError(f"cannot be written: {reason(error)}", file=remote) from error


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
            by_disk.setdefault(folder_written(path).stat().st_dev, []).append((path, size))
        except OSError:
            continue  # a missing folder is reported when the file is opened
    for together in by_disk.values():
        first, needed = together[0][0], sum(size for _, size in together)
        free = shutil.disk_usage(folder_written(first)).free
        if needed > free:
            what = counted(len(together), "temporary file" if temporary else "output")
            moved = temporary or is_remote(first)
            raise OutputError(
                f"{what} need{'s' if len(together) == 1 else ''} {in_bytes(needed)} of disk "
                f"space, but {in_bytes(free)} are free",
                file=folder_written(first) if moved else first,
                remedy="Set TMPDIR to a folder on another disk"
                if moved
                else "Write to another disk with -o",
            )


def folder_written(path: Path) -> Path:
    """Return the folder in which an output is written: for a URL, the temporary folder."""
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
