"""Rounding float64 numbers to another dtype once.

The way from float64 to the small dtypes goes through float32, which would round twice.
A number that is rounded to odd before it is rounded to nearest has in effect
been rounded once (Boldo & Melquiond, "Emulation of FMA and correctly rounded
sums", IEEE Trans. Computers 57(4), 2008).
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
_BELOW = (1 << 29) - 1  # the bits of a float64 that float32 does not have


class NonFiniteError(ArithmeticError):
    """An element that is NaN or infinite, and not the same in all inputs.

    Attributes:
        source: The number of the first input in which it is not finite; None if
            it is finite in all, and became infinite by rounding to the output's dtype.
        element: Its place in the chunk.
        value: What it is there.
    """

    def __init__(self, source: int | None, element: int, value: float) -> None:
        super().__init__(source, element, value)
        self.source = source
        self.element = element
        self.value = value


def round_into(values: Array, out: Array, dtype: DType) -> None:
    """Round float64 numbers into `out` once: to nearest, ties to even.

    Args:
        values: One-dimensional.
        out: As long as `values`, what carries `dtype`.
        dtype: The dtype of `out`.
    """
    if dtype.significand >= 24:
        np.copyto(out, values, casting="same_kind")
        return
    # To odd first: the bits that are cut off carry into the last one that stays.
    bits = values.view(np.int64)
    odd = bits & _BELOW
    odd += _BELOW
    odd |= bits
    odd &= ~_BELOW
    single = odd.view(np.float64).astype(np.float32)
    # Numbers of 24 bits are rounded again only where float32 has fewer, below its normal ones.
    if dtype.name == "bfloat16":
        tiny = np.abs(single) < _SMALLEST_NORMAL
        if tiny.any():
            few = values[tiny]
            rounded = (few + _BFLOAT16_SUBNORMAL) - _BFLOAT16_SUBNORMAL
            single[tiny] = np.copysign(rounded, few)
    narrow(single, out, dtype)


def round_at(places: Array, values: Array, out: Array, dtype: DType) -> None:
    """Round `values` into some places of `out`; refuse those that become infinite."""
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
        kind: Their dtype.
        out: As long as `values`, what carries `dtype`.
        dtype: The dtype of `out`.

    Raises:
        NonFiniteError: A finite element becomes infinite or NaN.
    """
    round_at(np.arange(out.size), wide(values, kind), out, dtype)
