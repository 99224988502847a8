"""Inner products of the differences between checkpoints, by group of tensors.

They are summed chunk by chunk while the mean is computed, so no tensor is read twice.
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

_AT_ONCE = 128 * 1024  # numbers of all inputs, converted to float64 at once


class Gram:
    """The inner products of one group of tensors, added up so far.

    Attributes:
        products: The float64 matrix, N by N, of <x_i - x_0, x_j - x_0> for inputs i and j.
        square: The inner product of the mean with itself.
    """

    def __init__(self, count: int) -> None:
        self.products: Array = np.zeros((count, count))
        self.square = 0.0

    def add_chunk(self, rows: Rows, mean: Array, dtype: DType) -> None:
        """Add the inner products of one chunk.

        An element that is not finite is the same in all inputs, and counts as a difference
        of 0.

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
