"""CRC-32 of stretches of bytes that are read in any order, piece by piece."""

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
    """Collects the checksums of what was read, and compares them with those recorded.

    Args:
        kept: Records of which `found` is to tell though their checksum is recorded.

    Attributes:
        found: The checksum of each record that has been read whole, and has none
            recorded: what is recorded needs no second place.
    """

    def __init__(self, kept: Container[Record] = ()) -> None:
        self._kept = kept
        self.found: dict[Record, int] = {}
        self._pieces: dict[Record, list[Piece]] = {}
        self._names: dict[Record, str] = {}

    def add(self, record: Record, name: str, piece: Piece | None) -> None:
        """Note the checksum of a piece that was read, by the tensor `name`; None: of nothing.

        Raises:
            FormatError: It is the whole record, and its bytes are not those that were saved.
        """
        if piece is not None and piece.length == record.length:
            self.settle(record, name, piece.crc)
            return
        self._names.setdefault(record, name)
        pieces = self._pieces.setdefault(record, [])
        if piece is not None:
            pieces.append(piece)

    @property
    def open(self) -> list[Record]:
        """The records of which pieces were read, but not yet the whole."""
        return [record for record in self._pieces if record not in self.found]

    def pieces(self) -> Iterator[tuple[Record, str, Sequence[Piece]]]:
        """Yield the open records, each with a tensor that looks at it and what was read of it."""
        for record in self.open:
            yield record, self._names[record], self._pieces[record]

    def check(self, record: Record) -> None:
        """Make up an open record's checksum from its pieces.

        What was not read in whole pieces, for one the rest of a storage of which
        the state_dict holds a view, is read now.

        Raises:
            FormatError: Its bytes are not those that were saved.
        """
        crc = combined(with_gaps(record, self._disjoint(record)))
        self.settle(record, self._names[record], crc)

    def settle(self, record: Record, name: str, crc: int) -> None:
        """Note the checksum of a whole record.

        Raises:
            FormatError: Its bytes are not those that were saved.
        """
        if record.crc32 is not None and crc != record.crc32:
            record.file.check_unchanged()  # a run that is still writing it did no damage
            raise FormatError(
                "is damaged: its bytes do not have the checksum that the file records",
                file=record.file.path,
                tensor=name,
                remedy="Restore the file from its source, or leave it out",
            )
        if record.crc32 is None or record in self._kept:
            self.found[record] = crc

    def _disjoint(self, record: Record) -> list[Piece]:
        """Return the pieces without those that overlap an earlier one."""
        kept: list[Piece] = []
        for piece in sorted(self._pieces[record]):
            if not kept or piece.start >= kept[-1].start + kept[-1].length:
                kept.append(piece)
        return kept


def verify(named: Iterable[tuple[Record, str]]) -> None:
    """Read records whole and compare their checksums, where they carry any.

    Args:
        named: Records, each with the name of a tensor that looks at it.

    Raises:
        FormatError: The bytes of one are not those that were saved.
    """
    ledger = Ledger()
    for record, name in named:
        if record.crc32 is not None:
            ledger.add(record, name, None)
    for record in ledger.open:
        ledger.check(record)


def with_gaps(record: Record, pieces: list[Piece]) -> list[Piece]:
    """Return pieces of a record that do not overlap, and what is between them, read now."""
    edges = [0, *(edge for p in sorted(pieces) for edge in (p.start, p.start + p.length))]
    edges.append(record.length)
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return pieces + [_read_piece(record, start, end - start) for start, end in gaps if end > start]


def _read_piece(record: Record, start: int, length: int) -> Piece:
    """Read a part of a record for its checksum only."""
    crc = 0
    for chunk in record.file.chunks(record.offset + start, length):
        crc = crc32(chunk, crc)
    return Piece(start, length, crc)
