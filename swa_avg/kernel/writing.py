"""Writing the results of one item of work to the output, and their checksums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

from zlib_ng.zlib_ng import crc32

from swa_avg.kernel.tasks import Bundle, Item
from swa_avg.storage import Output
from swa_avg.tensors import DType, Piece


class Writer(Protocol):
    """Writes the cells of one item to one output."""

    def write(self, data: memoryview) -> None:
        """Write the next cell.

        Raises:
            OutputError: The system reports an error.
        """

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        """Yield the numbers of the works, each with the checksum of its written bytes."""


def writer_to(output: Output, item: Item, places: Sequence[int], dtype: DType) -> Writer:
    """Return the writer of an item.

    Args:
        output: The output to write to.
        item: The item.
        places: The offset of each work in the output.
        dtype: The dtype in the output.
    """
    if isinstance(item, Bundle):
        return _BundleWriter(output, item, places, dtype.itemsize)
    return _RangeWriter(output, item.number, places[item.number], item.start * dtype.itemsize)


class _RangeWriter:
    """Writes consecutive cells of one work."""

    def __init__(self, output: Output, number: int, place: int, start: int) -> None:
        self._write, self._number = output.write, number
        self._place, self._start = place, start
        self._length = self._crc = 0

    def write(self, data: memoryview) -> None:
        self._write(data, self._place + self._start + self._length)
        self._crc = crc32(data, self._crc)
        self._length += len(data)

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        yield self._number, Piece(self._start, self._length, self._crc)


class _BundleWriter:
    """Writes the one cell of a bundle, each work to its own place."""

    def __init__(self, output: Output, item: Bundle, places: Sequence[int], size: int) -> None:
        self._write, self._places, self._numbers = output.write, places, item.numbers
        self._cuts = [slice(a * size, b * size) for a, b in pairwise(item.bounds)]
        self._pieces: list[Piece] = []

    def write(self, data: memoryview) -> None:
        for number, cut in zip(self._numbers, self._cuts, strict=True):
            part = data[cut]
            self._write(part, self._places[number])
            self._pieces.append(Piece(0, len(part), crc32(part)))

    def pieces(self) -> Iterator[tuple[int, Piece]]:
        yield from zip(self._numbers, self._pieces, strict=True)
