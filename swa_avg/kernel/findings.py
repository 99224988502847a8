"""The results of averaging besides the mean: checksums, differences, inner products.

Each task has findings of its own. They are sent between threads, processes and ranks as
plain numbers, and `merge` combines the findings of all tasks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from swa_avg.kernel.inner_products import Gram
from swa_avg.planning import Work
from swa_avg.tensors import Ledger, Piece, Record

Plain = dict[str, Any]


class Records:
    """All records that works read, numbered in the same way in every process.

    Most tasks have no findings for single records, so the numbers are computed when needed.

    Args:
        works: The works that read the records.
    """

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    @cached_property
    def all(self) -> Sequence[Record]:
        """The records by number; a record that several works read has several numbers."""
        sources = (source for work in self._works for source in work.sources)
        return [record for source in sources for record in source.records]

    @cached_property
    def numbers(self) -> Mapping[Record, int]:
        """One number for each record."""
        return dict(zip(self.all, range(len(self.all)), strict=True))


def shared(works: Sequence[Work]) -> frozenset[Record]:
    """Return the records that several works share, judged by the last input."""
    last = [work.sources[-1].records if work.sources else () for work in works]
    times = Counter(chain.from_iterable(last))
    return frozenset(
        record
        for work, seen in zip(works, last, strict=True)
        if any(times[record] > 1 for record in seen)
        for source in work.sources
        for record in source.records
    )


class Findings:
    """The findings of one task or of several.

    Attributes:
        ledger: The checksums of the bytes read.
        written: For each output, the checksums of the bytes written, by the work's number.
        differing: For each output, the numbers of copied works that are not the same in all
            inputs.
        grams: The inner products of each group.
        bytes_read: Bytes read from all inputs.
    """

    def __init__(self, outputs: int, kept: Container[Record] = ()) -> None:
        """Create empty findings.

        Args:
            outputs: The number of outputs.
            kept: Records whose checksums are kept even if the file records them.
        """
        self.ledger = Ledger(kept)
        self.written: list[dict[int, list[Piece]]] = [defaultdict(list) for _ in range(outputs)]
        self.differing: list[set[int]] = [set() for _ in range(outputs)]
        self.grams: dict[int, Gram] = {}
        self.bytes_read = 0

    def add_gram(self, group: int, gram: Gram) -> None:
        """Add a part of a group's inner products."""
        if group in self.grams:
            self.grams[group].add(gram)
        else:
            self.grams[group] = gram

    def plain(self, records: Records) -> Plain:
        """Return the findings as numbers and names that JSON can hold, for `merge`."""
        return {
            "read": self.bytes_read,
            # Two flat lists, because there may be very many records.
            "found": [records.numbers[record] for record in self.ledger.found],
            "crcs": [*self.ledger.found.values()],
            "pieces": [
                [records.numbers[record], name, list(map(_plain, pieces))]
                for record, name, pieces in self.ledger.pieces()
            ],
            "written": [
                [[work, list(map(_plain, pieces))] for work, pieces in of_output.items()]
                for of_output in self.written
            ],
            "differing": list(map(sorted, self.differing)),
            # JSON text keeps all bits of a float64.
            "grams": [
                [group, gram.products.tolist(), gram.square] for group, gram in self.grams.items()
            ],
        }

    def merge(self, other: Plain, records: Records) -> None:
        """Add the findings of other tasks of the same works.

        Args:
            other: The result of `plain`.
            records: The records of the works.

        Raises:
            FormatError: A record is now complete, and its checksum is wrong.
        """
        self.bytes_read += other["read"]
        for number, crc in zip(other["found"], other["crcs"], strict=True):
            self.ledger.found[records.all[number]] = crc
        for number, name, pieces in other["pieces"]:
            for piece in pieces or [None]:
                self.ledger.add(records.all[number], name, piece and Piece(*piece))
        for mine, theirs in zip(self.written, other["written"], strict=True):
            for work, pieces in theirs:
                mine[work] += [Piece(*piece) for piece in pieces]
        for found, numbers in zip(self.differing, other["differing"], strict=True):
            found.update(numbers)
        for group, products, square in other["grams"]:
            gram = Gram(len(products))
            gram.products += np.array(products)
            gram.square = square
            self.add_gram(group, gram)


def _plain(piece: Piece) -> tuple[int, int, int]:
    return piece.start, piece.length, piece.crc
