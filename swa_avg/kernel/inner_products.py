"""How far checkpoints are from each other: inner products of their differences, by groups.

Summed up chunk by chunk while the mean is computed; no tensor is read twice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.compensated import Rows, count_of
from swa_avg.kernel.elements import wide, widen
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

_AT_ONCE = 128 * 1024  # numbers of all inputs, in float64


class Gram:
    """The inner products of one group of tensors, so far.

    Attributes:
        products: float64, N by N: of x_i - x_0 and x_j - x_0, i and j the inputs.
        square: Of the mean with itself.
    """

    def __init__(self, count: int) -> None:
        self.products: Array = np.zeros((count, count))
        self.square = 0.0

    def add_chunk(self, rows: Rows, mean: Array, dtype: DType) -> None:
        """Add what one chunk has to them.

        What is not finite is the same in all inputs, and counts as no difference.

        Args:
            rows: The inputs, N rows of the length of the chunk.
            mean: Their mean.
            dtype: The dtype of `mean`.
        """
        count = count_of(rows)
        step = max(1, _AT_ONCE // count)
        for start in range(0, mean.size, step):
            part = slice(start, start + step)
            size, first = min(step, mean.size - start), 0
            numbers = np.empty((count, size))
            for block in rows:
                values = block.values[:, part]
                widen(values, numbers[first : first + len(values)], block.dtype)
                first += len(values)
            self._add(numbers, wide(mean[part], dtype))

    def _add(self, rows: Array, mean: Array) -> None:
        first = rows[0].copy()
        rows -= first
        products = rows @ rows.T
        if not np.isfinite(products).all():
            rows[:, ~np.isfinite(first)] = 0
            products = rows @ rows.T
        self.products += products
        square = float(mean @ mean)
        if not math.isfinite(square):
            mean = mean[np.isfinite(mean)]
            square = float(mean @ mean)
        self.square += square

    def add(self, other: Gram) -> None:
        """Add another part of the same group."""
        self.products += other.products
        self.square += other.square
