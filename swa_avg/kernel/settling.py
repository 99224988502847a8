"""Corrections of a mean: elements that are not finite, and negative zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.compensated import Rows, each, exact_means
from swa_avg.kernel.elements import (
    all_finite,
    bits,
    is_small,
    negative_zero,
    negative_zeros,
    non_finite,
    wide,
)
from swa_avg.kernel.rounding import NonFiniteError, round_at
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array


def settle(out: Array, rows: Rows, weights: Sequence[int], dtype: DType) -> None:
    """Correct the elements of a mean for which a sum gives the wrong result.

    An element with the same NaN, infinity or negative zero in all rows keeps its bits.

    Args:
        out: The mean of the rows.
        rows: The rows that were averaged.
        weights: How often each row counts.
        dtype: The dtype of `out`.

    Raises:
        NonFiniteError: An element is not finite, and not the same in all rows.
    """
    # NaN and infinity in a row make the mean not finite too, except in dtypes whose non-finite
    # bit patterns were added as if they were numbers: their rows are checked as well.
    odd = [block for block in rows if is_small(block.dtype) and block.dtype.name != "bfloat16"]
    if not (all_finite(out, dtype) and all(all_finite(*block) for block in odd)):
        _settle_non_finite(out, rows, weights, dtype)
    negative: Array | None = None
    for row, _ in each(rows):
        zeros = negative_zeros(row)
        if zeros is None:
            return
        negative = zeros if negative is None else negative & zeros
    if negative is not None:
        mean_bits = bits(out)
        mean_bits[negative & (mean_bits == 0)] = negative_zero(dtype)


def _settle_non_finite(out: Array, rows: Rows, weights: Sequence[int], dtype: DType) -> None:
    """Correct the elements of the mean that are NaN or infinite, or refuse them."""
    wrong = non_finite(out, dtype)
    for row, kind in each(rows):
        wrong |= non_finite(row, kind)
    places = wrong.nonzero()[0]
    columns = [(row[places], kind) for row, kind in each(rows)]
    last, of_last = columns[-1]
    same = np.ones(places.size, np.bool_)
    for column, kind in columns:
        if kind == of_last:
            same &= bits(column) == bits(last)
        else:
            same &= wide(column, kind) == wide(last, of_last)
    if of_last == dtype:
        bits(out)[places[same]] = bits(last)[same]
    else:
        round_at(places[same], wide(last[same], of_last), out, dtype)
    rest = places[~same]
    for source, (column, kind) in enumerate(columns):
        bad = non_finite(column, kind)[~same]
        if bad.any():
            first = int(bad.argmax())
            value = float(wide(column[~same][first : first + 1], kind)[0])
            raise NonFiniteError(source, int(rest[first]), value)
    # The rest is finite in every input: the sum, or the rounding to `dtype`, overflowed.
    means = exact_means(rows, weights, rest, dtype)
    over = np.isinf(means)
    if over.any():  # a difference of two numbers can exceed every float64
        first = int(over.argmax())
        raise NonFiniteError(None, int(rest[first]), float(means[first]))
    round_at(rest, means, out, dtype)
