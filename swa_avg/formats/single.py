"""Checkpoints that are a single file: the format is detected from the content, not the suffix."""

from __future__ import annotations

from pathlib import Path

from swa_avg.errors import FormatError
from swa_avg.formats import safetensors, torch_legacy, torch_zip, zip_directory
from swa_avg.formats.checkpoint import Checkpoint, Headers
from swa_avg.pickles import Budget
from swa_avg.storage import InputFile

START = 512  # bytes by which the formats are told apart
# Other files that are given as checkpoints by mistake: their first bytes and their type.
_STRANGERS = (
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"<", "HTML or XML, perhaps a failed download"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"BZh", "a bzip2 file"),
    (b"{", "JSON"),
)


def open_file(path: Path, headers: Headers, budget: Budget | None = None) -> Checkpoint:
    """Open a file and read its headers.

    Args:
        path: The file.
        headers: The cache of headers.
        budget: The budget of the checkpoint that the file is a part of, if any.

    Raises:
        FileError: The file cannot be opened.
        FormatError: The file is not a checkpoint, or is damaged.
    """
    file = InputFile(path)
    try:
        return read(file, headers, budget or Budget())
    except BaseException:
        file.close()
        raise


def is_checkpoint(path: Path) -> bool:
    """Return whether a file begins like a checkpoint; every zip archive does."""
    file = InputFile(path)
    try:
        start = file.read(0, min(START, file.size))
        header = int.from_bytes(start[:8], "little")
        safe = start[8:9] == b"{" and header <= file.size - 8
        return safe or start.startswith(zip_directory.MAGIC) or torch_legacy.is_legacy(start)
    finally:
        file.close()


def read(
    file: InputFile, headers: Headers, budget: Budget, start: bytes | None = None
) -> Checkpoint:
    """Read the headers of a file.

    Args:
        file: The file.
        headers: The cache of headers.
        budget: Limits what is built from the headers.
        start: The first START bytes of the file, if they have been read.

    Raises:
        FormatError: The file is not a checkpoint, or is damaged.
    """
    if file.size == 0:
        raise FormatError("is empty", file=file.path, expected="a checkpoint")
    start = file.read(0, min(START, file.size)) if start is None else start
    if start.startswith(zip_directory.MAGIC):
        return torch_zip.read(file, headers, budget)
    # torch reads a file that is both as a tar archive, which can hold other tensors.
    if torch_legacy.is_legacy(start) and not _is_tar(start):
        return torch_legacy.read(file, budget)
    if start[8:9] == b"{":
        return safetensors.read(file, headers, budget)
    looks = _looks_like(start)
    raise FormatError(
        f"looks like {looks}" if looks else "is of an unknown format",
        file=file.path,
        expected="a checkpoint written by torch.save or by safetensors",
    )


def _looks_like(start: bytes) -> str:
    """Return what a file that is no checkpoint looks like, by its first bytes; empty if unknown."""
    for magic, what in _STRANGERS:
        if start.startswith(magic):
            return what
    if _is_tar(start):
        return "a tar archive, as torch wrote them before 0.1.10"
    if start[:1] == b"\x80":
        return "a bare pickle"
    return "text" if start.isascii() and 0 not in start else ""


def _is_tar(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a tar archive, old or new."""
    import tarfile

    if start[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
