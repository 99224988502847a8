"""Boxes of a tensor as tensors of their own, on the same bytes.

Checkpoints of one run may store a tensor in different parts, because they were written by
different numbers of ranks. Cut into the same boxes, they can be averaged box by box. This
module reads nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from swa_avg.tensors.strided import Box
from swa_avg.tensors.tensor import Part, TensorRef, contiguous_stride


def cut(ref: TensorRef, boxes: Sequence[Box]) -> list[TensorRef]:
    """Return boxes of a tensor as tensors of their own, on the same bytes.

    A box that lies in one of the tensor's parts is not in parts itself.

    Args:
        ref: The tensor, whole or in parts.
        boxes: The boxes; each has at least one element, or is the whole tensor.
    """
    if not ref.parts:
        return [_narrowed(ref, box) for box in boxes]
    same = {Box(part.start, part.ref.shape): part.ref for part in ref.parts}
    near = _Near(ref.parts)
    return [same.get(box) or _collected(ref, box, near.parts(box)) for box in boxes]


def _narrowed(ref: TensorRef, box: Box) -> TensorRef:
    """Return a box of a tensor that is not in parts."""
    skipped = sum(at * step for at, step in zip(box.start, ref.stride, strict=True))
    return TensorRef(ref.dtype, box.shape, ref.stride, ref.record, ref.offset + skipped)


def _collected(ref: TensorRef, box: Box, parts: Sequence[Part]) -> TensorRef:
    """Return a box of a tensor, put together from the parts that it touches."""
    found = list(_overlaps(box, parts))
    if len(found) == 1:
        return found[0].ref
    stride = contiguous_stride(box.shape)
    return TensorRef(ref.dtype, box.shape, stride, found[0].ref.record, 0, tuple(found))


def _overlaps(box: Box, parts: Sequence[Part]) -> Iterator[Part]:
    """Yield the intersection of a box with each part, and its place in the box."""
    for part in parts:
        ends = zip(part.start, part.ref.shape, box.start, box.shape, strict=True)
        spans = [(max(a, b), min(a + size, b + wanted)) for a, size, b, wanted in ends]
        if all(first < end for first, end in spans):
            inside = tuple(first - at for (first, _), at in zip(spans, part.start, strict=True))
            start = tuple(first - at for (first, _), at in zip(spans, box.start, strict=True))
            shape = tuple(end - first for first, end in spans)
            yield Part(start, _narrowed(part.ref, Box(inside, shape)))


class _Near:
    """Finds the parts near a box without comparing it with each.

    Args:
        parts: The parts of a tensor with at least one dimension.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        dims = range(len(parts[0].start))
        self._dim = max(dims, key=lambda dim: len({part.start[dim] for part in parts}))
        self._parts = sorted(parts, key=lambda part: part.start[self._dim])
        self._starts = [part.start[self._dim] for part in self._parts]
        self._longest = max(part.ref.shape[self._dim] for part in parts)

    def parts(self, box: Box) -> Sequence[Part]:
        """Return all parts that a box touches, and perhaps others."""
        start, size = box.start[self._dim], box.shape[self._dim]
        first = bisect_left(self._starts, start - self._longest + 1)
        return self._parts[first : bisect_left(self._starts, start + size)]
