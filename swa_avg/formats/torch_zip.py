"""The zip format of torch (since 1.6): `.pt`, `.pth`, `.ckpt`, `.bin`.

The stored record `data.pkl` is the pickle, and each `data/KEY` is a storage. TorchScript
archives have the same structure and are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from zlib_ng.zlib_ng import crc32

from swa_avg.errors import ForeignError, FormatError, listed
from swa_avg.formats import pickler, zip_directory
from swa_avg.formats.checkpoint import (
    MOST_PROVENANCE_BYTES,
    PROVENANCE,
    Checkpoint,
    Headers,
    OutputStateDict,
    OutputStorage,
    OutputTensor,
    Splice,
)
from swa_avg.formats.zip_directory import MAGIC, UTF8, Directory
from swa_avg.formats.zip_end import FULL
from swa_avg.pickles import Budget, unpickler
from swa_avg.storage import InputFile
from swa_avg.tensors import Record, contiguous_stride

_ALIGNMENT = 64
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_DOS_DATE = 0x21  # 1980-01-01, so that equal inputs give equal bytes
_UNCHECKED = "has no checksums: damage cannot be detected"
_PROVENANCE = f"/{PROVENANCE}".encode()  # torch.load ignores unknown records


def read(file: InputFile, headers: Headers, budget: Budget) -> Checkpoint:
    """Read the headers of a torch zip.

    Args:
        file: The archive.
        headers: The cache of headers.
        budget: Limits what is built from the headers.

    Raises:
        FormatError: The archive or its pickle is damaged, or the archive is TorchScript.
    """
    directory = zip_directory.read(file, headers.forms, budget)
    pickled = directory.record(file, "data.pkl")
    if pickled is None or not directory.root:
        raise _without_pickle(file, directory)
    if "constants.pkl" in directory.numbers:
        zip_directory.refuse_torchscript(file)
    order = _byteorder(directory.record(file, "byteorder"))
    if order != "little":
        raise FormatError(f"has byte order {order}", file=file.path, expected="little")
    try:
        budget.read(pickled.length)
        found = headers.once(unpickler.load, _checked(pickled), budget)
    except FormatError as error:
        error.file = error.file or str(file.path)
        raise
    record = directory.record(file, PROVENANCE)
    records = found.located(directory.records(file, "data/"), file.path)
    return Checkpoint(
        file.path,
        "torch zip",
        found.tree,
        (file,),
        notes=() if any(directory.checksums) else (_UNCHECKED,),
        provenance=_provenance(record),
        provenance_record=record,
        records=records,
        budget=budget,
    )


def _without_pickle(file: InputFile, directory: Directory) -> ForeignError:
    """Return the error for an archive that torch.save has not written."""
    # Stable-Baselines3 saves policy.pth, its optimizer and JSON in one archive.
    inner = [name for name in directory.numbers if name.endswith((".pth", ".pt"))]
    around = f" of its own, around {listed(inner)}" if inner else ""
    return ForeignError(
        f"is a zip archive without a torch pickle{around}",
        file=file.path,
        expected="a checkpoint written by torch.save",
        remedy="Extract the file of the model from each archive, and give those" if inner else "",
    )


def _checked(record: Record) -> bytes:
    """Return the bytes of a small record, after verifying its checksum."""
    data = record.file.read(record.offset, record.length)
    if record.crc32 is not None and crc32(data) != record.crc32:
        raise FormatError(
            "has a damaged header: its checksum does not match",
            file=record.file.path,
            remedy="Restore the file from its source",
        )
    return data


def _byteorder(record: Record | None) -> str:
    if record is None:
        return "little"  # torch before 2.1 wrote no such record
    return _checked(record).decode("ascii", "replace") if record.length < 16 else "unknown"


def _provenance(record: Record | None) -> str:
    if record is None or record.length > MOST_PROVENANCE_BYTES:
        return ""
    return _checked(record).decode("ascii", "replace")


def checksum_places(file: InputFile) -> dict[int, tuple[int, ...]]:
    """Return the positions of the checksums in an archive.

    Returns:
        A map from the position of each record's first byte to the positions of its CRC-32:
        next to the data and in the directory. Records without a checksum are left out.
    """
    directory = zip_directory.read(file, {}, Budget())
    return {
        start: zip_directory.checksum_places(file, entry, start)
        for entry, start, checksum in zip(
            directory.entries, directory.starts, directory.checksums, strict=True
        )
        if checksum
    }


@dataclass(frozen=True)
class _Entry:
    """A record of the output: the positions of its header and its data, and its content."""

    name: bytes
    header: int
    start: int
    length: int
    data: bytes | None = None  # None for a storage, whose bytes come from elsewhere

    def extra(self, offset: int | None = None) -> bytes:
        """Return the ZIP64 field, if a number needs more than 32 bits."""
        numbers = [self.length, self.length] if self.length >= FULL else []
        if offset is not None and offset >= FULL:
            numbers.append(offset)
        return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""

    def fixed(self, checksum: int) -> tuple[int, ...]:
        """Return the fields that the local header and the directory share."""
        size = min(self.length, FULL)
        version = 45 if self.length >= FULL or self.header >= FULL else 20
        return version, UTF8, 0, 0, _DOS_DATE, checksum, size, size, len(self.name)

    def local(self, checksum: int) -> bytes:
        """Return the local header, padded so that the data begins at `start`."""
        extra = self.extra()
        padding = self.start - self.header - _LOCAL.size - len(self.name) - len(extra)
        extra += b"FB" + struct.pack("<H", padding - 4) + b"Z" * (padding - 4)
        return _LOCAL.pack(MAGIC, *self.fixed(checksum), len(extra)) + self.name + extra

    def central(self, checksum: int) -> bytes:
        """Return the entry of the directory."""
        extra = self.extra(self.header)
        version, *rest = self.fixed(checksum)
        fields = (version, version, *rest, len(extra), 0, 0, 0, 0, min(self.header, FULL))
        return _CENTRAL.pack(b"PK\x01\x02", *fields) + self.name + extra


@dataclass(frozen=True)
class ZipLayout:
    """The layout of a torch zip."""

    entries: tuple[_Entry, ...]

    @property
    def files(self) -> Mapping[str, int]:
        """Empty: the output is a single file."""
        return {}

    @property
    def places(self) -> tuple[int, ...]:
        """The position of the first byte of each storage."""
        return tuple(entry.start for entry in self.entries if entry.data is None)

    @property
    def _directory(self) -> int:
        last = self.entries[-1]
        return last.start + last.length

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return self._directory + len(self._tail([0] * len(self.entries)))

    def headers(
        self, checksums: Sequence[int], provenance: str = ""
    ) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the storages, with their positions."""
        entries = self.entries
        if entries[-1].name.endswith(_PROVENANCE):
            entries = (*entries[:-1], replace(entries[-1], data=provenance.encode()))
        of_storages = iter(checksums)
        every = [
            next(of_storages) if entry.data is None else crc32(entry.data) for entry in entries
        ]
        for entry, checksum in zip(entries, every, strict=True):
            yield entry.header, entry.local(checksum) + (entry.data or b"")
        yield self._directory, self._tail(every)

    def _tail(self, checksums: Sequence[int]) -> bytes:
        """Return the directory, and the end records with its position."""
        directory = b"".join(
            entry.central(checksum) for entry, checksum in zip(self.entries, checksums, strict=True)
        )
        return directory + _end(len(self.entries), len(directory), self._directory)


def _end(count: int, size: int, start: int) -> bytes:
    """Return the end records for a directory of `size` bytes at `start`."""
    counted = min(count, 0xFFFF)
    end = _END.pack(b"PK\x05\x06", 0, 0, counted, counted, min(size, FULL), min(start, FULL), 0)
    if counted == count < 0xFFFF and max(size, start) < FULL:
        return end
    zip64 = _ZIP64_END.pack(
        b"PK\x06\x06", _ZIP64_END.size - 12, 45, 45, 0, 0, count, count, size, start
    )
    return zip64 + _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1) + end


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return the changes that append a provenance record to an archive."""
    directory = zip_directory.read(file, {}, Budget())
    first, end = directory.start, directory.end
    name = f"{directory.root}{PROVENANCE}".encode()
    data = provenance.encode()
    entry = _entry(name, first, len(data), data)
    put_in = entry.local(crc32(data)) + data
    line = entry.central(crc32(data))
    size = end - first + len(line)
    tail = line + _end(len(directory.entries) + 1, size, first + len(put_in))
    return Splice(first, 0, put_in), Splice(end, file.size - end, tail)


def layout(state_dict: OutputStateDict) -> ZipLayout:
    """Lay out the torch zip of a state_dict.

    Records are named and aligned to 64 bytes as in torch. The folder is always `archive`, so
    that the bytes of an output do not depend on its file name.
    """
    provenance = state_dict.provenance.encode()
    return _layout(pickler.dump(state_dict), state_dict.storages, provenance)


def layout_tensor(storage: OutputStorage, shape: tuple[int, ...]) -> ZipLayout:
    """Lay out the torch zip of one contiguous tensor."""
    tensor = OutputTensor(0, 0, shape, contiguous_stride(shape))
    return _layout(pickler.dump_tensor(tensor, storage), (storage,))


def _layout(
    pickled: bytes, storages: Sequence[OutputStorage], provenance: bytes = b""
) -> ZipLayout:
    contents: list[tuple[str, int, bytes | None]] = [
        ("data.pkl", len(pickled), pickled),
        ("byteorder", 6, b"little"),
        *((f"data/{key}", storage.nbytes, None) for key, storage in enumerate(storages)),
        ("version", 2, b"3\n"),
        *([(PROVENANCE, len(provenance), provenance)] if provenance else []),
    ]
    entries: list[_Entry] = []
    place = 0
    for name, length, data in contents:
        entries.append(_entry(f"archive/{name}".encode(), place, length, data))
        place = entries[-1].start + length
    return ZipLayout(tuple(entries))


def _entry(name: bytes, place: int, length: int, data: bytes | None) -> _Entry:
    """Return a record with its header at `place` and its data aligned."""
    sizes = 20 if length >= FULL else 0
    start = place + _LOCAL.size + len(name) + sizes + 4
    return _Entry(name, place, start + -start % _ALIGNMENT, length, data)
