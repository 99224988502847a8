"""What all formats have in common: a checkpoint that was opened, a state_dict to be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from swa_avg.pickles import Budget
from swa_avg.storage import InputFile
from swa_avg.tensors import DType, Record, Stored, TensorRef, View

# The name under which an average says how it was made: a record, a file, a key of metadata.
PROVENANCE = "swa_avg.json"
MOST_PROVENANCE_BYTES = 64 << 20


class Components(dict[str, object]):
    """The tree of a folder of several models: each component's path, and what it holds."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which only the headers have been read.

    Attributes:
        path: As the user named it.
        format: The name of its format, for people.
        tree: What was saved: containers and plain values, with a `View` for each tensor, or a
            `TensorRef`. Checkpoints whose headers are equal may have it in common.
        files: The files it is made of, open.
        metadata: Text that a safetensors file carries about itself.
        notes: What a user should know about the file itself.
        beside: What stands in files beside the tensors (`trainer_state.json`), if anything.
        provenance: What an average of ours says of how it was made; else empty.
        provenance_record: The record that says it, where that is one of its own.
        records: Where the storages are that the views in `tree` look at.
        budget: What its headers have made, and what may still be made of them.
    """

    path: Path
    format: str
    tree: object
    files: tuple[InputFile, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: object = None
    provenance: str = ""
    provenance_record: Record | None = None
    records: Mapping[Stored, Record] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)

    def located(self, tensor: View | TensorRef) -> TensorRef:
        """Return where a tensor of `tree` is.

        Raises:
            KeyError: It is none of this checkpoint.
        """
        if isinstance(tensor, TensorRef):
            return tensor
        record = self.records[tensor.stored]
        return TensorRef(tensor.dtype, tensor.shape, tensor.stride, record, tensor.offset)

    def records_of(self, tensor: View | TensorRef) -> tuple[Record, ...]:
        """Return all storages that a tensor of `tree` looks at."""
        if isinstance(tensor, TensorRef):
            return tensor.records
        return (self.records[tensor.stored],)

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()


@dataclass(frozen=True, slots=True)
class Splice:
    """A stretch of a file that gives way to other bytes, as many or not.

    Attributes:
        start: Its first byte.
        length: How many bytes go; none where something is put in between.
        data: What comes instead.
    """

    start: int
    length: int
    data: bytes


@dataclass(frozen=True, slots=True)
class OutputStorage:
    """A stretch of elements in the output that one or several tensors look at."""

    dtype: DType
    numel: int

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the output: which storage, and how it looks at it, in elements."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class OutputStateDict:
    """A state_dict to be written.

    Attributes:
        storages: Its storages, in the order of the file.
        items: Its entries in order: tensors, and plain Python values.
        metadata: Its `_metadata` (module paths to versions), which torch keeps
            beside a state_dict, or None.
        text: The metadata of a safetensors file.
        provenance: How it was made, in ASCII, as far as that is known before its tensors
            are; what is known then has the same length. Empty where nothing is said.
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
    """An output in which every byte has its place before the first is written."""

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file of a folder; none for a single file."""

    @property
    def places(self) -> Sequence[int]:
        """Where each storage's first byte goes, in the order of the storages."""

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes that are no storage's, with their places.

        Args:
            checksums: The CRC-32 of each storage.
            provenance: How the output was made, as long as what it was laid out with.
        """
