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

    @property
    def unit(self) -> int:
        """The exponent of the smallest number: every number is a multiple of 2^-unit."""
        return self.bias + self.fraction - 1

    def multiple(self, bits: int) -> int | None:
        """Return the number that `bits` stand for, in units of the smallest; None for no number."""
        magnitude = bits & (self.sign - 1)
        if magnitude > self.largest or (self.unsigned_zero and bits == self.sign):
            return None
        exponent, fraction = magnitude >> self.fraction, magnitude & ((1 << self.fraction) - 1)
        if exponent:
            fraction = (fraction | 1 << self.fraction) << (exponent - 1)
        return -fraction if bits & self.sign else fraction

    def value(self, bits: int) -> Fraction | None:
        """Return the number that `bits` stand for; None for NaN and infinity."""
        multiple = self.multiple(bits)
        return None if multiple is None else Fraction(multiple, 1 << self.unit)

    @property
    def unsigned_zero(self) -> bool:
        """Whether NaN has taken the place of -0, as in the fnuz formats."""
        return self.largest == self.sign - 1

    def bits(self, value: Fraction) -> int:
        """Return the bits of the number nearest to `value`, of two the even one."""
        return self.nearest(value.numerator << self.unit, value.denominator)

    def nearest(self, multiple: int, divisor: int) -> int:
        """Return the bits of the number nearest to `multiple / divisor` units, of two the even."""
        size = abs(multiple)
        # As many times is it halved until its whole part has the bits of a fraction and one.
        halved = max((size // divisor).bit_length() - self.fraction - 1, 0)
        divisor <<= halved
        steps, rest = divmod(size, divisor)
        if 2 * rest > divisor or (2 * rest == divisor and steps % 2):
            steps += 1
        magnitude = (halved << self.fraction) + steps
        assert magnitude <= self.largest, "a mean is no larger than what it is the mean of"
        negative = multiple < 0 and not (self.unsigned_zero and magnitude == 0)
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
    mask = (1 << 8 * values.dtype.itemsize) - 1
    return [number & mask for number in _integers(values).tolist()]


def _integers(values: Tensor) -> Tensor:
    """Return the bits of a tensor's elements as integers, in C order."""
    flat = values.detach().resolve_conj().contiguous().reshape(-1)
    return flat.view(INTEGERS[values.dtype.itemsize])


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
    target = FORMATS[wanted]
    unit = max(form.unit for form in (*forms, target))
    times = weights or [1] * len(inputs)
    factors = [time << (unit - form.unit) for time, form in zip(times, forms, strict=True)]
    divisor = sum(times) << (unit - target.unit)
    made = []
    for column in zip(*map(bits, inputs), strict=True):
        if same_dtype and column.count(column[0]) == len(column):
            made.append(column[0])
            continue
        numbers = [form.multiple(pattern) for pattern, form in zip(column, forms, strict=True)]
        assert None not in numbers, "NaN and infinity have no mean"
        zeros = zip(column, forms, strict=True)
        if all(pattern == form.sign for pattern, form in zeros):
            made.append(0 if target.unsigned_zero else target.sign)
            continue
        exact = sum(n * factor for n, factor in zip(numbers, factors, strict=True))
        made.append(target.nearest(exact, divisor))
    return from_bits(made, wanted).reshape(inputs[0].shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have one dtype and shape, and the same bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_complex():
        return same_bits(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()))
    return bool(torch.equal(*(_integers(values) for values in (a, b))))
