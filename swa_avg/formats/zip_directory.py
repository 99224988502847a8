"""The directory of a zip archive: where its records are, each claim of it checked.

Only what `torch.save` writes: records stored, not compressed, on one disk, in
ZIP64 where that is needed. What a reader could take for one thing and another
reader for something else is refused: two records of one name, records that
overlap, a local header that names another record, bytes behind the archive.
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
_DESCRIPTOR = 0x8  # the checksum stands behind the data
_ZIP64 = 1  # the ZIP64 field among the extra ones
# Magic, flags, lengths of name and extra fields.
_LOCAL = struct.Struct("<4s2xH18xHH")
# Magic, flags, method, CRC-32, sizes as stored and unpacked, lengths of name, extra fields
# and comment, place of the local header.
_LINE = struct.Struct("<4s4xHH4xIIIHHH8xI")
_EXTRA = struct.Struct("<HH")
_ALIGNMENT = 64  # of records, by which the extra fields of local headers are long
_DENSE = 1 << 17  # bytes from one local header to the next: what a read from disk takes along
_OBJECTS = 8  # that are made of a record
# Where a local header and a line have their checksum.
_LOCAL_CHECKSUM, _LINE_CHECKSUM = 14, 16


class Entry(NamedTuple):
    """A record as the directory has it, but for its checksum.

    Attributes:
        name: Its name in the folder that all records are in.
        flags: How it is stored.
        length: Its bytes.
        header: The place of its local header.
        line: The place of its line in the directory.
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
        numbers: Which of them has which name, in small letters: torch's reader of archives
            takes large and small ones for the same.
        starts: The place of each one's first byte.
        checksums: The CRC-32 of each; 0 if none was computed.
        start: The place of the directory, behind all records.
        end: Where its last line ends.
    """

    root: str
    entries: Sequence[Entry]
    numbers: Mapping[str, int]
    starts: Sequence[int]
    checksums: Sequence[int]
    start: int
    end: int

    def record(self, file: InputFile, name: str) -> Record | None:
        """Return where a record is in a file that has this directory, if it is there.

        Args:
            file: The file.
            name: Its name, in small letters.
        """
        number = self.numbers.get(name)
        if number is None:
            return None
        return _record(file, self.entries[number], self.starts[number], self.checksums[number])

    def records(self, file: InputFile, folder: str) -> dict[str, Record]:
        """Return where all records of a folder are in a file that has this directory.

        Args:
            file: The file.
            folder: How their names begin; the result has only what comes after.
        """
        return {
            entry.name[len(folder) :]: _record(file, entry, start, checksum)
            for entry, start, checksum in zip(
                self.entries, self.starts, self.checksums, strict=True
            )
            if entry.name.startswith(folder)
        }


def _record(file: InputFile, entry: Entry, start: int, checksum: int) -> Record:
    # A checksum of 0 over data means that torch was told not to compute any.
    known = checksum if checksum or not entry.length else None
    return Record(file, start, entry.length, known)


def read(file: InputFile, forms: dict[int, Form], budget: Budget) -> Directory:
    """Read the directory of an archive, and the local headers of all records.

    Args:
        file: The archive.
        forms: What was learned of earlier ones, by the size of their directories.
        budget: What it may ask for.

    Raises:
        FormatError: It is not whole, or says what is not so.
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
    """A directory that was read: those of one run differ in little, and are checked by that.

    Another one is of the same form if each byte of it, and of the local headers, is
    the same but for the checksums and the name of the folder. What was found out
    about the records then is true of it too.

    Attributes:
        directory: What was read.
        lines: The bytes of the directory.
        heads: The bytes of each local header.
        root: How many bytes of each name are the folder.
    """

    directory: Directory
    lines: bytes
    heads: Sequence[bytes]
    root: int

    def fitted(self, file: InputFile, lines: bytes, start: int) -> Directory | None:
        """Return the directory of a file if it is of this form, else None."""
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
    """Headers that follow each other, but for the checksum and the name of the folder in each."""

    def __init__(
        self, headers: bytes, lengths: Sequence[int], checksum: int, name: int, root: int
    ) -> None:
        before, between, behind = checksum, name - checksum - 4, name + root
        fields = (f"{before}sI{between}s{root}s{length - behind}s" for length in lengths)
        self._struct = struct.Struct("<" + "".join(fields))
        self._same = self._parts(headers)[0]

    def _parts(self, headers: bytes) -> tuple[object, tuple[int, ...], tuple[bytes, ...]]:
        parts = self._struct.unpack(headers)
        return (parts[0::5], parts[2::5], parts[4::5]), parts[1::5], parts[3::5]

    def checksums(self, headers: bytes, root: bytes) -> tuple[int, ...] | None:
        """Return the checksums of other headers if all else is the same, in the folder `root`."""
        same, checksums, roots = self._parts(headers)
        return checksums if same == self._same and roots.count(root) == len(roots) else None


def checksum_places(file: InputFile, entry: Entry, start: int) -> tuple[int, int]:
    """Return where an archive keeps the CRC-32 of a record: beside its data, in the directory."""
    beside = entry.header + _LOCAL_CHECKSUM
    if entry.flags & _DESCRIPTOR:
        end = start + entry.length
        beside = end + (4 if file.read(end, 4) == b"PK\x07\x08" else 0)
    return beside, entry.line + _LINE_CHECKSUM


def refuse_torchscript(file: InputFile) -> NoReturn:
    """Refuse an archive that is a program, whose sources are compressed."""
    raise ForeignError(
        "is a TorchScript archive",
        file=file.path,
        expected="a checkpoint of tensors",
        remedy="Save model.state_dict() with torch.save",
    )


def _form(file: InputFile, lines: bytes, start: int, count: int) -> Form:
    """Read a directory, line by line, and check all that it says."""
    read = list(_lines(file, lines, start))
    if len(read) != count:
        refuse_broken(file, f"{len(read)} records where there are to be {count}")
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
    """Yield of each line its name, flags, length, checksum, the local header's place, its own."""
    place = 0
    while place < len(lines):
        magic, flags, method, checksum, stored, length, named, extra, comment, header = (
            _LINE.unpack_from(lines, place)
        )
        behind = place + _LINE.size + named
        name = lines[place + _LINE.size : behind]
        if magic != b"PK\x01\x02" or behind + extra + comment > len(lines):
            refuse_broken(file, "its directory is damaged")
        if FULL in (stored, length, header):
            fields = lines[behind : behind + extra]
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
        place = behind + extra + comment


def _wide(file: InputFile, extra: bytes, numbers: tuple[int, ...]) -> Iterator[int]:
    """Yield numbers of a line, those that need more than 32 bits from its ZIP64 field."""
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
    """Return the local header of each record, having compared it with the directory."""
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
                f"has another local header than its directory says, at {entry.name}",
                file=file.path,
                remedy="The file is damaged",
            )
        whole = length <= len(head)
        heads[number] = head[:length] if whole else file.read(entry.header, length)
    return heads


def _read_all(file: InputFile, places: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Read short pieces of a file."""
    if places and places[-1] - places[0] < len(places) * _DENSE:
        # Piece by piece a cold disk would seek for each.
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
        raise FormatError("holds a record that ends outside the file", file=file.path)
