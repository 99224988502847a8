"""The last checkpoint's own file as the output, with only the averaged bytes replaced.

What a framework put around the weights (optimizer, hyper-parameters, schedules)
stays as it is, byte for byte: it is neither understood nor written anew, so
that the framework's own loader takes the file. Only the ranges of the averaged
tensors, and the checksums over them, are other ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from swa_avg.checksums import Piece, combined, read_piece
from swa_avg.errors import OutputError
from swa_avg.files import InputFile
from swa_avg.formats import checksum_places
from swa_avg.layout import StateDict
from swa_avg.plan import Plan
from swa_avg.tensors import Record, is_dense


@dataclass(frozen=True)
class WrapperLayout:
    """A copy of a file in which some ranges come from elsewhere.

    Attributes:
        file: The file.
        records: For each range the record that it is in.
        places: Where each range begins.
        lengths: How long each range is.
        checksums: For the place of each record, the places of its CRC-32.
    """

    file: InputFile
    records: tuple[Record, ...]
    places: tuple[int, ...]
    lengths: tuple[int, ...]
    checksums: Mapping[int, tuple[int, ...]]

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return self.file.size

    def headers(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the ranges, then the checksums over what is inside.

        Args:
            checksums: The CRC-32 of each range.
        """
        for start, length in self._outside():
            for chunk in self.file.chunks(start, length):
                yield start, chunk
                start += len(chunk)
        by_record: dict[Record, list[Piece]] = {}
        for number, record in enumerate(self.records):
            start = self.places[number] - record.offset
            piece = Piece(start, self.lengths[number], checksums[number])
            by_record.setdefault(record, []).append(piece)
        for record, pieces in by_record.items():
            checksum = struct.pack("<I", combined(_with_gaps(record, pieces)))
            for place in self.checksums.get(record.offset, ()):
                yield place, checksum

    def _outside(self) -> Iterator[tuple[int, int]]:
        """Yield the start and length of each stretch that stays as it is."""
        place = 0
        for start, length in sorted(zip(self.places, self.lengths, strict=True)):
            yield place, start - place
            place = start + length
        yield place, self.file.size - place


def _with_gaps(record: Record, pieces: list[Piece]) -> list[Piece]:
    """Return the pieces and those between them, which keep their bytes."""
    ends = [0, *(edge for p in sorted(pieces) for edge in (p.start, p.start + p.length))]
    ends.append(record.length)
    gaps = [(start, end - start) for start, end in list(pairwise(ends))[::2]]
    return pieces + [read_piece(record, start, length) for start, length in gaps if length]


def layout(last: StateDict, plan: Plan) -> WrapperLayout:
    """Give every range that is computed its place in the last checkpoint's file.

    Raises:
        OutputError: A tensor cannot be replaced where it is.
    """
    if len(last.checkpoint.files) != 1:
        raise OutputError(
            "consists of several files", file=last.checkpoint.path, expected="one, to keep it whole"
        )
    (file,) = last.checkpoint.files
    ranges = []
    for work in plan.works:
        ref = last.tensors[work.name]
        if not is_dense(ref.shape, ref.stride):
            raise _irreplaceable(work.name, "is a view with gaps")
        ranges.append((ref.record, ref.record.offset + ref.offset * ref.dtype.itemsize, ref.nbytes))
    for (_, start, length), (_, after, _) in pairwise(sorted(ranges, key=lambda r: r[1:])):
        if length and start + length > after:
            name = next(w.name for w, r in zip(plan.works, ranges, strict=True) if r[1] == after)
            raise _irreplaceable(name, "shares its bytes, but not in every checkpoint")
    records, places, lengths = zip(*ranges, strict=True) if ranges else ((), (), ())
    return WrapperLayout(file, records, places, lengths, checksum_places(last.checkpoint))


def _irreplaceable(name: str, found: str) -> OutputError:
    return OutputError(
        f"{found}, so that it cannot be replaced where it is",
        tensor=name,
        remedy="Leave out --keep-wrapper",
    )
