"""What a tensor in a file is: its dtype, shape, stride and byte range.

In: files. Out: references to tensors, which read boxes of elements and check their
bytes. Knows nothing of file formats.
"""

from swa_avg.tensors.checksums import Ledger, Piece, combined, verify, with_gaps
from swa_avg.tensors.strided import Box, boxes, permuted, read_box, read_tensor, whole
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
)

__all__ = [
    "DTYPES",
    "SAFETENSORS_DTYPES",
    "Box",
    "DType",
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
    "combined",
    "contiguous_stride",
    "is_dense",
    "memory_order",
    "permuted",
    "read_box",
    "read_tensor",
    "verify",
    "whole",
    "with_gaps",
]
