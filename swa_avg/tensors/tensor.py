"""Descriptions of the tensors in a checkpoint: dtypes, shapes and byte ranges, but no data.

A checkpoint of any format is a directory of named byte ranges. The classes in this
module are the entries of that directory. This module opens no files and does not import
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from swa_avg.storage import InputFile


class Kind(Enum):
    """The arithmetic that a dtype allows."""

    FLOAT = "float"
    COMPLEX = "complex"
    EXACT = "exact"  # integers and bool: their mean has no meaning
    OPAQUE = "opaque"  # bits, packed and scale formats: no arithmetic


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: The name in torch, without `torch.`.
        itemsize: Bytes per element.
        kind: The arithmetic that it allows.
        safetensors: The name in safetensors, or None if it has none.
        significand: Bits of the significand with the implicit bit; for a complex dtype,
            of each part; 0 for other dtypes.
    """

    name: str
    itemsize: int
    kind: Kind
    safetensors: str | None = None
    significand: int = 0

    def __str__(self) -> str:
        return self.name


DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float64", 8, Kind.FLOAT, "F64", 53),
        DType("float32", 4, Kind.FLOAT, "F32", 24),
        DType("float16", 2, Kind.FLOAT, "F16", 11),
        DType("bfloat16", 2, Kind.FLOAT, "BF16", 8),
        DType("float8_e4m3fn", 1, Kind.FLOAT, "F8_E4M3", 4),
        DType("float8_e4m3fnuz", 1, Kind.FLOAT, "F8_E4M3FNUZ", 4),
        DType("float8_e5m2", 1, Kind.FLOAT, "F8_E5M2", 3),
        DType("float8_e5m2fnuz", 1, Kind.FLOAT, "F8_E5M2FNUZ", 3),
        DType("complex128", 16, Kind.COMPLEX, None, 53),
        DType("complex64", 8, Kind.COMPLEX, "C64", 24),
        DType("complex32", 4, Kind.COMPLEX, None, 11),
        DType("int64", 8, Kind.EXACT, "I64"),
        DType("uint64", 8, Kind.EXACT, "U64"),
        DType("int32", 4, Kind.EXACT, "I32"),
        DType("uint32", 4, Kind.EXACT, "U32"),
        DType("int16", 2, Kind.EXACT, "I16"),
        DType("uint16", 2, Kind.EXACT, "U16"),
        DType("int8", 1, Kind.EXACT, "I8"),
        DType("uint8", 1, Kind.EXACT, "U8"),
        DType("bool", 1, Kind.EXACT, "BOOL"),
        DType("float8_e8m0fnu", 1, Kind.OPAQUE, "F8_E8M0"),
        DType("float4_e2m1fn_x2", 1, Kind.OPAQUE),
        DType("bits8", 1, Kind.OPAQUE),
        DType("bits16", 2, Kind.OPAQUE),
    )
}

SAFETENSORS_DTYPES: Mapping[str, DType] = {
    dtype.safetensors: dtype for dtype in DTYPES.values() if dtype.safetensors
}


class Record(NamedTuple):
    """A byte range of a file that holds one storage.

    Attributes:
        file: The open file.
        offset: The first byte, counted from the start of the file.
        length: The number of bytes.
        crc32: The CRC-32 of the whole range as the format records it, or None.
    """

    file: InputFile
    offset: int
    length: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that has not been read: its element type and its layout.

    Attributes:
        dtype: The element type.
        shape: The sizes.
        stride: The stride of each dimension, in elements.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of its elements in bytes, without gaps."""
        return self.numel * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """The number of elements that it spans in the storage, gaps included."""
        return extent(self.shape, self.stride)

    @property
    def contiguous(self) -> bool:
        """Whether its elements are stored one after the other in C order."""
        return is_contiguous(self.shape, self.stride)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A storage as a header describes it, independent of the file.

    Two instances are never equal, so that storages of two headers cannot be confused.

    Attributes:
        name: The name in the header.
        numel: The number of elements.
        nbytes: The size in bytes.
    """

    name: str
    numel: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class View(Tensor):
    """A tensor as a header describes it. Files with equal headers share the object.

    Attributes:
        stored: The storage of its elements.
        offset: The first element, counted in elements from the start of the storage.
    """

    stored: Stored
    offset: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef(Tensor):
    """A tensor in a file, with the place of its elements.

    Attributes:
        record: The byte range of its storage; with several parts, that of the first part.
        offset: The first element, counted in elements from the start of the storage.
        parts: The boxes of a tensor that is stored in several places. They cover it
            completely and do not overlap.
    """

    record: Record
    offset: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def records(self) -> tuple[Record, ...]:
        """The byte ranges of all its storages."""
        return tuple(part.ref.record for part in self.parts) if self.parts else (self.record,)


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor that is stored separately, as each of several ranks writes it.

    Attributes:
        start: The box's first index in the tensor, for each dimension.
        ref: The stored tensor, with the box's shape.
    """

    start: tuple[int, ...]
    ref: TensorRef


def contiguous_stride(shape: Iterable[int]) -> tuple[int, ...]:
    """Return the strides of a C-contiguous tensor of `shape`, equal to torch's."""
    stride: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether elements are in C order; strides of dimensions of size 1 do not count."""
    if 0 in shape:
        return True
    step = 1
    for size, distance in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if distance != step:
                return False
            step *= size
    return True


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements a strided view spans, gaps included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def memory_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dimensions from the outermost to the innermost in memory."""
    return tuple(sorted(range(len(shape)), key=lambda dim: (-stride[dim], shape[dim] == 1, dim)))


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether a view covers every element of its extent exactly once."""
    order = memory_order(shape, stride)
    return is_contiguous(tuple(shape[d] for d in order), tuple(stride[d] for d in order))


def same_bytes(refs: Sequence[TensorRef], crcs: Mapping[Record, int] | None = None) -> bool | None:
    """Return whether tensors have the same bytes by their checksums; None without checksums.

    Args:
        refs: The tensors.
        crcs: The CRC-32 of records that were read, for files that record none.
    """
    found = crcs or {}
    known = [
        found.get(ref.record) if ref.record.crc32 is None else ref.record.crc32
        for ref in refs
        if _is_record(ref)
    ]
    if len(known) < len(refs) or None in known or len({ref.dtype for ref in refs}) > 1:
        return None
    return len(set(known)) == 1


def _is_record(ref: TensorRef) -> bool:
    """Return whether a tensor is its whole record, in C order."""
    return not ref.parts and ref.contiguous and ref.nbytes == ref.record.length
