"""Torch's zip format (since 1.6): `.pt`, `.pth`, `.ckpt`, `.bin`.

One stored record `data.pkl` is the pickle, each `data/KEY` a storage. The
standard library reads the directory of the zip; what torch takes on trust
(places, overlaps, checksums) is checked here. TorchScript archives look the
same from outside and are refused.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, cast

from zlib_ng.zlib_ng import crc32

from swa_avg.errors import FormatError
from swa_avg.files import InputFile
from swa_avg.formats import pickler, pickles
from swa_avg.formats.checkpoint import (
    Checkpoint,
    OutputStateDict,
    OutputStorage,
    OutputTensor,
)
from swa_avg.tensors import Record, contiguous_stride

MAGIC = b"PK\x03\x04"
_ALIGNMENT = 64
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_DOS_DATE = 0x21  # 1980-01-01, so that equal inputs give equal bytes
_UTF8 = 0x800
_DESCRIPTOR = 0x8  # the checksum stands behind the data
_FULL = 0xFFFFFFFF


def read(file: InputFile) -> Checkpoint:
    """Read the headers of a torch zip.

    Raises:
        FormatError: The archive or its pickle is not sound, or is TorchScript.
    """
    records = _records(file)
    root, data = _root(file, records)
    if f"{root}constants.pkl" in records:
        raise FormatError(
            "is a TorchScript archive",
            file=file.path,
            expected="a checkpoint of tensors",
            remedy="Save model.state_dict() with torch.save",
        )
    order = _byteorder(file, records.get(f"{root}byteorder"))
    if order != "little":
        raise FormatError(f"has byte order {order}", file=file.path, expected="little")
    unchecked = all(record.crc32 is None for record in records.values() if record.length)

    def storage(ref: pickles.Storage) -> Record:
        record = records.get(f"{root}data/{ref.key}")
        if record is None:
            raise FormatError(f"has no record for storage {ref.key}", file=file.path)
        return record

    try:
        tree = pickles.load(data, storage)
    except FormatError as error:
        error.file = error.file or str(file.path)
        raise
    notes = ("carries no checksums: damage to it cannot be found",) if unchecked else ()
    return Checkpoint(file.path, "torch zip", tree, (file,), notes=notes)


def _records(file: InputFile) -> dict[str, Record]:
    """Return where each record of the archive is, having checked that none overlap."""
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Seekable(file))) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise FormatError(
            f"is not a whole zip archive ({error})",
            file=file.path,
            expected="a checkpoint written by torch.save",
            remedy="The file is cut short or damaged",
        ) from error
    records: dict[str, Record] = {}
    spans: list[tuple[int, int]] = []
    for entry in entries:
        start = _data_offset(file, entry)
        if entry.filename in records:
            raise FormatError(f"holds two records named {entry.filename}", file=file.path)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FormatError(
                f"holds a compressed record, {entry.filename}",
                file=file.path,
                expected="stored records, as torch writes them",
                remedy="Save it again with torch.save",
            )
        # A checksum of 0 over data means that torch was told not to compute any.
        checksum = entry.CRC if entry.CRC or not entry.file_size else None
        records[entry.filename] = Record(file, start, entry.file_size, checksum)
        spans.append((entry.header_offset, start + entry.file_size))
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise FormatError("holds records that overlap", file=file.path)
    if spans and spans[-1][1] > file.size:
        raise FormatError("holds a record that ends outside the file", file=file.path)
    return records


def _data_offset(file: InputFile, entry: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin, from its local header."""
    header = file.read(entry.header_offset, _LOCAL.size)
    magic, _, flags, _, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(header)
    name = file.read(entry.header_offset + _LOCAL.size, name_length)
    expected = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    if magic != MAGIC or flags & 1 or name != expected:
        raise FormatError(
            f"has another local header than its directory says, at {entry.filename}",
            file=file.path,
            remedy="The file is damaged",
        )
    return int(entry.header_offset + _LOCAL.size + name_length + extra_length)


def _root(file: InputFile, records: Mapping[str, Record]) -> tuple[str, bytes]:
    """Return the folder that all records are in, and the pickle."""
    pickled = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    roots = {name.partition("/")[0] for name in records}
    if len(pickled) != 1 or len(roots) != 1 or pickled[0].count("/") != 1:
        raise FormatError(
            "is a zip archive without a torch pickle",
            file=file.path,
            expected="a checkpoint written by torch.save",
        )
    return pickled[0].removesuffix("data.pkl"), _checked(records[pickled[0]])


def _checked(record: Record) -> bytes:
    """Return a small record's bytes, having checked them against their checksum."""
    data = record.file.read(record.offset, record.length)
    if record.crc32 is not None and crc32(data) != record.crc32:
        raise FormatError(
            "has a damaged header: its checksum does not match",
            file=record.file.path,
            remedy="Restore the file from its source",
        )
    return data


def _byteorder(file: InputFile, record: Record | None) -> str:
    if record is None:
        return "little"  # torch before 2.1 wrote no such record
    return _checked(record).decode("ascii", "replace") if record.length < 16 else "unknown"


def checksum_places(file: InputFile) -> dict[int, tuple[int, ...]]:
    """Return where an archive keeps its checksums.

    Returns:
        For the place of each record's first byte, the places of its CRC-32: beside the
        data and in the directory. Records without a checksum are left out.
    """
    places: dict[int, tuple[int, ...]] = {}
    for entry, central in _entries(file):
        if not entry.CRC:
            continue
        start = _data_offset(file, entry)
        beside = entry.header_offset + 14
        if entry.flag_bits & _DESCRIPTOR:
            end = start + entry.file_size
            beside = end + (4 if file.read(end, 4) == b"PK\x07\x08" else 0)
        places[start] = (beside, central + 16)
    return places


def _entries(file: InputFile) -> Iterator[tuple[zipfile.ZipInfo, int]]:
    """Yield the entries of an archive, each with the place of its line in the directory."""
    with zipfile.ZipFile(cast("IO[bytes]", _Seekable(file))) as archive:
        place = archive.start_dir
        for entry in archive.infolist():
            yield entry, place
            lengths = struct.unpack("<HHH", file.read(place + 28, 6))
            place += _CENTRAL.size + sum(lengths)


class _Seekable:
    """Just enough of a file for `zipfile` to find the directory, on an open `InputFile`."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.place = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.file.size)[whence]
        if self.place < 0:
            raise ValueError("seek before the start of the file")
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.file.size - self.place)
        data = self.file.read(self.place, left if count < 0 else min(count, left))
        self.place += len(data)
        return data


@dataclass(frozen=True)
class _Entry:
    """A record of the output: its header's place, its data's place, what it holds."""

    name: bytes
    header: int
    start: int
    length: int
    data: bytes | None = None  # None for a storage, whose bytes come from elsewhere

    def extra(self, offset: int | None = None) -> bytes:
        """The zip64 field, where a number needs more than 32 bits."""
        numbers = [self.length, self.length] if self.length >= _FULL else []
        if offset is not None and offset >= _FULL:
            numbers.append(offset)
        return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    def fixed(self, checksum: int) -> tuple[int, ...]:
        """The fields that the local header and the directory share."""
        size = min(self.length, _FULL)
        version = 45 if self.length >= _FULL or self.header >= _FULL else 20
        return version, _UTF8, 0, 0, _DOS_DATE, checksum, size, size, len(self.name)

    def local(self, checksum: int) -> bytes:
        """The local header, padded so that the data begin at `start`."""
        extra = self.extra()
        padding = self.start - self.header - _LOCAL.size - len(self.name) - len(extra)
        extra += b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4)
        return _LOCAL.pack(MAGIC, *self.fixed(checksum), len(extra)) + self.name + extra

    def central(self, checksum: int) -> bytes:
        """The entry of the directory."""
        extra = self.extra(self.header)
        version, *rest = self.fixed(checksum)
        fields = (version, version, *rest, len(extra), 0, 0, 0, 0, min(self.header, _FULL))
        return _CENTRAL.pack(b"PK\x01\x02", *fields) + self.name + extra


@dataclass(frozen=True)
class ZipLayout:
    """A torch zip of which every byte has its place before the first is written."""

    entries: tuple[_Entry, ...]

    @property
    def files(self) -> Mapping[str, int]:
        """None: it is a single file."""
        return {}

    @property
    def places(self) -> tuple[int, ...]:
        """Where each storage's first byte goes."""
        return tuple(entry.start for entry in self.entries if entry.data is None)

    @property
    def _directory(self) -> int:
        last = self.entries[-1]
        return last.start + last.length

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return self._directory + len(self._tail([0] * len(self.entries)))

    def headers(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes that are no storage's, with their places."""
        of_storages = iter(checksums)
        every = [
            next(of_storages) if entry.data is None else crc32(entry.data) for entry in self.entries
        ]
        for entry, checksum in zip(self.entries, every, strict=True):
            yield entry.header, entry.local(checksum) + (entry.data or b"")
        yield self._directory, self._tail(every)

    def _tail(self, checksums: Sequence[int]) -> bytes:
        """The directory, and the records that say where it is."""
        directory = b"".join(
            entry.central(checksum) for entry, checksum in zip(self.entries, checksums, strict=True)
        )
        count, size, start = len(self.entries), len(directory), self._directory
        tail = b""
        if count >= 0xFFFF or size >= _FULL or start >= _FULL:
            tail = _ZIP64_END.pack(
                b"PK\x06\x06", _ZIP64_END.size - 12, 45, 45, 0, 0, count, count, size, start
            ) + _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
        counted = min(count, 0xFFFF)
        return (
            directory
            + tail
            + _END.pack(
                b"PK\x05\x06",
                0,
                0,
                counted,
                counted,
                min(size, _FULL),
                min(start, _FULL),
                0,
            )
        )


def layout(state_dict: OutputStateDict) -> ZipLayout:
    """Give every byte of a state_dict's torch zip its place.

    The records have torch's names and its alignment to 64 bytes; the folder
    is always `archive`, so that the output's name is not part of its bytes.
    """
    return _layout(pickler.dump(state_dict), state_dict.storages)


def layout_tensor(storage: OutputStorage, shape: tuple[int, ...]) -> ZipLayout:
    """Give every byte of the torch zip of one contiguous tensor its place."""
    tensor = OutputTensor(0, 0, shape, contiguous_stride(shape))
    return _layout(pickler.dump_tensor(tensor, storage), (storage,))


def _layout(pickled: bytes, storages: Sequence[OutputStorage]) -> ZipLayout:
    contents: list[tuple[str, int, bytes | None]] = [
        ("data.pkl", len(pickled), pickled),
        ("byteorder", 6, b"little"),
        *((f"data/{key}", storage.nbytes, None) for key, storage in enumerate(storages)),
        ("version", 2, b"3\n"),
    ]
    entries: list[_Entry] = []
    place = 0
    for name, length, data in contents:
        encoded = f"archive/{name}".encode()
        sizes = 20 if length >= _FULL else 0
        start = place + _LOCAL.size + len(encoded) + sizes + 4
        start += -start % _ALIGNMENT
        entries.append(_Entry(encoded, place, start, length, data))
        place = start + length
    return ZipLayout(tuple(entries))
