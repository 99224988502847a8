"""Checkpoint formats: each module is one, with its reader and its writer.

`open_checkpoint` tells them apart by content, never by suffix.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from swa_avg.errors import FormatError
from swa_avg.formats import dcp, safetensors, sharded, single, torch_zip
from swa_avg.formats.checkpoint import Checkpoint, Layout, OutputStateDict
from swa_avg.formats.single import open_file
from swa_avg.tensors import Record

__all__ = [
    "Checkpoint",
    "Layout",
    "OutputStateDict",
    "checksum_places",
    "is_checkpoint",
    "layout_for",
    "open_checkpoint",
    "patch",
]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint; its tensors stay on disk, and nothing in it runs.

    Args:
        path: A torch file (`.pt`, `.pth`, `.ckpt`, `.bin`), a safetensors file, or a folder
            of Hugging Face's or of torch.distributed.checkpoint.

    Returns:
        The checkpoint, its files open: close it when done.

    Raises:
        FileError: It cannot be opened.
        FormatError: It is no checkpoint, or not a sound one.
    """
    path = Path(path)
    if not path.is_dir():
        return open_file(path)
    if sharded.is_checkpoint(path):
        return sharded.read(path)
    if dcp.is_checkpoint(path):
        return dcp.read(path)
    raise FormatError(
        "is a folder without a checkpoint of its own",
        file=path,
        expected="model.safetensors, pytorch_model.bin, an index of shards or .metadata in it",
    )


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path looks like a checkpoint, a folder that is one included."""
    if path.is_dir():
        return sharded.is_checkpoint(path) or dcp.is_checkpoint(path)
    return single.is_checkpoint(path)


def layout_for(path: Path, state_dict: OutputStateDict) -> Layout:
    """Lay out the output in the form that its name asks for."""
    if is_safetensors(path):
        return safetensors.layout(state_dict)
    return torch_zip.layout(state_dict)


def patch(checkpoint: Checkpoint, contents: Mapping[Record, bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield what to write, and where, into a copy of a file to replace whole records of it."""
    places = checksum_places(checkpoint)
    for record, data in contents.items():
        yield record.offset, data
        for place in places.get(record.offset, ()):
            yield place, struct.pack("<I", crc32(data))


def checksum_places(checkpoint: Checkpoint) -> Mapping[int, tuple[int, ...]]:
    """Return, for the place of each record in a file, the places of its CRC-32."""
    (file,) = checkpoint.files
    return torch_zip.checksum_places(file) if checkpoint.format == "torch zip" else {}


def is_safetensors(path: Path) -> bool:
    """Tell whether an output of this name is written as safetensors."""
    return path.suffix == ".safetensors"
