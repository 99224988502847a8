"""Reading the inputs of one item of work cell by cell, with checksums of the bytes read.

A reader fills a buffer with the elements of a cell, in the order of the output. Each cell
of the item is read once, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

from zlib_ng.zlib_ng import crc32

from swa_avg.kernel.tasks import Cell, Item, Stretch, Strip
from swa_avg.planning import Treatment, Work
from swa_avg.storage import InputFile
from swa_avg.tensors import (
    Box,
    DType,
    Ledger,
    Piece,
    Record,
    TensorRef,
    elements,
    read_box,
    whole,
)

_SPARE = memoryview(bytearray(4096))  # receives the bytes between records, which are not used


class Reader(Protocol):
    """Reads one input of an item.

    Attributes:
        dtype: The dtype of the input.
    """

    dtype: DType

    def read(self, cell: Any, buffer: memoryview) -> None:
        """Fill `buffer` with the elements of one of the item's cells.

        Raises:
            SwaAvgError: The file cannot be read, or is shorter than it was.
        """

    def close(self, ledger: Ledger) -> int:
        """Add the checksums of the bytes read to the ledger; return the number of bytes."""


def readers_of(item: Item, works: Sequence[Work]) -> Sequence[Reader]:
    """Return a reader for each input of an item."""
    work = works[item.number]
    if isinstance(item, Strip):
        return [RangeReader(source, item, work.name) for source in work.sources]
    if isinstance(item, Stretch):
        return [BoxReader(source, item, work) for source in work.sources]
    together = [works[number] for number in item.numbers]
    cuts = {
        size: [slice(a * size, b * size) for a, b in pairwise(item.bounds)]
        for size in {source.dtype.itemsize for source in work.sources}
    }
    return [
        BundleReader(together, number, cuts[source.dtype.itemsize])
        for number, source in enumerate(work.sources)
    ]


class RangeReader:
    """Reads a range of a tensor that is stored in C order."""

    def __init__(self, source: TensorRef, strip: Strip, name: str) -> None:
        self.dtype = source.dtype
        self._record, self._name = source.record, name
        self._read = source.record.file.read_into
        # Offsets in the record: of the strip, and of the next byte to read.
        self._first = self._next = (source.offset + strip.start) * self.dtype.itemsize
        self._crc = 0

    def read(self, cell: Cell, buffer: memoryview) -> None:
        """Read the next cell, which begins where the last one ended."""
        self._read(buffer, self._record.offset + self._next)
        self._crc = crc32(buffer, self._crc)
        self._next += len(buffer)

    def close(self, ledger: Ledger) -> int:
        """Add the checksum of all cells together."""
        length = self._next - self._first
        ledger.add(self._record, self._name, Piece(self._first, length, self._crc))
        return length


class BundleReader:
    """Reads several small tensors of one checkpoint; adjacent ones with a single call."""

    def __init__(self, works: Sequence[Work], number: int, slices: Sequence[slice]) -> None:
        self.dtype = works[0].sources[number].dtype
        self._works, self._number, self._slices = works, number, slices
        self._crcs: list[int] = []

    def read(self, cell: Cell, buffer: memoryview) -> None:
        """Read all tensors; a bundle has only one cell."""
        views = [buffer[cut] for cut in self._slices]
        file: InputFile | None = None
        pieces: list[memoryview] = []
        start = end = 0
        for work, view in zip(self._works, views, strict=True):
            source = work.sources[self._number]
            record = source.record
            place = record.offset + source.offset * self.dtype.itemsize
            gap = place - end
            if record.file is file and 0 <= gap <= len(_SPARE):
                if gap:
                    pieces.append(_SPARE[:gap])
                pieces.append(view)
            else:
                if file is not None:
                    file.read_scattered(pieces, start)
                file, start, pieces = record.file, place, [view]
            end = place + len(view)
        if file is not None:
            file.read_scattered(pieces, start)
        self._crcs = [crc32(view) for view in views]

    def close(self, ledger: Ledger) -> int:
        """Add the checksum of each tensor."""
        for work, cut, crc in zip(self._works, self._slices, self._crcs, strict=True):
            source = work.sources[self._number]
            record, length = source.record, cut.stop - cut.start
            if length == record.length:
                ledger.check_whole(record, work.name, crc)
            else:
                place = source.offset * self.dtype.itemsize
                ledger.add(record, work.name, Piece(place, length, crc))
        return int(self._slices[-1].stop)


class BoxReader:
    """Reads boxes of a tensor with any strides, whole or in parts."""

    def __init__(self, source: TensorRef, stretch: Stretch, work: Work) -> None:
        self.dtype = source.dtype
        self._source, self._name = source, work.name
        self._averaged = work.treatment is Treatment.AVERAGED
        # The strides of the shape that is cut into boxes, if a box is one range; else None.
        self._steps = stretch.steps if whole(source) else None
        self._bytes_read = 0
        self._touched: set[Record] = set()
        self._pieces: dict[Record, Piece] = {}

    def read(self, cell: Box, buffer: memoryview) -> None:
        """Read a box; the elements in the buffer are in C order."""
        if not buffer:
            return
        record = self._source.record
        if self._steps is None:
            values = elements(buffer, cell.shape, self.dtype.itemsize)
            self._bytes_read += read_box(self._source, cell, values, self._seen)
            return
        first = sum(at * step for at, step in zip(cell.start, self._steps, strict=True))
        place = (self._source.offset + first) * self.dtype.itemsize
        record.file.read_into(buffer, record.offset + place)
        self._seen(record, place, buffer)
        self._bytes_read += len(buffer)

    def _seen(self, record: Record, start: int, data: memoryview | None) -> None:
        """Extend the checksum by a range that directly follows the ranges read before."""
        self._touched.add(record)
        if data is None:
            return
        piece = self._pieces.get(record, Piece(start, 0, 0))
        if start == piece.start + piece.length:
            crc = crc32(data, piece.crc)
            self._pieces[record] = Piece(piece.start, piece.length + len(data), crc)

    def close(self, ledger: Ledger) -> int:
        """Add the checksums of contiguous ranges, if they are needed.

        A record that has bytes, and of which this item has read none, is left to the item that
        reads it, which may have checked the whole of it. An empty tensor has no such item.
        """
        for record in self._source.records:
            is_own = record in self._touched or not (record.length and self._touched)
            if is_own and (self._averaged or record.crc32 is not None):
                ledger.add(record, self._name, self._pieces.get(record))
        return self._bytes_read
