"""Elements of every dtype as numpy arrays: what carries them, and the ways to numbers and back.

numpy knows neither bfloat16 nor float8. These, and float16, travel as signed integers of
their bits. Each of these formats is float32's own with fewer bits of exponent and of fraction:
shifted into place, its bits are those of a float32 that is too small by a power of two.
Everything here is exact, or rounds once: to the nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from swa_avg.tensors import FORMATS, DType, Format, Kind, part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_SIGNED: Mapping[int, np.dtype[Any]] = {n: np.dtype(f"i{n}") for n in (1, 2, 4, 8)}
_UNSIGNED: Mapping[int, np.dtype[Any]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
_WIDE: Mapping[str, np.dtype[Any]] = {f"float{8 * n}": np.dtype(f"f{n}") for n in (4, 8)}
_FRACTION, _BIAS = 23, 127  # of float32
_SIGN = 1 << 31
_INFINITY = 0x7F800000


def carrier(dtype: DType) -> np.dtype[Any]:
    """Return what carries elements: float32 and float64 themselves, of others the bits.

    Complex numbers are carried in their parts.
    """
    one = part(dtype)
    return _WIDE.get(one.name) or _SIGNED[one.itemsize]


def bits(values: Array) -> Array:
    """Return the bits of elements as signed integers: the same memory."""
    return values.view(_SIGNED[values.itemsize])


def is_small(dtype: DType) -> bool:
    """Tell whether a dtype is a real one of which numpy has no arithmetic, or a slow one."""
    return dtype.kind is Kind.FLOAT and dtype.name not in _WIDE


def scale(dtype: DType) -> float:
    """Return by what a number of this dtype is larger than what `widen_scaled` makes of it."""
    return math.ldexp(1.0, _BIAS - FORMATS[dtype.name].bias) if is_small(dtype) else 1.0


def widen_scaled(values: Array, out: Array, dtype: DType) -> None:
    """Write the numbers of a small dtype into a float32 array, each over `scale`.

    Their sums have the same bits as those of the numbers themselves; what is not finite
    comes out as if its bits were those of a number, but in bfloat16.
    """
    form, made = FORMATS[dtype.name], out.view(np.int32)
    np.left_shift(values, _FRACTION - form.fraction, out=made, dtype=np.int32)
    if form.bias != _BIAS:
        exponent = 8 * dtype.itemsize - 1 - form.fraction
        mask = _SIGN | (((1 << exponent) - 1) << _FRACTION) | ((1 << _FRACTION) - 1)
        np.bitwise_and(made, np.int32(mask - (1 << 32)), out=made)


def widen(values: Array, out: Array, dtype: DType) -> None:
    """Write elements into a float64 array, or if it has room for them a float32 one, exactly."""
    if not is_small(dtype):
        np.copyto(out, values)
        return
    single = np.empty(values.shape, np.float32)
    widen_scaled(values, single, dtype)
    np.multiply(single, scale(dtype), out=out)
    if dtype.name == "bfloat16" or all_finite(values, dtype):
        return
    form, wrong = FORMATS[dtype.name], non_finite(values, dtype)
    infinite = wrong & ((values & _magnitude(values)) == form.largest + 1) & form.infinite
    out[wrong] = math.nan
    out[infinite] = np.where(values[infinite] < 0, -math.inf, math.inf)


def wide(values: Array, dtype: DType) -> Array:
    """Return elements as float64."""
    made = np.empty(values.shape, np.float64)
    widen(values, made, dtype)
    return made


def narrow(values: Array, out: Array, dtype: DType) -> None:
    """Round float32 numbers to a dtype, once: to the nearest, ties to even.

    What is too large becomes infinite, or NaN where there is no infinity.
    """
    if dtype.name == "float32":
        np.copyto(out, values)
    elif dtype.name == "float16":
        np.copyto(out.view(np.float16), values, casting="same_kind")
    elif dtype.name == "bfloat16":
        _narrow_bfloat16(values.view(np.uint32), out.view(np.uint16))
    else:
        _narrow_float8(values.view(np.uint32), out.view(np.uint8), FORMATS[dtype.name])


def _narrow_bfloat16(single: Array, out: Array) -> None:
    """Cut the lower half off, after adding what carries where it is more than half."""
    made = single >> 16
    made &= 1
    made += 0x7FFF
    made += single
    made >>= 16
    np.copyto(out, made, casting="unsafe")
    size = single & (_SIGN - 1)
    if size.max(initial=0) > _INFINITY:
        out[size > _INFINITY] = 0x7FC0


def _narrow_float8(single: Array, out: Array, form: Format) -> None:
    shift = _FRACTION - form.fraction
    size = single & (_SIGN - 1)
    made = size - ((_BIAS - form.bias) << _FRACTION)
    made += ((made >> shift) & 1) + ((1 << (shift - 1)) - 1)
    made >>= shift
    # The sum with a power of two of which the last bit is the format's least number.
    least = np.float32(math.ldexp(1.0, 1 - form.bias - form.fraction + _FRACTION))
    tiny = (size.view(np.float32) + least).view(np.uint32) - least.view(np.uint32)
    made = np.where(size < (1 - form.bias + _BIAS) << _FRACTION, tiny, made)
    no_number = 0x80 if form.unsigned_zero else 0x7F
    made[made > form.largest] = form.largest + 1 if form.infinite else no_number
    made[size > _INFINITY] = no_number
    signed = (single >> 31) << 7
    made |= np.where(made == 0, 0, signed) if form.unsigned_zero else signed
    np.copyto(out, made, casting="unsafe")


def fill(out: Array, value: float, dtype: DType) -> None:
    """Make all elements the same number, which the dtype has."""
    if is_small(dtype):
        one = np.empty(1, out.dtype)
        narrow(np.array([value], np.float32), one, dtype)
        out[...] = one[0]
    else:
        out[...] = value


def all_finite(values: Array, dtype: DType) -> bool:
    """Tell whether all elements are finite, by their bits."""
    if not values.size:
        return True
    form, signed = FORMATS[dtype.name], bits(values)
    if form.unsigned_zero:
        return bool(signed.min() != _least(values))
    unsigned = values.view(_UNSIGNED[values.itemsize])
    most = form.largest | 1 << 8 * values.itemsize - 1
    return bool(signed.max() <= form.largest) and bool(unsigned.max() <= most)


def non_finite(values: Array, dtype: DType) -> Array:
    """Return which elements are NaN or infinite."""
    form, signed = FORMATS[dtype.name], bits(values)
    wrong: Array = (signed & _magnitude(values)) > form.largest
    return wrong if not form.unsigned_zero else np.equal(signed, _least(values))


def negative_zeros(values: Array) -> Array | None:
    """Return which elements have no bit set but the sign; None if none of them."""
    signed, least = bits(values), _least(values)
    return np.equal(signed, least) if signed.min() == least else None


def negative_zero(dtype: DType) -> int:
    """Return the bits of -0, as a signed integer; of +0 where the dtype has no other."""
    return 0 if FORMATS[dtype.name].unsigned_zero else -(1 << 8 * dtype.itemsize - 1)


def _magnitude(values: Array) -> Any:
    """Return all bits but the sign."""
    signed = _SIGNED[values.itemsize]
    return signed.type((1 << 8 * values.itemsize - 1) - 1)


def _least(values: Array) -> int:
    """Return the least signed integer: the sign bit alone."""
    return -(1 << 8 * values.itemsize - 1)
