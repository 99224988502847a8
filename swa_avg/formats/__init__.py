"""Checkpoint formats: each file is one, with its reader and its writer.

`open_checkpoint` tells them apart by content, never by suffix.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from swa_avg.errors import FileError, FormatError
from swa_avg.files import InputFile
from swa_avg.formats import safetensors, torch_legacy, torch_zip
from swa_avg.formats.checkpoint import Checkpoint, Layout, OutputStateDict
from swa_avg.tensors import Record

__all__ = ["Checkpoint", "Layout", "OutputStateDict", "layout_for", "open_checkpoint", "patch"]

# What people name .pt by mistake: the first bytes, and what they are.
_STRANGERS = (
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"<", "HTML or XML, perhaps a failed download"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"BZh", "a bzip2 file"),
    (b"{", "JSON"),
)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint; its tensors stay on disk, and nothing in it runs.

    Args:
        path: A torch file (`.pt`, `.pth`, `.ckpt`, `.bin`) or a safetensors file.

    Returns:
        The checkpoint, its file open: close it when done.

    Raises:
        FileError: It cannot be opened.
        FormatError: It is no checkpoint, or not a sound one.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError("is a folder", file=path, expected="a checkpoint file")
    file = InputFile(path)
    try:
        return _read(file)
    except BaseException:
        file.close()
        raise


def _read(file: InputFile) -> Checkpoint:
    if file.size == 0:
        raise FormatError("is empty", file=file.path, expected="a checkpoint")
    start = file.read(0, min(512, file.size))
    if start.startswith(torch_zip.MAGIC):
        return torch_zip.read(file)
    if torch_legacy.is_legacy(start):
        return torch_legacy.read(file)
    if start[8:9] == b"{":
        return safetensors.read(file)
    looks = next((what for magic, what in _STRANGERS if start.startswith(magic)), None)
    if looks is None and start[257:262] == b"ustar":
        looks = "a tar archive, as torch wrote them before 0.1.10"
    if looks is None and start[:1] == b"\x80":
        looks = "a bare pickle"
    if looks is None and start.isascii():
        looks = "text"
    raise FormatError(
        f"looks like {looks}" if looks else "is of an unknown format",
        file=file.path,
        expected="a checkpoint written by torch.save or by safetensors",
    )


def layout_for(path: Path, state_dict: OutputStateDict) -> Layout:
    """Lay out the output in the form that its name asks for."""
    if is_safetensors(path):
        return safetensors.layout(state_dict)
    return torch_zip.layout(state_dict)


def patch(checkpoint: Checkpoint, contents: Mapping[Record, bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield what to write, and where, into a copy of a file to replace whole records of it."""
    (file,) = checkpoint.files
    if checkpoint.format == "torch zip":
        return torch_zip.patch(file, contents)
    return ((record.offset, data) for record, data in contents.items())


def is_safetensors(path: Path) -> bool:
    """Tell whether an output of this name is written as safetensors."""
    return path.suffix == ".safetensors"
