"""Checkpoint formats: each module is one, with its reader and its writer.

`open_checkpoint` tells them apart by content, never by suffix.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from swa_avg.errors import FormatError
from swa_avg.formats import (
    dcp,
    dcp_layout,
    safetensors,
    sharded,
    single,
    torch_zip,
    zip_directory,
)
from swa_avg.formats.checkpoint import (
    MOST_PROVENANCE_BYTES,
    PROVENANCE,
    Checkpoint,
    Layout,
    OutputStateDict,
    Splice,
)
from swa_avg.formats.headers import Headers
from swa_avg.formats.single import open_file
from swa_avg.storage import InputFile, path_of
from swa_avg.tensors import Record

__all__ = [
    "PROVENANCE",
    "Checkpoint",
    "Form",
    "Headers",
    "Layout",
    "OutputStateDict",
    "Splice",
    "checksum_places",
    "form_of",
    "is_checkpoint",
    "layout_for",
    "open_checkpoint",
    "patch",
    "with_provenance",
]


_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")


class Form(Enum):
    """A form of the output."""

    TORCH = "torch zip"
    SAFETENSORS = "safetensors"
    FOLDER = "Hugging Face folder"
    DCP = "torch.distributed.checkpoint folder"


def open_checkpoint(path: str | os.PathLike[str], headers: Headers | None = None) -> Checkpoint:
    """Read the headers of a checkpoint; its tensors stay on disk, and nothing in it runs.

    Args:
        path: A torch file (`.pt`, `.pth`, `.ckpt`, `.bin`), a safetensors file, or a folder
            of Hugging Face's or of torch.distributed.checkpoint.
        headers: What was read of other checkpoints, where they have most of it in common.

    Returns:
        The checkpoint, its files open: close it when done.

    Raises:
        FileError: It cannot be opened.
        FormatError: It is no checkpoint, or not a sound one.
    """
    path = path_of(path)
    headers = headers or Headers()
    if not path.is_dir():
        return open_file(path, headers)
    if sharded.is_checkpoint(path):
        return _with_provenance(_of_one_time(sharded.read(path, headers)))
    if dcp.is_checkpoint(path):
        return _with_provenance(_of_one_time(dcp.read(path)))
    raise FormatError(
        "is a folder without a checkpoint of its own",
        file=path,
        expected="model.safetensors, pytorch_model.bin, an index of shards or .metadata in it",
    )


def _of_one_time(folder: Checkpoint) -> Checkpoint:
    """Return a folder whose files were all there at once: none was replaced meanwhile.

    Of one that is replaced later, what was opened is read; of one that is written to,
    that is found in the end.
    """
    try:
        for file in folder.files:
            file.check_in_place()
    except BaseException:
        folder.close()
        raise
    return folder


def _with_provenance(folder: Checkpoint) -> Checkpoint:
    """Return a folder with what it says of how it was made, if it does."""
    path = folder.path / PROVENANCE
    if not path.exists():
        return folder
    try:
        file = InputFile(path)
    except BaseException:
        folder.close()
        raise
    said = file.read(0, min(file.size, MOST_PROVENANCE_BYTES))
    file.close()
    return replace(folder, provenance=said.decode("ascii", "replace"))


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path looks like a checkpoint, a folder that is one included."""
    if path.is_dir():
        return sharded.is_checkpoint(path) or dcp.is_checkpoint(path)
    return single.is_checkpoint(path)


def form_of(path: Path, like: Checkpoint) -> Form:
    """Return the form in which an output is written: as its name says, else as the inputs are.

    Args:
        path: The output.
        like: One of the inputs.
    """
    if path.suffix.lower() == ".safetensors":
        return Form.SAFETENSORS
    if path.suffix.lower() in _TORCH_SUFFIXES:
        return Form.TORCH
    if like.path.is_dir():
        return Form.FOLDER if sharded.is_checkpoint(like.path) else Form.DCP
    if not path.suffix and like.format == "safetensors":
        return Form.SAFETENSORS
    return Form.TORCH


def layout_for(
    form: Form,
    state_dict: OutputStateDict,
    like: Checkpoint,
    where: str = "",
    shard_bytes: int | None = None,
) -> Layout:
    """Lay out the output.

    Args:
        form: Its form.
        state_dict: What is written.
        like: The input that a folder's small files are taken from.
        where: The dotted path to the state_dict in it, which a distributed checkpoint keeps.
        shard_bytes: The most bytes in one file of a folder; None takes 5 GB.
    """
    if form is Form.FOLDER:
        return sharded.layout(state_dict, like.path, shard_bytes or sharded.SHARD_BYTES)
    if form is Form.DCP:
        return dcp_layout.layout(state_dict, where)
    if form is Form.SAFETENSORS:
        return safetensors.layout(state_dict)
    return torch_zip.layout(state_dict)


def patch(
    checkpoint: Checkpoint, contents: Mapping[Record, bytes], provenance: str
) -> Iterator[tuple[int, bytes]]:
    """Yield what to write into a copy of a checkpoint to replace whole records of it.

    Args:
        checkpoint: A checkpoint of one file.
        contents: The bytes of records, as many as they have.
        provenance: What it is to say of how it was made, as long as what it says now.

    Yields:
        A place in the file, and the bytes that go there.
    """
    (file,) = checkpoint.files
    if checkpoint.provenance_record:
        contents = {**contents, checkpoint.provenance_record: provenance.encode()}
    elif provenance:
        with suppress(ValueError):  # somebody has taken out the room that we left for it
            yield 0, safetensors.restated(file, provenance)
    places = checksum_places(file)
    for record, data in contents.items():
        yield record.offset, data
        for place in places.get(record.offset, ()):
            yield place, struct.pack("<I", crc32(data))


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return what to change in a file for it to say how it was made.

    None where its format has no room for that: files from before torch 1.6.

    Args:
        file: A single file that says nothing of the kind yet.
        provenance: What it is to say.
    """
    start = file.read(0, min(9, file.size))
    if start.startswith(zip_directory.MAGIC):
        return torch_zip.with_provenance(file, provenance)
    if start[8:9] == b"{":
        return safetensors.with_provenance(file, provenance)
    return ()


def checksum_places(file: InputFile) -> Mapping[int, tuple[int, ...]]:
    """Return, for the place of each record in a file, the places of its CRC-32, if it has any."""
    if file.size < 4 or file.read(0, 4) != zip_directory.MAGIC:
        return {}
    return torch_zip.checksum_places(file)
