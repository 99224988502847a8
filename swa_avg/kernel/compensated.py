"""Sums and quotients of float64 numbers with what they lose; and rational arithmetic for the rest.

* What an addition loses is recovered by TwoSum (Knuth, The Art of Computer Programming
  vol. 2, 4.2.2, theorem B) and kept in a second float64.
* What is still missing from a quotient is put into its last bit: rounded to
  odd, it can be rounded once more (see `rounding`).
* What does not fit in two float64, which takes exponents more than 2^53 apart, what is
  too small for its own rest, and what is too near to a tie is done element by element.
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
# A quotient below may lack more than two float64 can hold: what is missing from it is subnormal.
_LEAST_QUOTIENT = 2.0**-960
_BESIDE = 1 + 2.0**-30  # so near to a tie what is missing may lie on either side of it


class Block(NamedTuple):
    """Inputs of one dtype: a row of elements of each."""

    values: Array
    dtype: DType


Rows = Sequence[Block]


class Sum(NamedTuple):
    """A sum as high + low (None: zero), and where even that is not all of it."""

    high: Array
    low: Array | None = None
    unsure: Array | None = None


def count_of(rows: Rows) -> int:
    """Return how many rows there are."""
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
    """Make `mean` the float64 nearest to (high + low) / count; to odd, if it is rounded again.

    Args:
        mean: Where it goes.
        high: The sum.
        low: What is missing from it.
        count: What it is divided by, up to 2^26.
        dtype: What it will be rounded to.

    Returns:
        Where that is not sure.
    """
    total = high + low
    rest = lost(high, low, total)
    np.divide(total, count, out=mean)
    # total - mean * count, exactly: the product of half a significand and a count is exact.
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
    # Where the step went in whole, it is a few bits long: its product with count is exact.
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
    """Where something is missing from `mean`, make its last bit 1, toward what is missing."""
    even = (mean.view(np.int64) & 1) == 0
    move = even & (tail != 0)
    if move.any():
        toward = np.where(tail > 0, math.inf, -math.inf)
        np.nextafter(mean, toward, out=mean, where=move)


def exact_means(rows: Rows, weights: Sequence[int], places: Array, dtype: DType) -> Array:
    """Return the means of some elements in float64, by rational arithmetic.

    They are rounded to odd where they will be rounded again, to a smaller `dtype`.
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
    nearest = float(exact)
    missing = exact - Fraction(nearest)
    if not odd or not missing or math.frexp(nearest)[0] * 2**53 % 2:
        return nearest
    return math.nextafter(nearest, math.inf if missing > 0 else -math.inf)
