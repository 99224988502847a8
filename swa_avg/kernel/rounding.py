"""Rounding of float64 numbers to another dtype, once.

The conversion from float64 to the small dtypes goes through float32, which would round
twice. A number that is first rounded to odd and then to nearest has the same value as if it
were rounded once (Boldo & Melquiond, "Emulation of FMA and correctly rounded sums", IEEE
Trans. Computers 57(4), 2008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.elements import narrow, non_finite, wide
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

_SMALLEST_NORMAL = 2.0**-126
# Adding and subtracting it rounds to a multiple of 2^-133, bfloat16's smallest number.
_BFLOAT16_SUBNORMAL = 1.5 * 2.0 ** (52 - 133)
_BELOW = (1 << 29) - 1  # the bits of a float64's fraction that float32 does not have


class NonFiniteError(ArithmeticError):
    """An element that is NaN or infinite, and not the same in all inputs.

    Attributes:
        source: The number of the first input in which it is not finite; None if it is
            finite in all inputs, and rounding to the output's dtype made it infinite.
        element: The index of the element in the chunk.
        value: The value of the element.
    """

    def __init__(self, source: int | None, element: int, value: float) -> None:
        super().__init__(source, element, value)
        self.source = source
        self.element = element
        self.value = value


def round_into(values: Array, out: Array, dtype: DType) -> None:
    """Round float64 numbers into `out` once, to nearest, ties to even.

    Args:
        values: The numbers, one-dimensional.
        out: The result, as long as `values`, with the `carrier` of `dtype`.
        dtype: The dtype of `out`.
    """
    if dtype.significand >= 24:
        np.copyto(out, values, casting="same_kind")
        return
    # Round to odd first: the last bit that stays becomes 1 if any bit that is cut off is 1.
    bits = values.view(np.int64)
    odd = bits & _BELOW
    odd += _BELOW
    odd |= bits
    odd &= ~_BELOW
    single = odd.view(np.float64).astype(np.float32)
    # The conversion to float32 is exact, except for subnormal numbers, which have fewer bits.
    if dtype.name == "bfloat16":
        tiny = np.abs(single) < _SMALLEST_NORMAL
        if tiny.any():
            few = values[tiny]
            rounded = (few + _BFLOAT16_SUBNORMAL) - _BFLOAT16_SUBNORMAL
            single[tiny] = np.copysign(rounded, few)
    narrow(single, out, dtype)


def round_at(places: Array, values: Array, out: Array, dtype: DType) -> None:
    """Round `values` into the given places of `out`; refuse those that become infinite."""
    rounded = np.empty(places.size, out.dtype)
    round_into(values, rounded, dtype)
    over = np.isfinite(values) & non_finite(rounded, dtype)
    if over.any():
        first = int(over.argmax())
        raise NonFiniteError(None, int(places[first]), float(values[first]))
    out[places] = rounded


def cast_into(values: Array, kind: DType, out: Array, dtype: DType) -> None:
    """Convert one chunk to the output's dtype, rounding once.

    Args:
        values: The elements.
        kind: The dtype of the elements.
        out: The result, as long as `values`, with the `carrier` of `dtype`.
        dtype: The dtype of `out`.

    Raises:
        NonFiniteError: A finite element becomes infinite or NaN.
    """
    round_at(np.arange(out.size), wide(values, kind), out, dtype)
