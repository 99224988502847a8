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

A weight of up to 26 bits times a number of up to 24 is exact in float64; a
float64 is cut into two halves first (Dekker, "A floating-point technique for
extending the available precision", Numerische Mathematik 18, 1971).

What does not fit in two float64, which takes exponents more than 2^53 apart, is
done element by element in rational arithmetic.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import islice

import torch

from swa_avg.rounding import (
    BITS,
    NonFiniteError,
    round_at,
    round_into,
    rounding_detector,
)
from swa_avg.tensors import DType

Inputs = Callable[[], Iterable[torch.Tensor]]

MOST_WEIGHT = 1 << 26
_LOWER_HALF = (1 << 27) - 1  # of a float64's significand


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum as high + low (None: zero), and where even that is not all of it."""

    high: torch.Tensor
    low: torch.Tensor | None = None
    unsure: torch.Tensor | None = None


class Averager:
    """Averages chunks of at most `capacity` elements, in buffers that it keeps.

    Used by one thread, with torch's own threads off (`torch.set_num_threads(1)`):
    the processor's note of a rounding is kept for each thread.
    """

    def __init__(self, capacity: int) -> None:
        self._all = [torch.empty(capacity, dtype=torch.float64) for _ in range(4)]
        self._narrow = torch.empty(capacity, dtype=torch.float32)
        self._size = -1
        self._rounded = rounding_detector()
        self._careful = False
        self._exact = True

    def mean_into(
        self,
        inputs: Inputs,
        count: int,
        out: torch.Tensor,
        dtype: DType,
        weights: Sequence[int] = (),
        rows: torch.Tensor | None = None,
    ) -> None:
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
            weights: How often each chunk counts, 1 to `MOST_WEIGHT`; empty where each
                counts once. A sum of more than `MOST_WEIGHT` is slow.
            rows: float64, `count` by the length of a chunk; the chunks are left in it.

        Raises:
            NonFiniteError: An element is not finite in some input, or becomes so by rounding.
        """
        self._resize(out.numel())
        total = self._add_up(inputs, weights, rows)
        self._finish(total, inputs, weights or (1,) * count, out, dtype)

    def running_means(
        self,
        inputs: Inputs,
        count: int,
        out: torch.Tensor,
        dtype: DType,
        weights: Sequence[int] = (),
        rows: torch.Tensor | None = None,
    ) -> Iterator[int]:
        """Write the mean of the first chunk into `out`, then of the first two, and so on.

        Each is what `mean_into` gives for so many. The arguments are those of `mean_into`.

        Yields:
            Of how many chunks the mean is in `out` now: 1 to `count`.
        """
        self._resize(out.numel())
        summing = self._careful_sums if self._careful else self._sums
        sums = summing(inputs(), weights, rows)
        for done in range(1, count + 1):
            total = next(sums)
            if not self._careful and not self._exact:
                self._careful = True
                sums = islice(self._careful_sums(inputs(), weights, rows), done - 1, None)
                total = next(sums)
            taken = (*weights[:done],) or (1,) * done
            self._finish(total, partial(_first, inputs, done), taken, out, dtype)
            yield done
        self._careful = self._careful and total.low is not None

    def _resize(self, size: int) -> None:
        """Make the buffers as long as the chunk."""
        if size != self._size:
            self._size = size
            self._high, self._new, self._wide, self._low = (made[:size] for made in self._all)
            self._middle = self._narrow[:size]

    def _add_up(self, inputs: Inputs, weights: Sequence[int], rows: torch.Tensor | None) -> _Sum:
        """Return the sum of all inputs.

        Where the plain sum had to round, it is done again with care; the chunk after
        such a one, which is of the same kind, is done with care at once.
        """
        if not self._careful:
            total = _last(self._sums(inputs(), weights, rows))
            if self._exact:
                return total
        total = _last(self._careful_sums(inputs(), weights, rows))
        self._careful = total.low is not None
        return total

    def _sums(
        self, chunks: Iterable[torch.Tensor], weights: Sequence[int], rows: torch.Tensor | None
    ) -> Iterator[_Sum]:
        """Yield the sum after each chunk; whether no addition has rounded is noted."""
        high, wide = self._high, self._wide
        total = _Sum(high)
        self._exact = True
        for number, chunk in enumerate(chunks):
            into = rows[number] if rows is not None else wide if number else high
            addends = self._addends(chunk, weights[number] if weights else 1, into)
            for addend in addends:
                if number or addend is not addends[0]:
                    self._add(addend)
                elif addend is not high:
                    high.copy_(addend)
            yield total

    def _add(self, addend: torch.Tensor) -> None:
        """Add to the sum. What was done before, as reading may, could have rounded too."""
        if self._rounded.raised():
            self._rounded.clear()
        self._high.add_(addend)
        self._exact = self._exact and not self._rounded.raised()

    def _careful_sums(
        self, chunks: Iterable[torch.Tensor], weights: Sequence[int], rows: torch.Tensor | None
    ) -> Iterator[_Sum]:
        """Yield the sum after each chunk, with what additions have lost."""
        high, new = self._high, self._new
        low: torch.Tensor | None = None
        unsure: torch.Tensor | None = None
        for number, chunk in enumerate(chunks):
            into = self._wide if rows is None else rows[number]
            addends = self._addends(chunk, weights[number] if weights else 1, into)
            for addend in addends:
                if number == 0 and addend is addends[0]:
                    high.copy_(addend)
                    continue
                self._rounded.clear()
                torch.add(high, addend, out=new)
                if self._rounded.raised():
                    error = _lost(high, addend, new)
                    before = torch.zeros_like(error) if low is None else low
                    low = before + error
                    wrong = _lost(before, error, low) != 0
                    unsure = wrong if unsure is None else unsure | wrong
                high.copy_(new)
            yield _Sum(high, low, unsure)

    def _addends(
        self, chunk: torch.Tensor, weight: int, into: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return float64 tensors whose sum is the chunk times its weight, exactly.

        The chunk in float64 goes to `into`: converting first and adding then is fastest.
        """
        if chunk.dtype is torch.float16:  # torch is slow at float16 to float64 in one step
            chunk = self._middle.copy_(chunk)
        into.copy_(chunk)
        if weight == 1:
            return (into,)
        if chunk.dtype is not torch.float64:
            return (torch.mul(into, weight, out=self._wide),)
        upper, lower = self._low, self._wide
        torch.bitwise_and(into.view(torch.int64), ~_LOWER_HALF, out=upper.view(torch.int64))
        torch.sub(into, upper, out=lower)
        torch.copysign(lower, upper, out=lower)  # for -0.0 plus 0.0 is 0.0
        return upper.mul_(weight), lower.mul_(weight)

    def _finish(
        self,
        total: _Sum,
        inputs: Inputs,
        weights: Sequence[int],
        out: torch.Tensor,
        dtype: DType,
    ) -> None:
        """Divide a sum by its weights and round it into `out`."""
        count, mean, unsure = sum(weights), self._new, total.unsure
        torch.div(total.high, count, out=mean)
        if total.low is not None:
            tail, lost = _refine(mean, total.high, total.low, count)
            if dtype.significand < 53:
                _round_to_odd(mean, tail)
                unsure = lost if unsure is None else unsure | lost
        if count > MOST_WEIGHT:
            unsure = torch.ones(self._size, dtype=torch.bool)
        if unsure is not None and unsure.any():
            _settle_exactly(mean, unsure.nonzero().flatten(), inputs, weights, dtype)
        if not round_into(mean, out, dtype, (self._wide, self._middle)):
            _settle_non_finite(out, mean, inputs, weights, dtype)


def _first(inputs: Inputs, count: int) -> Iterator[torch.Tensor]:
    return islice(inputs(), count)


def _last(sums: Iterator[_Sum]) -> _Sum:
    return deque(sums, maxlen=1).pop()


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
    mean: torch.Tensor, places: torch.Tensor, inputs: Inputs, weights: Sequence[int], dtype: DType
) -> None:
    """Put the mean of some elements in place by rational arithmetic.

    It is rounded to odd where it will be rounded again, to a smaller `dtype`.
    """
    columns = [chunk[places].to(torch.float64).tolist() for chunk in inputs()]
    odd = dtype.significand < 53
    exact = [_exact_mean(values, weights, odd) for values in zip(*columns, strict=True)]
    mean[places] = torch.tensor(exact, dtype=torch.float64)


def _exact_mean(values: tuple[float, ...], weights: Sequence[int], odd: bool) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    addends = (Fraction(value) * weight for value, weight in zip(values, weights, strict=True))
    exact = sum(addends, Fraction(0)) / sum(weights)
    if not exact:
        return -0.0 if all(math.copysign(1, value) < 0 for value in values) else 0.0
    nearest = float(exact)
    missing = exact - Fraction(nearest)
    if not odd or not missing or math.frexp(nearest)[0] * 2**53 % 2:
        return nearest
    return math.nextafter(nearest, math.inf if missing > 0 else -math.inf)


def _settle_non_finite(
    out: torch.Tensor, mean: torch.Tensor, inputs: Inputs, weights: Sequence[int], dtype: DType
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
        round_at(places[same], last[same].to(torch.float64), out, dtype)
    rest = places[~same]
    for source, column in enumerate(columns):
        values = column.to(torch.float64)[~same]
        bad = (~torch.isfinite(values)).nonzero().flatten()
        if bad.numel():
            raise NonFiniteError(source, int(rest[bad[0]]), float(values[bad[0]]))
    # Finite in every input: only the sum, or the rounding to a smaller dtype, overflowed.
    _settle_exactly(mean, rest, inputs, weights, dtype)
    round_at(rest, mean[rest], out, dtype)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(BITS[values.dtype.itemsize])
