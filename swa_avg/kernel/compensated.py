"""Sums and quotients of float64 numbers with error terms, and rational arithmetic for the rest.

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from swa_avg.kernel.elements import wide
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
