"""The writer of `torch.distributed.checkpoint` folders, as one rank would have written them.

One file holds the tensors one behind the other, each as `torch.save` writes a
tensor; `.metadata` says what is where.
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
    """A folder of files that lie, as far as places are concerned, one behind the other.

    Attributes:
        items: The torch zip of each storage.
        metadata: The bytes of `.metadata`.
        provenance: The bytes of the side file as laid out; none where nothing is said.
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
        """Where each storage's first byte goes."""
        starts = _starts(self.items)
        return [at + item.places[0] for at, item in zip(starts, self.items, strict=True)]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes that are no storage's, with their places."""
        starts = _starts(self.items)
        for at, item, checksum in zip(starts, self.items, checksums, strict=True):
            for place, data in item.headers([checksum]):
                yield at + place, data
        behind = sum(item.size for item in self.items)
        yield behind, self.metadata
        if self.provenance:
            yield behind + len(self.metadata), provenance.encode()


def layout(state_dict: OutputStateDict, where: str) -> DcpLayout:
    """Lay out a folder.

    Args:
        state_dict: What is written: contiguous tensors, each alone in its storage but
            for other names of the same.
        where: The dotted path at which it stands in what `load` fills.
    """
    shapes = {tensor.storage: tensor.shape for tensor in state_dict.tensors.values()}
    items = tuple(
        torch_zip.layout_tensor(storage, shapes[number])
        for number, storage in enumerate(state_dict.storages)
    )
    metadata = dump(_entries(state_dict, items, where), _DATA)
    return DcpLayout(items, metadata, state_dict.provenance.encode())


def _starts(items: Sequence[ZipLayout]) -> list[int]:
    """Return where each item begins in its file."""
    return [0, *accumulate(item.size for item in items)][: len(items)]


def _entries(
    state_dict: OutputStateDict, items: Sequence[ZipLayout], where: str
) -> Iterator[Entry]:
    """Yield each tensor with the stretch of the file that holds it."""
    parents = tuple(where.split(".")) if where else ()
    starts = _starts(items)
    for name, tensor in state_dict.tensors.items():
        dtype, size = state_dict.storages[tensor.storage].dtype.name, items[tensor.storage].size
        yield Entry((*parents, name), dtype, tensor.shape, starts[tensor.storage], size)
