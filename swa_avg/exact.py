"""The exact mean of tensors, rounded once. The arithmetic only; knows no files.

A float64 sum of float32 numbers is nearly always exact, but not always, and a
mean that is rounded to float64 and then to float32 has been rounded twice.
Both are put right here at almost no cost:

* The processor notes when an addition had to round. Where it did, the part
  that was lost is recovered (Knuth's TwoSum, The Art of Computer Programming
  vol. 2, 4.2.2, theorem B) and kept in a second float64.
* A number that is rounded to odd before it is rounded to nearest has in effect
  been rounded once (Boldo & Melquiond, "Emulation of FMA and correctly rounded
  sums", IEEE Trans. Computers 57(4), 2008).

The quotient of an exact float64 sum by a count needs no such care. Were it
rounded onto a tie m of a dtype of up to 24 bits, |sum - count * m| would be at
most count * ulp(m) / 2, which is less than ulp(sum); but both are multiples of
ulp(sum), so they are equal, and the tie is a true one.

What does not fit in two float64, which takes exponents more than 2^53 apart, is
done element by element in rational arithmetic.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import cache
from typing import ClassVar

import torch

from swa_avg.tensors import DTYPES, DType

Inputs = Callable[[], Iterable[torch.Tensor]]

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALLEST_NORMAL = 2.0**-126
# Adding and subtracting it rounds to a multiple of 2^-133, bfloat16's smallest number.
_BFLOAT16_SUBNORMAL = 1.5 * 2.0 ** (52 - 133)


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


class Averager:
    """Averages chunks of at most `capacity` elements, in buffers that it keeps.

    Used by one thread, with torch's own threads off (`torch.set_num_threads(1)`):
    the processor's note of a rounding is kept for each thread.
    """

    def __init__(self, capacity: int) -> None:
        self._high = torch.empty(capacity, dtype=torch.float64)
        self._sum = torch.empty(capacity, dtype=torch.float64)
        self._wide = torch.empty(capacity, dtype=torch.float64)
        self._half = torch.empty(capacity, dtype=torch.float32)
        self._rounded = rounding_detector()
        self._careful = isinstance(self._rounded, AlwaysRounded)

    def mean_into(self, inputs: Inputs, count: int, out: torch.Tensor, dtype: DType) -> None:
        """Write the mean of `count` chunks into `out`.

        float16, bfloat16, float32 and float8 inputs give the correctly rounded
        mean (to nearest, ties to even); float64 inputs the float64 nearest to it
        but for ties closer than 2^-50 ulp or 2^-1074. The order of the inputs does not matter.
        Elements that are the same in all inputs keep their bits, NaN and
        infinity included.

        Args:
            inputs: Gives the chunks, one-dimensional and of one length, each time it
                is called; a chunk may lie in the same memory as the one before.
            count: How many they are.
            out: Where the mean goes, one-dimensional, of `dtype`.
            dtype: The dtype of `out`.

        Raises:
            NonFiniteError: An element is not finite in some input, or becomes so by rounding.
        """
        size = out.numel()
        high, low, unsure = self._add_up(inputs, size)
        mean = self._sum[:size]
        torch.div(high, count, out=mean)
        if low is not None:
            tail, lost = _refine(mean, high, low, count)
            if dtype.significand < 53:
                _round_to_odd(mean, tail)
                unsure = lost if unsure is None else unsure | lost
        if unsure is not None and unsure.any():
            _settle_exactly(mean, unsure.nonzero().flatten(), inputs, count, dtype)
        if not round_into(mean, out, dtype, self._wide[:size]):
            _settle_non_finite(out, mean, inputs, count, dtype)

    def _add_up(
        self, inputs: Inputs, size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the sum as high + low (None: zero), and where even that is not all.

        Where the plain sum had to round, it is done again with care; the chunk after
        such a one, which is of the same kind, is done with care at once.
        """
        if not self._careful:
            high = self._add_plainly(inputs(), size)
            if high is not None:
                return high, None, None
        high, low, unsure = self._add_carefully(inputs(), size)
        self._careful = low is not None
        return high, low, unsure

    def _add_plainly(self, chunks: Iterable[torch.Tensor], size: int) -> torch.Tensor | None:
        """Return the sum, or None as soon as an addition has rounded."""
        high = self._high[:size]
        for number, chunk in enumerate(chunks):
            if number == 0:
                high.copy_(chunk)
                continue
            values = self._widened(chunk)
            self._rounded.clear()
            high.add_(values)
            if self._rounded.raised():
                return None
        return high

    def _add_carefully(
        self, chunks: Iterable[torch.Tensor], size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        high, new = self._high[:size], self._sum[:size]
        low: torch.Tensor | None = None
        unsure: torch.Tensor | None = None
        for number, chunk in enumerate(chunks):
            if number == 0:
                high.copy_(chunk)
                continue
            values = self._widened(chunk)
            self._rounded.clear()
            torch.add(high, values, out=new)
            if self._rounded.raised():
                error = _lost(high, values, new)
                if low is None:
                    low, unsure = error, torch.zeros(size, dtype=torch.bool)
                else:
                    total = low + error
                    unsure |= _lost(low, error, total) != 0  # type: ignore[operator]
                    low = total
            high, new = new, high
        if high.data_ptr() != self._high.data_ptr():
            self._high, self._sum = self._sum, self._high
        return high, low, unsure

    def _widened(self, chunk: torch.Tensor) -> torch.Tensor:
        """Return a chunk in float64: converting first and adding then is fastest."""
        wide = self._wide[: chunk.numel()]
        if chunk.dtype is torch.float16:  # torch is slow at float16 to float64 in one step
            return wide.copy_(self._half[: chunk.numel()].copy_(chunk))
        return wide.copy_(chunk)


def _lost(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return a + b - total exactly, where total = a + b rounded (TwoSum)."""
    virtual = total - a
    return (a - (total - virtual)).add_(b - virtual)


def _refine(
    mean: torch.Tensor, high: torch.Tensor, low: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make `mean` the float64 nearest to (high + low) / count.

    Returns:
        A tensor of the sign of what is still missing from `mean`, and where even
        that sign is not sure.
    """
    total = high + low
    rest = _lost(high, low, total)
    torch.div(total, count, out=mean)
    # total - mean * count, exactly: the product of half a significand and a count is exact.
    scaled = mean * (2.0**27 + 1)
    upper = scaled - (scaled - mean)
    remainder = (total - upper * count) - (mean - upper) * count
    missing = remainder + rest
    lost = _lost(remainder, rest, missing) != 0
    step = missing / count
    quotient = mean.clone()
    torch.add(quotient, step, out=mean)
    tail = step - (mean - quotient)
    # Where all inputs are -0.0, so is their mean.
    torch.where((high == 0) & (low == 0), high, mean, out=mean)
    # Where the step went in whole, it is a few bits long: its product with count is exact.
    return torch.where(tail == 0, missing - step * count, tail), lost


def _round_to_odd(mean: torch.Tensor, tail: torch.Tensor) -> None:
    """Where something is missing from `mean`, make its last bit 1, toward what is missing."""
    even = (mean.view(torch.int64) & 1) == 0
    toward = torch.where(tail > 0, math.inf, -math.inf)
    move = even & (tail != 0)
    mean.copy_(torch.where(move, torch.nextafter(mean, toward), mean))


def _settle_exactly(
    mean: torch.Tensor, places: torch.Tensor, inputs: Inputs, count: int, dtype: DType
) -> None:
    """Put the mean of some elements in place by rational arithmetic.

    It is rounded to odd where it will be rounded again, to a smaller `dtype`.
    """
    columns = [chunk[places].to(torch.float64).tolist() for chunk in inputs()]
    odd = dtype.significand < 53
    exact = [_exact_mean(values, count, odd) for values in zip(*columns, strict=True)]
    mean[places] = torch.tensor(exact, dtype=torch.float64)


def _exact_mean(values: tuple[float, ...], count: int, odd: bool) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    exact = sum(map(Fraction, values), Fraction(0)) / count
    nearest = float(exact)
    missing = exact - Fraction(nearest)
    if not odd or not missing or math.frexp(nearest)[0] * 2**53 % 2:
        return nearest
    return math.nextafter(nearest, math.inf if missing > 0 else -math.inf)


def round_into(
    values: torch.Tensor, out: torch.Tensor, dtype: DType, scratch: torch.Tensor | None = None
) -> bool:
    """Round float64 numbers into `out` once: to nearest, ties to even.

    torch goes from float64 to the small dtypes through float32, which would
    round twice; here the first of these roundings is to odd, which does no harm.

    Args:
        values: One-dimensional, not empty.
        out: As long as `values`, of `dtype`.
        dtype: The dtype of `out`.
        scratch: float64 memory to work in, as long as `values`.

    Returns:
        False if some element of `out` may not be finite.
    """
    if dtype.significand >= 24:
        out.copy_(values)
        return math.isfinite(out.sum().item())
    below = (1 << 29) - 1  # the bits that float32 does not have
    bits = values.view(torch.int64)
    odd = torch.empty_like(bits) if scratch is None else scratch.view(torch.int64)
    torch.bitwise_and(bits, below, out=odd)
    odd.add_(below).bitwise_or_(bits).bitwise_and_(~below)
    middle = odd.view(torch.float64).to(torch.float32)
    smallest, largest = (bound.item() for bound in torch.aminmax(middle.abs()))
    if dtype is DTYPES["bfloat16"] and not smallest >= _SMALLEST_NORMAL:
        tiny = middle.abs() < _SMALLEST_NORMAL
        few = values[tiny]
        rounded = (few + _BFLOAT16_SUBNORMAL) - _BFLOAT16_SUBNORMAL
        middle[tiny] = torch.copysign(rounded, few).to(torch.float32)
    out.copy_(middle)
    return largest <= torch.finfo(out.dtype).max


def _settle_non_finite(
    out: torch.Tensor, mean: torch.Tensor, inputs: Inputs, count: int, dtype: DType
) -> None:
    """Put right the elements that came out NaN or infinite, or refuse them."""
    places = (~torch.isfinite(out.to(torch.float64))).nonzero().flatten()
    if not places.numel():
        return  # only the sum of the chunk overflowed
    columns = [chunk[places].clone() for chunk in inputs()]
    last = columns[-1]
    same = torch.ones(places.numel(), dtype=torch.bool)
    for column in columns:
        if column.dtype == last.dtype:
            same &= _bits(column) == _bits(last)
        else:
            same &= column.to(torch.float64) == last.to(torch.float64)
    if last.dtype == out.dtype:
        _bits(out)[places[same]] = _bits(last)[same]
    else:
        _round_at(places[same], last[same].to(torch.float64), out, dtype)
    rest = places[~same]
    for source, column in enumerate(columns):
        values = column.to(torch.float64)[~same]
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if bad.numel():
            raise NonFiniteError(source, int(rest[bad[0]]), float(values[bad[0]]))
    # Finite in every input: only the sum, or the rounding to a smaller dtype, overflowed.
    _settle_exactly(mean, rest, inputs, count, dtype)
    _round_at(rest, mean[rest], out, dtype)


def _round_at(places: torch.Tensor, values: torch.Tensor, out: torch.Tensor, dtype: DType) -> None:
    """Round `values` into some places of `out`; refuse those that become infinite."""
    if places.numel():
        rounded = torch.empty(places.numel(), dtype=out.dtype)
        round_into(values, rounded, dtype)
        _refuse_overflow(values, rounded, places)
        out[places] = rounded


def cast_into(values: torch.Tensor, out: torch.Tensor, dtype: DType) -> None:
    """Convert one chunk to the output's dtype, rounding once.

    Raises:
        NonFiniteError: A finite element becomes infinite or NaN.
    """
    _round_at(torch.arange(out.numel()), values.to(torch.float64), out, dtype)


def _refuse_overflow(wide: torch.Tensor, out: torch.Tensor, places: torch.Tensor) -> None:
    over = torch.isfinite(wide) & ~torch.isfinite(out.to(torch.float64))
    if over.any():
        first = int(over.nonzero()[0])
        raise NonFiniteError(None, int(places[first]), float(wide[first]))


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(BITS[values.dtype.itemsize])


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
