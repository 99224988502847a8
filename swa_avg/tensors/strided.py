"""Reading a tensor in an order that differs from its order on disk.

The checkpoints of one average may store a tensor with different strides (transposed,
channels_last, a slice of a larger tensor), or in parts written by several ranks. The
elements are rearranged box by box, so a tensor is never in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swa_avg.tensors.floats import FORMATS, real_dtype, value_of
from swa_avg.tensors.tensor import (
    Kind,
    Part,
    Record,
    TensorRef,
    contiguous_stride,
    extent,
    is_contiguous,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Called with a record, the first byte in it, and the bytes that were read, if all were used.
Seen = Callable[[Record, int, memoryview | None], None]

# A strided box is read in one piece unless that reads more than this many times its bytes.
_MOST_WASTE = 4
_MOVED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: the start and the size in each dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def boxes(shape: Sequence[int], most: int) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `most` elements, in C order.

    Each box is a contiguous range of the elements in C order. The boxes follow each other
    without gaps.
    """
    cut = len(shape)
    while cut > 0 and math.prod(shape[cut - 1 :]) <= most:
        cut -= 1
    if cut == 0:
        yield Box((0,) * len(shape), tuple(shape))
        return
    dim = cut - 1
    step = max(1, most // math.prod(shape[cut:]))
    inner = tuple(shape[cut:])
    for outer in _indices(shape[:dim]):
        for at in range(0, shape[dim], step):
            size = min(step, shape[dim] - at)
            yield Box((*outer, at, *(0 for _ in inner)), (*(1 for _ in outer), size, *inner))


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)


def read_box(ref: TensorRef, box: Box, out: Array, seen: Seen | None = None) -> int:
    """Read a box of a tensor into an array of the box's shape.

    Args:
        ref: The tensor on disk, with any strides, whole or in parts.
        box: The elements to read.
        out: The destination, with the box's shape and the item size of `ref`.
        seen: Is called with the record and the start of every range that was read, and with its
            bytes if all of them were used.

    Returns:
        The number of bytes read from the file.
    """
    if ref.parts:
        return sum(_read_part(one, box, out, seen) for one in ref.parts)
    span = extent(box.shape, ref.stride)
    itemsize = ref.dtype.itemsize
    place = ref.offset + sum(at * step for at, step in zip(box.start, ref.stride, strict=True))
    if span > _MOST_WASTE * box.numel and not is_contiguous(box.shape, ref.stride):
        if seen is not None:
            seen(ref.record, place * itemsize, None)
        return _read_sparse(ref, box, out)
    direct = out.flags.c_contiguous and is_contiguous(box.shape, ref.stride)
    own = bytearray() if direct else bytearray(span * itemsize)
    buffer = out.reshape(-1).view("u1").data if direct else memoryview(own)
    ref.record.file.read_into(buffer, ref.record.offset + place * itemsize)
    if seen is not None:
        seen(ref.record, place * itemsize, buffer if span == box.numel else None)
    if not direct:
        import numpy as np

        steps = [itemsize * step for step in ref.stride]
        out[...] = np.ndarray(box.shape, out.dtype, buffer, strides=steps)
    return len(buffer)


def _read_part(part: Part, box: Box, out: Array, seen: Seen | None) -> int:
    """Read the intersection of a part and a box of the whole tensor."""
    inside, shape = [], []
    for dim, (at, start, wanted) in enumerate(zip(part.start, box.start, box.shape, strict=True)):
        first, end = max(at, start), min(at + part.ref.shape[dim], start + wanted)
        if first >= end:
            return 0
        inside.append(first - at)
        shape.append(end - first)
        if end - first < wanted:
            out = _narrowed(out, dim, first - start, end - first)
    return read_box(part.ref, Box(tuple(inside), tuple(shape)), out, seen)


def _narrowed(values: Array, dim: int, start: int, size: int) -> Array:
    """Return a slice of an array along one dimension."""
    cut = (*(slice(None),) * dim, slice(start, start + size))
    narrowed: Array = values[cut]
    return narrowed


def _read_sparse(ref: TensorRef, box: Box, out: Array) -> int:
    """Read a box with large gaps index by index, along the dimension of the largest stride."""
    dim = max((d for d in range(len(box.shape)) if box.shape[d] > 1), key=lambda d: ref.stride[d])
    read = 0
    for index in range(box.shape[dim]):
        start = (*box.start[:dim], box.start[dim] + index, *box.start[dim + 1 :])
        part = Box(start, (*box.shape[:dim], 1, *box.shape[dim + 1 :]))
        read += read_box(ref, part, _narrowed(out, dim, index, 1))
    return read


def elements(buffer: bytearray | memoryview, shape: Sequence[int], itemsize: int) -> Array:
    """Return memory as an array of elements of a size, for moving and not for arithmetic."""
    import numpy as np

    values: Array = np.frombuffer(buffer, _MOVED[itemsize]).reshape(shape)
    return values


def read_bytes(ref: TensorRef) -> bytearray:
    """Return all bytes of a tensor, in C order."""
    buffer = bytearray(ref.nbytes)
    if whole(ref):
        place = ref.record.offset + ref.offset * ref.dtype.itemsize
        ref.record.file.read_into(memoryview(buffer), place)
    elif buffer:
        box = Box((0,) * len(ref.shape), ref.shape)
        read_box(ref, box, elements(buffer, ref.shape, ref.dtype.itemsize))
    return buffer


def read_numbers(ref: TensorRef) -> list[int] | list[float]:
    """Return all elements of a small numeric tensor, in C order.

    A complex number becomes two numbers.
    """
    data, name, size = read_bytes(ref), ref.dtype.name, real_dtype(ref.dtype).itemsize
    places = range(0, len(data), size)
    if ref.dtype.kind is Kind.EXACT:
        signed = name.startswith("int")
        return [int.from_bytes(data[n : n + size], "little", signed=signed) for n in places]
    form = FORMATS[real_dtype(ref.dtype).name]
    return [value_of(int.from_bytes(data[n : n + size], "little"), form) for n in places]


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """Return the whole tensor, contiguous and in its own dtype."""
    import torch

    dtype = getattr(torch, ref.dtype.name)
    buffer = read_bytes(ref)
    if not buffer:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(ref.shape)


def permuted(ref: TensorRef, order: Sequence[int], shape: Sequence[int]) -> TensorRef:
    """Return the tensor with its dimensions in another order."""
    stride = tuple(ref.stride[dim] for dim in order) if order else ref.stride
    parts = tuple(
        Part(
            tuple(part.start[dim] for dim in order),
            permuted(part.ref, order, [part.ref.shape[dim] for dim in order]),
        )
        for part in ref.parts
    )
    return TensorRef(ref.dtype, tuple(shape), stride, ref.record, ref.offset, parts)


def whole(ref: TensorRef) -> bool:
    """Return whether a tensor is stored in C order, so that ranges of it can be read."""
    return not ref.parts and (ref.contiguous or ref.stride == contiguous_stride(ref.shape))
