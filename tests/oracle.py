"""What a mean must be: rational arithmetic on bit patterns, sharing nothing with swa_avg.

Numbers are taken apart and put together by the definition of their format; no
floating-point operation, of torch or of Python, has a part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: sign, exponent, fraction."""

    exponent: int
    fraction: int
    bias: int
    largest: int  # the bits of the largest finite number; what is above is no number

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.fraction)

    def value(self, bits: int) -> Fraction | None:
        """Return the number that `bits` stand for; None for NaN and infinity."""
        magnitude = bits & (self.sign - 1)
        if magnitude > self.largest or (self.unsigned_zero and bits == self.sign):
            return None
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        if exponent:
            fraction |= 1 << self.fraction
        scale = Fraction(2) ** (max(exponent, 1) - self.bias - self.fraction)
        return (-1 if bits & self.sign else 1) * fraction * scale

    @property
    def unsigned_zero(self) -> bool:
        """Whether NaN has taken the place of -0, as in the fnuz formats."""
        return self.largest == self.sign - 1

    def bits(self, value: Fraction) -> int:
        """Return the bits of the number nearest to `value`, of two the even one."""
        size = abs(value)
        lowest = 1 - self.bias
        exponent = lowest
        if size:
            exponent = size.numerator.bit_length() - size.denominator.bit_length()
            if Fraction(2) ** exponent > size:
                exponent -= 1
            exponent = max(exponent, lowest)
        steps = round(size / Fraction(2) ** (exponent - self.fraction))  # half to even
        magnitude = ((exponent - lowest) << self.fraction) + steps
        assert magnitude <= self.largest, "a mean is no larger than what it is the mean of"
        negative = value < 0 and not (self.unsigned_zero and magnitude == 0)
        return magnitude | (self.sign if negative else 0)


FORMATS = {
    torch.float64: Format(11, 52, 1023, 0x7FEFFFFFFFFFFFFF),
    torch.float32: Format(8, 23, 127, 0x7F7FFFFF),
    torch.float16: Format(5, 10, 15, 0x7BFF),
    torch.bfloat16: Format(8, 7, 127, 0x7F7F),
    torch.float8_e4m3fn: Format(4, 3, 7, 0x7E),
    torch.float8_e4m3fnuz: Format(4, 3, 8, 0x7F),
    torch.float8_e5m2: Format(5, 2, 15, 0x7B),
    torch.float8_e5m2fnuz: Format(5, 2, 16, 0x7F),
}
PARTS = {torch.complex128: torch.float64, torch.complex64: torch.float32}


def bits(values: Tensor) -> list[int]:
    """Return the bit patterns of a tensor's elements, in C order."""
    size = values.dtype.itemsize
    flat = values.detach().resolve_conj().contiguous().reshape(-1)
    return [number & ((1 << 8 * size) - 1) for number in flat.view(INTEGERS[size]).tolist()]


def from_bits(patterns: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a one-dimensional tensor of these bit patterns."""
    size = dtype.itemsize
    raw = b"".join(number.to_bytes(size, "little") for number in patterns)
    return torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def mean(
    inputs: Sequence[Tensor], dtype: torch.dtype | None = None, weights: Sequence[int] = ()
) -> Tensor:
    """Return the mean of tensors of one shape, rounded once to `dtype`.

    Without weights each input counts once. Elements with the same bits in all inputs keep them.
    What is -0 in all of them is -0 in any dtype that has it.
    """
    wanted = dtype or inputs[0].dtype
    if wanted in PARTS:
        parts = [torch.view_as_real(values) for values in inputs]
        return torch.view_as_complex(mean(parts, PARTS[wanted], weights))
    same_dtype = all(values.dtype == wanted for values in inputs)
    forms = [FORMATS[values.dtype] for values in inputs]
    times = weights or [1] * len(inputs)
    made = []
    for column in zip(*map(bits, inputs), strict=True):
        patterns = set(column)
        if same_dtype and len(patterns) == 1:
            made.append(patterns.pop())
            continue
        numbers = [form.value(pattern) for pattern, form in zip(column, forms, strict=True)]
        assert None not in numbers, "NaN and infinity have no mean"
        zeros = zip(column, forms, strict=True)
        if all(pattern == form.sign for pattern, form in zeros):
            made.append(0 if FORMATS[wanted].unsigned_zero else FORMATS[wanted].sign)
            continue
        exact = sum((n * w for n, w in zip(numbers, times, strict=True)), Fraction(0)) / sum(times)
        made.append(FORMATS[wanted].bits(exact))
    return from_bits(made, wanted).reshape(inputs[0].shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have one dtype and shape, and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        return same_bits(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    return bits(a) == bits(b)
