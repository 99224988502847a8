"""Elements of every dtype in numpy arrays, and conversion to numbers and back.

numpy has no bfloat16 and no float8. These dtypes, and float16, are stored as signed integers
with the same bits. Each of these formats is like float32 with fewer bits of exponent and
fraction: shifted left, its bits are those of a float32 that is too small by a power of two.
Every function is exact, or rounds once to nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from swa_avg.tensors import FORMATS, DType, Format, Kind, real_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_SIGNED: Mapping[int, np.dtype[Any]] = {n: np.dtype(f"i{n}") for n in (1, 2, 4, 8)}
_UNSIGNED: Mapping[int, np.dtype[Any]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
_WIDE: Mapping[str, np.dtype[Any]] = {f"float{8 * n}": np.dtype(f"f{n}") for n in (4, 8)}
_FRACTION, _BIAS = 23, 127  # float32's bits of fraction, and bias of the exponent
_SIGN = 1 << 31
_INFINITY = 0x7F800000


def carrier(dtype: DType) -> np.dtype[Any]:
    """Return the numpy dtype that stores a dtype: itself for float32 and float64, else integers.

    A complex number is stored as two elements, its real and imaginary parts.
    """
    one = real_dtype(dtype)
    return _WIDE.get(one.name) or _SIGNED[one.itemsize]


def bits(values: Array) -> Array:
    """Return the bits of elements as signed integers, in the same memory."""
    return values.view(_SIGNED[values.itemsize])


def is_small(dtype: DType) -> bool:
    """Return whether a dtype is real and numpy has no arithmetic for it, or only a slow one."""
    return dtype.kind is Kind.FLOAT and dtype.name not in _WIDE


def scale(dtype: DType) -> float:
    """Return the factor between a number of this dtype and the result of `widen_scaled`."""
    return math.ldexp(1.0, _BIAS - FORMATS[dtype.name].bias) if is_small(dtype) else 1.0


def widen_scaled(values: Array, out: Array, dtype: DType) -> None:
    """Write the numbers of a small dtype into a float32 array, divided by `scale`.

    Sums of the results have the same significands as sums of the numbers. Except for
    bfloat16, the bits of NaN and infinity are converted as if they were numbers.
    """
    form, shifted = FORMATS[dtype.name], out.view(np.int32)
    np.left_shift(values, _FRACTION - form.fraction, out=shifted, dtype=np.int32)
    if form.bias != _BIAS:
        exponent = 8 * dtype.itemsize - 1 - form.fraction
        mask = _SIGN | (((1 << exponent) - 1) << _FRACTION) | ((1 << _FRACTION) - 1)
        np.bitwise_and(shifted, np.int32(mask - (1 << 32)), out=shifted)


def widen(values: Array, out: Array, dtype: DType) -> None:
    """Write elements exactly into a float64 array, or into a float32 one that can hold them."""
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
    numbers = np.empty(values.shape, np.float64)
    widen(values, numbers, dtype)
    return numbers


def narrow(values: Array, out: Array, dtype: DType) -> None:
    """Round float32 numbers to a dtype once, to nearest, ties to even.

    Numbers that are too large become infinity, or NaN if the dtype has no infinity.
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
    """Add half of the last bit that stays, then cut off the lower 16 bits."""
    rounded = single >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += single
    rounded >>= 16
    np.copyto(out, rounded, casting="unsafe")
    size = single & (_SIGN - 1)
    if size.max(initial=0) > _INFINITY:
        out[size > _INFINITY] = 0x7FC0


def _narrow_float8(single: Array, out: Array, form: Format) -> None:
    shift = _FRACTION - form.fraction
    size = single & (_SIGN - 1)
    rounded = size - ((_BIAS - form.bias) << _FRACTION)
    rounded += ((rounded >> shift) & 1) + ((1 << (shift - 1)) - 1)
    rounded >>= shift
    # Subnormal results: adding a power of two whose last bit is the format's smallest number
    # rounds to a multiple of that number.
    least = np.float32(math.ldexp(1.0, 1 - form.bias - form.fraction + _FRACTION))
    tiny = (size.view(np.float32) + least).view(np.uint32) - least.view(np.uint32)
    rounded = np.where(size < (1 - form.bias + _BIAS) << _FRACTION, tiny, rounded)
    nan = 0x80 if form.unsigned_zero else 0x7F
    rounded[rounded > form.largest] = form.largest + 1 if form.infinite else nan
    rounded[size > _INFINITY] = nan
    signed = (single >> 31) << 7
    rounded |= np.where(rounded == 0, 0, signed) if form.unsigned_zero else signed
    np.copyto(out, rounded, casting="unsafe")


def fill(out: Array, value: float, dtype: DType) -> None:
    """Set all elements to one number, which the dtype can represent."""
    if is_small(dtype):
        one = np.empty(1, out.dtype)
        narrow(np.array([value], np.float32), one, dtype)
        out[...] = one[0]
    else:
        out[...] = value


def all_finite(values: Array, dtype: DType) -> bool:
    """Return whether all elements are finite, by their bits."""
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
    """Return which elements have only the sign bit set, or None if there are none."""
    signed, least = bits(values), _least(values)
    return np.equal(signed, least) if signed.min() == least else None


def negative_zero(dtype: DType) -> int:
    """Return the bits of -0 as a signed integer, or those of +0 if the dtype has no -0."""
    return 0 if FORMATS[dtype.name].unsigned_zero else -(1 << 8 * dtype.itemsize - 1)


def _magnitude(values: Array) -> Any:
    """Return the mask of all bits except the sign."""
    signed = _SIGNED[values.itemsize]
    return signed.type((1 << 8 * values.itemsize - 1) - 1)


def _least(values: Array) -> int:
    """Return the smallest signed integer: only the sign bit is set."""
    return -(1 << 8 * values.itemsize - 1)
