"""What averaging finds out beside the mean: checksums, differences, inner products.

Tasks add to it from any thread. What several processes have found becomes one
by `merge`, as if one process had found all of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import torch

from swa_avg.checksums import Ledger, Piece
from swa_avg.grams import Gram
from swa_avg.plan import Work
from swa_avg.tensors import Record


class Findings:
    """What the tasks of one run have found so far.

    Attributes:
        ledger: The checksums of what was read.
        written: For each output and each work the checksums of what was written.
        differing: The numbers of copied works that are not the same in all inputs.
        grams: The inner products of each group.
        bytes_read: Bytes read from all inputs.
    """

    def __init__(self, works: Sequence[Work], outputs: int) -> None:
        """Begin with nothing.

        Args:
            works: All that is computed, whoever computes it.
            outputs: How many outputs are written.
        """
        self.ledger = Ledger()
        self.written: list[list[list[Piece]]] = [[[] for _ in works] for _ in range(outputs)]
        self.differing: set[int] = set()
        self.grams: dict[int, Gram] = {}
        self.bytes_read = 0
        self._works = works
        self._lock = threading.Lock()

    def add_gram(self, group: int, gram: Gram) -> None:
        """Add a part of a group's inner products."""
        with self._lock:
            if group in self.grams:
                self.grams[group].add(gram)
            else:
                self.grams[group] = gram

    def to_bytes(self) -> bytes:
        """Return it as what another process can `merge`."""
        numbers = {record: number for number, record in enumerate(self._records())}
        content = {
            "read": self.bytes_read,
            "found": [[numbers[record], crc] for record, crc in self.ledger.found.items()],
            "pieces": [
                [numbers[record], name, list(map(_plain, pieces))]
                for record, name, pieces in self.ledger.pieces()
            ],
            "written": [
                [
                    [work, list(map(_plain, pieces))]
                    for work, pieces in enumerate(of_output)
                    if pieces
                ]
                for of_output in self.written
            ],
            "differing": sorted(self.differing),
            # As text a float64 keeps all its bits.
            "grams": [
                [group, gram.products.tolist(), gram.square] for group, gram in self.grams.items()
            ],
        }
        return json.dumps(content, separators=(",", ":")).encode()

    def merge(self, data: bytes) -> None:
        """Add what another process has found, which has done other tasks of the same works.

        Args:
            data: What its `to_bytes` returned.

        Raises:
            FormatError: All of a record has been read, and its bytes are not those that were saved.
        """
        other: dict[str, Any] = json.loads(data)
        records = self._records()
        self.bytes_read += other["read"]
        for number, crc in other["found"]:
            self.ledger.found[records[number]] = crc
        for number, name, pieces in other["pieces"]:
            for piece in pieces or [None]:
                self.ledger.add(records[number], name, piece and Piece(*piece))
        for mine, theirs in zip(self.written, other["written"], strict=True):
            for work, pieces in theirs:
                mine[work] += [Piece(*piece) for piece in pieces]
        self.differing.update(other["differing"])
        for group, products, square in other["grams"]:
            gram = Gram(len(products))
            gram.products += torch.tensor(products, dtype=torch.float64)
            gram.square = square
            self.add_gram(group, gram)

    def _records(self) -> list[Record]:
        """Return all records that are read, in the same order in every process."""
        sources = (source for work in self._works for source in work.sources)
        return list(dict.fromkeys(record for source in sources for record in source.records))


def _plain(piece: Piece) -> tuple[int, int, int]:
    return piece.start, piece.length, piece.crc
