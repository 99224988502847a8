"""The writer of `torch.distributed.checkpoint` folders, as one rank would have written them.

One file holds the tensors one behind the other, each as `torch.save` writes a
tensor; `.metadata` says what is where. The classes in it are torch's own, taken
from torch, so that the loader of the torch at hand knows them.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from swa_avg.formats import torch_zip
from swa_avg.formats.checkpoint import PROVENANCE, OutputStateDict
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
    metadata = pickle.dumps(_metadata(state_dict, items, where))
    return DcpLayout(items, metadata, state_dict.provenance.encode())


def _starts(items: Sequence[ZipLayout]) -> list[int]:
    """Return where each item begins in its file."""
    return [0, *accumulate(item.size for item in items)][: len(items)]


def _metadata(state_dict: OutputStateDict, items: Sequence[ZipLayout], where: str) -> Any:
    """Return what torch's own planner would have noted of the tensors."""
    import torch
    from torch.distributed.checkpoint import metadata as of
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    parents = tuple(where.split(".")) if where else ()
    starts = _starts(items)
    tensors: dict[str, of.TensorStorageMetadata | of.BytesStorageMetadata] = {}
    paths, places = {}, {}
    for name, tensor in state_dict.tensors.items():
        key = ".".join((*parents, name))
        size = torch.Size(tensor.shape)
        zeros = torch.Size([0] * len(size))
        dtype = getattr(torch, state_dict.storages[tensor.storage].dtype.name)
        tensors[key] = of.TensorStorageMetadata(
            properties=of.TensorProperties(dtype=dtype),
            size=size,
            chunks=[of.ChunkStorageMetadata(offsets=zeros, sizes=size)],
        )
        paths[key] = (*parents, name)
        item = items[tensor.storage]
        places[of.MetadataIndex(key, zeros)] = _StorageInfo(
            _DATA, starts[tensor.storage], item.size
        )
    return of.Metadata(state_dict_metadata=tensors, planner_data=paths, storage_data=places)
