"""The exact mean of tensors, rounded once: the arithmetic, without any files.

A float64 sum of float32 numbers is nearly always exact, but not always, and a mean that
is rounded to float64 and then to float32 is rounded twice. This module avoids both at
almost no cost. The processor sets a flag when an addition had to round. Such a sum is
computed again with error terms (see `compensated`).

The quotient of an exact float64 sum by a count does not need that. Suppose that it is
rounded to a tie m of a dtype of up to 24 bits. Then |sum - count * m| is at most
count * ulp(m) / 2, which is less than ulp(sum). For counts of up to 2^26, both are
multiples of ulp(sum), so they are equal, and the exact quotient is that tie.

A weight of up to 26 bits times a number of up to 24 bits is exact in float64. A float64
number is split into two halves first (Dekker 1971). None of this depends on the signs of the
weights, as long as their sum is positive.

Windows that overlap share sums if these are exact (see `compensated`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from swa_avg.kernel.arithmetic import RoundingDetector, rounding_detector
from swa_avg.kernel.compensated import (
    Block,
    Rows,
    SlidingSums,
    Sum,
    count_of,
    each,
    exact_means,
    lost,
    refine,
    some,
)
from swa_avg.kernel.elements import is_small, scale, widen
from swa_avg.kernel.few_bits import FewBits, is_few
from swa_avg.kernel.rounding import NonFiniteError, round_into
from swa_avg.kernel.settling import settle
from swa_avg.tensors import DType

if TYPE_CHECKING:
    from swa_avg.kernel.elements import Array

MOST_WEIGHT = 1 << 26
# How many numbers of all rows are added up at once. The smaller amount fits in the L2 cache.
# Beside other threads, calls of numpy should be fewer and longer, because they contend for the GIL.
ALONE = 160 * 1024
BESIDE_THREADS = 640 * 1024
MOST_OF_ONE = 16 * 1024  # numbers of one input, when running means are computed
_LEAST_ROWS = 5
_ALIGNED = 64
_LOWER_HALF = (1 << 27) - 1  # of a float64's significand
_COLUMNS = 5


class Averager:
    """Averages rows, in buffers that it reuses. Call it within `default_arithmetic`.

    One instance is for one thread: the processor's rounding flag is kept for each thread.

    Args:
        at_once: How many numbers of all rows are added up at once.
        rounded: Detects additions that were rounded; by default one that works on this machine.
    """

    def __init__(self, at_once: int = ALONE, rounded: RoundingDetector | None = None) -> None:
        self._at_once = at_once
        self._columns = np.empty((_COLUMNS, 0))
        self._rounded = rounded or rounding_detector()
        self._few = FewBits(self._rounded)
        self._sliding = SlidingSums(self._rounded)
        self._sliding_few = SlidingSums(self._rounded, few=True)
        self._careful = False

    def mean_into(self, rows: Rows, out: Array, dtype: DType, weights: Sequence[int] = ()) -> None:
        """Write the mean of the rows into `out`, correctly rounded: to nearest, ties to even.

        The result does not depend on the order of the rows. Elements that are the same in
        all rows keep their bits, NaN and infinity included.

        Args:
            rows: The rows to average, each as long as `out`.
            out: The result, a one-dimensional array of the `carrier` of `dtype`.
            dtype: The dtype of `out`.
            weights: How often each row counts, up to `MOST_WEIGHT`; empty if each counts
                once. A row that is subtracted has a negative weight; the sum is positive. The
                mean is slow if they add up to more than `MOST_WEIGHT`.

        Raises:
            NonFiniteError: An element is not finite in some row, or becomes so by rounding.
        """
        step = self._at_once // max(_LEAST_ROWS, count_of(rows))
        step = max(_ALIGNED, step // _ALIGNED * _ALIGNED)
        self._resize(min(step, out.size))
        for start in range(0, out.size, step):
            cut = slice(start, start + step)
            part = [Block(block.values[:, cut], block.dtype) for block in rows]
            self._mean(part, out[cut], dtype, weights)
        settle(out, rows, weights, dtype)

    def running_means(
        self, rows: Rows, out: Array, dtype: DType, weights: Sequence[int] = ()
    ) -> Iterator[int]:
        """Write the mean of the first row into `out`, then of the first two, and so on.

        Each mean is the same as that of `mean_into`, and so are the arguments.

        Yields:
            The number of rows whose mean is in `out` now, from 1 to all.
        """
        self._resize(out.size)
        singly = [Block(values[None], kind) for values, kind in each(rows)]
        for done, total in enumerate(self._sums(rows, weights), 1):
            first, counted = singly[:done], weights[:done]
            self._finish(total, out, dtype, first, counted)
            settle(out, first, counted, dtype)
            yield done

    def window_means(
        self, rows: Rows, spans: Sequence[Sequence[int]], out: Array, dtype: DType
    ) -> Iterator[int]:
        """Write the mean of each window into `out`, one after the other.

        Each mean is the same as that of `mean_into` for the rows of the window.

        Args:
            rows: The rows, each as long as `out`.
            spans: The numbers of the rows of each window, which are consecutive.
            out: The result.
            dtype: The dtype of `out`.

        Yields:
            The number of the window whose mean is in `out` now.

        Raises:
            NonFiniteError: As for `mean_into`; its source is the number of the row.
        """
        few = is_few(rows, dtype, max(map(len, spans))) and self._sliding_few.is_ready()
        sums: Iterable[Array | None] = repeat(None, len(spans))
        if few or self._sliding.is_ready():
            sums = (self._sliding_few if few else self._sliding).of(rows, spans, out.size)
        for number, (span, total) in enumerate(zip(spans, sums, strict=True)):
            window = some(rows, span)
            try:
                if total is None:
                    self.mean_into(window, out, dtype)
                elif few:
                    self._few.finish(total, len(span), rows[0].dtype, out, dtype)
                    settle(out, window, (), dtype)
                else:
                    self._resize(out.size)
                    self._finish(Sum(total), out, dtype, window, ())
                    settle(out, window, (), dtype)
            except NonFiniteError as error:
                error.source = None if error.source is None else span[error.source]
                raise
            yield number

    def _resize(self, size: int) -> None:
        """Make the columns at least `size` long."""
        if self._columns.shape[1] < size:
            self._columns = np.empty((_COLUMNS, size))

    def _mean(self, rows: Rows, out: Array, dtype: DType, weights: Sequence[int]) -> None:
        """Write the mean of one step of `mean_into`."""
        high = self._columns[0, : out.size]
        if weights or len(rows) > 1:
            total = self._sum(rows, weights, high)
        else:
            values, kind = rows[0]
            if is_small(kind):
                values = self._few.widened(values, kind)
                exact = is_few(rows, dtype, len(values))
                if exact and self._few.averaged(values, kind, out, dtype):
                    return
            total = self._sum(rows, weights, high, values)
        self._finish(total, out, dtype, rows, weights)

    def _sum(
        self, rows: Rows, weights: Sequence[int], high: Array, numbers: Array | None = None
    ) -> Sum:
        """Return the sum of all rows times their weights.

        If the plain sum had to round, the sum is computed again with error terms. The next
        sums, whose numbers are similar, then use error terms from the start.

        Args:
            rows: The rows.
            weights: How often each counts; empty if each counts once.
            high: The buffer for the plain sum.
            numbers: The numbers of the rows, divided by the dtype's `scale`, if all rows
                have one dtype and each counts once.
        """
        if not self._careful:
            self._rounded.clear()
            if numbers is None:
                self._add_up(rows, weights, high)
            else:
                np.add.reduce(numbers, axis=0, dtype=np.float64, out=high)
            if not self._rounded.raised():
                if numbers is not None and is_small(rows[0].dtype):
                    high *= scale(rows[0].dtype)
                return Sum(high)
        total = deque(self._sums(rows, weights), maxlen=1).pop()
        self._careful = total.low is not None
        return total

    def _add_up(self, rows: Rows, weights: Sequence[int], high: Array) -> None:
        high[...] = 0
        for addends in self._addends(rows, weights):
            for addend in addends:
                np.add(high, addend, out=high)

    def _sums(self, rows: Rows, weights: Sequence[int]) -> Iterator[Sum]:
        """Yield the sum after each row, with the rounding errors of the additions."""
        size = rows[0].values.shape[1]
        high, new = self._columns[:2, :size]
        low: Array | None = None
        unsure: Array | None = None
        high[...] = 0
        for addends in self._addends(rows, weights):
            for addend in addends:
                self._rounded.clear()
                np.add(high, addend, out=new)
                if self._rounded.raised():
                    error = lost(high, addend, new)
                    before = np.zeros_like(error) if low is None else low
                    low = before + error
                    wrong = lost(before, error, low) != 0
                    unsure = wrong if unsure is None else unsure | wrong
                high, new = new, high
            yield Sum(high, low, unsure)

    def _addends(self, rows: Rows, weights: Sequence[int]) -> Iterator[Sequence[Array]]:
        """Yield for each row one or two float64 arrays whose sum is the row times its weight."""
        size = rows[0].values.shape[1]
        whole, upper = self._columns[2:4, :size]
        for number, (values, dtype) in enumerate(each(rows)):
            widen(values, whole, dtype)
            if not weights:
                yield (whole,)
            elif dtype.significand < 53:
                whole *= weights[number]
                yield (whole,)
            else:
                np.bitwise_and(whole.view(np.int64), ~_LOWER_HALF, out=upper.view(np.int64))
                whole -= upper
                whole *= weights[number]
                upper *= weights[number]
                yield whole, upper

    def _finish(
        self, total: Sum, out: Array, dtype: DType, rows: Rows, weights: Sequence[int]
    ) -> None:
        """Divide the sum of the rows by the sum of the weights, and round it into `out`."""
        count, unsure = sum(weights) or count_of(rows), total.unsure
        mean = self._columns[4, : out.size]
        if count > MOST_WEIGHT:
            unsure = np.ones(out.size, np.bool_)
        elif total.low is None and count & (count - 1) == 0:
            np.multiply(total.high, 1 / count, out=mean)  # the same number, in half the time
        elif total.low is None:
            np.divide(total.high, count, out=mean)
        else:
            doubtful = refine(mean, total.high, total.low, count, dtype)
            unsure = doubtful if unsure is None else unsure | doubtful
        if unsure is not None and unsure.any():
            places = unsure.nonzero()[0]
            mean[places] = exact_means(rows, weights, places, dtype)
        round_into(mean, out, dtype)
