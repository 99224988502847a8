"""The laws of the mean: correctly rounded, whatever the order, the chunks or the processor."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swa_avg.kernel.arithmetic import (
    AlwaysRounded,
    RoundingDetector,
    default_arithmetic,
    rounding_detector,
)
from swa_avg.kernel.compensated import Block, Rows, SlidingSums
from swa_avg.kernel.elements import carrier
from swa_avg.kernel.exact import ALONE, MOST_WEIGHT, Averager
from swa_avg.kernel.rounding import NonFiniteError
from swa_avg.tensors.tensor import DTYPES, DType

FLOATS = tuple(oracle.FORMATS)
NARROW = tuple(dtype for dtype in FLOATS if dtype != torch.float64)
FEW = tuple(dtype for dtype in FLOATS if dtype.itemsize <= 2)
names = pytest.mark.parametrize("dtype", FLOATS, ids=str)
few_names = pytest.mark.parametrize("dtype", FEW, ids=str)
narrow_names = pytest.mark.parametrize("dtype", NARROW, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _as_in_the_kernel() -> Iterator[None]:
    """What overflows is nothing to warn of."""
    with default_arithmetic():
        yield


def averaged(
    inputs: list[Tensor],
    dtype: torch.dtype | None = None,
    chunk: int | None = None,
    detector: RoundingDetector | None = None,
    weights: tuple[int, ...] = (),
) -> Tensor:
    """Return the mean as swa-avg computes it, in chunks of `chunk` elements."""
    wanted = of(dtype or inputs[0].dtype)
    out = np.empty(inputs[0].numel(), carrier(wanted))
    chunk = chunk or out.size
    averager = Averager(rounded=detector)
    for start in range(0, out.size, chunk):
        parts = [values[start : start + chunk] for values in inputs]
        averager.mean_into(_rows(parts), out[start : start + chunk], wanted, weights)
    return tensor(out, dtype or inputs[0].dtype)


def of(dtype: torch.dtype) -> DType:
    return DTYPES[str(dtype).removeprefix("torch.")]


def tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Return what the kernel has computed as a tensor."""
    return torch.frombuffer(bytearray(values.tobytes()), dtype=dtype)


def _rows(parts: list[Tensor]) -> Rows:
    """Return inputs as the kernel gives them."""
    dtypes = [values.dtype for values in parts]
    carried = [
        values.contiguous().view(torch.uint8).numpy().view(carrier(of(values.dtype)))
        for values in parts
    ]
    if len(set(dtypes)) == 1:
        return [Block(np.stack(carried), of(dtypes[0]))]
    pairs = zip(carried, dtypes, strict=True)
    return [Block(values[None], of(dtype)) for values, dtype in pairs]


def assert_correct(
    inputs: list[Tensor], dtype: torch.dtype | None = None, weights: tuple[int, ...] = ()
) -> None:
    expected = oracle.mean(inputs, dtype, weights)
    found = averaged(inputs, dtype, weights=weights)
    pairs = zip(oracle.bits(expected), oracle.bits(found), strict=True)
    wrong = [n for n, (a, b) in enumerate(pairs) if a != b]
    columns = [[values[n].item().hex() for values in inputs] for n in wrong[:2]]
    assert not wrong, (len(wrong), columns, found[wrong[:2]], expected[wrong[:2]])


def spread(count: int, size: int, low: float, high: float, dtype: torch.dtype) -> list[Tensor]:
    """Inputs whose elements each have their own exponent, within 10^low .. 10^high."""
    scale = 10 ** torch.empty(size, dtype=torch.float64).uniform_(low, high)
    largest = oracle.FORMATS[dtype].value(oracle.FORMATS[dtype].largest)
    return [
        (torch.randn(size, dtype=torch.float64) * scale).clamp(-float(largest), float(largest))
        .to(torch.float32 if dtype.itemsize < 4 else dtype).to(dtype)
        for _ in range(count)
    ]  # fmt: skip


def anything(count: int, size: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Finite numbers of any bit pattern: every exponent, every sign, subnormals too."""
    draw = random.Random(seed)
    form = oracle.FORMATS[dtype]

    def number() -> int:
        while True:
            pattern = draw.getrandbits(8 * dtype.itemsize)
            if form.value(pattern) is not None:
                return pattern

    return [oracle.from_bits([number() for _ in range(size)], dtype) for _ in range(count)]


# Correctly rounded.


@names
@pytest.mark.parametrize("count", [*range(1, 14), 101])
def test_mean_is_correctly_rounded_over_weights_like_real_ones(
    dtype: torch.dtype, count: int
) -> None:
    """Over exponents from 1e-6 to 1e4, no element is off by a bit."""
    torch.manual_seed(count)
    assert_correct(spread(count, 1000 // count + 20, -6, 4, dtype))


@names
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 9, 12, 13, 101])
def test_mean_is_correctly_rounded_over_all_exponents(dtype: torch.dtype, count: int) -> None:
    """Where inputs of one element are as far apart as the format allows."""
    assert_correct(anything(count, 1000 // count + 10, dtype, seed=count))


@few_names
@pytest.mark.parametrize("count", [2, 3, 10, 255, 2048, 2049])
def test_mean_of_few_bits_about_ties_is_correctly_rounded(dtype: torch.dtype, count: int) -> None:
    """Of neighbours, about as many of the one as of the other; also where a sum has 24 bits."""
    form = oracle.FORMATS[dtype]
    one = form.bias << form.fraction
    ends = [one, one + 1, one + 2, one + (1 << form.fraction) - 2, one + (1 << form.fraction) - 1]
    lowest = [0, 1, 2, (1 << form.fraction) - 1]
    columns = [
        [start + (row < upper) for row in range(count)]
        for start in ((*ends, *lowest) if count < 1000 else (one, ends[-1], 1))
        for upper in {*range(count // 2 - 2, count // 2 + 4), 1, count - 1} & {*range(count + 1)}
    ]
    rows = zip(*columns, strict=True)
    assert_correct([oracle.from_bits(row, dtype) for row in rows])


@few_names
@pytest.mark.parametrize("to", FLOATS, ids=str)
@pytest.mark.parametrize("count", [2, 3, 10])
def test_mean_of_few_bits_is_rounded_once_to_any_dtype(
    dtype: torch.dtype, to: torch.dtype, count: int
) -> None:
    """Whether the sum is exact in float32 or not; the inputs of one dtype or of two."""
    torch.manual_seed(count)
    for low, high in ((0, 1), (-6, 1)):
        inputs = spread(count, 300, low, high, dtype)
        assert_correct(inputs, to)
        assert_correct([inputs[0], *spread(count - 1, 300, low, high, torch.bfloat16)], to)


@narrow_names
def test_mean_of_subnormals_is_correctly_rounded(dtype: torch.dtype) -> None:
    """Below the smallest normal number nothing is flushed or rounded twice."""
    form = oracle.FORMATS[dtype]
    draw = random.Random(1)
    below = 1 << (form.fraction + 1)
    patterns = [[draw.randrange(below) | draw.choice((0, form.sign)) for _ in range(400)]
                for _ in range(7)]  # fmt: skip
    if form.unsigned_zero:
        patterns = [[0 if p == form.sign else p for p in row] for row in patterns]
    for count in (2, 3, 4, 7):
        assert_correct([oracle.from_bits(row, dtype) for row in patterns[:count]])


def exactly(values: list[Fraction], dtype: torch.dtype) -> Tensor:
    """Return numbers that the dtype holds as they are."""
    form = oracle.FORMATS[dtype]
    made = [form.bits(value) for value in values]
    assert [form.value(pattern) for pattern in made] == values
    return oracle.from_bits(made, dtype)


def ties(dtype: torch.dtype) -> list[tuple[Fraction, Fraction]]:
    """Neighbours, of either sign, whose middle is a tie; eight times as much is still finite."""
    form = oracle.FORMATS[dtype]
    draw = random.Random(0)
    top = form.largest - (4 << form.fraction)
    lower = [draw.randrange(1, top) for _ in range(200)]
    lower += [1, 2, (1 << form.fraction) - 1, 1 << form.fraction, (2 << form.fraction) - 1]
    signed = [pattern | sign for pattern in lower for sign in (0, form.sign)]
    return [(form.value(pattern), form.value(pattern + 1)) for pattern in signed]


@narrow_names
@pytest.mark.parametrize("aside", [-1, 0, 1])
def test_mean_beside_a_tie_falls_on_its_side(dtype: torch.dtype, aside: int) -> None:
    """A mean that misses a tie by the smallest of numbers is not a tie; one that does not, is.

    For float32 the sum is not exact in float64; the narrower dtypes would be
    rounded twice on torch's way from float64 through float32.
    """
    tiny = aside * oracle.FORMATS[dtype].value(1)
    pairs = ties(dtype)
    rows = [[2 * low for low, _ in pairs], [2 * high for _, high in pairs]]
    rows += [[tiny] * len(pairs), [Fraction(0)] * len(pairs)]
    assert_correct([exactly(row, dtype) for row in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aside", [-1, 0, 1])
def test_mean_beside_a_tie_survives_cancellation(dtype: torch.dtype, aside: int) -> None:
    """Large numbers that cancel take nothing of the small ones with them, in any order."""
    tiny = aside * oracle.FORMATS[dtype].value(1)
    pairs = [(low, high) for low, high in ties(dtype) if abs(low) < 2**40]
    big = Fraction(2**100)
    rows = [[4 * low for low, _ in pairs], [4 * high for _, high in pairs]]
    rows += [[value] * len(pairs) for value in (big, tiny, -big, *[Fraction(0)] * 3)]
    inputs = [exactly(row, dtype) for row in rows]
    assert_correct(inputs)
    assert_correct(inputs[::-1])
    assert_correct([inputs[n] for n in (2, 0, 3, 1, 4, 5, 6, 7)])


@pytest.mark.parametrize(
    ("wide", "dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_mean_in_a_narrower_dtype_is_rounded_once(wide: torch.dtype, dtype: torch.dtype) -> None:
    """A mean half a step of the wide dtype beside a tie of the narrow one is no tie."""
    middles = [(low + high) / 2 for low, high in ties(dtype)]
    at = exactly(middles, wide)
    patterns = oracle.bits(at)
    for step in (-1, 0, 1):
        beside = oracle.from_bits([pattern + step for pattern in patterns], wide)
        assert_correct([at, beside], dtype)
        assert_correct([at, at, beside], dtype)


def test_mean_of_mixed_dtypes_is_rounded_once() -> None:
    """Inputs of several dtypes give the rounded mean of their values."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2)
    inputs = [anything(1, 500, dtype, seed)[0] for seed, dtype in enumerate(dtypes)]
    small = [values.to(torch.float64).clamp(-6e4, 6e4).to(values.dtype) for values in inputs]
    for dtype in (torch.float32, torch.bfloat16):
        assert_correct(small, dtype)


@settings(deadline=None, max_examples=100)
@given(raw=st.binary(min_size=32, max_size=256), dtype=st.sampled_from(FLOATS))
def test_mean_is_correctly_rounded_for_any_bits(raw: bytes, dtype: torch.dtype) -> None:
    """Hypothesis looks for a counterexample among all finite bit patterns."""
    form = oracle.FORMATS[dtype]

    def sound(pattern: int) -> int:
        return 0 if form.value(pattern) is None else pattern

    size, width = dtype.itemsize, 4
    numbers = [
        int.from_bytes(raw[n : n + size], "little") for n in range(0, 8 * width * size, size)
    ]
    rows = [numbers[n : n + width] for n in range(0, 8 * width, width) if n * size < len(raw)]
    assert_correct([oracle.from_bits(list(map(sound, row)), dtype) for row in rows])


def test_float64_mean_is_nearest_where_a_sum_needs_three_float64() -> None:
    """What does not fit into two float64 is still rounded to the nearest."""
    rows = [[1.0, 1.0, -3.0], [2.0**-60, 2.0**-53, 2.0**-70], [2.0**-120, 2.0**-120, 1.0]]
    rows.append([1.0, 1.0, 2.0**-170])
    assert_correct([torch.tensor(row, dtype=torch.float64) for row in rows])


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("top", [1, 2, 40, 100])
def test_float64_mean_of_tiny_numbers_is_the_nearest(count: int, top: int) -> None:
    """Below 1e-307, where a rest is too small for float64: exponents from the least up."""
    draw = random.Random(count * top)
    patterns = [[draw.randrange(top << 52) | draw.choice((0, 1 << 63)) for _ in range(300)]
                for _ in range(count)]  # fmt: skip
    assert_correct([oracle.from_bits(row, torch.float64) for row in patterns])


@pytest.mark.parametrize("aside", [-1, 0, 1])
@pytest.mark.parametrize("places", [40, 52, 60, 100, 500])
def test_float64_mean_beside_a_tie_falls_on_its_side(aside: int, places: int) -> None:
    """However little it misses the tie by: neighbours, and what is 2^-places times as large."""
    draw = random.Random(places)
    low = [draw.getrandbits(52) | (1023 + draw.randrange(9)) << 52 for _ in range(200)]
    rows = [low, [pattern + 1 for pattern in low]]
    values = [oracle.from_bits(row, torch.float64) for row in rows]
    assert_correct([*(4 * row for row in values), aside * values[0] * 2.0**-places,
                    torch.zeros(200, dtype=torch.float64)])  # fmt: skip
    assert_correct([*values, aside * values[0] * 2.0**-places])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_mean_of_the_largest_numbers_does_not_overflow(dtype: torch.dtype) -> None:
    """A sum may be more than its dtype holds; a mean never is."""
    form = oracle.FORMATS[dtype]
    rows = [[form.largest, form.largest | form.sign, form.largest - n] for n in range(7)]
    assert_correct([oracle.from_bits(row, dtype) for row in rows])


# Weighted.

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9), st.integers(1, MOST_WEIGHT), st.just(MOST_WEIGHT)),
    min_size=4,
    max_size=4,
)


@settings(deadline=None, max_examples=150)
@given(
    raw=st.binary(min_size=32, max_size=256), dtype=st.sampled_from(FLOATS), drawn=WEIGHTS,
    cancel=st.booleans(),
)  # fmt: skip
def test_weighted_mean_is_correctly_rounded(
    raw: bytes, dtype: torch.dtype, drawn: list[int], cancel: bool
) -> None:
    """The sum of w_i x_i over that of w_i, for any finite bits, in any order of the inputs."""
    form = oracle.FORMATS[dtype]
    largest = Fraction(2) ** 990

    def sound(pattern: int) -> int:
        value = form.value(pattern)
        return pattern if value is not None and abs(value) <= largest else 0

    size, weights = dtype.itemsize, tuple(drawn)
    numbers = [int.from_bytes(raw[n : n + size], "little") for n in range(0, len(raw), size)]
    length = max(1, len(numbers) // 4)
    rows = [[sound(numbers[(n + k * length) % len(numbers)]) for n in range(length)]
            for k in range(4)]  # fmt: skip
    if cancel and not form.unsigned_zero:
        rows[1] = [pattern ^ form.sign for pattern in rows[0]]
        weights = (weights[0], weights[0], *weights[2:])
    inputs = [oracle.from_bits(row, dtype) for row in rows]
    assert_correct(inputs, None, weights)
    backwards = averaged(inputs[::-1], weights=weights[::-1])
    assert oracle.same_bits(averaged(inputs, weights=weights), backwards)


@names
@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 5), (MOST_WEIGHT, MOST_WEIGHT - 1, 3)])
def test_weighted_mean_of_real_weights(dtype: torch.dtype, weights: tuple[int, ...]) -> None:
    """Over weights like real ones, and elements the same in all inputs keep their bits."""
    torch.manual_seed(0)
    inputs = spread(3, 400, -6, 4, dtype)
    for values in inputs:
        values[::9] = -0.0
        values[4] = inputs[0][4]
    assert_correct(inputs, None, weights)
    chunks = averaged(inputs, chunk=37, weights=weights)
    assert oracle.same_bits(chunks, averaged(inputs, weights=weights))


@names
def test_identical_inputs_keep_their_bits_whatever_their_weights(dtype: torch.dtype) -> None:
    """Infinities, NaN payloads, -0.0, subnormals, the largest numbers."""
    form = oracle.FORMATS[dtype]
    patterns = [form.sign, form.largest, form.largest + 1, form.largest + 2, 1, 0, 3]
    patterns = [p for p in patterns if p < 2 * form.sign]
    values = oracle.from_bits([*patterns, *oracle.bits(spread(1, 90, -6, 4, dtype)[0])], dtype)
    for weights in ((3, 1, 7), (MOST_WEIGHT, MOST_WEIGHT, 1)):
        assert oracle.same_bits(averaged([values] * 3, weights=weights), values)


def test_equal_weights_are_no_weights() -> None:
    """A mean in which each counts seven times is the mean."""
    inputs = anything(4, 300, torch.float32, seed=2)
    assert oracle.same_bits(averaged(inputs, weights=(7,) * 4), averaged(inputs))


# All means of the first k inputs.


@names
@pytest.mark.parametrize("weights", [(), (3, 1, 4, 1, 5, 9)])
@pytest.mark.parametrize("make", ["like weights", "all exponents", "halfway"])
@pytest.mark.parametrize("careful", [False, True])
def test_running_means_are_the_means(
    dtype: torch.dtype, weights: tuple[int, ...], make: str, careful: bool
) -> None:
    """Each running mean is that of the first k inputs by themselves, bit for bit."""
    torch.manual_seed(0)
    inputs = spread(6, 200, -3, 1, dtype)
    if make == "all exponents":
        inputs = anything(6, 200, dtype, seed=1)
    elif make == "halfway":  # additions are exact up to the fourth
        inputs[3:] = anything(3, 200, dtype, seed=4)
    for values in inputs:
        values[::13] = -0.0
    inputs[0][5] = math.nan  # alone it is what it is
    averager = Averager(rounded=AlwaysRounded() if careful else None)
    out = np.empty(200, carrier(of(dtype)))
    made = averager.running_means(_rows(inputs), out, of(dtype), weights)
    assert next(made) == 1
    assert oracle.same_bits(tensor(out, dtype), inputs[0])
    with pytest.raises(NonFiniteError):
        next(made)
    for values in inputs:
        values[5] = 1
    for _ in range(2):  # what the averager has learnt from a chunk changes nothing
        counts = []
        for k in averager.running_means(_rows(inputs), out, of(dtype), weights):
            counts.append(k)
            mean = averaged(inputs[:k], weights=weights[:k])
            assert oracle.same_bits(tensor(out, dtype), mean), k
        assert counts == [1, 2, 3, 4, 5, 6]


# All means of windows of consecutive inputs.


def spans_of(count: int, lengths: Iterable[int]) -> list[range]:
    """The windows of some lengths, in the order of their ends."""
    return [range(end - length, end) for end in range(1, count + 1) for length in sorted(lengths)
            if length <= end]  # fmt: skip


def assert_windows(
    averager: Averager, inputs: list[Tensor], lengths: Iterable[int], dtype: torch.dtype
) -> None:
    out = np.empty(inputs[0].numel(), carrier(of(dtype)))
    spans = spans_of(len(inputs), lengths)
    numbers = []
    for number in averager.window_means(_rows(inputs), spans, out, of(dtype)):
        numbers.append(number)
        expected = oracle.mean([inputs[n] for n in spans[number]], dtype)
        assert oracle.same_bits(tensor(out, dtype), expected), spans[number]
    assert numbers == list(range(len(spans)))


@names
@pytest.mark.parametrize("make", ["like weights", "halfway", "mixed"])
@pytest.mark.parametrize("careful", [False, True])
def test_means_of_windows_are_the_means(dtype: torch.dtype, make: str, careful: bool) -> None:
    """Each is correctly rounded, whether partial sums are exact, to the middle, or never."""
    torch.manual_seed(0)
    inputs = spread(9, 60, -1, 1, dtype)
    if make == "halfway":
        inputs[5:] = anything(4, 60, dtype, seed=4)
    elif make == "mixed":
        inputs[3:5] = [values.to(torch.bfloat16) for values in spread(2, 60, -1, 1, dtype)]
    for values in inputs:
        values[::13] = -0.0
        values[5] = 1
    inputs[4][13] = 0.0
    averager = Averager(rounded=AlwaysRounded() if careful else None)
    for _ in range(4):  # what the averager has learnt from a chunk changes nothing
        assert_windows(averager, inputs, (1, 2, 4, 7, 9), dtype)


@settings(deadline=None, max_examples=100)
@given(
    raw=st.binary(min_size=24, max_size=200),
    dtype=st.sampled_from(FLOATS),
    alike=st.booleans(),
    count=st.integers(1, 7),
    drawn=st.sets(st.integers(1, 7), min_size=1, max_size=3),
)
def test_means_of_windows_are_correctly_rounded(
    raw: bytes, dtype: torch.dtype, alike: bool, count: int, drawn: set[int]
) -> None:
    """For any finite bits and any lengths; with exponents alike, partial sums are exact."""
    form, size = oracle.FORMATS[dtype], dtype.itemsize
    numbers = [int.from_bytes(raw[n : n + size], "little") for n in range(0, len(raw) - 7, size)]
    if alike:
        fraction = (1 << form.fraction) - 1
        numbers = [n & (fraction | form.sign) | form.bias << form.fraction for n in numbers]
    numbers = [0 if form.value(n) is None else n for n in numbers]
    length = -(-len(numbers) // count)
    rows = [[numbers[(n + k * length) % len(numbers)] for n in range(length)]
            for k in range(count)]  # fmt: skip
    lengths = {min(length, count) for length in drawn}
    assert_windows(Averager(), [oracle.from_bits(row, dtype) for row in rows], lengths, dtype)


def test_sliding_sums_are_used_where_they_are_exact() -> None:
    """After one that was rounded, the next chunks do without them, and later ones try again."""
    sliding, size = SlidingSums(rounding_detector()), 50
    exact = [np.full((1, size), n, np.float32) for n in range(1, 5)]
    rounded = [*exact[:3], np.full((1, size), 2.0**-60, np.float32)]
    spans, kind = spans_of(4, (3,)), of(torch.float32)

    def sums(rows: list[Any]) -> list[float | None]:
        if not sliding.is_ready():
            return [None]
        found = sliding.of([Block(row, kind) for row in rows], spans, size)
        return [None if total is None else float(total[0]) for total in found]

    assert sums(exact) == [6, 9]
    assert sums(rounded) == [6, None]
    assert sums(exact) == [None]
    assert sums(exact) == [6, 9] == sums(exact)


def test_element_that_is_not_finite_in_some_windows() -> None:
    """It is refused in each window that has it, with the number of the input; others are sound."""
    inputs = [torch.ones(70) * n for n in range(6)]
    inputs[2][7] = math.inf
    out = np.empty(70, carrier(of(torch.float32)))
    averager = Averager()
    made = averager.window_means(_rows(inputs), spans_of(6, (2,)), out, of(torch.float32))
    assert next(made) == 0 and (out == 0.5).all()
    with pytest.raises(NonFiniteError) as refused:
        next(made)
    assert (refused.value.source, refused.value.element) == (2, 7)
    assert_windows(averager, inputs[3:], (2,), torch.float32)


# The same bits, whatever the way.


@names
def test_order_does_not_matter(dtype: torch.dtype) -> None:
    """All 120 orders of five inputs give the same bits, signs of zeros included."""
    inputs = anything(5, 60, dtype, seed=3)
    for place in range(20):  # exact cancellation, zeros of both signs
        inputs[1][place], inputs[2][place] = 0.0, inputs[0][place].to(torch.float64) * -1
        inputs[3][place], inputs[4][place] = -0.0, 0.0
    first = averaged(inputs)
    assert oracle.same_bits(first, oracle.mean(inputs))
    for order in permutations(inputs):
        assert oracle.same_bits(averaged(list(order)), first)


@names
def test_chunks_do_not_matter(dtype: torch.dtype) -> None:
    """An element's mean does not depend on which elements it is computed with."""
    wide = anything(6, 97, dtype, seed=5)
    inputs = [torch.cat([a.view(oracle.INTEGERS[dtype.itemsize]),
                         b.view(oracle.INTEGERS[dtype.itemsize])]).view(dtype)
              for a, b in zip(wide, spread(6, 97, -6, 4, dtype), strict=True)]  # fmt: skip
    for values in inputs:
        values[::9] = -0.0
    whole = averaged(inputs)
    for chunk in (1, 2, 7, 64, 193):
        assert oracle.same_bits(averaged(inputs, chunk=chunk), whole)


@names
@pytest.mark.parametrize("weights", [(), (2, 1, 5)])
def test_long_rows_do_not_matter(dtype: torch.dtype, weights: tuple[int, ...]) -> None:
    """Rows that are averaged a part at a time, some of which need care, some none."""
    torch.manual_seed(1)
    size = 2 * ALONE + 7
    inputs = spread(3, size, -1, 1, dtype)
    hard = anything(3, 50, dtype, seed=9)
    for values, odd in zip(inputs, hard, strict=True):
        bits = values.view(oracle.INTEGERS[dtype.itemsize])
        bits[:50] = odd.view(bits.dtype)
        bits[size // 2 : size // 2 + 50] = odd.view(bits.dtype)
        bits[-50:] = odd.view(bits.dtype)
        values[7::4000] = -0.0
    whole = averaged(inputs, weights=weights)
    assert oracle.same_bits(averaged(inputs, chunk=977, weights=weights), whole)
    for places in (slice(0, 30), slice(size // 2 - 10, size // 2 + 60), slice(-60, None)):
        exact = oracle.mean([values[places] for values in inputs], None, weights)
        assert oracle.same_bits(whole[places], exact)


@names
def test_detector_does_not_matter(dtype: torch.dtype) -> None:
    """Where the processor cannot be asked about roundings, the bits are the same."""
    for inputs in (anything(5, 400, dtype, seed=7), spread(12, 400, -6, 4, dtype)):
        inputs = [values.index_fill(0, torch.arange(0, 400, 9), 0) if dtype.itemsize > 1 else values
                  for values in inputs]  # fmt: skip
        assert oracle.same_bits(averaged(inputs, detector=AlwaysRounded()), averaged(inputs))


def test_processor_is_asked_on_this_machine() -> None:
    """The fast way is the one that is in use where the tests of it run."""
    import platform

    if platform.machine() not in RoundingDetector._INEXACT:
        pytest.skip("no known processor")
    assert type(rounding_detector()) is RoundingDetector


@names
@pytest.mark.parametrize("count", [1, 3, 10])
def test_identical_inputs_keep_their_bits(dtype: torch.dtype, count: int) -> None:
    """Every bit pattern of the dtype: infinities, NaN payloads, -0.0, subnormals."""
    if dtype.itemsize <= 2:
        patterns = list(range(1 << 8 * dtype.itemsize))
    else:
        draw = random.Random(0)
        form = oracle.FORMATS[dtype]
        patterns = [draw.getrandbits(8 * dtype.itemsize) for _ in range(3000)]
        patterns += [form.sign, form.largest, form.largest + 1, form.largest + 2, 1, 0]
        patterns += [form.sign | pattern for pattern in patterns if pattern < form.sign]
    values = oracle.from_bits(patterns, dtype)
    assert oracle.bits(averaged([values] * count)) == patterns


@names
def test_identical_elements_keep_their_bits_beside_others(dtype: torch.dtype) -> None:
    """A -0.0, an infinity or a NaN stays what it is where its neighbours differ."""
    form = oracle.FORMATS[dtype]
    fixed = [p for p in (form.sign, form.largest + 1, form.largest + 2, form.sign | 1)
             if p < 2 * form.sign]  # fmt: skip
    others = anything(3, 50, dtype, seed=11)
    inputs = [oracle.from_bits(fixed + oracle.bits(values), dtype) for values in others]
    found = averaged(inputs)
    assert oracle.bits(found)[: len(fixed)] == fixed
    assert oracle.same_bits(found[len(fixed) :], oracle.mean(others))


@names
@pytest.mark.parametrize("to", FLOATS, ids=str)
def test_nan_in_all_inputs_is_nan_in_any_dtype(dtype: torch.dtype, to: torch.dtype) -> None:
    """NaN is what -0.0 is in other formats."""
    nan = torch.full((3,), math.nan).to(dtype)
    assert averaged([nan, nan], to).to(torch.float32).isnan().all()


# Refused.


@pytest.mark.parametrize("dtype", [d for d in FLOATS if d != torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("source", [0, 1, 2])
def test_number_that_is_not_finite_is_named(dtype: torch.dtype, source: int) -> None:
    """The error holds the input, the element and what it is."""
    inputs = spread(3, 20, -1, 1, dtype)
    inputs[source][13] = math.nan
    with pytest.raises(NonFiniteError) as refused:
        averaged(inputs)
    assert (refused.value.source, refused.value.element) == (source, 13)
    assert math.isnan(refused.value.value)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_in_some_inputs_is_refused(value: float) -> None:
    """Infinity is kept where all have it; beside it, one input without it is one too many."""
    inputs = spread(3, 20, -1, 1, torch.float32)
    for values in inputs:
        values[4] = value
    inputs[0][5] = inputs[1][5] = value
    with pytest.raises(NonFiniteError) as refused:
        averaged(inputs)
    assert (refused.value.source, refused.value.element, refused.value.value) == (0, 5, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_overflow_of_a_narrower_dtype_is_refused(dtype: torch.dtype) -> None:
    """A mean that rounds to infinity is named; the largest that does not is written."""
    form = oracle.FORMATS[dtype]
    largest = form.value(form.largest)
    step = largest - form.value(form.largest - 1)
    fits = float(largest + step / 2 - step / 64)
    inputs = [torch.tensor([1.0, fits], dtype=torch.float32) for _ in range(3)]
    inputs[0][0] = 2.0
    assert_correct(inputs, dtype)
    inputs[1][1] = inputs[2][1] = float(largest + step / 2)
    inputs[0][1] = float(largest + step / 2 + step / 64)
    with pytest.raises(NonFiniteError) as refused:
        averaged(inputs, dtype)
    assert (refused.value.source, refused.value.element) == (None, 1)
    assert math.isfinite(refused.value.value)
