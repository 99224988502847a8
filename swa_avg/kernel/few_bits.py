"""The mean of numbers of up to 11 bits (float16, bfloat16, float8), in float32 where it is exact.

They mostly have an exact sum even in float32; where they have, all is done in it, which is
much less work. Its quotient by a count, were it rounded onto a tie m between results of 11
bits, would be the tie itself: |sum - count * m| would be at most count * ulp(m) / 2, which is
less than ulp(sum); but for counts that leave the bits of a tie room both are multiples of
ulp(sum), so they are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.arithmetic import RoundingDetector
from swa_avg.kernel.elements import narrow, scale, widen_scaled
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

# So many: a tie between results of 11 bits has 12, and its product with the count is to be
# exact in 24.
MOST_ROWS = 1 << 11
_MOST_WAITED = 64  # sums that are not tried in float32 after one that was not exact in it


class FewBits:
    """Rows of few bits as float32, in a buffer that it keeps, and their mean.

    Args:
        rounded: Tells whether an addition had to round.
    """

    def __init__(self, rounded: RoundingDetector) -> None:
        self._rounded = rounded
        self._buffer = np.empty(0, np.float32)
        self._waited = self._waiting = 0

    def widened(self, rows: Array, dtype: DType) -> Array:
        """Return rows of a small dtype as float32 numbers, each over the dtype's `scale`."""
        if self._buffer.size < rows.size:
            self._buffer = np.empty(rows.size, np.float32)
        single = self._buffer[: rows.size].reshape(rows.shape)
        widen_scaled(rows, single, dtype)
        return single

    def averaged(self, single: Array, kind: DType, out: Array, dtype: DType) -> bool:
        """Write the mean of rows into `out`, if their sum is exact in float32.

        Where it was not, it likely is not in what follows either: that is not tried for a
        while, and for the longer the more often it was in vain.

        Args:
            single: What `widened` has made of them, of up to `MOST_ROWS`.
            kind: Their dtype.
            out: Where the mean goes.
            dtype: The dtype of `out`, of up to 24 bits.

        Returns:
            Whether it was exact. If not, `out` is as it was.
        """
        if self._waited < self._waiting:
            self._waited += 1
            return False
        self._waited = 0
        self._rounded.clear()
        mean = np.add.reduce(single, axis=0)
        if self._rounded.raised():
            self._waiting = min(_MOST_WAITED, 2 * self._waiting + 1)
            return False
        self._waiting = 0
        # A power of two in the divisor changes nothing but the quotient's exponent.
        np.divide(mean, np.float32(len(single) / scale(kind)), out=mean)
        narrow(mean, out, dtype)
        return True
