"""Tensors in files: dtype, shape, stride and byte range.

In: files. Out: references to tensors, boxes of their elements, and checksums of their
bytes. Does not depend on file formats.
"""

from swa_avg.tensors.checksums import Ledger, Piece, combined, verify, with_gaps
from swa_avg.tensors.cutting import cut
from swa_avg.tensors.floats import FORMATS, Format, real_dtype, value_of
from swa_avg.tensors.handmade import COUNTERS, Group, by_hand
from swa_avg.tensors.optimizers import in_groups, is_optimizer, optimizer_groups
from swa_avg.tensors.strided import (
    Box,
    boxes,
    elements,
    permuted,
    read_box,
    read_numbers,
    read_tensor,
    whole,
)
from swa_avg.tensors.tensor import (
    DTYPES,
    SAFETENSORS_DTYPES,
    DType,
    Kind,
    Part,
    Record,
    Stored,
    Tensor,
    TensorRef,
    View,
    contiguous_stride,
    is_dense,
    memory_order,
    same_bytes,
)

__all__ = [
    "COUNTERS",
    "DTYPES",
    "FORMATS",
    "SAFETENSORS_DTYPES",
    "Box",
    "DType",
    "Format",
    "Group",
    "Kind",
    "Ledger",
    "Part",
    "Piece",
    "Record",
    "Stored",
    "Tensor",
    "TensorRef",
    "View",
    "boxes",
    "by_hand",
    "combined",
    "contiguous_stride",
    "cut",
    "elements",
    "in_groups",
    "is_dense",
    "is_optimizer",
    "memory_order",
    "optimizer_groups",
    "permuted",
    "read_box",
    "read_numbers",
    "read_tensor",
    "real_dtype",
    "same_bytes",
    "value_of",
    "verify",
    "whole",
    "with_gaps",
]
