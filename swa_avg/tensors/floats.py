"""Floating-point formats: their definitions, and the number that a bit pattern represents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from swa_avg.tensors.tensor import DTYPES, DType

# A complex number consists of two real numbers.
_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


class Format(NamedTuple):
    """A binary floating-point format.

    Attributes:
        fraction: The number of bits of the fraction.
        bias: The bias of the exponent.
        largest: The bits of the largest finite number; larger bit patterns are not finite.
        infinite: Whether the bit pattern after `largest` is infinity; all others are NaN.
        unsigned_zero: Whether the format has no -0; its bit pattern is then the only NaN.
    """

    fraction: int
    bias: int
    largest: int
    infinite: bool = True
    unsigned_zero: bool = False

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << self.largest.bit_length()


# IEEE 754-2019, table 3.5; bfloat16 as in Intel's white paper 338302-001; E4M3 and E5M2 of
# Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1; FNUZ of Noune et al.
# 2022, "8-bit Numerical Formats for Deep Neural Networks", section 2.
FORMATS: Mapping[str, Format] = {
    "float64": Format(52, 1023, 0x7FEFFFFFFFFFFFFF),
    "float32": Format(23, 127, 0x7F7FFFFF),
    "float16": Format(10, 15, 0x7BFF),
    "bfloat16": Format(7, 127, 0x7F7F),
    "float8_e4m3fn": Format(3, 7, 0x7E, infinite=False),
    "float8_e4m3fnuz": Format(3, 8, 0x7F, infinite=False, unsigned_zero=True),
    "float8_e5m2": Format(2, 15, 0x7B),
    "float8_e5m2fnuz": Format(2, 16, 0x7F, infinite=False, unsigned_zero=True),
}


def real_dtype(dtype: DType) -> DType:
    """Return the dtype of the real and imaginary parts; a real dtype is returned itself."""
    return DTYPES[_PARTS.get(dtype.name, dtype.name)]


def value_of(bits: int, form: Format) -> float:
    """Return the number that a bit pattern represents; float64 holds it exactly."""
    size = bits & (form.sign - 1)
    if size > form.largest or (form.unsigned_zero and bits == form.sign):
        infinite = form.infinite and size == form.largest + 1
        return math.nan if not infinite else -math.inf if bits & form.sign else math.inf
    exponent, fraction = size >> form.fraction, size & ((1 << form.fraction) - 1)
    if exponent:
        fraction |= 1 << form.fraction
    value = math.ldexp(fraction, max(exponent, 1) - form.bias - form.fraction)
    return -value if bits & form.sign else value
