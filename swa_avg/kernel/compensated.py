"""Sums of windows, sums and quotients with error terms, and rational arithmetic for the rest.

* The sum of a window of rows is that of the window before it, with one addition and one
  subtraction, whatever its length. If neither was rounded, it is exact, as if the rows of the
  window were added up. If one was rounded, it is not used.
* TwoSum (Knuth, The Art of Computer Programming vol. 2, 4.2.2, theorem B) computes the
  rounding error of each addition. The errors are added up in a second float64.
* A quotient is rounded to odd, so that it can be rounded once more (see `rounding`).
* Rational arithmetic computes, element by element, the sums that do not fit in two float64
  numbers (their exponents differ by more than 53), quotients that are too small for an
  error term, and quotients too close to a tie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from swa_avg.kernel.arithmetic import Attempts, RoundingDetector
from swa_avg.kernel.elements import is_small, wide, widen, widen_scaled
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

_SPLITTER = 2.0**27 + 1
# Below this quotient the error term may be subnormal, and two float64 are not enough.
_LEAST_QUOTIENT = 2.0**-960
_BESIDE = 1 + 2.0**-30  # a result this close to a tie may be on either side of it


class Block(NamedTuple):
    """Inputs of one dtype, one row of elements for each input."""

    values: Array
    dtype: DType


Rows = Sequence[Block]


class Sum(NamedTuple):
    """A sum as high + low (None for zero), and the elements where that is not exact."""

    high: Array
    low: Array | None = None
    unsure: Array | None = None


def count_of(rows: Rows) -> int:
    """Return the number of rows."""
    return sum(len(block.values) for block in rows)


def each(rows: Rows) -> Iterator[tuple[Array, DType]]:
    """Yield the rows, each with its dtype."""
    for block in rows:
        for values in block.values:
            yield values, block.dtype


def some(rows: Rows, span: Sequence[int]) -> Rows:
    """Return consecutive rows, which are in one block if all rows are."""
    cut = slice(span[0], span[-1] + 1)
    if len(rows) == 1:
        return [Block(rows[0].values[cut], rows[0].dtype)]
    return rows[cut]


def lost(a: Array, b: Array, total: Array) -> Array:
    """Return a + b - total exactly, where total = a + b rounded (TwoSum)."""
    virtual = total - a
    error: Array = a - (total - virtual)
    error += b - virtual
    return error


def refine(mean: Array, high: Array, low: Array, count: int, dtype: DType) -> Array:
    """Set `mean` to (high + low) / count, rounded to nearest, or to odd for a smaller dtype.

    Args:
        mean: The result.
        high: The sum.
        low: The error term of the sum.
        count: The divisor, at most 2^26.
        dtype: The dtype that the result will be rounded to.

    Returns:
        The elements for which the result is not certain.
    """
    total = high + low
    rest = lost(high, low, total)
    np.divide(total, count, out=mean)
    # total - mean * count, exact because half a significand times a count is exact.
    # (Dekker, "A floating-point technique for extending the available precision",
    # Numerische Mathematik 18, 1971.)
    scaled = mean * _SPLITTER
    upper = scaled - (scaled - mean)
    remainder = (total - upper * count) - (mean - upper) * count
    missing = remainder + rest
    unsure = lost(remainder, rest, missing) != 0
    step = missing / count
    quotient = mean.copy()
    np.add(quotient, step, out=mean)
    tail = step - (mean - quotient)
    # Where the whole step was added, it has few bits, and its product with count is exact.
    left = missing - step * count
    small = (np.abs(mean) < _LEAST_QUOTIENT) & (total != 0)
    if dtype.significand < 53:
        _round_to_odd(mean, np.where(tail == 0, left, tail))
    else:
        beside = mean + tail * _BESIDE != mean
        unsure = beside & (unsure | (left != 0))
    doubtful: Array = unsure | small
    return doubtful


def _round_to_odd(mean: Array, tail: Array) -> None:
    """Round `mean` to odd: where `tail` is not zero, make the last bit 1 in its direction."""
    even = (mean.view(np.int64) & 1) == 0
    move = even & (tail != 0)
    if move.any():
        toward = np.where(tail > 0, math.inf, -math.inf)
        np.nextafter(mean, toward, out=mean, where=move)


def exact_means(rows: Rows, weights: Sequence[int], places: Array, dtype: DType) -> Array:
    """Return the means of some elements in float64, computed by rational arithmetic.

    They are rounded to odd if they will be rounded again, to a smaller `dtype`.
    """
    columns = [wide(row[places], kind).tolist() for row, kind in each(rows)]
    odd = dtype.significand < 53
    weights = weights or (1,) * len(columns)
    exact = [_exact_mean(values, weights, odd) for values in zip(*columns, strict=True)]
    return np.array(exact, np.float64)


def _exact_mean(values: tuple[float, ...], weights: Sequence[int], odd: bool) -> float:
    from fractions import Fraction  # seldom needed, and slow to import

    if not all(map(math.isfinite, values)):
        return math.nan
    addends = (Fraction(value) * weight for value, weight in zip(values, weights, strict=True))
    exact = sum(addends, Fraction(0)) / sum(weights)
    try:
        nearest = float(exact)
    except OverflowError:  # only if a weight is negative
        return math.inf if exact > 0 else -math.inf
    missing = exact - Fraction(nearest)
    if not odd or not missing or math.frexp(nearest)[0] * 2**53 % 2:
        return nearest
    return math.nextafter(nearest, math.inf if missing > 0 else -math.inf)


class SlidingSums:
    """Exact sums of windows, in reused buffers.

    Args:
        rounded: Detects additions that were rounded.
        few: Whether the sums are float32, of rows of a small dtype divided by its `scale`;
            otherwise they are float64.
    """

    def __init__(self, rounded: RoundingDetector, few: bool = False) -> None:
        self._rounded = rounded
        self._few = few
        self._memory = np.empty((0, 0), np.float32 if few else np.float64)
        self._wide: Array = self._memory  # receives the numbers of a small dtype
        self._attempts = Attempts()

    def is_ready(self) -> bool:
        """Return whether sums are tried for the next chunk (see `Attempts`)."""
        return self._attempts.is_due()

    def of(self, rows: Rows, spans: Sequence[Sequence[int]], size: int) -> Iterator[Array | None]:
        """Yield the sum of each window, valid until the next one; None if it is not exact.

        After the first None there is no further sum.

        Args:
            rows: The rows.
            spans: The numbers of the rows of each window.
            size: The length of a row.
        """
        lengths = dict.fromkeys(map(len, spans))
        if self._memory.shape[0] <= len(lengths) or self._memory.shape[1] < size:
            self._memory = np.empty((len(lengths) + 1, size), self._memory.dtype)
        *sums, self._wide = self._memory[: len(lengths) + 1, :size]
        totals = dict(zip(lengths, sums, strict=True))
        before = dict.fromkeys(lengths, range(0))
        blocks = [Block(values, dtype) for values, dtype in each(rows)]
        for number, span in enumerate(spans):
            window, total = range(span[0], span[-1] + 1), totals[len(span)]
            self._rounded.clear()
            self._move(total, before[len(span)], window, blocks)
            if self._rounded.raised():
                self._attempts.ended(well=False)
                yield from repeat(None, len(spans) - number)
                return
            before[len(span)] = window
            yield total
        self._attempts.ended(well=True)

    def _move(self, total: Array, before: range, window: range, rows: Sequence[Block]) -> None:
        """Change the sum of one window into that of another."""
        gone, new = range(before.start, window.start), range(before.stop, window.stop)
        if window.start < before.start or len(gone) + len(new) >= len(window):
            np.copyto(total, self._widened(rows[window.start]))
            gone, new = range(0), window[1:]
        for number in gone:
            np.subtract(total, self._widened(rows[number]), out=total)
        for number in new:
            np.add(total, self._widened(rows[number]), out=total)

    def _widened(self, row: Block) -> Array:
        """Return the numbers of a row, in a dtype that numpy can add to a sum."""
        if not is_small(row.dtype):
            return row.values
        wide = self._wide
        (widen_scaled if self._few else widen)(row.values, wide, row.dtype)
        return wide
