"""The writer of `torch.distributed.checkpoint` folders, in the form that one rank writes.

One file holds all tensors in sequence, each in the format of `torch.save` for one tensor;
`.metadata` holds the location of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from swa_avg.formats import torch_zip
from swa_avg.formats.checkpoint import PROVENANCE, OutputStateDict
from swa_avg.formats.dcp_metadata import Entry, dump
from swa_avg.formats.torch_zip import ZipLayout

_DATA = "__0_0.distcp"
_METADATA = ".metadata"


@dataclass(frozen=True)
class DcpLayout:
    """The layout of a folder; positions count through its files as if they were one file.

    Attributes:
        items: The torch zip of each storage.
        metadata: The bytes of `.metadata`.
        provenance: The provenance text used for the layout, as bytes; empty for none.
    """

    items: tuple[ZipLayout, ...]
    metadata: bytes
    provenance: bytes

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file."""
        sizes = {_DATA: sum(item.size for item in self.items), _METADATA: len(self.metadata)}
        return sizes | ({PROVENANCE: len(self.provenance)} if self.provenance else {})

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(self.files.values())

    @property
    def places(self) -> Sequence[int]:
        """The position of the first byte of each storage."""
        starts = _starts(self.items)
        return [at + item.places[0] for at, item in zip(starts, self.items, strict=True)]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the storages, with their positions."""
        starts = _starts(self.items)
        for at, item, checksum in zip(starts, self.items, checksums, strict=True):
            for place, data in item.headers([checksum]):
                yield at + place, data
        after = sum(item.size for item in self.items)
        yield after, self.metadata
        if self.provenance:
            yield after + len(self.metadata), provenance.encode()


def layout(state_dict: OutputStateDict, where: str) -> DcpLayout:
    """Lay out a folder.

    Args:
        state_dict: The state_dict to write. Its tensors are contiguous, and a storage is
            shared only by several names of one tensor.
        where: The dotted path of the state_dict in the nested dict that is given to `load`.
    """
    shapes = {tensor.storage: tensor.shape for tensor in state_dict.tensors.values()}
    items = tuple(
        torch_zip.layout_tensor(storage, shapes[number])
        for number, storage in enumerate(state_dict.storages)
    )
    metadata = dump(_entries(state_dict, items, where), _DATA)
    return DcpLayout(items, metadata, state_dict.provenance.encode())


def _starts(items: Sequence[ZipLayout]) -> list[int]:
    """Return the position of each item in its file."""
    return [0, *accumulate(item.size for item in items)][: len(items)]


def _entries(
    state_dict: OutputStateDict, items: Sequence[ZipLayout], where: str
) -> Iterator[Entry]:
    """Yield each tensor with the range of the file that holds it."""
    parents = tuple(where.split(".")) if where else ()
    starts = _starts(items)
    for name, tensor in state_dict.tensors.items():
        dtype, size = state_dict.storages[tensor.storage].dtype.name, items[tensor.storage].size
        yield Entry((*parents, name), dtype, tensor.shape, starts[tensor.storage], size)
