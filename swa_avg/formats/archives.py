"""`.nemo` archives: tar files with the weights and the small files of a NeMo model.

The weights of an archive that is not compressed are a range of its bytes. An output of the same
kind is a copy of the last archive with other weights, so this module only reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from swa_avg.errors import FormatError, listed
from swa_avg.formats import single
from swa_avg.formats.checkpoint import (
    MOST_PROVENANCE_BYTES,
    PROVENANCE,
    Checkpoint,
    Headers,
    Splice,
)
from swa_avg.pickles import Budget
from swa_avg.storage import InputFile, Section
from swa_avg.tensors import Record

# nemo/core/connectors/save_restore_connector.py: model_weights_ckpt; a folder if distributed.
_NEMO_WEIGHTS = "model_weights.ckpt"
_NEMO_FOLDER = "model_weights/"
_MOST_MEMBERS = 10_000
_MOST_HEADER_BYTES = 1 << 20
_BLOCK = 512
_GZIP = b"\x1f\x8b"


def is_checkpoint(path: Path) -> bool:
    """Return whether a file is a `.nemo` archive, or one that is compressed."""
    file = InputFile(path)
    try:
        if file.read(0, min(2, file.size)) == _GZIP:
            return path.suffix == ".nemo"
        return _is_tar(file) and any(map(_is_weights, _read_members(file).sections))
    finally:
        file.close()


def open_file(path: Path, headers: Headers, *, own: bool = False) -> Checkpoint:
    """Open a file of any format, also a `.nemo` archive, and read its headers.

    Args:
        path: The file.
        headers: The cache of headers.
        own: Whether no other process writes to the file, which this process has written.

    Raises:
        FileError: The file cannot be opened.
        FormatError: The file is not a checkpoint, is damaged, or is compressed.
    """
    file = InputFile(path, own=own)
    try:
        start = file.read(0, min(single.START, file.size))
        if start.startswith(_GZIP) and path.suffix == ".nemo":
            raise FormatError(
                "is a compressed archive, which cannot be read by range",
                file=path,
                remedy=f"Decompress it: gzip -dc {quote(str(path))} > uncompressed.nemo",
            )
        if _has_tar_magic(start):
            return _read_archive(file, headers)
        return single.read(file, headers, Budget(), start)
    except BaseException:
        file.close()
        raise


def _read_archive(file: InputFile, headers: Headers) -> Checkpoint:
    members = _read_members(file).sections
    weights = [name for name in members if _is_weights(name)]
    if not weights:
        return single.read(file, headers, Budget())  # refused as a tar archive
    if weights != [_NEMO_WEIGHTS]:
        distributed = any(name.startswith(_NEMO_FOLDER) for name in weights)
        name = file.path.stem
        raise FormatError(
            f"has its weights in several files ({listed(weights)})",
            file=file.path,
            expected=_NEMO_WEIGHTS,
            remedy=f"Unpack each into a folder and average {_NEMO_FOLDER} of these: "
            f"mkdir {quote(name)} && tar -xf {quote(str(file.path))} -C {quote(name)}"
            if distributed
            else "Merge them with NeMo's megatron_change_num_partitions.py",
        )
    inner = single.read(members[_NEMO_WEIGHTS], headers, Budget())
    record, text = inner.provenance_record, inner.provenance
    if PROVENANCE in members:
        section = members[PROVENANCE]
        text = section.read(0, min(section.size, MOST_PROVENANCE_BYTES)).decode("ascii", "replace")
        record = Record(section, 0, section.size)
    return replace(
        inner,
        path=file.path,
        format="NeMo archive",
        files=(file,),
        without=(),
        provenance=text,
        provenance_record=record,
    )


def _is_weights(name: str) -> bool:
    return name.rpartition("/")[2] == _NEMO_WEIGHTS or name.startswith(_NEMO_FOLDER)


def _is_tar(file: InputFile) -> bool:
    return _has_tar_magic(file.read(0, min(single.START, file.size)))


def _has_tar_magic(start: bytes) -> bool:
    return start[257:262] == b"ustar"


class _Headers:
    """The headers of a tar archive, as a file for `tarfile`, which limits what is read at once."""

    def __init__(self, file: InputFile) -> None:
        self._file, self._place = file, 0

    def read(self, length: int) -> bytes:
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes")
        data = self._file.read(self._place, max(0, min(length, self._file.size - self._place)))
        self._place += len(data)
        return data

    def seek(self, place: int) -> None:
        self._place = min(max(place, 0), self._file.size)

    def tell(self) -> int:
        return self._place


@dataclass(frozen=True)
class _Members:
    """The regular files in a tar archive.

    Attributes:
        sections: The range of each file, by its name.
        end: The position after the last file, at which another one can be added.
    """

    sections: dict[str, Section]
    end: int


def _read_members(file: InputFile) -> _Members:
    """Read the headers of a tar archive.

    Raises:
        FormatError: The archive is damaged, or has two files of one name, or too many.
    """
    import tarfile

    found: dict[str, Section] = {}
    try:
        archive = tarfile.TarFile(fileobj=_Headers(file), mode="r")  # type: ignore[arg-type]
        for member in archive:
            # Sparse files and links have no range of their own.
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                continue
            name = member.name.removeprefix("./")
            if member.size < 0:
                raise tarfile.ReadError(f"{name} has {member.size} bytes")
            if name in found or len(found) >= _MOST_MEMBERS:
                what = f"two files with the name {name}" if name in found else "too many files"
                raise FormatError(f"is a tar archive with {what}", file=file.path)
            found[name] = Section(file, member.offset_data, member.size)
        end = archive.offset
        if end + _BLOCK > file.size or any(file.read(end, _BLOCK)):
            raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(
            f"is a damaged tar archive ({error})",
            file=file.path,
            remedy="Copy it again from its source",
        ) from error
    return _Members(found, end)


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return the change that adds a provenance text to a `.nemo` archive; empty for other files."""
    import tarfile

    if not _is_tar(file):
        return ()
    data = provenance.encode()
    header = tarfile.TarInfo(f"./{PROVENANCE}")
    header.size, header.mode = len(data), 0o644
    block = header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % _BLOCK)
    return (Splice(_read_members(file).end, 0, block),)
