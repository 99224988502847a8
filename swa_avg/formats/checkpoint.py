"""The types that all formats share: an opened checkpoint, parsed headers, a state_dict to write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from swa_avg.pickles import Budget
from swa_avg.storage import InputFile
from swa_avg.tensors import DType, Record, Stored, TensorRef, View

_T = TypeVar("_T")
_MOST_HEADER_BYTES = 16 << 20
# The name of the provenance of an average: of a zip record, a file, or a metadata key.
PROVENANCE = "swa_avg.json"
MOST_PROVENANCE_BYTES = 64 << 20


class Components(dict[str, object]):
    """The tree of a folder of several models: the content of each component by its path."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint of which only the headers have been read.

    Attributes:
        path: The path that the user gave.
        format: The name of the format, for display.
        tree: The saved object: containers and plain values, with a `View` or a `TensorRef`
            for each tensor. Checkpoints with equal headers may share one tree.
        files: The open files of the checkpoint.
        metadata: The metadata of a safetensors file.
        notes: Notes for the user about the files.
        beside: The content of a file beside the tensors (`trainer_state.json`), if any.
        without: For a bundle, the patterns of the files that an output leaves out, such as
            optimizer state; None for any other checkpoint.
        provenance: The provenance text of an average that swa-avg wrote; otherwise empty.
        provenance_record: The record that holds the provenance, if it has its own record.
        records: The record of each storage that a view in `tree` refers to.
        budget: Counts and limits what is built from the headers.
    """

    path: Path
    format: str
    tree: object
    files: tuple[InputFile, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: object = None
    without: tuple[str, ...] | None = None
    provenance: str = ""
    provenance_record: Record | None = None
    records: Mapping[Stored, Record] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)

    @property
    def is_bundle(self) -> bool:
        """Whether an output of the same kind is a copy of this checkpoint with other weights."""
        return self.without is not None

    def located(self, tensor: View | TensorRef) -> TensorRef:
        """Return a tensor of `tree` with its location.

        Raises:
            KeyError: The tensor is not of this checkpoint.
        """
        if isinstance(tensor, TensorRef):
            return tensor
        record = self.records[tensor.stored]
        return TensorRef(tensor.dtype, tensor.shape, tensor.stride, record, tensor.offset)

    def records_of(self, tensor: View | TensorRef) -> tuple[Record, ...]:
        """Return the records of all storages that a tensor of `tree` uses."""
        if isinstance(tensor, TensorRef):
            return tensor.records
        return (self.records[tensor.stored],)

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()


class Headers:
    """A cache of headers that were parsed before.

    The headers of checkpoints of one run are mostly the same, often to the byte. The cache is
    keyed by all bytes of a header, and its values do not refer to a file. One object serves
    one run, and is dropped when the files of the run are open.

    Attributes:
        forms: Parsed directories of zip archives, by size.
    """

    def __init__(self) -> None:
        self.forms: dict[int, Any] = {}
        self._read: dict[tuple[Callable[[bytes, Budget], Any], bytes], Any] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def once(self, read: Callable[[bytes, Budget], _T], data: bytes, budget: Budget) -> _T:
        """Return `read(data, budget)`, which depends only on the bytes.

        For equal bytes the result is the same object and the budget is not charged again.
        """
        if (read, data) in self._read:
            made: _T = self._read[read, data]
            return made
        made = read(data, budget)
        with self._lock:
            self._read[read, data] = made
            self._kept += len(data)
            while self._kept > _MOST_HEADER_BYTES and len(self._read) > 1:
                oldest = next(iter(self._read))
                del self._read[oldest]
                self._kept -= len(oldest[1])
        return made


@dataclass(frozen=True, slots=True)
class Splice:
    """A replacement of a range of bytes in a file by other bytes, possibly of another length.

    Attributes:
        start: The first byte of the range.
        length: The length of the range; 0 for an insertion.
        data: The new bytes.
    """

    start: int
    length: int
    data: bytes


@dataclass(frozen=True, slots=True)
class OutputStorage:
    """A storage of the output: elements that one or several tensors share."""

    dtype: DType
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: its storage by number, and its offset and strides in elements.

    Attributes:
        parts: The boxes of a tensor that is written to several storages, each with its first
            index in the tensor; `storage` is then that of the first box.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], OutputTensor], ...] = ()


@dataclass(frozen=True)
class OutputStateDict:
    """A state_dict to write.

    Attributes:
        storages: The storages, in the order of the file.
        items: The entries in order: tensors and plain Python values.
        metadata: The `_metadata` (module paths to versions) that torch attaches to a
            state_dict, or None.
        text: The metadata of a safetensors file.
        provenance: The provenance text in ASCII, as far as it is known before the tensors
            are computed. The final text has the same length. Empty for no provenance.
    """

    storages: tuple[OutputStorage, ...]
    items: Mapping[str, OutputTensor | object]
    metadata: Mapping[str, object] | None = None
    text: Mapping[str, str] = field(default_factory=dict)
    provenance: str = ""

    @property
    def tensors(self) -> dict[str, OutputTensor]:
        """Its tensors by name."""
        return {name: item for name, item in self.items.items() if isinstance(item, OutputTensor)}


class Layout(Protocol):
    """The layout of an output: the place of every byte is known before the first is written."""

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file of a folder; empty for a single file."""

    @property
    def places(self) -> Sequence[int]:
        """The position of the first byte of each storage, in the order of the storages."""

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the storages, with their positions.

        Args:
            checksums: The CRC-32 of each storage.
            provenance: The final provenance text, of the length used for the layout.
        """
