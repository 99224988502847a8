"""CRC-32 checksums of byte ranges that are read in pieces, in any order."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from zlib_ng.zlib_ng import crc32, crc32_combine

from swa_avg.errors import FormatError
from swa_avg.tensors.tensor import Record


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """The checksum of `length` bytes that begin `start` bytes into a record."""

    start: int
    length: int
    crc: int


def combined(pieces: list[Piece]) -> int:
    """Return the checksum of pieces that follow each other without a gap."""
    crc = 0
    for piece in sorted(pieces):
        crc = crc32_combine(crc, piece.crc, piece.length)
    return crc


class Ledger:
    """Collects the checksums of the bytes read, and compares them with the recorded ones.

    Args:
        kept: Records that are added to `found` even if the file records their checksum.

    Attributes:
        found: The checksum of each completely read record for which the file records none.
    """

    def __init__(self, kept: Container[Record] = ()) -> None:
        self._kept = kept
        self.found: dict[Record, int] = {}
        self._pieces: dict[Record, list[Piece]] = {}
        self._names: dict[Record, str] = {}

    def add(self, record: Record, name: str, piece: Piece | None) -> None:
        """Add the checksum of a piece that was read for the tensor `name`.

        None adds the record without a piece.

        Raises:
            FormatError: The piece is the whole record, and its checksum is wrong.
        """
        if piece is not None and piece.length == record.length:
            self.check_whole(record, name, piece.crc)
            return
        self._names.setdefault(record, name)
        pieces = self._pieces.setdefault(record, [])
        if piece is not None:
            pieces.append(piece)

    @property
    def open(self) -> list[Record]:
        """The records that have been read in pieces, and are not complete yet."""
        return [record for record in self._pieces if record not in self.found]

    def pieces(self) -> Iterator[tuple[Record, str, Sequence[Piece]]]:
        """Yield the open records, each with the name of one of its tensors and its pieces."""
        for record in self.open:
            yield record, self._names[record], self._pieces[record]

    def check(self, record: Record) -> None:
        """Combine the pieces of an open record and check the result.

        Bytes between the pieces are read now, for example the rest of a storage of which
        the state_dict contains only a view.

        Raises:
            FormatError: The record's checksum is wrong.
        """
        crc = combined(with_gaps(record, self._disjoint(record)))
        self.check_whole(record, self._names[record], crc)

    def check_whole(self, record: Record, name: str, crc: int) -> None:
        """Check the checksum of a whole record.

        Raises:
            FormatError: It differs from the recorded one.
        """
        if record.crc32 is not None and crc != record.crc32:
            record.file.check_unchanged()  # a file that is still being written is not damaged
            raise FormatError(
                "is damaged: its bytes do not match the checksum in the file",
                file=record.file.path,
                tensor=name,
                remedy="Restore the file from its source, or leave it out",
            )
        if record.crc32 is None or record in self._kept:
            self.found[record] = crc

    def _disjoint(self, record: Record) -> list[Piece]:
        """Return the pieces that do not overlap an earlier one."""
        kept: list[Piece] = []
        for piece in sorted(self._pieces[record]):
            if not kept or piece.start >= kept[-1].start + kept[-1].length:
                kept.append(piece)
        return kept


def verify(named: Iterable[tuple[Record, str]]) -> None:
    """Read whole records and compare their checksums, if the file records them.

    Args:
        named: Records, each with the name of one of its tensors.

    Raises:
        FormatError: A checksum is wrong.
    """
    ledger = Ledger()
    for record, name in named:
        if record.crc32 is not None:
            ledger.add(record, name, None)
    for record in ledger.open:
        ledger.check(record)


def with_gaps(record: Record, pieces: list[Piece]) -> list[Piece]:
    """Return disjoint pieces of a record and the pieces between them, which are read now."""
    edges = [0, *(edge for p in sorted(pieces) for edge in (p.start, p.start + p.length))]
    edges.append(record.length)
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return pieces + [_read_piece(record, start, end - start) for start, end in gaps if end > start]


def _read_piece(record: Record, start: int, length: int) -> Piece:
    """Read a part of a record and return its checksum."""
    crc = 0
    for chunk in record.file.chunks(record.offset + start, length):
        crc = crc32(chunk, crc)
    return Piece(start, length, crc)
