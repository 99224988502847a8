"""The exact mean of tensors, rounded once. The arithmetic only; knows no files.

A float64 sum of float32 numbers is nearly always exact, but not always, and a
mean that is rounded to float64 and then to float32 has been rounded twice.
Both are put right here at almost no cost:

* The processor notes when an addition had to round. Where it did, the part
  that was lost is recovered (Knuth's TwoSum, The Art of Computer Programming
  vol. 2, 4.2.2, theorem B) and kept in a second float64.
* What is still missing from the quotient is put into its last bit: rounded to
  odd, it can be rounded once more (see `rounding`).

The quotient of an exact float64 sum by a count needs no such care. Were it
rounded onto a tie m of a dtype of up to 24 bits, |sum - count * m| would be at
most count * ulp(m) / 2, which is less than ulp(sum); but for counts of up to 2^26
both are multiples of ulp(sum), so they are equal, and the tie is a true one.

Inputs of up to 11 bits (float16, bfloat16, float8) mostly have an exact sum even in
float32; where they have, all is done in it, which is much less work. Of its quotient
the same is true as of the float64 one, for counts that leave the bits of a tie room.

A weight of up to 26 bits times a number of up to 24 is exact in float64; a
float64 is cut into two halves first (Dekker, "A floating-point technique for
extending the available precision", Numerische Mathematik 18, 1971).

What does not fit in two float64, which takes exponents more than 2^53 apart, is
done element by element in rational arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from swa_avg.kernel.rounding import BITS, NonFiniteError, round_at, round_into, rounding_detector
from swa_avg.tensors import DType

# What is averaged: a row for each input; in one tensor, if all are of one dtype.
Rows = torch.Tensor | Sequence[torch.Tensor]

MOST_WEIGHT = 1 << 26
# How many numbers are in float64 at once. Fewer stay in the processor's second cache; but
# threads of Python take turns at each call of torch, which then should be fewer and longer.
ALONE = 80 * 1024
BESIDE_THREADS = 640 * 1024
MOST_OF_ONE = 16 * 1024  # of one input, where all are kept in float64
# So many inputs of up to 11 bits may be averaged in float32: a tie between results of 11
# bits has 12, and its product with the count is to be exact in 24.
_FEW_ROWS = 1 << 11
_MOST_WAITED = 64  # sums that are not tried in float32 after one that was not exact in it
_DIVISORS = (torch.float32, torch.float64)
_LEAST_ROWS = 5
_ALIGNED = 64
_LOWER_HALF = (1 << 27) - 1  # of a float64's significand
_SIGNED = BITS | {1: torch.int8}


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum as high + low (None: zero), and where even that is not all of it."""

    high: torch.Tensor
    low: torch.Tensor | None = None
    unsure: torch.Tensor | None = None


class Averager:
    """Averages rows, in buffers that it keeps.

    Used by one thread, with torch's own threads off (`torch.set_num_threads(1)`):
    the processor's note of a rounding is kept for each thread.

    Args:
        at_once: How many numbers of all rows it has in float64 at once.
    """

    def __init__(self, at_once: int = ALONE) -> None:
        self._at_once = at_once
        self._wide = torch.empty(0, dtype=torch.float64)
        self._half = torch.empty(0)
        self._columns = torch.empty(4, 0, dtype=torch.float64)
        self._narrow = torch.empty(0)
        self._shape = (0, 0, 0)
        self._count, self._counts = 0, dict[torch.dtype, torch.Tensor]()
        self._rounded = rounding_detector()
        self._careful = False
        self._waited = self._waiting = 0

    def mean_into(
        self, rows: Rows, out: torch.Tensor, dtype: DType, weights: Sequence[int] = ()
    ) -> None:
        """Write the mean of the rows into `out`.

        float16, bfloat16, float32 and float8 inputs give the correctly rounded
        mean (to nearest, ties to even); float64 inputs the float64 nearest to it
        but for ties closer than 2^-50 ulp or 2^-1074. The order of the rows does not matter.
        Elements that are the same in all rows keep their bits, NaN and infinity included.

        Args:
            rows: What is averaged, each as long as `out`.
            out: Where the mean goes, one-dimensional, of `dtype`.
            dtype: The dtype of `out`.
            weights: How often each row counts, 1 to `MOST_WEIGHT`; empty where each
                counts once. A sum of more than `MOST_WEIGHT` is slow.

        Raises:
            NonFiniteError: An element is not finite in some row, or becomes so by rounding.
        """
        count, parts = len(rows), _parts(rows, weights)
        step = self._at_once // max(_LEAST_ROWS, parts * count)
        step = max(_ALIGNED, step // _ALIGNED * _ALIGNED)
        few = not weights and _of_few_bits(rows, dtype)
        for some, into in zip(_split(rows, step), torch.split(out, step), strict=True):
            self._resize(parts, count, into.numel())
            if few and self._averaged_in_float32(some, into):
                continue
            total = self._sum(self._widened(some, weights))
            self._finish(total, into, dtype, some, weights)
        _settle(out, rows, weights, dtype)

    def running_means(
        self, rows: Rows, out: torch.Tensor, dtype: DType, weights: Sequence[int] = ()
    ) -> Iterator[int]:
        """Write the mean of the first row into `out`, then of the first two, and so on.

        Each is what `mean_into` gives for so many. The arguments are those of `mean_into`;
        all rows are in float64 at once, so they should not be longer than `MOST_OF_ONE`.

        Yields:
            Of how many rows the mean is in `out` now: 1 to all.
        """
        self._resize(_parts(rows, weights), len(rows), out.numel())
        addends = self._widened(rows, weights)
        for done, total in enumerate(self._sums(addends), 1):
            first, counted = rows[:done], weights[:done]
            self._finish(total, out, dtype, first, counted)
            _settle(out, first, counted, dtype)
            yield done

    def _averaged_in_float32(self, rows: Rows, out: torch.Tensor) -> bool:
        """Write the mean of rows of few bits into `out`, if their sum is exact in float32.

        Where it was not, it likely is not in what follows either: that is not tried for a
        while, and for the longer the more often it was in vain.

        Returns:
            Whether it was exact. If not, `out` is as it was.
        """
        if self._waited < self._waiting:
            self._waited += 1
            return False
        self._waited = 0
        for values, into in _one_by_one(rows, self._single):
            into.copy_(values)
        self._rounded.clear()
        torch.sum(self._single, 0, out=self._middle)
        if self._rounded.raised():
            self._waiting = min(_MOST_WAITED, 2 * self._waiting + 1)
            return False
        self._waiting = 0
        out.copy_(self._middle.div_(self._divisor(self._shape[1], torch.float32)))
        return True

    def _widened(self, rows: Rows, weights: Sequence[int]) -> torch.Tensor:
        """Return float64 numbers that add up to the rows times their weights, exactly.

        Returns:
            Parts (1 or 2) by rows by elements.
        """
        whole = self._addends[0]
        for values, into in _one_by_one(rows, whole):
            self._widen(values, into)
        if self._shape[0] == 2:
            upper = self._addends[1]
            torch.bitwise_and(whole.view(torch.int64), ~_LOWER_HALF, out=upper.view(torch.int64))
            whole.sub_(upper)
        if weights:
            self._addends.mul_(torch.tensor(weights, dtype=torch.float64)[:, None])
        return self._addends

    def _widen(self, values: torch.Tensor, into: torch.Tensor) -> None:
        """Convert numbers to float64."""
        if values.dtype is torch.float16:  # torch is slow at float16 to float64 in one step
            values = self._half[: values.numel()].view(values.shape).copy_(values)
        into.copy_(values)

    def _resize(self, parts: int, count: int, size: int) -> None:
        """Make the buffers as large as so many parts of so many rows of a length are."""
        shape = (parts, count, size)
        if shape == self._shape:
            return
        self._shape, numel = shape, math.prod(shape)
        if self._wide.numel() < numel:
            self._wide = torch.empty(numel, dtype=torch.float64)
            self._half = torch.empty(numel)
        if self._columns.shape[1] < size:
            self._columns = torch.empty(4, size, dtype=torch.float64)
            self._narrow = torch.empty(size)
        self._addends = self._wide[:numel].view(shape)
        self._single = self._half[: count * size].view(count, size)
        self._high, self._new, self._mean, self._spare = self._columns[:, :size]
        self._middle = self._narrow[:size]

    def _sum(self, addends: torch.Tensor) -> _Sum:
        """Return the sum of all addends.

        Where the plain sum had to round, it is done again with care; what comes after
        such a one, which is of the same kind, is done with care at once.
        """
        if not self._careful:
            self._rounded.clear()
            torch.sum(addends, (0, 1), out=self._high)
            if not self._rounded.raised():
                return _Sum(self._high)
        total = deque(self._sums(addends), maxlen=1).pop()
        self._careful = total.low is not None
        return total

    def _sums(self, addends: torch.Tensor) -> Iterator[_Sum]:
        """Yield the sum after each row, with what additions have lost."""
        high, new = self._high, self._new
        low: torch.Tensor | None = None
        unsure: torch.Tensor | None = None
        high.zero_()
        for row in range(addends.shape[1]):
            for addend in addends[:, row]:
                self._rounded.clear()
                torch.add(high, addend, out=new)
                if self._rounded.raised():
                    error = _lost(high, addend, new)
                    before = torch.zeros_like(error) if low is None else low
                    low = before + error
                    wrong = _lost(before, error, low) != 0
                    unsure = wrong if unsure is None else unsure | wrong
                high, new = new, high
            yield _Sum(high, low, unsure)

    def _finish(
        self, total: _Sum, out: torch.Tensor, dtype: DType, rows: Rows, weights: Sequence[int]
    ) -> None:
        """Divide the sum of the rows by how many count, and round it into `out`."""
        count, mean, unsure = sum(weights) or len(rows), self._mean, total.unsure
        torch.div(total.high, self._divisor(count, torch.float64), out=mean)
        if total.low is not None:
            tail, lost = _refine(mean, total.high, total.low, count)
            if dtype.significand < 53:
                _round_to_odd(mean, tail)
                unsure = lost if unsure is None else unsure | lost
        if count > MOST_WEIGHT:
            unsure = torch.ones(out.numel(), dtype=torch.bool)
        if unsure is not None and unsure.any():
            places = unsure.nonzero().flatten()
            mean[places] = _exact_means(rows, weights, places, dtype)
        round_into(mean, out, dtype, (self._spare, self._middle))

    def _divisor(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a count as a tensor, which torch else makes of a number each time."""
        if self._count != count:
            self._count = count
            self._counts = {kind: torch.tensor(count, dtype=kind) for kind in _DIVISORS}
        return self._counts[dtype]


def _split(rows: Rows, size: int) -> Iterable[Rows]:
    """Return the first so many elements of the rows, the next, and so on."""
    if isinstance(rows, torch.Tensor):
        return torch.split(rows, size, 1)
    return zip(*(torch.split(row, size) for row in rows), strict=True)


def _one_by_one(rows: Rows, into: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Return what goes where: all rows at once, if they are of one dtype."""
    if isinstance(rows, torch.Tensor):
        return [(rows, into)]
    return zip(rows, into, strict=True)


def _of_few_bits(rows: Rows, dtype: DType) -> bool:
    """Tell whether a sum of rows that is exact in float32 gives their mean."""
    some = rows[:1] if isinstance(rows, torch.Tensor) else rows
    few = all(torch.finfo(row.dtype).bits <= 16 for row in some)
    return few and len(rows) <= _FEW_ROWS and dtype.significand <= 24


def _parts(rows: Rows, weights: Sequence[int]) -> int:
    """Return into how many parts a row is cut so that its product with a weight is exact."""
    return 2 if weights and any(row.dtype is torch.float64 for row in rows) else 1


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
    # Where the step went in whole, it is a few bits long: its product with count is exact.
    return torch.where(tail == 0, missing - step * count, tail), lost


def _round_to_odd(mean: torch.Tensor, tail: torch.Tensor) -> None:
    """Where something is missing from `mean`, make its last bit 1, toward what is missing."""
    even = (mean.view(torch.int64) & 1) == 0
    toward = torch.where(tail > 0, math.inf, -math.inf)
    move = even & (tail != 0)
    mean.copy_(torch.where(move, torch.nextafter(mean, toward), mean))


def _exact_means(
    rows: Rows, weights: Sequence[int], places: torch.Tensor, dtype: DType
) -> torch.Tensor:
    """Return the means of some elements in float64, by rational arithmetic.

    They are rounded to odd where they will be rounded again, to a smaller `dtype`.
    """
    columns = [row[places].to(torch.float64).tolist() for row in rows]
    odd = dtype.significand < 53
    weights = weights or (1,) * len(columns)
    exact = [_exact_mean(values, weights, odd) for values in zip(*columns, strict=True)]
    return torch.tensor(exact, dtype=torch.float64)


def _exact_mean(values: tuple[float, ...], weights: Sequence[int], odd: bool) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    addends = (Fraction(value) * weight for value, weight in zip(values, weights, strict=True))
    exact = sum(addends, Fraction(0)) / sum(weights)
    nearest = float(exact)
    missing = exact - Fraction(nearest)
    if not odd or not missing or math.frexp(nearest)[0] * 2**53 % 2:
        return nearest
    return math.nextafter(nearest, math.inf if missing > 0 else -math.inf)


def _settle(out: torch.Tensor, rows: Rows, weights: Sequence[int], dtype: DType) -> None:
    """Put right what sums do not keep: what is not finite, and zeros that are negative.

    Args:
        out: The mean of the rows.
        rows: What was averaged.
        weights: How often each row counts.
        dtype: The dtype of `out`.

    Raises:
        NonFiniteError: An element is not finite, and not the same in all rows.
    """
    short = out.itemsize == 1 or out.dtype is torch.float16
    enough = torch.float32 if short else out.dtype  # so that finite numbers have a finite sum
    if not math.isfinite(out.sum(dtype=enough).item()):
        _settle_non_finite(out, rows, weights, dtype)
    negative = torch.ones(1, dtype=torch.bool)
    for row in rows:
        bits, zero = _signed_bits(row), _negative_zero(row)
        if bits.amin() > zero:
            return
        negative = negative & (bits == zero)
    minus_zero = torch.full((1,), -0.0).to(out.dtype)  # +0.0 where the dtype has no other
    bits = _signed_bits(out)
    bits[negative & (bits == 0)] = _signed_bits(minus_zero)


def _settle_non_finite(out: torch.Tensor, rows: Rows, weights: Sequence[int], dtype: DType) -> None:
    """Put right the elements that came out NaN or infinite, or refuse them."""
    places = (~torch.isfinite(out.to(torch.float64))).nonzero().flatten()
    if not places.numel():
        return  # only the sum of the chunk overflowed
    columns = [row[places] for row in rows]
    last = columns[-1]
    same = torch.ones(places.numel(), dtype=torch.bool)
    for column in columns:
        if column.dtype == last.dtype:
            same &= _signed_bits(column) == _signed_bits(last)
        else:
            same &= column.to(torch.float64) == last.to(torch.float64)
    if last.dtype == out.dtype:
        _signed_bits(out)[places[same]] = _signed_bits(last)[same]
    else:
        round_at(places[same], last[same].to(torch.float64), out, dtype)
    rest = places[~same]
    for source, column in enumerate(columns):
        values = column.to(torch.float64)[~same]
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if bad.numel():
            raise NonFiniteError(source, int(rest[bad[0]]), float(values[bad[0]]))
    # Finite in every input: only the sum, or the rounding to a smaller dtype, overflowed.
    round_at(rest, _exact_means(rows, weights, rest, dtype), out, dtype)


def _signed_bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(_SIGNED[values.dtype.itemsize])


def _negative_zero(values: torch.Tensor) -> int:
    """Return the bits of -0.0 as a signed integer: only the sign, and so the least there is."""
    return torch.iinfo(_SIGNED[values.dtype.itemsize]).min
