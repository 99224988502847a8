"""The dtypes that numpy has not: every pattern of bits means what it means to torch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch

from swa_avg.kernel.arithmetic import default_arithmetic
from swa_avg.kernel.elements import all_finite, carrier, narrow, non_finite, wide, widen
from swa_avg.tensors.floats import FORMATS, value_of
from swa_avg.tensors.tensor import DTYPES

SMALL = [dtype for dtype in oracle.FORMATS if dtype.itemsize <= 2]
small = pytest.mark.parametrize("dtype", SMALL, ids=str)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def every(dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """Return each element of a dtype once, as torch has it and as it is carried."""
    patterns = np.arange(1 << 8 * dtype.itemsize).astype(f"u{dtype.itemsize}")
    values = torch.frombuffer(bytearray(patterns.tobytes()), dtype=dtype)
    return values, patterns.view(carrier(DTYPES[name_of(dtype)]))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Tell whether numbers are the same, zeros with their signs; NaN is NaN."""
    both = np.isnan(a) & np.isnan(b)
    return bool((both | ((a == b) & (np.signbit(a) == np.signbit(b)))).all())


@small
def test_every_pattern_is_widened_as_torch_does(dtype: torch.dtype) -> None:
    """To float32 and to float64; by the definition of the format, too."""
    values, carried = every(dtype)
    kind = DTYPES[name_of(dtype)]
    with default_arithmetic():
        single = np.empty(carried.size, np.float32)
        widen(carried, single, kind)
        double = wide(carried, kind)
    expected = values.to(torch.float64).numpy()
    assert same(single.astype(np.float64), expected)
    assert same(double, expected)
    form = FORMATS[kind.name]
    defined = [value_of(bits, form) for bits in range(carried.size)]
    assert same(np.array(defined), expected)
    finite = np.isfinite(expected)
    assert (non_finite(carried, kind) == ~finite).all()
    assert all_finite(carried[finite], kind)
    for place in np.flatnonzero(~finite)[:: max(1, (~finite).sum() // 50)]:
        assert not all_finite(np.append(carried[finite][:9], carried[place]), kind)


@small
def test_every_number_its_neighbours_and_middles_are_narrowed_as_by_definition(
    dtype: torch.dtype,
) -> None:
    """What is exact stays; about each middle the nearest is taken, at it the even one."""
    values, carried = every(dtype)
    kind, form = DTYPES[name_of(dtype)], oracle.FORMATS[dtype]
    finite = np.isfinite(values.to(torch.float64).numpy())
    out = np.empty(int(finite.sum()), carrier(kind))
    with default_arithmetic():
        single = np.empty(carried.size, np.float32)
        widen(carried, single, kind)
        narrow(single[finite], out, kind)
        assert (out == carried[finite]).all()
        numbers = np.unique(np.abs(single[finite]))
        middles = ((numbers[:-1].astype(np.float64) + numbers[1:]) / 2).astype(np.float32)
        inf = np.float32(math.inf)
        around = np.concatenate([middles, np.nextafter(middles, inf), np.nextafter(middles, -inf)])
        around = np.concatenate([around, -around])
        found = np.empty(around.size, carrier(kind))
        narrow(around, found, kind)
    expected = [form.bits(Fraction(float(number))) for number in around]
    # A number that rounds to zero keeps its sign, where zero has one.
    for place, (number, bits) in enumerate(zip(around, expected, strict=True)):
        if bits == 0 and number < 0 and not form.unsigned_zero:
            expected[place] = form.sign
    assert (found.view(f"u{dtype.itemsize}") == np.array(expected)).all()


@small
def test_any_float32_is_narrowed_as_torch_does(dtype: torch.dtype) -> None:
    """A million of any bits; what is too large becomes what torch makes of it, or NaN."""
    draw = np.random.default_rng(0)
    bits = draw.integers(0, 1 << 32, 1_000_000, dtype=np.uint64).astype(np.uint32)
    single = bits.view(np.float32)
    kind = DTYPES[name_of(dtype)]
    found = np.empty(single.size, carrier(kind))
    with default_arithmetic():
        narrow(single, found, kind)
        ours = wide(found, kind)
        expected = torch.from_numpy(single.copy()).to(dtype).to(torch.float64).numpy()
        largest = float(oracle.FORMATS[dtype].value(oracle.FORMATS[dtype].largest))
        inside = np.abs(single.astype(np.float64)) <= largest
        beyond = ours[np.abs(single.astype(np.float64)) >= 2 * largest]
    assert same(ours[inside], expected[inside])
    assert not np.isfinite(beyond).any()
    assert np.isnan(ours[np.isnan(single)]).all()
