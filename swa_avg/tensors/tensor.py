"""What a tensor in a checkpoint is: names, dtypes, shapes and places; no data.

A checkpoint, whatever its format, is a directory of named byte ranges. The
classes here are that directory. Nothing here opens a file or imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from swa_avg.storage import InputFile


class Kind(Enum):
    """What can be done with the elements of a dtype."""

    FLOAT = "float"
    COMPLEX = "complex"
    EXACT = "exact"  # integers and bool: a mean of them means nothing
    OPAQUE = "opaque"  # bits, packed and scale formats: no arithmetic at all


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: Its name in torch, without the `torch.`.
        itemsize: Bytes per element.
        kind: What can be done with its elements.
        safetensors: Its name in safetensors, None where it has none.
        significand: Bits of a float's significand, the implicit one included;
            for complex, of each part; 0 for the rest.
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
    """A stretch of bytes in a file: what a storage is on disk.

    Attributes:
        file: The file, open.
        offset: Its first byte, counted from the start of the file.
        length: How many bytes.
        crc32: The checksum that the format records for all of it, or None.
    """

    file: InputFile
    offset: int
    length: int
    crc32: int | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that has not been read: what its elements are, and how they lie.

    Attributes:
        dtype: Its element type.
        shape: Its sizes.
        stride: Elements between neighbours, for each dimension.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take, each counted once."""
        return self.numel * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """How many elements of the storage lie between its first and its last."""
        return extent(self.shape, self.stride)

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one after the other in C order."""
        return is_contiguous(self.shape, self.stride)


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A storage as a header speaks of it, whichever file it is in.

    Two are never equal, of whatever name: so none is taken for that of another header.

    Attributes:
        name: Its name there.
        numel: Its elements.
        nbytes: Its size in bytes.
    """

    name: str
    numel: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class View(Tensor):
    """A tensor as a header speaks of it. Files with equal headers have it in common.

    Attributes:
        stored: The storage that it looks at.
        offset: Its first element, counted in elements from the storage's start.
    """

    stored: Stored
    offset: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef(Tensor):
    """A tensor in a file: where its elements are.

    Attributes:
        record: The storage that it looks at; of several parts the first one's.
        offset: Its first element, counted in elements from the storage's start.
        parts: The boxes that it is made of, where they are stored apart; without
            holes and overlaps.
    """

    record: Record
    offset: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def records(self) -> tuple[Record, ...]:
        """All storages that it looks at."""
        return tuple(part.ref.record for part in self.parts) if self.parts else (self.record,)


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor that is stored by itself, as one rank of several writes it.

    Attributes:
        start: Where in the tensor it begins, for each dimension.
        ref: What is stored, of the box's shape.
    """

    start: tuple[int, ...]
    ref: TensorRef


def contiguous_stride(shape: Iterable[int]) -> tuple[int, ...]:
    """Return the strides of a C-contiguous tensor of `shape`, as torch gives them."""
    stride: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether elements lie in C order; sizes of 0 and 1 need no stride."""
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
    """Tell whether a view fills its extent, each place once, in some order of its dimensions."""
    order = memory_order(shape, stride)
    return is_contiguous(tuple(shape[d] for d in order), tuple(stride[d] for d in order))


def same_bytes(refs: Sequence[TensorRef]) -> bool | None:
    """Tell whether tensors hold the same bytes, or None if checksums in headers do not tell."""
    known = [ref.record.crc32 for ref in refs if _is_record(ref)]
    if len(known) < len(refs) or None in known or len({ref.dtype for ref in refs}) > 1:
        return None
    return len(set(known)) == 1


def _is_record(ref: TensorRef) -> bool:
    """Tell whether a tensor is all of its record, in C order."""
    return not ref.parts and ref.contiguous and ref.nbytes == ref.record.length
