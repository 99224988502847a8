"""The mean of numbers of up to 11 bits (float16, bfloat16, float8), in float32 if that is exact.

The sum of such numbers is usually exact in float32, which is much faster than float64. The
quotient of an exact sum by a count is then correctly rounded too: suppose that it is rounded
to a tie m between results of 11 bits. Then |sum - count * m| is at most count * ulp(m) / 2,
which is less than ulp(sum). For counts of up to `MOST_ROWS`, both are multiples of ulp(sum),
so they are equal, and the quotient is the tie itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.arithmetic import Attempts, RoundingDetector
from swa_avg.kernel.compensated import Rows
from swa_avg.kernel.elements import is_small, narrow, scale, widen_scaled
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

# A tie between results of 11 bits has 12 bits; its product with a count must fit in 24.
MOST_ROWS = 1 << 11


def is_few(rows: Rows, dtype: DType, count: int) -> bool:
    """Return whether sums of rows may be computed in float32.

    Args:
        rows: The rows.
        dtype: The dtype of the mean.
        count: The number of rows that are added up.
    """
    small = len(rows) == 1 and is_small(rows[0].dtype)
    return small and count <= MOST_ROWS and dtype.significand <= 24


class FewBits:
    """Converts rows of few bits to float32, in a reused buffer, and computes their mean.

    Args:
        rounded: Detects additions that were rounded.
    """

    def __init__(self, rounded: RoundingDetector) -> None:
        self._rounded = rounded
        self._buffer = self._mean = np.empty(0, np.float32)
        self._attempts = Attempts()

    def widened(self, rows: Array, dtype: DType) -> Array:
        """Return rows of a small dtype as float32 numbers, divided by the dtype's `scale`."""
        if self._buffer.size < rows.size:
            self._buffer = np.empty(rows.size, np.float32)
        single = self._buffer[: rows.size].reshape(rows.shape)
        widen_scaled(rows, single, dtype)
        return single

    def averaged(self, single: Array, kind: DType, out: Array, dtype: DType) -> bool:
        """Write the mean of rows into `out`, if their sum is exact in float32.

        After a sum that was not exact, some calls return False at once (see `Attempts`).

        Args:
            single: The result of `widened`, of up to `MOST_ROWS` rows.
            kind: The dtype of the rows.
            out: The result.
            dtype: The dtype of `out`, of up to 24 bits.

        Returns:
            Whether the sum was exact. If not, `out` is unchanged.
        """
        if not self._attempts.is_due():
            return False
        self._rounded.clear()
        mean = np.add.reduce(single, axis=0)
        exact = not self._rounded.raised()
        self._attempts.ended(well=exact)
        if exact:
            self.finish(mean, len(single), kind, out, dtype)
        return exact

    def finish(self, total: Array, count: int, kind: DType, out: Array, dtype: DType) -> None:
        """Write the mean of rows into `out`, from their exact sum in float32.

        Args:
            total: The sum of the rows, each divided by the `scale` of `kind`.
            count: The number of rows.
            kind: The dtype of the rows.
            out: The result.
            dtype: The dtype of `out`, of up to 24 bits.
        """
        if self._mean.size < total.size:
            self._mean = np.empty(total.size, np.float32)
        mean = self._mean[: total.size]
        # A power of two in the divisor changes only the exponent of the quotient.
        np.divide(total, np.float32(count / scale(kind)), out=mean)
        narrow(mean, out, dtype)
