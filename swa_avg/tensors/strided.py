"""Reading a tensor in another order than the one in which it lies on disk.

Inputs of one average may hold the same tensor with other strides: transposed,
channels_last, a slice of something larger; or in parts that several ranks wrote.
Their elements are brought into the order of the output box by box, so that no
tensor of full size is ever built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swa_avg.tensors.floats import FORMATS, part, value_of
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

# Of which record, from which byte of it, what.
Seen = Callable[[Record, int, memoryview], None]

# A strided box is read in one piece if that reads no more than this many times its bytes.
_MOST_WASTE = 4
_MOVED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: for each dimension where it starts and how far it goes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


def boxes(shape: Sequence[int], most: int) -> Iterator[Box]:
    """Cut a tensor into boxes of at most `most` elements, in C order.

    Each box is a stretch of the tensor's elements in C order, and they follow
    each other without a gap.
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
        ref: The tensor on disk, of any strides, whole or in parts.
        box: What is wanted of it.
        out: Where it goes: of the box's shape, with elements as long as `ref`'s.
        seen: Told of every stretch that was read in which no byte is left out.

    Returns:
        How many bytes were read from the file.
    """
    if ref.parts:
        return sum(_read_part(one, box, out, seen) for one in ref.parts)
    span = extent(box.shape, ref.stride)
    itemsize = ref.dtype.itemsize
    if span > _MOST_WASTE * box.numel and not is_contiguous(box.shape, ref.stride):
        return _read_thinly(ref, box, out)
    place = ref.offset + sum(at * step for at, step in zip(box.start, ref.stride, strict=True))
    direct = out.flags.c_contiguous and is_contiguous(box.shape, ref.stride)
    own = bytearray() if direct else bytearray(span * itemsize)
    buffer = out.reshape(-1).view("u1").data if direct else memoryview(own)
    ref.record.file.read_into(buffer, ref.record.offset + place * itemsize)
    if seen is not None and span == box.numel:
        seen(ref.record, place * itemsize, buffer)
    if not direct:
        import numpy as np

        steps = [itemsize * step for step in ref.stride]
        out[...] = np.ndarray(box.shape, out.dtype, buffer, strides=steps)
    return len(buffer)


def _read_part(part: Part, box: Box, out: Array, seen: Seen | None) -> int:
    """Read what a part has of a box of the whole tensor."""
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
    """Return a part of an array along one dimension."""
    cut = (*(slice(None),) * dim, slice(start, start + size))
    narrowed: Array = values[cut]
    return narrowed


def _read_thinly(ref: TensorRef, box: Box, out: Array) -> int:
    """Read a box that is thinly spread, index by index along its widest dimension."""
    dim = max((d for d in range(len(box.shape)) if box.shape[d] > 1), key=lambda d: ref.stride[d])
    read = 0
    for index in range(box.shape[dim]):
        start = (*box.start[:dim], box.start[dim] + index, *box.start[dim + 1 :])
        part = Box(start, (*box.shape[:dim], 1, *box.shape[dim + 1 :]))
        read += read_box(ref, part, _narrowed(out, dim, index, 1))
    return read


def elements(buffer: bytearray | memoryview, shape: Sequence[int], itemsize: int) -> Array:
    """Return memory as elements of any dtype of a size, to be moved and not computed with."""
    import numpy as np

    values: Array = np.frombuffer(buffer, _MOVED[itemsize]).reshape(shape)
    return values


def read_bytes(ref: TensorRef) -> bytearray:
    """Return the bytes of a tensor, read whole, in C order."""
    buffer = bytearray(ref.nbytes)
    if whole(ref):
        place = ref.record.offset + ref.offset * ref.dtype.itemsize
        ref.record.file.read_into(memoryview(buffer), place)
    elif buffer:
        box = Box((0,) * len(ref.shape), ref.shape)
        read_box(ref, box, elements(buffer, ref.shape, ref.dtype.itemsize))
    return buffer


def read_numbers(ref: TensorRef) -> list[int] | list[float]:
    """Return all elements of a small tensor that has numbers for elements, in C order.

    A complex number is two.
    """
    data, name, size = read_bytes(ref), ref.dtype.name, part(ref.dtype).itemsize
    places = range(0, len(data), size)
    if ref.dtype.kind is Kind.EXACT:
        signed = name.startswith("int")
        return [int.from_bytes(data[n : n + size], "little", signed=signed) for n in places]
    form = FORMATS[part(ref.dtype).name]
    return [value_of(int.from_bytes(data[n : n + size], "little"), form) for n in places]


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """Return a tensor, read whole and contiguous, in its own dtype."""
    import torch

    dtype = getattr(torch, ref.dtype.name)
    buffer = read_bytes(ref)
    if not buffer:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(ref.shape)


def permuted(ref: TensorRef, order: Sequence[int], shape: Sequence[int]) -> TensorRef:
    """Return a tensor with its dimensions in another order."""
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
    """Tell whether a tensor lies on disk in C order, so that ranges of it can be read."""
    return not ref.parts and (ref.contiguous or ref.stride == contiguous_stride(ref.shape))
