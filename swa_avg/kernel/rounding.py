"""Rounding float64 numbers to another dtype once, and noticing where the processor rounds.

torch goes from float64 to the small dtypes through float32, which rounds twice.
A number that is rounded to odd before it is rounded to nearest has in effect
been rounded once (Boldo & Melquiond, "Emulation of FMA and correctly rounded
sums", IEEE Trans. Computers 57(4), 2008).
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import ClassVar

import torch

from swa_avg.tensors import DTYPES, DType, Kind

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALLEST_NORMAL = 2.0**-126
# Adding and subtracting it rounds to a multiple of 2^-133, bfloat16's smallest number.
_BFLOAT16_SUBNORMAL = 1.5 * 2.0 ** (52 - 133)


def carrier(dtype: DType) -> torch.dtype:
    """Return the torch dtype in which elements travel: bits where there is no arithmetic."""
    # complex32 is bits too: torch warns of every tensor of it.
    if dtype.kind in (Kind.EXACT, Kind.OPAQUE) or dtype.name == "complex32":
        return BITS[dtype.itemsize]
    made = getattr(torch, dtype.name)
    assert isinstance(made, torch.dtype)
    return made


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


def round_into(
    values: torch.Tensor,
    out: torch.Tensor,
    dtype: DType,
    scratch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Round float64 numbers into `out` once: to nearest, ties to even.

    torch goes from float64 to the small dtypes through float32, which would
    round twice; here the first of these roundings is to odd, which does no harm.

    Args:
        values: One-dimensional, not empty.
        out: As long as `values`, of `dtype`.
        dtype: The dtype of `out`.
        scratch: float64 and float32 memory to work in, as long as `values`.
    """
    if dtype.significand >= 24:
        out.copy_(values)
        return
    wide, middle = scratch
    below = (1 << 29) - 1  # the bits that float32 does not have
    bits, odd = values.view(torch.int64), wide.view(torch.int64)
    torch.bitwise_and(bits, below, out=odd)
    odd.add_(below).bitwise_or_(bits).bitwise_and_(~below)
    detector = rounding_detector()
    detector.clear()
    middle.copy_(wide)
    # Numbers of 24 bits are rounded again only where float32 has fewer, below its normal ones.
    if dtype is DTYPES["bfloat16"] and detector.raised():
        tiny = middle.abs() < _SMALLEST_NORMAL
        few = values[tiny]
        rounded = (few + _BFLOAT16_SUBNORMAL) - _BFLOAT16_SUBNORMAL
        middle[tiny] = torch.copysign(rounded, few).to(torch.float32)
    out.copy_(middle)


def round_at(places: torch.Tensor, values: torch.Tensor, out: torch.Tensor, dtype: DType) -> None:
    """Round `values` into some places of `out`; refuse those that become infinite."""
    if places.numel():
        rounded = torch.empty(places.numel(), dtype=out.dtype)
        scratch = torch.empty_like(values), torch.empty_like(values, dtype=torch.float32)
        round_into(values, rounded, dtype, scratch)
        _refuse_overflow(values, rounded, places)
        out[places] = rounded


def cast_into(values: torch.Tensor, out: torch.Tensor, dtype: DType) -> None:
    """Convert one chunk to the output's dtype, rounding once.

    Raises:
        NonFiniteError: A finite element becomes infinite or NaN.
    """
    round_at(torch.arange(out.numel()), values.to(torch.float64), out, dtype)


def _refuse_overflow(wide: torch.Tensor, out: torch.Tensor, places: torch.Tensor) -> None:
    over = torch.isfinite(wide) & ~torch.isfinite(out.to(torch.float64))
    if over.any():
        first = int(over.nonzero()[0])
        raise NonFiniteError(None, int(places[first]), float(wide[first]))


class RoundingDetector:
    """The processor's note, kept for each thread, that some operation had to round.

    Of the C standard's <fenv.h>: FE_INEXACT stays set until it is cleared.
    """

    _INEXACT: ClassVar = {
        "x86_64": 0x20,
        "AMD64": 0x20,
        "i686": 0x20,
        "aarch64": 0x10,
        "arm64": 0x10,
    }

    def __init__(self) -> None:
        self._mask = self._INEXACT[platform.machine()]
        library = ctypes.PyDLL(None)  # PyDLL: the call is too short to give up the GIL for
        self._clear = library.feclearexcept
        self._test = library.fetestexcept

    def clear(self) -> None:
        """Forget earlier roundings."""
        self._clear(self._mask)

    def raised(self) -> bool:
        """Tell whether any operation has rounded since `clear`."""
        return bool(self._test(self._mask))


class AlwaysRounded(RoundingDetector):
    """Where the processor cannot be asked: every addition is taken to have rounded."""

    def __init__(self) -> None:
        pass

    def clear(self) -> None:
        """Do nothing."""

    def raised(self) -> bool:
        """Return True."""
        return True


@cache
def rounding_detector() -> RoundingDetector:
    """Return a detector that was seen to work, on more elements than torch leaves to one thread.

    One rounding in the last element must be noticed, and none where there is none.
    """
    size = 1 << 16
    try:
        detector = RoundingDetector()
    except (KeyError, OSError, AttributeError, TypeError):
        return AlwaysRounded()
    ones = torch.ones(size, dtype=torch.float64)
    values = torch.ones(size, dtype=torch.float32)
    detector.clear()
    torch.add(ones, values, out=torch.empty_like(ones))
    quiet = not detector.raised()
    values[-1] = 2.0**-60
    detector.clear()
    torch.add(ones, values, out=torch.empty_like(ones))
    return detector if quiet and detector.raised() else AlwaysRounded()
