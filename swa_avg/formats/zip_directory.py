"""The directory of a zip archive: the positions of its records, with all fields checked.

Only archives like those of `torch.save` are read: records are stored, not compressed, on one
disk, in ZIP64 if necessary. Archives that two readers could interpret differently are
refused: two records with one name, records that overlap, a local header that contradicts the
directory, bytes after the end of the archive.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, repeat
from typing import NamedTuple, NoReturn

from swa_avg.errors import ForeignError, FormatError
from swa_avg.formats.zip_end import FULL, find_directory, refuse_broken
from swa_avg.pickles import Budget
from swa_avg.storage import InputFile, announce, reading_ahead
from swa_avg.tensors import Record

MAGIC = b"PK\x03\x04"
UTF8 = 0x800
_ENCRYPTED = 0x1
_DESCRIPTOR = 0x8  # the checksum follows the data
_ZIP64 = 1  # the kind of the ZIP64 extra field
# Magic, flags, lengths of name and extra fields.
_LOCAL = struct.Struct("<4s2xH18xHH")
# Magic, flags, method, CRC-32, sizes as stored and unpacked, lengths of name, extra fields
# and comment, place of the local header.
_LINE = struct.Struct("<4s4xHH4xIIIHHH8xI")
_EXTRA = struct.Struct("<HH")
_ALIGNMENT = 64  # of records; the extra field of a local header is at most about this long
_DENSE = 1 << 17  # mean bytes between local headers up to which one large read is faster
_OBJECTS = 8  # objects built per record
# The offset of the checksum in a local header and in a line of the directory.
_LOCAL_CHECKSUM, _LINE_CHECKSUM = 14, 16


class Entry(NamedTuple):
    """A record of the directory, without its checksum.

    Attributes:
        name: Its name, without the folder that all records are in.
        flags: Its flags.
        length: Its size in bytes.
        header: The position of its local header.
        line: The position of its line in the directory.
    """

    name: str
    flags: int
    length: int
    header: int
    line: int


@dataclass(frozen=True)
class Directory:
    """The records of an archive.

    Attributes:
        root: The folder that all records are in, with its slash; empty if there is none.
        entries: The records, in the order of the directory.
        numbers: The number of each record by its name in lower case, because torch's reader
            ignores case.
        starts: The position of the first byte of each record.
        checksums: The CRC-32 of each record; 0 if none was computed.
        start: The position of the directory, after all records.
        end: The position at which its last line ends.
    """

    root: str
    entries: Sequence[Entry]
    numbers: Mapping[str, int]
    starts: Sequence[int]
    checksums: Sequence[int]
    start: int
    end: int

    def record(self, file: InputFile, name: str) -> Record | None:
        """Return a record of a file with this directory, or None if there is no such record.

        Args:
            file: The file.
            name: The name of the record, in lower case.
        """
        number = self.numbers.get(name)
        if number is None:
            return None
        return _record(file, self.entries[number], self.starts[number], self.checksums[number])

    def records(self, file: InputFile, folder: str) -> dict[str, Record]:
        """Return all records of a folder in a file with this directory.

        Args:
            file: The file.
            folder: The prefix of their names; the keys of the result do not have it.
        """
        return {
            entry.name[len(folder) :]: _record(file, entry, start, checksum)
            for entry, start, checksum in zip(
                self.entries, self.starts, self.checksums, strict=True
            )
            if entry.name.startswith(folder)
        }


def _record(file: InputFile, entry: Entry, start: int, checksum: int) -> Record:
    # A checksum of 0 for a record with data means that torch was set not to compute checksums.
    known = checksum if checksum or not entry.length else None
    return Record(file, start, entry.length, known)


def read(file: InputFile, forms: dict[int, Form], budget: Budget) -> Directory:
    """Read the directory of an archive, and the local headers of all records.

    Args:
        file: The archive.
        forms: The directories of earlier archives, by size.
        budget: Limits what is built from the directory.

    Raises:
        FormatError: The archive is incomplete, damaged or inconsistent.
    """
    try:
        start, size, count = find_directory(file)
        budget.read(size + count * (_LOCAL.size + _ALIGNMENT))
        budget.make(count * _OBJECTS)
        lines = file.read(start, size)
        form = forms.get(size)
        found = form.fitted(file, lines, start) if form else None
        if found is None:
            forms[size] = form = _form(file, lines, start, count)
            found = form.directory
    except (struct.error, UnicodeDecodeError) as error:
        refuse_broken(file, str(error))
    return found


@dataclass(frozen=True)
class Form:
    """A parsed directory, used to read the similar directories of other archives quickly.

    Another directory has the same form if all its bytes, and those of the local headers, are
    equal except for the checksums and the name of the folder. It then has the same records
    at the same positions, and needs no further checks.

    Attributes:
        directory: The parsed directory.
        lines: The bytes of the directory.
        heads: The bytes of each local header.
        root: The length of the folder in each name, in bytes.
    """

    directory: Directory
    lines: bytes
    heads: Sequence[bytes]
    root: int

    def fitted(self, file: InputFile, lines: bytes, start: int) -> Directory | None:
        """Return the directory of a file if it has this form, otherwise None."""
        root = lines[_LINE.size : _LINE.size + self.root]
        if start != self.directory.start or root.find(b"/") != self.root - 1:
            return None
        checksums = self._lines_mask.checksums(lines, root)
        if checksums is None:
            return None
        places = [entry.header for entry in self.directory.entries]
        heads = b"".join(_read_all(file, places, list(map(len, self.heads))))
        if self._heads_mask.checksums(heads, root) is None:
            return None
        first = self.directory.entries[0]
        return replace(self.directory, root=_decoded(root, first.flags), checksums=checksums)

    @cached_property
    def _lines_mask(self) -> _Mask:
        places = [entry.line for entry in self.directory.entries]
        lengths = [after - line for line, after in pairwise((*places, self.directory.end))]
        return _Mask(self.lines, lengths, _LINE_CHECKSUM, _LINE.size, self.root)

    @cached_property
    def _heads_mask(self) -> _Mask:
        lengths = list(map(len, self.heads))
        return _Mask(b"".join(self.heads), lengths, _LOCAL_CHECKSUM, _LOCAL.size, self.root)


class _Mask:
    """A sequence of headers, compared without the checksum and the folder name in each."""

    def __init__(
        self, headers: bytes, lengths: Sequence[int], checksum: int, name: int, root: int
    ) -> None:
        before, between, after = checksum, name - checksum - 4, name + root
        fields = (f"{before}sI{between}s{root}s{length - after}s" for length in lengths)
        self._struct = struct.Struct("<" + "".join(fields))
        self._same = self._parts(headers)[0]

    def _parts(self, headers: bytes) -> tuple[object, tuple[int, ...], tuple[bytes, ...]]:
        parts = self._struct.unpack(headers)
        return (parts[0::5], parts[2::5], parts[4::5]), parts[1::5], parts[3::5]

    def checksums(self, headers: bytes, root: bytes) -> tuple[int, ...] | None:
        """Return the checksums of other headers if they match with the folder `root`, or None."""
        same, checksums, roots = self._parts(headers)
        return checksums if same == self._same and roots.count(root) == len(roots) else None


def checksum_places(file: InputFile, entry: Entry, start: int) -> tuple[int, int]:
    """Return the two positions of a record's CRC-32: next to its data, and in the directory."""
    beside = entry.header + _LOCAL_CHECKSUM
    if entry.flags & _DESCRIPTOR:
        end = start + entry.length
        beside = end + (4 if file.read(end, 4) == b"PK\x07\x08" else 0)
    return beside, entry.line + _LINE_CHECKSUM


def refuse_torchscript(file: InputFile) -> NoReturn:
    """Refuse a TorchScript archive, which is a program with compressed sources."""
    raise ForeignError(
        "is a TorchScript archive",
        file=file.path,
        expected="a checkpoint of tensors",
        remedy="Save model.state_dict() with torch.save",
    )


def _form(file: InputFile, lines: bytes, start: int, count: int) -> Form:
    """Parse a directory line by line, and check it."""
    read = list(_lines(file, lines, start))
    if len(read) != count:
        refuse_broken(file, f"{len(read)} records instead of {count}")
    roots = {raw.partition(b"/")[0] for raw, *_ in read}
    root = next(iter(roots)) + b"/" if len(roots) == 1 else b""
    entries = [
        Entry(_decoded(raw.removeprefix(root), flags), flags, length, header, line)
        for raw, flags, length, _, header, line in read
    ]
    numbers = {entry.name.lower(): number for number, entry in enumerate(entries)}
    for number, entry in enumerate(entries):
        if numbers[entry.name.lower()] != number:
            raise FormatError(f"holds two records named {entry.name}", file=file.path)
    heads = _heads(file, entries, [raw for raw, *_ in read], start)
    starts = [entry.header + len(head) for entry, head in zip(entries, heads, strict=True)]
    _check_apart(file, entries, starts, start)
    checksums = tuple(checksum for _, _, _, checksum, _, _ in read)
    folder = _decoded(root, entries[0].flags) if entries else ""
    directory = Directory(folder, entries, numbers, starts, checksums, start, start + len(lines))
    return Form(directory, lines, heads, len(root))


def _decoded(name: bytes, flags: int) -> str:
    return name.decode("utf-8" if flags & UTF8 else "cp437")


_Line = tuple[bytes, int, int, int, int, int]


def _lines(file: InputFile, lines: bytes, start: int) -> Iterator[_Line]:
    """Yield the name, flags, length, checksum, header position and position of each line."""
    place = 0
    while place < len(lines):
        magic, flags, method, checksum, stored, length, named, extra, comment, header = (
            _LINE.unpack_from(lines, place)
        )
        after = place + _LINE.size + named
        name = lines[place + _LINE.size : after]
        if magic != b"PK\x01\x02" or after + extra + comment > len(lines):
            refuse_broken(file, "its directory is damaged")
        if FULL in (stored, length, header):
            fields = lines[after : after + extra]
            length, stored, header = _wide(file, fields, (length, stored, header))
        if method or stored != length or flags & _ENCRYPTED:
            if b"/code/" in name:
                refuse_torchscript(file)
            kind = FormatError if b"data.pkl" in lines else ForeignError
            raise kind(
                f"holds a compressed record, {_decoded(name, flags)}",
                file=file.path,
                expected="stored records, as torch writes them",
                remedy="Save it again with torch.save",
            )
        yield name, flags, length, checksum, header, start + place
        place = after + extra + comment


def _wide(file: InputFile, extra: bytes, numbers: tuple[int, ...]) -> Iterator[int]:
    """Yield numbers of a line; numbers of more than 32 bits come from its ZIP64 field."""
    place = 0
    while place + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, place)
        place += _EXTRA.size
        if kind == _ZIP64:
            wide = struct.iter_unpack("<Q", extra[place : place + length - length % 8])
            for number in numbers:
                found = next(wide, None) if number == FULL else (number,)
                if found is None:
                    refuse_broken(file, "its directory is damaged")
                yield found[0]
            return
        place += length
    yield from numbers


def _heads(
    file: InputFile, entries: Sequence[Entry], names: Sequence[bytes], end: int
) -> list[bytes]:
    """Return the local header of each record, after comparing it with the directory."""
    places = [entry.header for entry in entries]
    least = [_LOCAL.size + len(name) for name in names]
    if any(place + length > end for place, length in zip(places, least, strict=True)):
        refuse_broken(file, "its directory is damaged")
    likely = [
        min(length + _ALIGNMENT, end - place) for place, length in zip(places, least, strict=True)
    ]
    heads = _read_all(file, places, likely)
    for number, (entry, name, head) in enumerate(zip(entries, names, heads, strict=True)):
        magic, flags, named, extra = _LOCAL.unpack_from(head)
        length = _LOCAL.size + named + extra
        if magic != MAGIC or flags & _ENCRYPTED or head[_LOCAL.size : _LOCAL.size + named] != name:
            raise FormatError(
                f"has a local header that does not match the directory, for {entry.name}",
                file=file.path,
                remedy="The file is damaged",
            )
        whole = length <= len(head)
        heads[number] = head[:length] if whole else file.read(entry.header, length)
    return heads


def _read_all(file: InputFile, places: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Read short pieces of a file."""
    if places and places[-1] - places[0] < len(places) * _DENSE:
        # One large read instead of a seek for each piece on a cold disk.
        announce([(file, places[0], places[-1] - places[0])])
    with reading_ahead(zip(repeat(file), places, lengths)):
        return file.read_pieces(places, lengths)


def _check_apart(
    file: InputFile, entries: Sequence[Entry], starts: Sequence[int], end: int
) -> None:
    """Refuse records that share bytes, with each other or with the directory."""
    spans = [
        (entry.header, start + entry.length) for entry, start in zip(entries, starts, strict=True)
    ]
    spans.sort()
    if any(before > start for (_, before), (start, _) in pairwise(spans)):
        raise FormatError("holds records that overlap", file=file.path)
    if spans and spans[-1][1] > end:
        raise FormatError("holds a record that reaches into the directory", file=file.path)
