"""Recomputes a sample of an average, element by element, in rational arithmetic.

Elements are read by their indices in the checkpoints' tensors and added as fractions. No
code of the kernel is used.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from swa_avg.planning import Treatment, Work
from swa_avg.tensors import FORMATS, Box, Kind, TensorRef, elements, read_box, real_dtype, value_of

_BOXES = 4096  # divided among the tensors
_MOST_OF_ONE = 16
_WIDTH = 8  # elements of a box
_EXACT = (Kind.EXACT, Kind.OPAQUE)


@dataclass(frozen=True)
class Wrong:
    """A wrong element: its tensor, and the first index of the sampled row that contains it."""

    name: str
    place: tuple[int, ...]


def wrong_in_sample(
    works: Sequence[Work],
    inputs: Sequence[Mapping[str, TensorRef]],
    output: Mapping[str, TensorRef],
) -> Wrong | None:
    """Recompute a sample of elements; return a wrong one, or None.

    Args:
        works: The computed tensors.
        inputs: The tensors of each checkpoint, by name.
        output: The tensors of the output, by name.
    """
    draw = random.Random(0)
    # A tensor that is written in parts has several works, which are all computed alike.
    named: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        if math.prod(work.shape) and work.name in output:  # not the tensors in extra state
            named[work.name].append(work)
    each = max(1, min(_MOST_OF_ONE, _BOXES // max(len(named), 1)))
    for parts in draw.sample([*named.values()], min(len(named), _BOXES)):
        work = parts[0]
        result = output[work.name]
        sources = _sources(parts, [tensors[work.name] for tensors in inputs])
        for number in range(each):
            box = _box(result.shape, draw, number)
            if not _is_right(work, result, sources, box):
                return Wrong(work.name, box.start)
    return None


def _sources(parts: Sequence[Work], every: Sequence[TensorRef]) -> Sequence[TensorRef]:
    """Return the checkpoints' tensors that an output tensor is computed from."""
    averaged = parts[0].treatment is Treatment.AVERAGED
    # A tensor that is not averaged is taken from the last of the work's sources.
    taken = [source for work in parts for source in work.sources[0 if averaged else -1 :]]
    records = {record for source in taken for record in source.records}
    sources = [ref for ref in every if ref.record in records]
    return sources if averaged else sources[-1:]


def _box(shape: tuple[int, ...], draw: random.Random, number: int) -> Box:
    """Return a row of a few elements: the first row, the last row, then random ones."""
    if not shape:
        return Box((), ())
    width = min(_WIDTH, shape[-1])
    most = [*(size - 1 for size in shape[:-1]), shape[-1] - width]
    ends = {0: [0] * len(shape), 1: most}
    start = ends.get(number) or [draw.randint(0, last) for last in most]
    return Box(tuple(start), (*(1 for _ in shape[:-1]), width))


def _is_right(work: Work, result: TensorRef, sources: Sequence[TensorRef], box: Box) -> bool:
    """Return whether the elements of a box are correct."""
    output = _Elements(result, box)
    if work.treatment is Treatment.RESET:
        return all(value == work.fill for value in output.values)
    inputs = [_Elements(source, box) for source in sources]
    if work.dtype.kind in _EXACT:
        return output.bits == inputs[-1].bits
    averaged = work.treatment is Treatment.AVERAGED and work.weights
    weights = work.weights if averaged else (1,) * len(inputs)
    same_dtype = all(source.dtype == work.dtype for source in sources)
    for number, bits in enumerate(output.bits):
        patterns = {one.bits[number] for one in inputs}
        if same_dtype and len(patterns) == 1:
            right = bits in patterns
        else:
            right = _is_mean(output, inputs, number, weights)
        if not right:
            return False
    return True


def _is_mean(
    output: _Elements, inputs: Sequence[_Elements], number: int, weights: Sequence[int]
) -> bool:
    """Return whether an element is the rounded mean of the inputs, or what they all have."""
    column = [one.values[number] for one in inputs]
    if not all(map(math.isfinite, column)):  # as text: NaN is not equal to itself
        return {str(value) for value in column} == {str(output.values[number])}
    terms = (weight * Fraction(value) for weight, value in zip(weights, column, strict=True))
    return output.holds(number, sum(terms, Fraction(0)) / sum(weights))


class _Elements:
    """The elements of a box, as bits and as numbers.

    A complex number counts as two elements. For integers the numbers are the bits. A
    number that is not finite is a float.
    """

    def __init__(self, ref: TensorRef, box: Box) -> None:
        dtype = real_dtype(ref.dtype)
        self._format, size = FORMATS.get(dtype.name), dtype.itemsize
        data = bytearray(box.numel * ref.dtype.itemsize)
        read_box(ref, box, elements(data, box.shape, ref.dtype.itemsize))
        places = range(0, len(data), size)
        self.bits = [int.from_bytes(data[place : place + size], "little") for place in places]
        form = self._format
        self.values: Sequence[int | float] = self.bits
        if form:
            self.values = [value_of(bits, form) for bits in self.bits]

    def holds(self, number: int, exact: Fraction) -> bool:
        """Return whether an element is the number of its dtype that is nearest to `exact`."""
        value, form = self.values[number], self._format
        if form is None or not math.isfinite(value):
            return False
        exponent = max(_exponent(exact), 2 - form.bias)
        step = Fraction(2) ** (exponent - form.fraction - 1)
        return Fraction(value) == round(exact / step) * step  # ties to even


def _exponent(value: Fraction) -> int:
    """Return the least e with |value| < 2**e."""
    if not value:
        return -(1 << 20)
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    return exponent + (size >= Fraction(2) ** exponent)
