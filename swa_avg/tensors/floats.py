"""The floating-point formats, as they are defined: what number a pattern of bits stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from swa_avg.tensors.tensor import DTYPES, DType

# A complex number is two real ones.
_PARTS = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


class Format(NamedTuple):
    """A binary floating-point format.

    Attributes:
        fraction: Bits of the fraction.
        bias: What is subtracted from the exponent's bits.
        largest: The bits of the largest finite number; what is above is no number.
        infinite: Whether what comes next is infinity; else it is NaN, as all that is above.
        unsigned_zero: Whether the bits of -0 are those of NaN, its only ones.
    """

    fraction: int
    bias: int
    largest: int
    infinite: bool = True
    unsigned_zero: bool = False

    @property
    def sign(self) -> int:
        """The bit of the sign."""
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


def part(dtype: DType) -> DType:
    """Return the dtype of a complex number's parts, and of others themselves."""
    return DTYPES[_PARTS.get(dtype.name, dtype.name)]


def value_of(bits: int, form: Format) -> float:
    """Return the number that bits stand for: every format's are float64's too."""
    size = bits & (form.sign - 1)
    if size > form.largest or (form.unsigned_zero and bits == form.sign):
        infinite = form.infinite and size == form.largest + 1
        return math.nan if not infinite else -math.inf if bits & form.sign else math.inf
    exponent, fraction = size >> form.fraction, size & ((1 << form.fraction) - 1)
    if exponent:
        fraction |= 1 << form.fraction
    value = math.ldexp(fraction, max(exponent, 1) - form.bias - form.fraction)
    return -value if bits & form.sign else value
