"""The functions that choose a format: to open a checkpoint, to lay out or to patch an output.

The format of an input is detected from its content, never from its suffix.
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
    archives,
    bundles,
    dcp,
    dcp_layout,
    safetensors,
    sharded,
    sharded_layout,
    single,
    torch_zip,
    zip_directory,
)
from swa_avg.formats.checkpoint import (
    MOST_PROVENANCE_BYTES,
    PROVENANCE,
    Checkpoint,
    Components,
    Headers,
    Layout,
    OutputStateDict,
    Splice,
)
from swa_avg.formats.components import ROOT
from swa_avg.storage import InputFile, path_of
from swa_avg.tensors import Record

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")


class Form(Enum):
    """The format of an output."""

    TORCH = "torch zip"
    SAFETENSORS = "safetensors"
    FOLDER = "Hugging Face folder"
    DCP = "torch.distributed.checkpoint folder"
    COPY = "copy of the last checkpoint with other weights"


def open_checkpoint(
    path: str | os.PathLike[str], headers: Headers | None = None, own: bool = False
) -> Checkpoint:
    """Read the headers of a checkpoint; its tensors stay on disk, and none of its code runs.

    Args:
        path: A torch file (`.pt`, `.pth`, `.ckpt`, `.bin`), a safetensors file, a `.nemo`
            archive, a Hugging Face folder, a torch.distributed.checkpoint folder, or a folder
            of DeepSpeed, Megatron-LM, SpeechBrain or LitGPT.
        headers: The cache of the headers of other checkpoints.
        own: Whether no other process writes to the file, which this process has written.

    Returns:
        The checkpoint with open files. Close it when done.

    Raises:
        FileError: The checkpoint cannot be opened.
        FormatError: The path is not a checkpoint, or the checkpoint is damaged.
    """
    path = path_of(path)
    headers = headers or Headers()
    if not path.is_dir():
        return archives.open_file(path, headers, own)
    if sharded.is_checkpoint(path):
        return _with_provenance(_of_one_time(sharded.read(path, headers)))
    if bundles.is_folder(path):
        return _with_provenance(_of_one_time(bundles.read(path, headers)))
    if dcp.is_checkpoint(path):
        return _with_provenance(_of_one_time(dcp.read(path)))
    raise FormatError(
        "is a folder without a checkpoint of its own",
        file=path,
        expected="model.safetensors, pytorch_model.bin, an index of shards or .metadata in it",
    )


def _of_one_time(folder: Checkpoint) -> Checkpoint:
    """Return a folder after checking that none of its files was replaced during opening.

    If a file is replaced later, the opened one is read. A file that is modified in place
    is detected at the end of the run.
    """
    try:
        for file in folder.files:
            file.check_in_place()
    except BaseException:
        folder.close()
        raise
    return folder


def _with_provenance(folder: Checkpoint) -> Checkpoint:
    """Return a folder with its provenance, if it has a provenance file."""
    path = folder.path / PROVENANCE
    if not path.exists():
        return folder
    try:
        file = InputFile(path)
    except BaseException:
        folder.close()
        raise
    data = file.read(0, min(file.size, MOST_PROVENANCE_BYTES))
    file.close()
    # The provenance of the folder describes all its files; a record in one of them is older.
    text = data.decode("ascii", "replace")
    return replace(folder, provenance=text, provenance_record=None)


def is_checkpoint(path: Path) -> bool:
    """Return whether a path looks like a checkpoint, either a file or a folder."""
    if path.is_dir():
        kinds = (sharded.is_checkpoint, bundles.is_folder, dcp.is_checkpoint)
        return any(is_of_kind(path) for is_of_kind in kinds)
    return single.is_checkpoint(path) or archives.is_checkpoint(path)


def form_of(path: Path, like: Checkpoint, kept: bool = False) -> Form:
    """Return the format of an output: by its suffix, otherwise the format of the inputs.

    Args:
        path: The output.
        like: One of the inputs.
        kept: Whether the output is to be a copy of `like` with other weights.
    """
    # The folders that Lightning writes with FSDP and DeepSpeed end in .ckpt.
    if kept and path.suffix and path.suffix == like.path.suffix and like.path.is_dir():
        return Form.COPY
    if path.suffix.lower() == ".safetensors":
        return Form.SAFETENSORS
    if path.suffix.lower() in _TORCH_SUFFIXES:
        return Form.TORCH
    is_folder = like.path.is_dir()
    if like.is_bundle and (is_folder or path.suffix in ("", ".nemo")):
        return Form.COPY
    if is_folder:
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
        form: The format.
        state_dict: The state_dict to write.
        like: The input from which the small files of a folder are copied.
        where: The location of the state_dict in the input: the dotted path, which a
            distributed checkpoint keeps, or the components.
        shard_bytes: The maximum size of one file of a folder; None means 5 GB.
    """
    if form is Form.FOLDER:
        parts = where.split(" + ") if isinstance(like.tree, Components) else (ROOT,)
        return sharded_layout.layout(state_dict, like.path, parts, shard_bytes)
    if form is Form.DCP:
        return dcp_layout.layout(state_dict, where)
    if form is Form.SAFETENSORS:
        return safetensors.layout(state_dict)
    return torch_zip.layout(state_dict)


def patch(
    checkpoint: Checkpoint, contents: Mapping[Record, bytes], provenance: str
) -> Iterator[tuple[Path, int, bytes]]:
    """Yield the writes that replace whole records in a copy of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        contents: The new bytes of each record, of the same length as the old ones.
        provenance: The new provenance text, of the same length as the old one.

    Yields:
        A file of the checkpoint, a position in it, and the bytes to write there.
    """
    beside = checkpoint.path / PROVENANCE
    if checkpoint.provenance_record:
        contents = {**contents, checkpoint.provenance_record: provenance.encode()}
    elif provenance and checkpoint.path.is_dir() and beside.exists():
        yield beside, 0, provenance.encode()
    elif provenance:
        (file,) = checkpoint.files
        with suppress(ValueError):  # another program removed the padding of the provenance
            yield file.path, 0, safetensors.restated(file, provenance)
    places = {file: checksum_places(file) for file in {record.file for record in contents}}
    for record, data in contents.items():
        path, start = record.file.path, record.file.start
        yield path, start + record.offset, data
        for place in places[record.file].get(record.offset, ()):
            yield path, start + place, struct.pack("<I", crc32(data))


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return the changes that add a provenance text to a file.

    The result is empty for files from before torch 1.6, whose format has no place for it.

    Args:
        file: A single file without provenance.
        provenance: The provenance text.
    """
    start = file.read(0, min(9, file.size))
    if start.startswith(zip_directory.MAGIC):
        return torch_zip.with_provenance(file, provenance)
    if start[8:9] == b"{":
        return safetensors.with_provenance(file, provenance)
    return archives.with_provenance(file, provenance)


def checksum_places(file: InputFile) -> Mapping[int, tuple[int, ...]]:
    """Map the position of each record in a file to the positions of its CRC-32, if it has one."""
    if file.size < 4 or file.read(0, 4) != zip_directory.MAGIC:
        return {}
    return torch_zip.checksum_places(file)
