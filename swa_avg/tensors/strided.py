"""Reading a tensor in another order than the one in which it lies on disk.

Inputs of one average may hold the same tensor with other strides: transposed,
channels_last, a slice of something larger; or in parts that several ranks wrote.
Their elements are brought into the order of the output box by box, so that no
tensor of full size is ever built.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swa_avg.tensors.tensor import Part, Record, TensorRef, contiguous_stride, extent, is_contiguous

if TYPE_CHECKING:
    import torch

# Of which record, from which byte of it, what.
Seen = Callable[[Record, int, memoryview], None]

# A strided box is read in one piece if that reads no more than this many times its bytes.
_MOST_WASTE = 4


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


def read_box(ref: TensorRef, box: Box, out: torch.Tensor, seen: Seen | None = None) -> int:
    """Read a box of a tensor into a tensor of the box's shape.

    Args:
        ref: The tensor on disk, of any strides, whole or in parts.
        box: What is wanted of it.
        out: Where it goes: of the box's shape and of `ref`'s dtype.
        seen: Told of every stretch that was read in which no byte is left out.

    Returns:
        How many bytes were read from the file.
    """
    if ref.parts:
        return sum(_read_part(part, box, out, seen) for part in ref.parts)
    span = extent(box.shape, ref.stride)
    itemsize = ref.dtype.itemsize
    if span > _MOST_WASTE * box.numel and not is_contiguous(box.shape, ref.stride):
        return _read_thinly(ref, box, out)
    import torch

    place = ref.offset + sum(at * step for at, step in zip(box.start, ref.stride, strict=True))
    direct = out.is_contiguous() and is_contiguous(box.shape, ref.stride)
    buffer = _memory(out) if direct else memoryview(bytearray(span * itemsize))
    ref.record.file.read_into(buffer, ref.record.offset + place * itemsize)
    if seen is not None and span == box.numel:
        seen(ref.record, place * itemsize, buffer)
    if not direct:
        flat = torch.frombuffer(buffer, dtype=out.dtype)
        out.copy_(flat.as_strided(box.shape, ref.stride))
    return len(buffer)


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor; without numpy, torch itself has no way to them."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _read_part(part: Part, box: Box, out: torch.Tensor, seen: Seen | None) -> int:
    """Read what a part has of a box of the whole tensor."""
    inside, shape = [], []
    for dim, (at, start, wanted) in enumerate(zip(part.start, box.start, box.shape, strict=True)):
        first, end = max(at, start), min(at + part.ref.shape[dim], start + wanted)
        if first >= end:
            return 0
        inside.append(first - at)
        shape.append(end - first)
        if end - first < wanted:
            out = out.narrow(dim, first - start, end - first)
    return read_box(part.ref, Box(tuple(inside), tuple(shape)), out, seen)


def _read_thinly(ref: TensorRef, box: Box, out: torch.Tensor) -> int:
    """Read a box that is thinly spread, index by index along its widest dimension."""
    dim = max((d for d in range(len(box.shape)) if box.shape[d] > 1), key=lambda d: ref.stride[d])
    read = 0
    for index in range(box.shape[dim]):
        start = (*box.start[:dim], box.start[dim] + index, *box.start[dim + 1 :])
        part = Box(start, (*box.shape[:dim], 1, *box.shape[dim + 1 :]))
        read += read_box(ref, part, out.narrow(dim, index, 1))
    return read


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """Return a tensor, read whole and contiguous, in its own dtype."""
    import torch

    dtype = getattr(torch, ref.dtype.name)
    if not ref.numel:
        return torch.empty(ref.shape, dtype=dtype)
    buffer = bytearray(ref.nbytes)
    out = torch.frombuffer(buffer, dtype=dtype).view(ref.shape)
    read_box(ref, Box((0,) * len(ref.shape), ref.shape), out)
    return out


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
